"""Reopening a complete dataset to retry the images it lacks."""

from collections.abc import Sequence

import numpy as np

from loader.errors import ShardsError, one_line
from loader.format.layout import Index
from prep.plan.dataset import DatasetPlan, ShardPlan
from prep.plan.manifest import MADE_BY, libraries
from prep.shard.records import ImageRecord, Run, ShardRecord, SkippedImage, stamp_files
from prep.workspace.workspace import Workspace


def reopen(plan: DatasetPlan, index: Index, skipped: Sequence[SkippedImage]) -> None:
    """Turn a complete dataset into an unfinished build that lacks the shards with skipped images.

    The dataset stays readable until that build is complete. All other shards keep their files.

    Args:
        plan: the plan of the dataset.
        index: its index.
        skipped: the images it lacks.

    Raises:
        ShardsError: another version of the program or its libraries made it.
        StorageError: the storage of the sources fails.
    """
    ours, theirs = (MADE_BY, libraries(index.container)), (index.made_by, dict(index.libraries))
    if ours != theirs:
        expected, got = f"a dataset made by {_program(*ours)}, whose shards can be kept", f"one by {_program(*theirs)}"
        raise ShardsError(one_line(f"{plan.folder}: expected {expected}, got {got} (--overwrite rebuilds it)"))
    workspace = Workspace(plan.folder)
    names = {image.image for image in skipped}
    numbers = {shard.file: number for number, shard in enumerate(index.shards)}
    kept = [s for s in plan.shards if s.file in numbers and names.isdisjoint(source.name for source in s.sources)]
    records = [_record(index, numbers[shard.file], shard) for shard in kept]
    workspace.begin(plan.manifest)
    for shard, record in zip(kept, records, strict=True):
        if [image.name for image in record.images] == [source.name for source in shard.sources]:
            workspace.keep(plan, shard, record)


def _program(made_by: str, versions: dict[str, str]) -> str:
    return f"{made_by} with {', '.join(f'{name} {version}' for name, version in versions.items())}"


def _record(index: Index, number: int, plan: ShardPlan) -> ShardRecord:
    """Return the record of a shard from the index."""
    return ShardRecord(
        shard=index.shards[number],
        images=[_image(index, image) for image in np.flatnonzero(index.shard == number).tolist()],
        skipped=[],
        stamps=[stamp for source in plan.sources for stamp in stamp_files(source)],
    )


def _image(index: Index, image: int) -> ImageRecord:
    return ImageRecord(
        name=index.name[image],
        height=int(index.height[image]),
        width=int(index.width[image]),
        runs={
            level: Run(
                offset=int(plane.offset[image]),
                crc32=int(plane.crc32[image]),
                source=None if plane.source is None else plane.source[image],
                source_sha256=None if plane.source_sha256 is None else plane.source_sha256[image],
            )
            for level, plane in index.planes.items()
        },
    )
