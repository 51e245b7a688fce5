"""What an unfinished build leaves in its folder, so that the same command can go on from there.

`build.json` holds the build's terms, `shard-00003.h5.json` the record of a finished shard: all that the index needs of
it, and how its source files looked. A record is written when its shard is on the disk, by rename. The shard itself
is still `shard-00003.h5.part` where an earlier dataset needs the name until the new one is complete.

None of it is trusted: a record counts only if it is this user's, says what the plan says, and the bytes of its shard
agree with it (prep.build.trust).
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from loader.errors import FormatError
from loader.format import layout as fmt
from loader.format.layout import Shard
from loader.system.safefile import open_member, read_member, read_own, sync_folder
from prep.build.records import dump_record, dump_terms, parse_record, parse_terms
from prep.build.staging import BUILD, LEFTOVER, RECORD, SHARD, exists, write_whole
from prep.build.terms import Terms
from prep.build.trust import has_digest, need_fit, need_unharmed
from prep.shard.shard import PART, ShardPlan, ShardRecord, stamps

ROOM = 1 << 20  # bytes that a file of the journal may have in any case,
ROOM_PER_IMAGE = 64 << 10  # and for each image beyond: names and reasons have a few thousand characters at most


@dataclass(frozen=True)
class Journal:
    """The records of a build in its folder, under its terms."""

    folder: Path
    terms: Terms

    @cached_property
    def build(self) -> str:
        """The name of the build in its records."""
        return self.terms.sha256

    def begin(self) -> None:
        """Write down the terms."""
        write_whole(self.folder / BUILD, dump_terms(self.terms))

    def keep(self, plan: ShardPlan, record: ShardRecord) -> None:
        """Record a finished shard, then give it its name, unless a dataset has a shard of that name."""
        write_whole(self.folder / (plan.file + RECORD), dump_record(record, self.build, plan.recipe.max_pixels))
        if record.shard and not exists(self.folder / fmt.INDEX):
            plan.part.rename(self.folder / plan.file)
            sync_folder(self.folder)

    def find(self, plan: ShardPlan) -> ShardRecord | None:
        """The record of a shard that is finished: of this build, unharmed, and of source files as they are now."""
        path = self.folder / (plan.file + RECORD)
        try:
            text = read_own(path, ROOM + ROOM_PER_IMAGE * len(plan.sources))
            build, max_pixels, record = parse_record(text, str(path))
            if build != self.build:
                return None
            limit = plan.recipe.max_pixels
            if max_pixels != limit and (record.bad or any(i.height * i.width > limit for i in record.images)):
                return None
            if record.stamps != [stamp for source in plan.sources for stamp in stamps(source)]:
                return None
            need_fit(record, plan)
            if record.shard:
                need_unharmed(plan.part if exists(plan.part) else self.folder / plan.file, record, plan)
        except (OSError, FormatError):
            return None
        return record


def read_terms(folder: Path, like: Terms) -> Terms | None:
    """The terms of the unfinished build in a folder; None where none was begun, or none can be read.

    Those that are far longer than `like`, the terms of this build, are not read.
    """
    path = folder / BUILD
    try:
        return parse_terms(read_member(path, ROOM + 8 * len(dump_terms(like))), str(path))
    except (OSError, FormatError):
        return None


def clean(folder: Path, finished: Collection[str] = ()) -> None:
    """Remove what a build left in a folder, but for finished shards and their records, and its terms.

    A dataset's own shards stay; where there is no index there are none.
    """
    keep = {BUILD, *(name + ending for name in finished for ending in ("", PART, RECORD))}
    if not exists(folder / fmt.INDEX):
        for path in [path for path in folder.iterdir() if SHARD.fullmatch(path.name) and path.name not in keep]:
            path.unlink()
    for path in leftovers(folder):
        if path.name not in keep:
            path.unlink()


def discard(folder: Path) -> None:
    """Remove an unfinished build; or what is left of one that ended, where there is an index."""
    if exists(folder / fmt.INDEX):
        (folder / BUILD).unlink(missing_ok=True)  # first: the dataset is complete, records or not
    clean(folder)
    (folder / BUILD).unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """The files in a folder that are there only as long as a build is unfinished."""
    return [path for path in folder.iterdir() if LEFTOVER.fullmatch(path.name)]


def holds(path: Path, shard: Shard) -> bool:
    """Whether a file has the length and SHA-256 of a shard."""
    try:
        return has_digest(open_member(path), shard)
    except OSError:
        return False
