"""Tables and charts of what was measured, and the table of targets.

python benchmarks/report.py [--out DIR]     # again, from the raw figures; the chart of the main README too
"""

import re
from collections.abc import Callable
from pathlib import Path

import click
from chart import draw
from common import table
from modes import LIMIT
from overview import draw_overview
from results import Results, load, save
from rivals_rows import NPY, PNG
from targets import targets_table
from ways import MODES
from ways_ours import MEMCPY

HERE = Path(__file__).parent
README = HERE / "README.md"
OVERVIEW = HERE.parent / "docs" / "pictures" / "loading.png"  # the chart of the main README
Column = tuple[str, Callable[[str], str]]


def write_all(results: Results, out: Path) -> str:
    """Write MODE.json, MODE.md, MODE.png and targets.md; return the tables."""
    out.mkdir(parents=True, exist_ok=True)
    save(results, out)
    return write_tables(results, out)


def write_tables(results: Results, out: Path) -> str:
    """Write what follows from the raw figures; the README's tables too, where they are the repository's results."""
    tables = "\n\n".join(mode_table(results, scale) for scale in results.rounds)
    targets = write_targets(out)
    name, settings = results.mode, results.settings
    head = (
        f"{results.images} images, batches of {settings['batch_size']}, {settings['rounds']} rounds; "
        f"{results.machine}; {results.versions}\n"
    )
    how = "".join(f"- **{way}**: {text}.\n" for way, text in results.how.items())
    (out / f"{name}.md").write_text(f"# {name}\n\n{head}\n{tables}\n\n![chart]({name}.png)\n\n{how}", encoding="utf-8")
    draw(results, out / f"{name}.png")
    fill_readme(out, name, f"{head}\n{tables}\n\n![{name}](results/{name}.png)")
    return f"\n{head}\n{tables}\n\n{targets}\n"


def write_targets(out: Path) -> str:
    """Write targets.md from all results there are, and the README's table; return the table."""
    targets = targets_table(out)
    (out / "targets.md").write_text(f"{targets}\n", encoding="utf-8")
    fill_readme(out, "targets", targets)
    return targets


def mode_table(results: Results, scale: int) -> str:
    """The table of one mode and scale, as Markdown."""
    rows = [[way, *(cell(way) for _, cell in columns(results, scale))] for way in results.by_speed(scale)]
    patch = results.settings["lr_patch"]
    size = f"LR {patch} × {patch}, HR {patch * scale} × {patch * scale}"
    return f"**{results.mode}, ×{scale}**: {size}\n\n" + table(["way", *(n for n, _ in columns(results, scale))], rows)


def columns(results: Results, scale: int) -> list[Column]:
    """What is told of each way in a mode."""

    def ratio(below: str, digits: str) -> Callable[[str], str]:
        def cell(way: str) -> str:
            value = results.ratio(scale, way, below)
            return "" if value is None else format(value, digits)

        return cell

    rate: Column = ("patches/s", lambda way: f"{results.rate(scale, way):,.0f}")
    png: Column = ("× PNG", ratio(PNG.name, ",.3g" if results.mode != "warm" else ",.0f"))
    rows: Column = ("× memmap", ratio(NPY.name, ",.3g"))
    read: Column = ("bytes read ÷ needed", lambda way: f"{results.read_ratio(scale, way):.2f}")
    busy: Column = ("cores busy", lambda way: f"{results.busy(scale, way):.1f}")
    if results.mode == "warm":
        return [rate, ("of memcpy", ratio(MEMCPY.name, ".3f")), png, busy]
    if results.mode == "cold":
        return [rate, (f"of {LIMIT}", ratio(LIMIT, ".3f")), png, rows, read, busy]
    requests: Column = ("requests/patch", lambda way: f"{results.requests(scale, way):.1f}")
    latency: Column = ("time × in flight ÷ (requests × delay)", lambda way: f"{results.over_latency(scale, way):.2f}")
    return [rate, png, rows, requests, read, latency]


def fill_readme(out: Path, name: str, text: str) -> None:
    """Replace what stands between two marks in the README, where these are the repository's own results."""
    if not is_repository(out):
        return
    before = README.read_text(encoding="utf-8")
    marks = re.compile(f"(<!-- {name} -->\n).*?(<!-- end of {name} -->\n)", re.DOTALL)
    README.write_text(marks.sub(lambda found: f"{found[1]}{text}\n{found[2]}", before), encoding="utf-8")


def is_repository(out: Path) -> bool:
    """True if `out` is the folder of the results that the repository keeps."""
    return out.resolve() == (HERE / "results").resolve()


@click.command()
@click.option("--out", default=HERE / "results", type=click.Path(path_type=Path), help="Folder of the results.")
def main(out: Path) -> None:
    """Write all tables and charts again."""
    modes = {mode: results for mode in MODES if (results := load(out, mode)).rounds}
    for results in modes.values():
        print(write_tables(results, out))
    if is_repository(out):
        draw_overview(modes, OVERVIEW)


if __name__ == "__main__":
    main()
