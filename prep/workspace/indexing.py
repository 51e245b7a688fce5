"""Shard records → index."""

from collections.abc import Sequence

import numpy as np

from loader.errors import ShardsError
from loader.format.layout import HR, Index, Plane, Strings
from prep.plan.manifest import MADE_BY, libraries
from prep.plan.recipe import Recipe
from prep.shard.records import ShardRecord


def make_index(recipe: Recipe, records: Sequence[ShardRecord]) -> Index:
    """Return the index of a dataset with these shards, in order.

    Raises:
        ShardsError: they hold no image.
    """
    built = [record for record in records if record.shard]
    images = [image for record in built for image in record.images]
    if not images:
        raise ShardsError("expected at least one usable image, got none")
    planes = {}
    for level in (HR, *recipe.scales):
        runs = [image.runs[level] for image in images]
        named = [(run.source, run.source_sha256) for run in runs if run.source and run.source_sha256]
        planes[level] = Plane(
            tile=recipe.tiles[level],
            offset=np.array([run.offset for run in runs], np.int64),
            crc32=np.array([run.crc32 for run in runs], np.int64),
            source=Strings([name for name, _ in named]) if named else None,
            source_sha256=Strings([digest for _, digest in named]) if named else None,
        )
    return Index(
        container=recipe.container,
        made_by=MADE_BY,
        libraries=libraries(recipe.container),
        lr=recipe.lr,
        images_per_shard=recipe.images_per_shard,
        shards=tuple(record.shard for record in built if record.shard),
        name=Strings([image.name for image in images]),
        shard=np.repeat(np.arange(len(built)), [len(record.images) for record in built]),
        height=np.array([image.height for image in images], np.int64),
        width=np.array([image.width for image in images], np.int64),
        planes=planes,
    )
