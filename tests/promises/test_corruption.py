"""Random damage to any file of a dataset: `verify` finds all of it, and the loader raises its own errors.

The loader does not notice changed pixels: it returns them, and must not crash.
"""

import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from loader import FormatError, PatchDataset
from loader.ahead.reader import open_reader
from loader.format.layout import PAGE
from loader.pixels.shards import Shards
from prep.cli import main

FEW, MANY = 30, 400  # for each container


def flip_a_bit(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def swap_blocks(data: bytes, rng: random.Random) -> bytes:
    """Swap two different pages of the file."""
    blocks = [data[at : at + PAGE] for at in range(0, len(data), PAGE)]
    if len(set(blocks)) < 2:
        return flip_a_bit(data, rng)
    while True:
        a, b = rng.randrange(len(blocks)), rng.randrange(len(blocks))
        if blocks[a] != blocks[b]:
            blocks[a], blocks[b] = blocks[b], blocks[a]
            if (changed := b"".join(blocks)) != data:
                return changed


DAMAGES = (flip_a_bit, truncate, swap_blocks)


def is_found(folder: Path) -> bool:
    """Return whether `verify` finds damage without crashing; --quick must not crash either."""
    for arguments in (["--quick"], []):
        result = CliRunner().invoke(main, ["verify", str(folder), "--workers", "2", *arguments])
        assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code == 1


def read_everything(folder: Path) -> str:
    """Read all pixels; return "refused" if the loader raised its own error, "read" otherwise."""
    try:
        shards = Shards(folder)
        for image in range(len(shards.index.name)):
            for scale in shards.index.planes:
                shards.read(image, scale)
                shards.tiles(image, scale).sum()
        data = PatchDataset(folder, 2, 8, length=24)
        data.__getitems__(range(24))
        reader = open_reader(data.shards, 2, 8, io="pread")
        lr, hr = (np.empty((24, side, side, 3), np.uint8) for side in (8, 16))
        reader.ask(data.plan.crops(0, np.arange(24)))(lr, hr)
        reader.close()
    except FormatError as error:
        return "refused" if str(error).isprintable() else "refused in several lines"
    return "read"


def run(dataset: Path, copy: Path, count: int, seed: int) -> Counter[str]:
    """Damage one file at a time, `count` times, each file equally often; return the counts of outcomes."""
    shutil.copytree(dataset, copy)
    assert not is_found(copy)
    rng, outcomes = random.Random(seed), Counter[str]()
    files = sorted(copy.iterdir())
    assert len(files) > 3
    for n in range(count):
        path, damage = files[n % len(files)], DAMAGES[n // len(files) % len(DAMAGES)]
        data = path.read_bytes()
        changed = damage(data, rng)
        assert changed != data
        path.write_bytes(changed)
        outcomes[damage.__name__] += 1
        if is_found(copy):
            outcomes["found"] += 1
        else:
            print(f"not found: {path.name}, {damage.__name__}, number {n} of seed {seed}")
        outcomes[read_everything(copy)] += 1
        path.write_bytes(data)
    return outcomes


def test_random_damage_is_found(dataset: Path, tmp_path: Path) -> None:
    outcomes = run(dataset, tmp_path / "copy", FEW, seed=1)
    assert outcomes["found"] == FEW
    assert min(outcomes[damage.__name__] for damage in DAMAGES) >= FEW // 4
    assert outcomes["read"] + outcomes["refused"] == FEW
    assert outcomes["read"] > 0 < outcomes["refused"]


@pytest.mark.long
def test_much_random_damage_is_found(dataset: Path, tmp_path: Path) -> None:
    outcomes = run(dataset, tmp_path / "copy", MANY, seed=2)
    damages = ", ".join(f"{outcomes[damage.__name__]} × {damage.__name__}" for damage in DAMAGES)
    print(
        f"\n{dataset.name}: {outcomes['found']} of {MANY} found ({damages}); "
        f"loader: {outcomes['refused']} refused, {outcomes['read']} read to the end"
    )
    assert outcomes["found"] == MANY
    assert outcomes["read"] + outcomes["refused"] == MANY
