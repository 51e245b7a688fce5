"""Records of shards → index → dataset: the last step, after which there is a dataset where there was none."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loader import format as fmt
from loader.format import HR, Index, Plane, ShardsError, Strings
from loader.index import dump_index
from loader.safefile import sync_folder
from prep.journal import SHARD, SKIPPED, stage
from prep.shard import PART, Bad, Recipe, ShardRecord
from prep.terms import MADE_BY, lr_origin


def make_index(recipe: Recipe, records: Sequence[ShardRecord]) -> Index:
    """The index of a dataset from the records of its shards, in order."""
    built = [record for record in records if record.shard]
    images = [image for record in built for image in record.images]
    if not images:
        raise ShardsError("expected at least one usable image, got none")
    planes = {}
    for scale in (HR, *recipe.scales):
        runs = [image.runs[scale] for image in images]
        named = [(run.source, run.source_sha256) for run in runs if run.source and run.source_sha256]
        planes[scale] = Plane(
            tile=fmt.plane_tile(recipe.tile, scale),
            offset=np.array([run.offset for run in runs], np.int64),
            crc32=np.array([run.crc32 for run in runs], np.int64),
            source=Strings([name for name, _ in named]) if named else None,
            source_sha256=Strings([digest for _, digest in named]) if named else None,
        )
    return Index(
        container=recipe.container,
        made_by=MADE_BY,
        lr=lr_origin(recipe),
        shards=tuple(record.shard for record in built if record.shard),
        name=Strings([image.name for image in images]),
        shard=np.repeat(np.arange(len(built)), [len(record.images) for record in built]),
        height=np.array([image.height for image in images], np.int64),
        width=np.array([image.width for image in images], np.int64),
        planes=planes,
    )


def commit(folder: Path, index: Index, bad: Sequence[Bad]) -> None:
    """Turn finished shards into a dataset: those that have no name yet take theirs, then the index appears, by rename.

    What an earlier dataset left in the folder is removed first, its index before its shards: at no moment does an
    index stand beside shards that are not its own. A commit that was stopped can be done again.
    """
    staged = stage(folder / fmt.INDEX, dump_index(index))
    if bad:
        text = json.dumps([vars(entry) for entry in bad], indent=1, ensure_ascii=False) + "\n"
        skipped = stage(folder / SKIPPED, text.encode())
    (folder / fmt.INDEX).unlink(missing_ok=True)
    sync_folder(folder)
    names = {shard.file for shard in index.shards}
    for path in folder.iterdir():
        if (SHARD.fullmatch(path.name) and path.name not in names) or path.name == SKIPPED:
            path.unlink()
    if bad:
        skipped.rename(folder / SKIPPED)
    for name in names:
        if (part := folder / (name + PART)).exists():
            part.rename(folder / name)
    sync_folder(folder)
    staged.rename(folder / fmt.INDEX)
    sync_folder(folder)
