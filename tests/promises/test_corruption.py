"""Random damage to any file of a dataset: `verify` finds every piece of it, and the loader meets it with its own error.

What changes bytes and not lengths the loader cannot see when it opens: it then gives wrong pixels, and must not crash.
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


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def swap_blocks(data: bytes, rng: random.Random) -> bytes:
    """Two blocks of a page change places; blocks that are alike would change nothing."""
    blocks = [data[at : at + PAGE] for at in range(0, len(data), PAGE)]
    if len(set(blocks)) < 2:
        return flip_a_bit(data, rng)
    while True:
        a, b = rng.randrange(len(blocks)), rng.randrange(len(blocks))
        if blocks[a] != blocks[b]:
            blocks[a], blocks[b] = blocks[b], blocks[a]
            if (changed := b"".join(blocks)) != data:
                return changed


HARMS = (flip_a_bit, cut, swap_blocks)


def is_found(folder: Path) -> bool:
    """Whether `verify` says so, in its own way; --quick may or may not."""
    for arguments in (["--quick"], []):
        result = CliRunner().invoke(main, ["verify", str(folder), "--workers", "2", *arguments])
        assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code == 1


def read_everything(folder: Path) -> str:
    """What becomes of a reader: "refused" with the loader's error, or "read" to the end, whatever the pixels."""
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


def run(dataset: Path, place: Path, count: int, seed: int) -> Counter[str]:
    """Damage one file at a time, `count` times; each file as often as the others."""
    shutil.copytree(dataset, place)
    assert not is_found(place)
    rng, told = random.Random(seed), Counter[str]()
    files = sorted(place.iterdir())
    assert len(files) > 3
    for n in range(count):
        path, harm = files[n % len(files)], HARMS[n // len(files) % len(HARMS)]
        data = path.read_bytes()
        changed = harm(data, rng)
        assert changed != data
        path.write_bytes(changed)
        told[harm.__name__] += 1
        if is_found(place):
            told["found"] += 1
        else:
            print(f"not found: {path.name}, {harm.__name__}, number {n} of seed {seed}")
        told[read_everything(place)] += 1
        path.write_bytes(data)
    return told


def test_random_damage_is_found(dataset: Path, tmp_path: Path) -> None:
    told = run(dataset, tmp_path / "copy", FEW, seed=1)
    assert told["found"] == FEW
    assert min(told[harm.__name__] for harm in HARMS) >= FEW // 4
    assert told["read"] + told["refused"] == FEW
    assert told["read"] > 0 < told["refused"]


@pytest.mark.long
def test_much_random_damage_is_found(dataset: Path, tmp_path: Path) -> None:
    told = run(dataset, tmp_path / "copy", MANY, seed=2)
    harms = ", ".join(f"{told[harm.__name__]} × {harm.__name__}" for harm in HARMS)
    print(
        f"\n{dataset.name}: {told['found']} of {MANY} found ({harms}); "
        f"loader: {told['refused']} refused, {told['read']} read to the end"
    )
    assert told["found"] == MANY
    assert told["read"] + told["refused"] == MANY
