"""The figures of one mode: medians over rounds, ratios within rounds, stored as JSON."""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from children import Reading
from modes import Rounds


@dataclass(frozen=True)
class Results:
    """The results of one mode, by scale; `how` describes the setup of each way."""

    mode: str
    machine: str
    versions: str
    images: int
    settings: dict[str, Any]
    how: dict[str, str]
    rounds: dict[int, Rounds]

    def rate(self, scale: int, way: str) -> float:
        """Patches per second."""
        return statistics.median(reading.rate for reading in self.rounds[scale][way])

    def ratio(self, scale: int, above: str, below: str) -> float | None:
        """Return the speed-up of one way over another; None if one was not measured."""
        ways = self.rounds.get(scale, {})
        if above not in ways or below not in ways:
            return None
        return statistics.median(a.rate / b.rate for a, b in zip(ways[above], ways[below], strict=True))

    def read_ratio(self, scale: int, way: str) -> float:
        """Return bytes read from storage ÷ bytes of the patches."""
        patch = self.settings["lr_patch"] ** 2 * (1 + scale**2) * 3
        return self._median(scale, way, lambda reading: reading.bytes_read / (reading.samples * patch))

    def requests(self, scale: int, way: str) -> float:
        """Return storage requests per patch."""
        return self._median(scale, way, lambda reading: reading.requests / reading.samples)

    def busy(self, scale: int, way: str) -> float:
        """Return how many cores a way kept busy."""
        return self._median(scale, way, lambda reading: reading.cpu_seconds / reading.seconds)

    def over_latency(self, scale: int, way: str) -> float:
        """Return its time ÷ (requests × delay ÷ requests in flight)."""
        delay = self.settings["delay_ms"] / 1e3 / self.settings["in_flight"]
        return self._median(scale, way, lambda reading: reading.seconds / (reading.requests * delay))

    def by_speed(self, scale: int) -> list[str]:
        """Return the ways, fastest first."""
        return sorted(self.rounds[scale], key=lambda way: -self.rate(scale, way))

    def _median(self, scale: int, way: str, value: Callable[[Reading], float]) -> float:
        return statistics.median(map(value, self.rounds[scale][way]))


def save(results: Results, folder: Path) -> None:
    """Write MODE.json, one line per way."""
    parts = {key: value for key, value in vars(results).items() if key != "rounds"}
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)},\n" for key, value in parts.items()]
    scales = []
    for scale, ways in results.rounds.items():
        rows = [f"{json.dumps(way)}: {json.dumps(list(map(compact, each)))}" for way, each in ways.items()]
        scales.append(f'"{scale}": {{\n' + ",\n".join(rows) + "\n}")
    text = "{\n" + "".join(lines) + '"rounds": {' + ",\n".join(scales) + "}\n}\n"
    (folder / f"{results.mode}.json").write_text(text, encoding="utf-8")


def compact(reading: Reading) -> dict[str, float]:
    """Return the non-zero figures, rounded to significant digits."""
    return {key: round(value, 5) for key, value in asdict(reading).items() if value}


def load(folder: Path, mode: str) -> Results:
    """Read MODE.json; without one, return results without rounds."""
    path = folder / f"{mode}.json"
    if not path.exists():
        return Results(mode, "", "", 0, {}, {}, {})
    fields = json.loads(path.read_text(encoding="utf-8"))
    rounds = {
        int(scale): {way: [Reading(**reading) for reading in each] for way, each in ways.items()}
        for scale, ways in fields.pop("rounds").items()
    }
    return Results(**fields, rounds=rounds)
