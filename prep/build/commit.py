"""Finished shards → dataset: the last step, after which there is a dataset where there was none."""

import json
import stat
from collections.abc import Sequence
from pathlib import Path

from loader.errors import ShardsError
from loader.format import layout as fmt
from loader.format.index import INDEX_ROOM, INDEX_SHARE
from loader.format.index_text import dump_index, parse_index
from loader.format.layout import Index
from loader.format.sidecar import sidecars
from loader.system.safefile import describe_kind, sync_folder
from prep.build.staging import SHARD, SKIPPED, exists, need_file_or_nothing, stage
from prep.shard.shard import PART, Bad


def commit(folder: Path, index: Index, bad: Sequence[Bad]) -> None:
    """Turn finished shards into a dataset: those that have no name yet take theirs, then the index appears, by rename.

    What an earlier dataset left in the folder is removed first, its index before its shards: at no moment does an
    index stand beside shards that are not its own. Sidecars of another index go, too. A
    commit that was stopped can be done again.

    Raises:
        FormatError: readers would not take the index.
        ShardsError: a name that must be replaced is a folder's. The earlier dataset is untouched then.
        OSError: something cannot be written.
    """
    names = {shard.file for shard in index.shards}
    old = [path for path in folder.iterdir() if SHARD.fullmatch(path.name) or path.name == SKIPPED]
    for path in (folder / fmt.INDEX, *old):
        need_file_or_nothing(path)
    text, digest = _checked(folder / fmt.INDEX, index)
    old += [folder / name for name, of in sidecars(folder).items() if of != digest]
    staged = stage(folder / fmt.INDEX, text)
    if bad:
        entries = json.dumps([vars(entry) for entry in bad], indent=1, ensure_ascii=False) + "\n"
        skipped = stage(folder / SKIPPED, entries.encode())
    (folder / fmt.INDEX).unlink(missing_ok=True)
    sync_folder(folder)
    for path in old:
        if path.name not in names:
            path.unlink(missing_ok=True)
    if bad:
        skipped.rename(folder / SKIPPED)
    for name in names:
        if exists(part := folder / (name + PART)):
            if not stat.S_ISREG(mode := part.lstat().st_mode):
                raise ShardsError(f"{part}: expected a finished shard, got {describe_kind(mode)}")
            part.rename(folder / name)
    sync_folder(folder)
    staged.rename(folder / fmt.INDEX)
    sync_folder(folder)


def _checked(path: Path, index: Index) -> tuple[bytes, str]:
    """The text of an index that readers will take, and its digest."""
    text = dump_index(index)
    most = INDEX_ROOM + sum(shard.bytes for shard in index.shards) // INDEX_SHARE
    if len(text) > most:
        expected = f"an index of at most {most} bytes, as its shards are, which readers take"
        raise ShardsError(f"{path}: expected {expected}, got {len(text)}; shorter names of folders and files help")
    return text, parse_index(text, str(path)).sha256
