"""The targets, and the figures reached."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ways_ours as ours
from common import table
from modes import LIMIT
from results import Results, load
from rivals_rows import NPY, PNG
from ways import is_ours

GATHER, MEMCPY, LOADER = ours.GATHER.name, ours.MEMCPY.name, ours.LOADER_AUTO.name


@dataclass(frozen=True)
class Target:
    """A target: at least or at most a figure. `reached` returns the measured one, None if there is none."""

    what: str
    at_least: bool
    wanted: float
    reached: Callable[[], float | None]
    unit: str = "×"

    def row(self) -> list[str]:
        """Return a row of the table."""
        value = self.reached()
        met = "" if value is None else "yes" if (value >= self.wanted) == self.at_least else "no"
        sign = "≥" if self.at_least else "≤"
        return [self.what, f"{sign} {self.wanted:g} {self.unit}", figure(value, self.unit), met]


def figure(value: float | None, unit: str) -> str:
    """Return a number rounded to significant digits, as text."""
    if value is None:
        return "not measured"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def targets_table(folder: Path) -> str:
    """Return the table of targets, from all results in a folder."""
    rows = [target.row() for mode in (warm, cold, slow) for target in mode(load(folder, mode.__name__))]
    path = folder / "index.json"
    figures = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return table(["what", "target", "reached", "met"], [*rows, *(target.row() for target in of_index(figures))])


def warm(results: Results) -> list[Target]:
    """Return the targets of the mode warm: files in the page cache."""

    def ratio(scale: int, above: str, below: str) -> Callable[[], float | None]:
        return lambda: results.ratio(scale, above, below)

    def best_rival(scale: int) -> Callable[[], float | None]:
        return lambda: best(results, scale)

    memcpy, png, rival = "of memcpy", f"× {PNG.name}", "× the best rival on one core"
    turned = ours.GATHER_TURNED.name
    return [
        Target("warm, one core, gather alone, ×4", True, 0.75, ratio(4, GATHER, MEMCPY), memcpy),
        Target("warm, one core, gather alone, ×2", True, 0.55, ratio(2, GATHER, MEMCPY), memcpy),
        *(
            Target(f"the same, fallback, ×{s}", True, 0.35, ratio(s, ours.GATHER_PLAIN.name, MEMCPY), memcpy)
            for s in (4, 2)
        ),
        *(Target(f"warm, one core, gather alone, ×{s}", True, 3.5, best_rival(s), rival) for s in (4, 2)),
        *(Target(f"warm, one core, gather alone, ×{s}", True, 1500, ratio(s, GATHER, PNG.name), png) for s in (4, 2)),
        *(Target(f"warm, 8 transforms on the host, ×{s}", True, 0.4, ratio(s, turned, MEMCPY), memcpy) for s in (4, 2)),
        *(Target(f"warm, 8 transforms on the host, ×{s}", True, 800, ratio(s, turned, PNG.name), png) for s in (4, 2)),
        *(
            Target(f"warm, both cores, {what}, ×{s}", True, 1.7, ratio(s, many.name, one.name), "× one core")
            for what, many, one in (
                ("gather alone", ours.GATHER_ALL, ours.GATHER),
                ("PatchLoader", ours.LOADER_ALL, ours.LOADER_1),
            )
            for s in (4, 2)
        ),
    ]


def best(results: Results, scale: int) -> float | None:
    """Return the speed-up of the gather over the fastest rival on one core."""
    every = [*results.rounds.get(scale, {})]
    rivals = [
        way
        for way in every
        if not is_ours(way) and way not in (MEMCPY, ours.MEMCPY_ALL.name) and not way.endswith("all cores")
    ]
    ratios = [ratio for way in rivals if (ratio := results.ratio(scale, GATHER, way)) is not None]
    return min(ratios, default=None)


def cold(results: Results) -> list[Target]:
    """Return the targets of the mode cold: local disk, empty page cache."""

    def ratio(scale: int, below: str) -> Callable[[], float | None]:
        return lambda: results.ratio(scale, LOADER, below)

    def read(scale: int) -> Callable[[], float | None]:
        return lambda: results.read_ratio(scale, LOADER) if scale in results.rounds else None

    return [
        *(Target(f"cold, ×{s}", True, 0.9, ratio(s, LIMIT), "of fio") for s in (4, 2)),
        *(Target(f"cold, bytes read, ×{s}", False, w, read(s), "× bytes needed") for s, w in ((4, 1.65), (2, 2.4))),
        *(Target(f"cold, ×{s}", True, 10, ratio(s, NPY.name), f"× {NPY.name}") for s in (4, 2)),
        *(Target(f"cold, ×{s}", True, 200, ratio(s, PNG.name), f"× {PNG.name}") for s in (4, 2)),
    ]


def slow(results: Results) -> list[Target]:
    """Return the targets of the mode slow: storage with high latency."""

    def ratio(scale: int, below: str) -> Callable[[], float | None]:
        return lambda: results.ratio(scale, LOADER, below)

    def latency(scale: int) -> Callable[[], float | None]:
        return lambda: results.over_latency(scale, LOADER) if scale in results.rounds else None

    formula = "× (requests × delay ÷ in flight)"
    return [
        *(Target(f"slow, ×{s}", True, 25, ratio(s, PNG.name), f"× {PNG.name}") for s in (4, 2)),
        *(Target(f"slow, ×{s}", True, 15, ratio(s, NPY.name), f"× {NPY.name}") for s in (4, 2)),
        *(Target(f"slow, time, ×{s}", False, 1.3, latency(s), formula) for s in (4, 2)),
    ]


def of_index(figures: dict[str, Any]) -> list[Target]:
    """Return the targets for a dataset of 100,000 images."""
    return [
        Target("first batch after opening 100,000 images", False, 2, lambda: figures.get("first_batch_s"), "s"),
        Target("its throughput", True, 0.9, lambda: figures.get("throughput_ratio"), "of 100 images"),
        Target("a worker's private memory beyond torch", False, 60, lambda: figures.get("worker_private_mb"), "MB"),
    ]
