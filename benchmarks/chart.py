"""Bar charts: patches per second on a logarithmic axis, one panel per scale, ours highlighted."""

from pathlib import Path

import matplotlib
from modes import LIMITS
from results import Results
from ways import is_ours
from ways_ours import MEMCPY, MEMCPY_ALL

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS, LIMIT, RIVALS = "#d1495b", "#2b2d42", "#a3b1c2"
TITLES = {
    "warm": "Warm: all files in the page cache",
    "cold": "Cold: page cache empty, local disk",
    "slow": "Slow: {delay_ms:g} ms per request, {in_flight} at a time",
}


def draw(results: Results, path: Path) -> None:
    """Write the chart of one mode as PNG."""
    scales = list(results.rounds)
    most = max(len(ways) for ways in results.rounds.values())
    figure, panels = plt.subplots(
        1, len(scales), figsize=(7.2 * len(scales), 0.31 * most + 1.7), squeeze=False, layout="constrained"
    )
    for panel, scale in zip(panels[0], scales, strict=True):
        ways = results.by_speed(scale)[::-1]
        rates = [results.rate(scale, way) for way in ways]
        colours = [
            OURS if is_ours(way) else LIMIT if way in (MEMCPY.name, MEMCPY_ALL.name, *LIMITS) else RIVALS
            for way in ways
        ]
        bars = panel.barh(ways, rates, color=colours)
        labels = [f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}" for rate in rates]
        panel.bar_label(bars, labels, padding=3, fontsize=9)
        panel.set_xscale("log")
        panel.set_xlim(min(rates) / 2, max(rates) * 4)
        patch = results.settings["lr_patch"]
        panel.set_title(f"×{scale}: LR {patch}, HR {patch * scale}", fontsize=11)
        panel.set_xlabel("patches per second (logarithmic)")
        panel.tick_params(axis="y", labelsize=9, length=0)
        for label, way in zip(panel.get_yticklabels(), ways, strict=True):
            label.set_fontweight("bold" if is_ours(way) else "normal")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", color="#e5e5e5", linewidth=0.6)
        panel.set_axisbelow(True)
    figure.suptitle(TITLES[results.mode].format(**results.settings), fontsize=13, fontweight="bold")
    figure.supxlabel(
        f"{results.machine}; {results.images} images, batches of {results.settings['batch_size']}", fontsize=8
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)
