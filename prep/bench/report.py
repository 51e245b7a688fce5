"""What training needs from its storage, what was measured, and what to do about it."""

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from loader.ahead.positional import READ_THREADS
from loader.errors import one_line

MARGIN = 1.2  # storage keeps up if it delivers this many times the rate needed
IoMode = Literal["mmap", "pread"]
IO_MODES: tuple[IoMode, ...] = ("mmap", "pread")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training run: what one step reads, and how long it takes."""

    scale: int
    lr_patch: int
    batch_size: int
    step_ms: float
    threads: int

    @property
    def patches_per_second(self) -> float:
        """The rate at which the run consumes patches."""
        return self.batch_size / self.step_ms * 1000


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Results. `cold` and `warm` are patches per second by io mode; `evicted` is the fraction of pages dropped from the
    page cache on request, None if unknown (cold figures are cold only if it is near 1); `not_measured` gives the reason
    for each io mode that was not measured.
    """

    file_system: str
    network: bool
    dataset_bytes: int
    free_memory: int
    latency_ms: float
    random_mb_per_second: float
    evicted: float | None
    cold: dict[str, float]
    warm: dict[str, float]
    needed: float
    not_measured: dict[str, str] = field(default_factory=dict)

    @property
    def chosen(self) -> IoMode:
        """The io mode that io="auto" selects here."""
        return "pread" if self.network else "mmap"


def recommendation(measured: Measurements, folder: Path) -> str:
    """Return advice for the user."""
    enough = measured.needed * MARGIN
    chosen = measured.chosen
    if chosen not in measured.cold:
        (other,) = measured.cold
        return (
            f'Use io="{other}": io="auto" is "{chosen}" here, which was not measured ({measured.not_measured[chosen]}).'
        )
    if max(measured.warm.values()) < measured.needed:
        return (
            "Even from memory, the loader delivers fewer patches than training needs: give it more threads "
            "(PatchLoader(threads=..), train.py --workers), or check what else is running here."
        )
    if measured.cold[chosen] >= enough:
        return f'No change needed: io="auto" ({chosen} here) keeps up even when nothing is cached.'
    for other, rate in measured.cold.items():
        if rate >= enough:
            return f'Use io="{other}": with it, this storage keeps up even when nothing is cached.'
    minutes = measured.dataset_bytes / max(measured.random_mb_per_second * 1e6, 1) / 60
    # With TMPDIR unset the target would be the root directory: ${TMPDIR:?} stops the shell instead.
    copy = f'cp -r -- {shell_word(folder)} "${{TMPDIR:?}}"/    # about {minutes:.1f} minutes at the measured rate'
    if measured.dataset_bytes < measured.free_memory * 0.8:
        return (
            "The first epoch will wait for the storage; later ones are read from memory, where the dataset fits. To "
            f"avoid the wait, copy it to node-local storage first:\n  {copy}"
        )
    return (
        "This storage is too slow for this training, and memory is too small to cache the dataset. Copy it to "
        f"node-local storage:\n  {copy}"
    )


def report_lines(measured: Measurements, workload: Workload, folder: Path) -> list[str]:
    """Return the results as text."""
    kind = "counts as network" if measured.network else "counts as local disk"
    lines = [
        f"{one_line(str(folder))}: {measured.dataset_bytes / 1e9:.2f} GB on {measured.file_system}, which {kind}",
        f"latency             {measured.latency_ms:.2f} ms for a scattered read of 4 KiB",
        f"scattered reads     {measured.random_mb_per_second:.0f} MB/s, 64 KiB each, {READ_THREADS} at once",
    ]
    lines += [f"patches/s, cold     {rate:,.0f} with io={io!r}" for io, rate in measured.cold.items()]
    lines += [f"patches/s, warm     {rate:,.0f} with io={io!r}" for io, rate in measured.warm.items()]
    lines += [one_line(f"io={io!r} was not measured: {reason}") for io, reason in measured.not_measured.items()]
    lines.append(
        f"training needs      {measured.needed:,.0f} patches/s: "
        f"batches of {workload.batch_size} in {workload.step_ms:g} ms"
    )
    if measured.evicted is not None and measured.evicted < 0.9:
        lines.append(
            f"({1 - measured.evicted:.0%} of the pages stayed in memory, used elsewhere: cold figures are too high)"
        )
    return [*lines, recommendation(measured, folder)]


def shell_word(path: Path) -> str:
    """Return a path quoted for a shell and safe to print: `.` by its name, unprintable characters in $'…'."""
    path = path.resolve() if path.name in ("", "..") else path
    if (text := str(path)).isprintable():
        return shlex.quote(text)
    return "$'" + "".join(c if c.isprintable() and c not in "\\'" else _escaped(c) for c in text) + "'"


def _escaped(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
