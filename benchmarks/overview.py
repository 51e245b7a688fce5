"""The chart of README.md: ours and the rivals in memory, on a cold disk and on slow storage, at ×4."""

from pathlib import Path

import matplotlib
from chart import LIMIT, OURS, RIVALS
from modes import LATENCY
from modes import LIMIT as FIO
from results import Results
from ways_ours import LOADER_1, LOADER_AUTO, MEMCPY

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SCALE = 4
LOADER = "srshards PatchLoader"
# The label of each bar, and the names of that way in the three modes.
BARS = {
    LOADER: (LOADER_1.name, LOADER_AUTO.name, LOADER_AUTO.name),
    "np.memmap on rows": ("np.memmap on rows",) * 3,
    "FFCV raw (HR only)": ("FFCV raw (HR only)",) * 3,
    "h5py, chunked": ("h5py chunked",) * 3,
    "TensorStore": ("TensorStore", "TensorStore, all cores", "TensorStore, all cores"),
    "zarr": ("zarr",) * 3,
    "LMDB of PNG sub-images": ("LMDB of PNG sub-images",) * 3,
    "whole PNGs (OpenCV)": ("PNG decoding",) * 3,
}
PANELS = (
    ("warm", "In memory, one core", MEMCPY.name, "memcpy"),
    ("cold", "Local disk, cold cache", FIO, "fio"),
    ("slow", "{delay_ms:g} ms per request", LATENCY, "{in_flight} in flight"),
)


def draw_overview(modes: dict[str, Results], path: Path) -> None:
    """Write the chart as PNG; `modes` has the results of each mode by its name."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(10, 3.6), sharey=True, layout="constrained")
    labels = [*BARS, "yardstick"][::-1]
    colours = [{LOADER: OURS, "yardstick": LIMIT}.get(label, RIVALS) for label in labels]
    for number, (panel, (mode, title, limit, limit_name)) in enumerate(zip(panels, PANELS, strict=True)):
        results = modes[mode]
        ways = {label: names[number] for label, names in BARS.items()} | {"yardstick": limit}
        rates = [results.rate(SCALE, ways[label]) for label in labels]
        texts = [f"{rate:,.0f}" for rate in rates]
        texts[0] += f" ({limit_name.format(**results.settings)})"
        panel.bar_label(panel.barh(labels, rates, color=colours, height=0.74), texts, padding=4, fontsize=9.5)
        panel.set_title(title.format(**results.settings), fontsize=11, fontweight="bold", loc="left")
        panel.set_xscale("log")
        panel.set_xlim(1, max(rates) * 30)
        panel.set_xticks([])
        panel.minorticks_off()
        panel.tick_params(axis="y", labelsize=10, length=0)
        panel.spines[["top", "right", "bottom"]].set_visible(False)
    panels[0].get_yticklabels()[labels.index(LOADER)].set_fontweight("bold")
    figure.supxlabel("patches per second, logarithmic scale", fontsize=9.5)
    figure.savefig(path, dpi=100)
    plt.close(figure)
