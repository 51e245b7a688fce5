"""The workspace: the folder of a dataset, and the one owner of every file name in it.

An unfinished build leaves its manifest, and for each finished shard a record: everything the index needs, and stamps
of the source files. A record appears, by rename, once its shard is on the disk. The shard keeps its staged name as long
as an earlier dataset needs the final one. Nothing found in the folder is trusted: see prep.workspace.trust.
"""

import contextlib
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loader.errors import FormatError, ShardsError
from loader.format import layout as fmt
from loader.format.index import INDEX_ROOM, INDEX_SHARE
from loader.format.index_text import dump_index, parse_index
from loader.format.layout import Index
from loader.format.sidecar import sidecars
from loader.system.safefile import describe_kind, read_member, read_own, sync_folder, write_staged
from prep.plan.dataset import DatasetPlan, ShardPlan
from prep.plan.manifest import Manifest
from prep.shard.records import ShardRecord, SkippedImage, stamp_files
from prep.workspace.lock import LockMode, join_lock, locked
from prep.workspace.record_file import RecordFile, dump_record, parse_record
from prep.workspace.skipped import dump_skipped, read_skipped_list
from prep.workspace.state import Complete, Empty, Orphaned, Other, State, Unfinished
from prep.workspace.trust import check_record, check_shard_file, other_writers

PART = ".part"  # the ending of a staged file
RECORD = ".json"  # the ending of a record, after the shard's name
LIMIT = 1 << 20  # bytes allowed for a manifest or record,
LIMIT_PER_IMAGE = 64 << 10  # and for each image: names and reasons have a few thousand characters at most


@dataclass(frozen=True)
class Workspace:
    """The folder of a dataset, complete or being built."""

    folder: Path

    @property
    def index(self) -> Path:
        """The index; its existence makes the dataset complete."""
        return self.folder / fmt.INDEX

    @property
    def skipped(self) -> Path:
        """The list of images that the dataset lacks."""
        return self.folder / "skipped.json"

    @property
    def manifest(self) -> Path:
        """The manifest of an unfinished build."""
        return self.folder / "build.json"

    @property
    def lock(self) -> Path:
        """The lock file."""
        return self.folder / "build.lock"

    @property
    def repair(self) -> Path:
        """The folder in which `prep verify --repair` builds shards."""
        return self.folder / "repair.part"

    def shard(self, file: str) -> Path:
        """Return the path of a shard."""
        return self.folder / file

    def record(self, file: str) -> Path:
        """Return the path of the record of a shard."""
        return self.folder / (file + RECORD)

    def staged(self, file: str) -> Path:
        """Return the path under which a file is written before it is renamed to `file`."""
        return self.folder / (file + PART)

    @contextlib.contextmanager
    def created(self) -> Iterator[None]:
        """Create the folder if necessary; a new one that is still empty afterwards is removed."""
        new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            if new:
                with contextlib.suppress(OSError):
                    self.folder.rmdir()

    def locked(
        self, note: Callable[[str], None], mode: LockMode = LockMode.WHOLE
    ) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of the folder; see prep.workspace.lock."""
        return locked(self.lock, mode, note)

    def join_lock(self) -> None:
        """Join the lock of a build as one of its workers; see prep.workspace.lock."""
        join_lock(self.lock)

    def other_writers(self) -> str | None:
        """Return who else can replace files in the folder, as text; None if only this user can."""
        return other_writers(self.folder)

    def is_settled(self) -> bool:
        """Return True if the folder holds a dataset, no leftovers of a build, and no lock file."""
        return self.index.exists() and not self._leftovers() and not self.lock.exists()

    def state(self, manifest: Manifest) -> State:
        """Return what the folder holds, from the view of a build with this manifest."""
        try:
            found = self._read_manifest(manifest)
        except (OSError, FormatError):
            found = None
        if found == manifest:
            return Unfinished()
        if self.index.exists():
            return Complete(other_build=_exists(self.manifest))
        if _exists(self.manifest):
            return Other(found)
        if shards := [path.name for path in self._shards()]:
            return Orphaned(min(shards))
        return Empty()

    def begin(self, manifest: Manifest) -> None:
        """Write the manifest: from here on the folder holds an unfinished build."""
        self._write(self.manifest, manifest.dump())

    def keep(self, plan: DatasetPlan, shard: ShardPlan, record: ShardRecord) -> None:
        """Keep a finished shard: write its record, then rename it, unless a dataset may have a shard of that name."""
        file = RecordFile(build=plan.manifest.sha256, max_pixels=plan.recipe.max_pixels, record=record)
        self._write(self.record(shard.file), dump_record(file))
        if record.shard and not self.index.exists():
            self.staged(shard.file).rename(self.shard(shard.file))
            sync_folder(self.folder)

    def find(self, plan: DatasetPlan, shard: ShardPlan) -> ShardRecord | None:
        """Return the record of a finished shard of this plan; None unless shard and sources are as recorded."""
        path, limit = self.record(shard.file), plan.recipe.max_pixels
        try:
            file = parse_record(read_own(path, LIMIT + LIMIT_PER_IMAGE * len(shard.sources)), str(path))
            record = file.record
            if file.build != plan.manifest.sha256:
                return None
            if file.max_pixels != limit and (record.skipped or any(i.height * i.width > limit for i in record.images)):
                return None
            if record.stamps != [stamp for source in shard.sources for stamp in stamp_files(source)]:
                return None
            check_record(record, shard, plan.recipe)
            if record.shard:
                staged = self.staged(shard.file)
                check_shard_file(staged if _exists(staged) else self.shard(shard.file), record, plan.recipe)
        except (OSError, FormatError):
            return None
        return record

    def commit(self, index: Index, skipped: Sequence[SkippedImage]) -> None:
        """Turn finished shards into a dataset: shards still staged are renamed, then the index appears, by rename.

        The files of an earlier dataset are removed first, its index before its shards: an index never coexists with
        shards of another dataset. Sidecars of other indexes are removed, too. An interrupted commit can be repeated.

        Raises:
            FormatError: readers would refuse the index.
            ShardsError: a name to be replaced is a folder's; the earlier dataset is untouched.
            OSError: something cannot be written.
        """
        names = {shard.file for shard in index.shards}
        old = [*self._shards(), *([self.skipped] if _exists(self.skipped) else [])]
        for path in (self.index, *old):
            _check_not_folder(path)
        text, digest = _checked(self.index, index)
        old += [self.folder / name for name, owner in sidecars(self.folder).items() if owner != digest]
        staged_index = self._stage(self.index, text)
        staged_skipped = self._stage(self.skipped, dump_skipped(skipped)) if skipped else None
        self.index.unlink(missing_ok=True)
        sync_folder(self.folder)
        for path in old:
            if path.name not in names:
                path.unlink(missing_ok=True)
        if staged_skipped:
            staged_skipped.rename(self.skipped)
        for name in names:
            if _exists(staged := self.staged(name)):
                if not stat.S_ISREG(mode := staged.lstat().st_mode):
                    raise ShardsError(f"{staged}: expected a finished shard, got {describe_kind(mode)}")
                staged.rename(self.shard(name))
        sync_folder(self.folder)
        staged_index.rename(self.index)
        sync_folder(self.folder)
        self.abandon()

    def clean(self, finished: Collection[str] = ()) -> None:
        """Remove what a build left, except its manifest, and `finished` shards and their records.

        Without an index, all shards are leftovers of a build; with one, those under their final names belong to it.
        """
        kept = {self.manifest.name, *(name + ending for name in finished for ending in ("", PART, RECORD))}
        shards = [] if self.index.exists() else self._shards()
        for path in [*shards, *self._leftovers()]:
            if path.name not in kept:
                path.unlink()

    def abandon(self) -> None:
        """Remove an unfinished build, or what is left of it after its commit."""
        if self.index.exists():
            self.manifest.unlink(missing_ok=True)  # first: the dataset is complete whether or not records remain
        self.clean()
        self.manifest.unlink(missing_ok=True)

    def read_skipped(self) -> list[SkippedImage]:
        """Return the images that the dataset lacks.

        Raises:
            FormatError: the list is damaged, too long, or not a file.
        """
        return read_skipped_list(self.skipped)

    def describe_skipped(self) -> str:
        """Return an addition to a verdict on the dataset about the images it lacks; "" if there are none."""
        try:
            count = len(self.read_skipped())
        except FormatError as error:
            return f"; its list of skipped images cannot be read: {error}"
        return f"; {count} images were skipped when it was built, see {self.skipped.name}" if count else ""

    def _read_manifest(self, like: Manifest) -> Manifest:
        # A manifest far longer than this build's must be another build's, and is not read.
        return Manifest.parse(read_member(self.manifest, LIMIT + 8 * len(like.dump())), str(self.manifest))

    def _shards(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if fmt.shard_number(path.name) is not None]

    def _leftovers(self) -> list[Path]:
        """Return the files that exist only while a build is unfinished: its manifest, records and staged files."""
        files = {self.manifest, *(self.staged(path.name) for path in (self.manifest, self.skipped, self.index))}
        return [path for path in self.folder.iterdir() if path in files or _is_leftover_of_shard(path.name)]

    def _stage(self, path: Path, data: bytes) -> Path:
        """Write a file to the disk under its staged name; return that."""
        staged = self.staged(path.name)
        write_staged(staged, data)
        return staged

    def _write(self, path: Path, data: bytes) -> None:
        """Write a file so that it is never seen incomplete."""
        self._stage(path, data).rename(path)
        sync_folder(self.folder)


def _is_leftover_of_shard(name: str) -> bool:
    """Return whether this is the name of a staged shard, a record, or a staged record."""
    shard = name.removesuffix(PART).removesuffix(RECORD)
    return shard != name and fmt.shard_number(shard) is not None


def _exists(path: Path) -> bool:
    """Return whether anything has that name, be it a dangling link."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _check_not_folder(path: Path) -> None:
    if _exists(path) and stat.S_ISDIR(mode := path.lstat().st_mode):
        raise ShardsError(f"{path}: expected a file or nothing, got {describe_kind(mode)}")


def _checked(path: Path, index: Index) -> tuple[bytes, str]:
    """Return the content of an index file, provided that readers accept it, and its digest."""
    text = dump_index(index)
    most = INDEX_ROOM + sum(shard.bytes for shard in index.shards) // INDEX_SHARE
    if len(text) > most:
        expected = f"an index of at most {most} bytes, which readers accept for shards of that size"
        raise ShardsError(f"{path}: expected {expected}, got {len(text)}; use shorter names of folders and files")
    return text, parse_index(text, str(path)).sha256
