"""What an unfinished build leaves in its folder, so that the same command can go on from there.

`build.json` holds the build's terms, `shard-00003.h5.json` the record of a finished shard: all that the index needs of
it, and how its source files looked. A record is written when its shard is on the disk, by rename. The shard itself
is still `shard-00003.h5.part` where an earlier dataset needs the name until the new one is complete.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loader import format as fmt
from loader.format import Shard
from loader.safefile import sync_folder, write_staged
from prep.shard import PART, Bad, ImageRecord, Run, ShardPlan, ShardRecord, stamps
from prep.terms import Terms

BUILD = "build.json"
SKIPPED = "skipped.json"
RECORD = ".json"  # the ending of a record
SHARD = re.compile(r"shard-\d{5,}\.(h5|raw)")
LEFTOVER = re.compile(rf"{SHARD.pattern}(\.json|\.part|\.json\.part)|build\.json|(build|skipped|index)\.json\.part")


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
        write_whole(self.folder / BUILD, _dump(vars(self.terms)))

    def keep(self, plan: ShardPlan, record: ShardRecord) -> None:
        """Record a finished shard, then give it its name, unless a dataset has a shard of that name."""
        facts = _facts(record) | {"build": self.build, "max_pixels": plan.recipe.max_pixels}
        write_whole(self.folder / (plan.file + RECORD), _dump(facts))
        if record.shard and not (self.folder / fmt.INDEX).exists():
            plan.part.rename(self.folder / plan.file)
            sync_folder(self.folder)

    def find(self, plan: ShardPlan) -> ShardRecord | None:
        """The record of a shard that is finished: of this build, unharmed, and of source files as they are now."""
        try:
            facts = _load(self.folder / (plan.file + RECORD))
            if facts["build"] != self.build:
                return None
            record, limit = _record(facts), plan.recipe.max_pixels
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if facts["max_pixels"] != limit and (record.bad or any(i.height * i.width > limit for i in record.images)):
            return None
        if record.stamps != [stamp for source in plan.sources for stamp in stamps(source)]:
            return None
        path = plan.part if plan.part.exists() else self.folder / plan.file
        return record if record.shard is None or holds(path, record.shard) else None


def read_terms(folder: Path) -> Terms | None:
    """The terms of the unfinished build in a folder; None where none was begun, or none can be read."""
    try:
        return Terms(**_load(folder / BUILD))
    except (OSError, ValueError, TypeError):
        return None


def read_skipped(folder: Path) -> list[Bad]:
    """The images that were left out of a dataset."""
    try:
        return [Bad(**entry) for entry in json.loads((folder / SKIPPED).read_bytes())]
    except (OSError, ValueError, TypeError):
        return []


def clean(folder: Path, finished: Collection[str] = ()) -> None:
    """Remove what a build left in a folder, but for finished shards and their records, and its terms.

    A dataset's own shards stay; where there is no index there are none.
    """
    keep = {BUILD, *(name + ending for name in finished for ending in ("", PART, RECORD))}
    if not (folder / fmt.INDEX).exists():
        for path in [path for path in folder.iterdir() if SHARD.fullmatch(path.name) and path.name not in keep]:
            path.unlink()
    for path in leftovers(folder):
        if path.name not in keep:
            path.unlink()


def discard(folder: Path) -> None:
    """Remove an unfinished build; or what is left of one that ended, where there is an index."""
    if (folder / fmt.INDEX).exists():
        (folder / BUILD).unlink(missing_ok=True)  # first: the dataset is complete, records or not
    clean(folder)
    (folder / BUILD).unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """The files in a folder that are there only as long as a build is unfinished."""
    return [path for path in folder.iterdir() if LEFTOVER.fullmatch(path.name)]


def holds(path: Path, shard: Shard) -> bool:
    """Whether a file has the length and SHA-256 of a shard."""
    try:
        with path.open("rb") as file:
            whole = os.fstat(file.fileno()).st_size == shard.bytes
            return whole and hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    except OSError:
        return False


def stage(path: Path, data: bytes) -> Path:
    """Write a file to the disk under its temporary name, which is returned."""
    part = path.with_name(path.name + PART)
    write_staged(part, data)
    return part


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that its name never stands for less than all of it."""
    stage(path, data).rename(path)
    sync_folder(path.parent)


def _facts(record: ShardRecord) -> dict[str, Any]:
    return {
        "shard": vars(record.shard) if record.shard else None,
        "images": [
            [image.name, image.height, image.width, [[scale, *vars(run).values()] for scale, run in image.runs.items()]]
            for image in record.images
        ],
        "bad": [vars(bad) for bad in record.bad],
        "stamps": record.stamps,
    }


def _record(facts: dict[str, Any]) -> ShardRecord:
    return ShardRecord(
        Shard(**facts["shard"]) if facts["shard"] else None,
        [
            ImageRecord(name, height, width, {scale: Run(*values) for scale, *values in runs})
            for name, height, width, runs in facts["images"]
        ],
        [Bad(**bad) for bad in facts["bad"]],
        [stamp and (stamp[0], stamp[1]) for stamp in facts["stamps"]],
    )


def _dump(facts: dict[str, Any]) -> bytes:
    """JSON in a line, and in another its digest."""
    body = json.dumps(facts, ensure_ascii=False).encode()
    return body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def _load(path: Path) -> dict[str, Any]:
    body, _, digest = path.read_bytes().rstrip(b"\n").rpartition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError(f"{path}: damaged")
    facts: dict[str, Any] = json.loads(body)
    return facts
