"""The log of a training run: `metrics.jsonl` in its folder, one JSON object per line, each with its `iteration`.

A record holds losses and speed (`loss`, `seconds_per_step`, ...) or validation scores (`psnr_y`, ...) on the dataset
`valid`. Infinity and NaN, which JSON lacks, are written as null.
"""

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loader.errors import ShardsError, one_line
from loader.system.safefile import open_to_write, read_member, write_atomically

LOG = "metrics.jsonl"
VALID = "valid"  # key: the dataset of a score, by its abbreviated identity
BICUBIC = "bicubic_"  # prefix of the scores of bicubic enlargement
MAX_LOG = 1 << 30  # bytes
MAX_LINE = 1 << 16  # bytes; lines have about 300
LARGEST = 1 << 53  # integers beyond this are not exact as doubles
Record = Mapping[str, Any]


class LogError(ShardsError):
    """A log with unusable values; the message is one line."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def read_records(path: Path, read: Callable[[Path, int], bytes] = read_member) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers, from 1, and records of a log; skip other lines, such as incomplete ones of killed runs.

    `read` is a function of `loader.system.safefile`. Raises LogError if a file has text but no records; OSError if it
    cannot be read.
    """
    data, found = read(path, MAX_LOG), False
    for number, line in enumerate(io.BytesIO(data), start=1):
        try:
            record = json.loads(line) if len(line) <= MAX_LINE else None
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found = True
            yield number, record
    if not found and data.strip():
        raise LogError(f"{path}: expected lines of JSON objects, got none")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records with an iteration of a run's log; an empty list if there is no log.

    Raises OSError if the log cannot be read.
    """
    if not path.exists():
        return []
    try:
        return [record for _, record in read_records(path) if type(record.get("iteration")) is int]
    except LogError:
        return []


def write_log(path: Path, records: Iterable[Record]) -> None:
    """Replace a log, atomically."""
    write_atomically(path, "".join(map(_to_line, records)).encode())


def append_record(path: Path, record: Record) -> None:
    """Append a record to a log. OSError, naming the log, if it cannot be written."""
    data = _to_line(record).encode()
    descriptor = open_to_write(path)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def iteration_in(record: Record, where: str) -> int:
    """Return a record's iteration. LogError, starting with `where`, if it has none."""
    value = record.get("iteration")
    if type(value) is not int or not -LARGEST <= value <= LARGEST:
        raise LogError(f"{where}: iteration: expected a whole number, got {_shown(value)}")
    return value


def number_in(record: Record, key: str, where: str) -> float | None:
    """Return a number in a record, None if absent or null. LogError, starting with `where`, for other types."""
    value = record.get(key)
    if value is None:
        return None
    if type(value) is float or (type(value) is int and -LARGEST <= value <= LARGEST):
        return float(value)
    raise LogError(f"{where}: {key}: expected a number, got {_shown(value)}")


def score_of(value: Any) -> float:
    """Return a logged score: null means infinity, the PSNR of equal images; -inf if it is not a number."""
    if value is None:
        return math.inf
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else -math.inf


def _to_line(record: Record) -> str:
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(plain, allow_nan=False) + "\n"


def _shown(value: object) -> str:
    """Return a JSON value as short text; an integer of thousands of digits cannot be printed."""
    return (
        f"{value!r:.80}"
        if value is None or isinstance(value, bool | float | str)
        else f"a value of type {type(value).__name__}"
    )
