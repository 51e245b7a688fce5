"""Randomly mutated checkpoints (bytes, records, pickles, values) are refused, or are what a run could have written.

A few seconds by default; SRSHARDS_FUZZ_SECONDS and SRSHARDS_FUZZ_SEED set the duration and the seed.
"""

from __future__ import annotations

import copy
import io
import random
import resource
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import EDGES, fuzz, mutated, refused
from torch import Tensor

from model.checkpoints import CheckpointError, load_checkpoint, read_raw
from model.shufflemixer import ShuffleMixer
from model.training.ranks import Ranks
from model.training.settings import Config
from model.training.state import from_checkpoint, new_state, to_checkpoint
from model.training.vetting import check_content

MEMORY = 1 << 20  # KiB by which the process may grow: a pickle of the maximum size takes half of that
RANKS = Ranks(0, 1, torch.device("cpu"))
CONFIG = Config(shards="s", scale=2, out="o", micro_batch="auto")
POSITION = {"sample": 128, "seed": 0, "length": 7}


@pytest.fixture(autouse=True)
def memory_limit() -> Iterator[None]:
    before, threads = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are tiny
    yield
    torch.set_num_threads(threads)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def small() -> bytes:
    torch.manual_seed(0)
    network = ShuffleMixer(8, 3, 1, 2, scale=2)
    fields = {"features": 8, "kernel_size": 3, "blocks": 1, "scale": 2}
    return saved({"params": network.state_dict(), "network": fields, "iteration": 3, "note": ["a", None, (1, 2.5)]})


def check_weights(path: Path, given: bytes) -> str:
    """Check that a file is refused in one line, or holds the finite weights of a network."""
    path.write_bytes(given)
    try:
        read_raw(path)
    except CheckpointError as error:
        refused(error, str(path))
    try:
        network = load_checkpoint(path).build()
    except CheckpointError as error:
        return refused(error, str(path))
    assert network.parameter_count() < 100_000
    assert all(value.isfinite().all() for value in network.state_dict().values())
    return "accepted"


def test_bytes_of_archives(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = small()
    # The end holds ZIP's directory, which is read first.
    tail = len(data) - data.rindex(b"PK\x01\x02", 0, data.index(b"PK\x01\x02") + 4)
    words = [*EDGES, b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"\x08\0", bytes(8)]

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.6:
            return data[:-tail] + mutated(data[-tail:], rng, words)
        return mutated(data, rng, words)

    outcomes = fuzz("bytes of checkpoints", make, lambda given: check_weights(tmp_path / "a.pt", given), capfd)
    assert outcomes["refused"]


def test_pickles(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Mutate the pickle or another record, with correct checksums."""
    with zipfile.ZipFile(io.BytesIO(small())) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    opcodes = [bytes([code]) for code in b"(.0123BCGIJKMNRTUX\\]abcdhjlpqrstu}\x80\x81\x85\x86\x87\x88\x89\x8a\x8b"]
    words = [*EDGES, *opcodes, b"cos\nsystem\n", b"ctorch\nFloatStorage\n", b"ctorch\nLongStorage\n", b"K\0", b"K\xff",
             b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"cbuiltins\nbytearray\n", b"h\1",
             b"ctorch._utils\n_rebuild_tensor_v3\n", b"\x8a\x08" + b"\xff" * 8, b"\x8a\x07" + b"\xff" * 7]  # fmt: skip

    def make(rng: random.Random) -> bytes:
        changed = dict(records)
        name = "archive/data.pkl" if rng.random() < 0.8 else rng.choice(list(records))
        changed[name] = mutated(records[name], rng, words)
        if rng.random() < 0.1:
            del changed[rng.choice(list(changed))]
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", rng.choice([0, 0, 0, 8])) as out:
            for name, value in changed.items():
                out.writestr(name, value)
        return buffer.getvalue()

    outcomes = fuzz("pickles of checkpoints", make, lambda given: check_weights(tmp_path / "a.pt", given), capfd)
    assert outcomes["refused"]


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all values inside `value`."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(found for key, part in inner for found in paths_in(part, (*path, key)))]


def odd(value: Any, rng: random.Random) -> Any:
    """Return another value in place of `value`; for a tensor, often another tensor."""
    if isinstance(value, Tensor) and rng.random() < 0.8:
        flat = value.reshape(-1)
        spoilt = value.clone().double().reshape(-1)
        spoilt[rng.randrange(len(spoilt))] = rng.choice([float("nan"), float("inf"), -1.0, 1e30])
        return rng.choice([
            flat[:1], flat[:0], flat, value.double(), value.half(), value.long(), value.bool(), value.unsqueeze(0),
            value.expand(2, *value.shape), value.T if value.ndim == 2 else value, flat.repeat(2), value.to("meta"),
            spoilt.reshape(value.shape).to(value.dtype), torch.nn.Parameter(value.float()), value.clone(),
        ])  # fmt: skip
    return rng.choice([
        None, True, False, 0, 1, -1, 2, 1 << 31, 1 << 53, 1 << 63, 1 << 64, -(1 << 63), 0.5, -0.0, 1e308, float("nan"),
        float("inf"), "", "a", "\x1b[31m", "9" * 5000, [], [0], {}, {"a": 1}, {0: {}}, (0.9, 0.99), (), torch.zeros(1),
        torch.zeros(()), torch.zeros(0),
    ])  # fmt: skip


def test_states_of_training(capfd: pytest.CaptureFixture[str]) -> None:
    """Replace, remove and add values; states that are accepted must train."""
    state = new_state(CONFIG, RANKS)
    expected = to_checkpoint(state, {}, CONFIG, RANKS)
    for _ in range(2):
        state.optimiser.zero_grad()
        state.network(torch.rand(1, 3, 4, 4)).square().mean().backward()
        state.optimiser.step()
        state.iteration += 1
    state.micro_batch = 8
    content = to_checkpoint(state, POSITION, CONFIG, RANKS)
    parameters = list(state.network.parameters())
    paths = paths_in(content)[1:]
    # Two thirds of the paths lead to tensors; half of the changes go elsewhere.
    others = [path for path in paths if path[0] not in ("params", "params_ema", "optimiser") or "param_groups" in path]

    def make(rng: random.Random) -> Any:
        changed = copy.deepcopy(content)
        for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
            *outer, last = rng.choice(paths if rng.random() < 0.5 else others)
            inner: Any = changed
            try:
                for key in outer:
                    inner = inner[key]
                if rng.random() < 0.1:
                    del inner[last]
                elif rng.random() < 0.1 and isinstance(inner, dict):
                    inner[rng.choice(["other", 0, 999, "\x1b["])] = inner[last]
                else:
                    inner[last] = odd(inner[last], rng)
            except (KeyError, TypeError, IndexError):  # removed by an earlier change
                continue
        return changed

    def check(given: Any) -> str:
        try:
            checked = check_content(given, expected, parameters)
        except CheckpointError as error:
            return refused(error, "")
        for index, moments in checked["optimiser"]["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                assert moments[name].shape == parameters[index].shape
                assert moments[name].stride() == parameters[index].stride()
                assert moments[name].dtype == torch.float32
        for name in ("params", "params_ema"):
            assert {key: value.shape for key, value in checked[name].items()} == {
                key: value.shape for key, value in expected[name].items()
            }
        fresh = new_state(CONFIG, RANKS)
        try:
            from_checkpoint(given, fresh, CONFIG, RANKS)
        except CheckpointError as error:
            return refused(error, "")
        fresh.network(torch.rand(1, 3, 4, 4)).square().mean().backward()
        fresh.optimiser.step()
        return "accepted"

    outcomes = fuzz("states of training", make, check, capfd)
    assert outcomes["refused"]
    assert outcomes["accepted"]
