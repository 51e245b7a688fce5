"""Tools of the fuzz tests: random changes to valid inputs, and the loop that tries them."""

import os
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

FUZZING = "SRSHARDS_FUZZ_SECONDS" in os.environ
SECONDS = float(os.environ.get("SRSHARDS_FUZZ_SECONDS", "6")) / 4  # for each of four fuzz tests
SEED = int(os.environ.get("SRSHARDS_FUZZ_SEED", "0"))
LEAST = 20  # inputs, even on a slow machine
Words = list[bytes]
EDGES: Words = [b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\xff\xff", b"\0\0\0\1", b"\1\0\0\0"]


def mutated(data: bytes, rng: random.Random, words: Words) -> bytes:
    """Return data with bytes changed, removed, repeated or inserted, more often near the start, where headers are."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        if not out:
            break
        at = rng.randrange(min(len(out), rng.choice([16, 64, 256, 1 << 30])))
        length = rng.randrange(1, 40)
        match rng.randrange(7):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
            case 2:
                word = rng.choice(words)
                out[at : at + len(word)] = word
            case 3:
                del out[at : at + length]
            case 4:
                out[at:at] = out[at : at + length]
            case 5:
                out[at:at] = rng.choice(words)
            case _:
                if rng.random() < 0.3:
                    del out[at:]
    return bytes(out)


def fuzz(
    name: str, make: Callable[[random.Random], Any], attempt: Callable[[Any], str], capfd: pytest.CaptureFixture[str]
) -> Counter[str]:
    """Make inputs and try them until time is up; return how often each outcome occurred."""
    outcomes, slowest, n = Counter[str](), 0.0, 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end or n < LEAST:
        given = make(random.Random(f"{SEED}/{n}"))
        start = time.monotonic()
        try:
            outcomes[attempt(given)] += 1
        except Exception as error:
            raise AssertionError(f"{name}: input {n} of seed {SEED} raised {error!r}") from error
        slowest, n = max(slowest, time.monotonic() - start), n + 1
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    ends = ", ".join(f"{count} {what}" for what, count in sorted(outcomes.items()))
    with capfd.disabled():
        if FUZZING:
            print(f"\n{name}: {n} inputs of seed {SEED} in {SECONDS:.0f} s: {ends}; "
                  f"the slowest took {slowest:.2f} s; most memory of the process {memory:.0f} MiB")  # fmt: skip
    return outcomes


def refused(error: Exception, start: str) -> str:
    """Check that an error is one line that starts with its place; return "refused"."""
    text = str(error)
    assert text.startswith(start)
    assert text.isprintable()
    assert len(text) < 4000
    return "refused"


ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 15, 16, 17, 1 << 20, (1 << 20) + 1, 1 << 31, 1 << 62, 1 << 63, 1 << 64, 10**400,
    -(1 << 63), 0.5, 1e308, float("nan"), float("inf"), "", "a", "..", "../x", "/etc/passwd", "a/b", "\0", "\ud800",
    "ü" * 300, "0" * 64, "shard-00000.h5", "shard-99999.raw", [], [[]], [0], ["a"], {}, {"a": 1}, {"tile": 64},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all nested values."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def change_json(top: dict[str, Any], rng: random.Random) -> None:
    """Replace, remove, repeat or swap a random value."""
    *outer, last = rng.choice(places(top)[1:])
    inner: Any = top
    for key in outer:
        inner = inner[key]
    match rng.randrange(6):
        case 0 | 1:
            inner[last] = deepcopy(rng.choice(ODD))
        case 2 if isinstance(inner[last], int):
            inner[last] += rng.choice([-4096, -1, 1, 4096, 1 << 40])
        case 3:
            del inner[last]
        case 4 if isinstance(inner, list):
            inner.insert(last, deepcopy(inner[rng.randrange(len(inner))]))
        case _:
            if isinstance(inner, list):
                other = rng.randrange(len(inner))
                inner[last], inner[other] = inner[other], inner[last]
            else:
                inner["other"] = deepcopy(inner[last])
