"""A complete dataset from which images were left out, opened again so that those are tried once more."""

from collections.abc import Sequence

import numpy as np

from loader.errors import ShardsError, one_line
from loader.format.layout import Index
from prep.build.journal import Journal
from prep.build.terms import MADE_BY, libraries
from prep.shard.shard import Bad, ImageRecord, Run, ShardPlan, ShardRecord, stamps


def reopen(journal: Journal, plans: Sequence[ShardPlan], index: Index, skipped: Sequence[Bad]) -> None:
    """Turn a complete dataset into an unfinished build that lacks the shards from which images were left out.

    The dataset stays as it is, and readable, until that build is complete; the other shards keep their files.

    Args:
        journal: of the build that made the dataset.
        plans: its shards, with all images.
        index: the dataset's.
        skipped: the images that were left out.

    Raises:
        ShardsError: another version of the program, or of its libraries, made the dataset.
        StorageError: the sources cannot be looked at.
    """
    ours, theirs = (MADE_BY, libraries(index.container)), (index.made_by, dict(index.libraries))
    if ours != theirs:
        expected, got = f"a dataset made by {_program(*ours)}, whose shards can be kept", f"one by {_program(*theirs)}"
        raise ShardsError(one_line(f"{journal.folder}: expected {expected}, got {got} (--overwrite builds it anew)"))
    bad = {entry.image for entry in skipped}
    numbers = {shard.file: number for number, shard in enumerate(index.shards)}
    whole = [plan for plan in plans if plan.file in numbers and bad.isdisjoint(s.image.stem for s in plan.sources)]
    records = [_record(index, numbers[plan.file], plan) for plan in whole]
    journal.begin()
    for plan, record in zip(whole, records, strict=True):
        if [image.name for image in record.images] == [source.image.stem for source in plan.sources]:
            journal.keep(plan, record)


def _program(made_by: str, versions: dict[str, str]) -> str:
    return f"{made_by} with {', '.join(f'{name} {version}' for name, version in versions.items())}"


def _record(index: Index, number: int, plan: ShardPlan) -> ShardRecord:
    """What the index says of a shard, as the build had recorded it."""
    images = []
    for image in np.flatnonzero(index.shard == number).tolist():
        runs = {}
        for scale, plane in index.planes.items():
            source = None if plane.source is None else plane.source[image]
            digest = None if plane.source_sha256 is None else plane.source_sha256[image]
            runs[scale] = Run(int(plane.offset[image]), int(plane.crc32[image]), source, digest)
        images.append(ImageRecord(index.name[image], int(index.height[image]), int(index.width[image]), runs))
    return ShardRecord(index.shards[number], images, [], [s for source in plan.sources for s in stamps(source)])
