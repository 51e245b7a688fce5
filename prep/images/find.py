"""Finding image files in folders: in the same order and under the same names on every machine."""

import os
import unicodedata
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from stat import S_ISDIR, S_ISREG

from loader.errors import ShardsError, one_line
from loader.format.layout import is_image_name
from loader.system.safefile import describe_kind
from prep.images.faults import NOT_FOUND, SourceFolder, explain, shown

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAX_NAMED = 5  # broken links named in a note
Note = Callable[[str], None]


@dataclass(frozen=True)
class ImageFile:
    """An image file, and its name relative to its source (forward slashes, UTF-8).

    `folder` holds the file itself, links resolved; None if unknown.
    """

    path: Path
    name: str
    folder: SourceFolder | None = field(default=None, compare=False, repr=False)

    @property
    def stem(self) -> str:
        """The file's name without its suffix: the image's name in a dataset."""
        return PurePosixPath(self.name).stem


@dataclass
class _Found:
    """Results of a walk: image files (path, name in bytes, folder), how many are behind links, broken links."""

    files: list[tuple[Path, bytes, SourceFolder | None]] = field(default_factory=list)
    linked: int = 0
    broken: list[Path] = field(default_factory=list)


def find_images(sources: Sequence[Path], note: Note = lambda text: None) -> list[ImageFile]:
    """Return all image files among `sources` and in folders, recursively, sorted by stem.

    In folders, hidden files, files with other suffixes, and anything but regular files are ignored; a source that is a
    file must be an image. Links are followed, and each folder is walked once: real folders first, then links by name.
    Names are decoded as UTF-8, independent of the locale.

    Args:
        sources: folders and image files.
        note: called with messages about images reached through links, and about broken links.

    Raises:
        ShardsError: a source does not exist, cannot be read or holds no image; or names are not UTF-8 or images share
            a stem (all such files are listed).
    """
    found = [entry for source in sources for entry in _find(source, note)]
    files, bad_names = [], []
    for path, name, folder in found:
        try:
            file = ImageFile(path, name.decode(), folder)
        except UnicodeDecodeError:
            bad_names.append(shown(path))
            continue
        files.append(file)
        if not is_image_name(file.stem):
            bad_names.append(shown(path))
    if bad_names:
        raise ShardsError(listing("expected file names in UTF-8, got these (invalid or too long)", bad_names))
    by_stem: dict[str, list[ImageFile]] = defaultdict(list)
    for file in files:
        by_stem[normalized(file.stem)].append(file)
    duplicates = [
        f"{stem}: {', '.join(map(_distinct, twins))}" for stem, twins in sorted(by_stem.items()) if len(twins) > 1
    ]
    if duplicates:
        raise ShardsError(listing("expected each stem once, since it names the image, got duplicates", duplicates))
    return sorted(files, key=lambda file: file.stem)


def normalized(stem: str) -> str:
    """Return a stem in Unicode normal form C, in which names that look the same are equal (macOS writes form D)."""
    return unicodedata.normalize("NFC", stem)


def listing(head: str, problems: Iterable[str]) -> str:
    """Return an error text with a line for each problem."""
    return "\n  ".join([f"{head}:", *map(one_line, problems)])


def is_folder(path: Path) -> bool:
    """Return whether a path leads to a folder; False if nothing is there. StorageError if that cannot be determined."""
    try:
        return S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if error.errno in NOT_FOUND:
            return False
        raise explain(error, path) from None


def _distinct(file: ImageFile) -> str:
    """Return a path, escaped if its stem is not in normal form C, so that it does not look like another one."""
    return shown(file.path) if file.stem == normalized(file.stem) else ascii(shown(file.path))


def _find(source: Path, note: Note) -> Iterator[tuple[Path, bytes, SourceFolder | None]]:
    try:
        mode = source.stat().st_mode
    except OSError as error:
        got = "nothing" if error.errno in NOT_FOUND else error.strerror
        raise ShardsError(
            one_line(f"{shown(source)}: expected a folder of images or an image file, got {got}")
        ) from None
    if S_ISREG(mode):
        if source.suffix.lower() not in SUFFIXES:
            expected = f"an image ({', '.join(SUFFIXES)}) or a folder"
            raise ShardsError(one_line(f"{shown(source)}: expected {expected}, got {source.suffix!r}"))
        yield source, os.fsencode(source.name), _folder_of(source)
        return
    if not S_ISDIR(mode):
        got = describe_kind(mode)
        raise ShardsError(one_line(f"{shown(source)}: expected a folder of images or an image file, got {got}"))
    tree = _walk(source)
    if tree.broken:
        names = ", ".join(map(shown, tree.broken[:MAX_NAMED]))
        more = ", …" if len(tree.broken) > MAX_NAMED else ""
        note(one_line(f"{shown(source)}: {len(tree.broken)} broken links are ignored: {names}{more}"))
    if not tree.files:
        raise ShardsError(
            one_line(f"{shown(source)}: expected images ({', '.join(SUFFIXES)}), got none in this folder")
        )
    if tree.linked:
        note(one_line(f"{shown(source)}: {tree.linked} of {len(tree.files)} images were reached through links"))
    yield from tree.files


def _walk(top: Path) -> _Found:
    """Find the image files below a folder, also through links; each folder once, independent of its listing order."""
    tree = _Found()
    seen: set[tuple[int, int]] = set()
    links = [Path()]  # the top; then, round by round, the links to folders found in the previous round
    behind_link = False
    while links:
        found: list[Path] = []
        for link in sorted(links, key=os.fsencode):
            waiting = deque([link])
            while waiting:
                inner = waiting.popleft()
                try:
                    folder = SourceFolder.of(top / inner)
                    if (folder.device, folder.inode) in seen:
                        continue
                    seen.add((folder.device, folder.inode))
                    entries = _visible(folder.path)
                except OSError as error:
                    raise _unreadable(top / inner, error) from None
                for entry in entries:
                    is_link, kind = entry.is_symlink(), _kind(entry)
                    path = inner / entry.name
                    image = entry.name.lower().endswith(SUFFIXES)
                    if kind == "folder":
                        (found if is_link else waiting).append(path)
                    elif image and kind in ("file", "broken"):
                        home = _folder_of(top / path) if is_link else folder
                        tree.files.append((top / path, os.fsencode(path), home))
                        tree.linked += is_link or behind_link
                    elif kind == "broken":
                        tree.broken.append(top / path)
        links, behind_link = found, True
    return tree


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(
            (entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: os.fsencode(entry.name)
        )


def _kind(entry: os.DirEntry[str]) -> str:
    """Return "folder", "file", "broken" (a link) or "other" (a pipe, a device).

    If that cannot be determined it is an error: a folder's images must not go missing silently.
    """
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        if entry.is_symlink():
            Path(entry.path).stat()
    except OSError as error:
        if error.errno in NOT_FOUND:
            return "broken"
        raise _unreadable(Path(entry.path), error) from None
    return "other"


def _folder_of(path: Path) -> SourceFolder | None:
    """Return the folder of the file that a path resolves to."""
    try:
        return SourceFolder.of(path.resolve(strict=True).parent)
    except (OSError, RuntimeError):  # a broken link
        return None


def _unreadable(path: Path, error: OSError) -> ShardsError:
    return ShardsError(one_line(f"{shown(path)}: expected a readable folder, got {error.strerror}"))
