"""The record of a finished shard: everything the index needs of it, and what became of its other images."""

from dataclasses import dataclass

from loader.format.layout import Shard
from prep.images.faults import StorageError, explain
from prep.plan.dataset import ShardPlan, Source


@dataclass(frozen=True, kw_only=True)
class Run:
    """A tile run: its place in the shard, and its source file (None if made from HR)."""

    offset: int
    crc32: int
    source: str | None
    source_sha256: str | None


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """An image of a shard: HR height and width in pixels, tile runs by level."""

    name: str
    height: int
    width: int
    runs: dict[int, Run]


@dataclass(frozen=True, kw_only=True)
class SkippedImage:
    """An image that could not be used, the name of the file at fault (relative to its source), and the reason."""

    image: str
    source: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """Length and modification time (ns) of the source file of one plane; None if the file was not there."""

    image: str
    level: int
    bytes: int | None
    modified: int | None


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A shard as built (`shard` is None if no image was usable), its images in order, and its skipped images.

    `stamps` describes all source files as they were before being read.
    """

    shard: Shard | None
    images: list[ImageRecord]
    skipped: list[SkippedImage]
    stamps: list[Stamp]

    def covers(self, plan: ShardPlan) -> bool:
        """True if the record accounts for every image of `plan`."""
        return len(self.images) + len(self.skipped) == len(plan.sources)


def stamp_files(source: Source) -> list[Stamp]:
    """Return the stamps of an image's files as they are now.

    Raises:
        StorageError: the storage fails, so the files may well be unchanged.
    """
    stamps = []
    for level, file in source.files.items():
        size = modified = None
        try:
            found = file.path.stat()
            size, modified = found.st_size, found.st_mtime_ns
        except OSError as error:
            meaning = explain(error, file.path, file.folder)
            if isinstance(meaning, StorageError):
                raise meaning from None
        stamps.append(Stamp(image=source.name, level=level, bytes=size, modified=modified))
    return stamps
