"""Where the images are: files in folders, found in the same order and under the same names on every machine."""

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
from prep.images.faults import NOWHERE, Place, explain, shown

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
NAMED = 5  # so many links are told by name
Note = Callable[[str], None]


@dataclass(frozen=True)
class ImageFile:
    """An image file, and its name relative to the source it was found in (with forward slashes, UTF-8).

    `place` is the folder that holds the file itself; None where that is not known.
    """

    path: Path
    name: str
    place: Place | None = field(default=None, compare=False, repr=False)

    @property
    def stem(self) -> str:
        """The file's name without its suffix: the image's name in a dataset."""
        return PurePosixPath(self.name).stem


@dataclass
class _Tree:
    """What a walk has found: image files (path, name in bytes, place), how many of them behind links, broken links."""

    files: list[tuple[Path, bytes, Place | None]] = field(default_factory=list)
    linked: int = 0
    broken: list[Path] = field(default_factory=list)


def find_images(sources: Sequence[Path], note: Note = lambda text: None) -> list[ImageFile]:
    """Return all image files in folders (and the folders within) and among files, sorted by stem.

    Hidden files, files with other suffixes, and pipes and the like are passed over in folders; a file named outright
    must be an image. Links are followed, each folder is walked once: real folders first, then links by name. Names are
    the bytes of the file system read as UTF-8, whatever the locale.

    Args:
        sources: folders and image files.
        note: is told of images reached through links, and of links that lead nowhere.

    Raises:
        ShardsError: a source does not exist, cannot be read, or holds no image; names are no UTF-8; or images share a
            stem (all such are listed).
    """
    found = [entry for source in sources for entry in _find(source, note)]
    files, strange = [], []
    for path, name, place in found:
        try:
            file = ImageFile(path, name.decode(), place)
        except UnicodeDecodeError:
            strange.append(shown(path))
            continue
        files.append(file)
        if not is_image_name(file.stem):
            strange.append(shown(path))
    if strange:
        raise ShardsError(listing("expected file names in UTF-8, got these, which are not or are too long", strange))
    by_stem: dict[str, list[ImageFile]] = defaultdict(list)
    for file in files:
        by_stem[same(file.stem)].append(file)
    doubles = [f"{stem}: {', '.join(map(_apart, twins))}" for stem, twins in sorted(by_stem.items()) if twins[1:]]
    if doubles:
        raise ShardsError(listing("expected each stem once, since it names the image, got more", doubles))
    return sorted(files, key=lambda file: file.stem)


def same(stem: str) -> str:
    """Return what stems that look the same have in common: their Unicode normal form C (macOS writes form D)."""
    return unicodedata.normalize("NFC", stem)


def listing(head: str, problems: Iterable[str]) -> str:
    """Return the text of an error with a line for each problem."""
    return "\n  ".join([f"{head}:", *map(one_line, problems)])


def is_folder(path: Path) -> bool:
    """Return whether a path leads to a folder; False where nothing is, an error where that cannot be told."""
    try:
        return S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if error.errno in NOWHERE:
            return False
        raise explain(error, path) from None


def _apart(file: ImageFile) -> str:
    """A path, with escapes where its stem is not in normal form C: it looks like another one."""
    return shown(file.path) if file.stem == same(file.stem) else ascii(shown(file.path))


def _find(source: Path, note: Note) -> Iterator[tuple[Path, bytes, Place | None]]:
    try:
        mode = source.stat().st_mode
    except OSError as error:
        got = "nothing there" if error.errno in NOWHERE else error.strerror
        raise ShardsError(
            one_line(f"{shown(source)}: expected a folder of images or an image file, got {got}")
        ) from None
    if S_ISREG(mode):
        if source.suffix.lower() not in SUFFIXES:
            expected = f"an image ({', '.join(SUFFIXES)}) or a folder"
            raise ShardsError(one_line(f"{shown(source)}: expected {expected}, got {source.suffix!r}"))
        yield source, os.fsencode(source.name), _home(source)
        return
    if not S_ISDIR(mode):
        got = describe_kind(mode)
        raise ShardsError(one_line(f"{shown(source)}: expected a folder of images or an image file, got {got}"))
    tree = _walk(source)
    if tree.broken:
        names = ", ".join([shown(path) for path in tree.broken[:NAMED]] + ["…"] * (len(tree.broken) > NAMED))
        note(one_line(f"{shown(source)}: {len(tree.broken)} links lead nowhere, and are passed over: {names}"))
    if not tree.files:
        raise ShardsError(
            one_line(f"{shown(source)}: expected images ({', '.join(SUFFIXES)}), got none in this folder")
        )
    if tree.linked:
        note(one_line(f"{shown(source)}: {tree.linked} of {len(tree.files)} images are reached through links"))
    yield from tree.files


def _walk(top: Path) -> _Tree:
    """The image files below a folder, through links too, yet each folder once, whatever order a folder is listed in."""
    tree = _Tree()
    seen: set[tuple[int, int]] = set()
    links = [Path()]  # the top; then, in rounds, the links to folders that the round before has met
    behind_link = False
    while links:
        met: list[Path] = []
        for link in sorted(links, key=os.fsencode):
            waiting = deque([link])
            while waiting:
                inner = waiting.popleft()
                try:
                    place = Place.of(top / inner)
                    if (place.device, place.inode) in seen:
                        continue
                    seen.add((place.device, place.inode))
                    entries = _visible(place.path)
                except OSError as error:
                    raise _unreadable(top / inner, error) from None
                for entry in entries:
                    is_link, kind = entry.is_symlink(), _kind(entry)
                    path = inner / entry.name
                    image = entry.name.lower().endswith(SUFFIXES)
                    if kind == "folder":
                        (met if is_link else waiting).append(path)
                    elif image and kind in ("file", "nowhere"):
                        home = _home(top / path) if is_link else place
                        tree.files.append((top / path, os.fsencode(path), home))
                        tree.linked += is_link or behind_link
                    elif kind == "nowhere":
                        tree.broken.append(top / path)
        links, behind_link = met, True
    return tree


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(
            (entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: os.fsencode(entry.name)
        )


def _kind(entry: os.DirEntry[str]) -> str:
    """Whether this is a folder, a file, a link that leads nowhere, or something other (a pipe, a device).

    What cannot be told is an error: it might be a folder, whose images would be missing without a word.
    """
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        if entry.is_symlink():
            Path(entry.path).stat()
    except OSError as error:
        if error.errno in NOWHERE:
            return "nowhere"
        raise _unreadable(Path(entry.path), error) from None
    return "other"


def _home(path: Path) -> Place | None:
    """The folder of the file that a path leads to in the end."""
    try:
        return Place.of(path.resolve(strict=True).parent)
    except (OSError, RuntimeError):  # it leads nowhere
        return None


def _unreadable(path: Path, error: OSError) -> ShardsError:
    return ShardsError(one_line(f"{shown(path)}: expected a readable folder, got {error.strerror}"))
