"""Training steps (forward and backward) and whole-image inference, compared with the published implementation style.

python benchmarks/bench_step.py [--device cuda] [--model tiny] [--precision bf16]    # adds to results/step.{json,md}
python benchmarks/bench_step.py --device cuda --memory                               # peak memory; writes nothing

The rival (rival_shufflemixer.py) has the same weights; outputs and gradients are compared before anything is timed.
Each round runs every implementation once; ratios are medians over rounds.
"""

import os

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # measure compilation as in a first run

import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from common import machine, median_ratio, rounds, table, versions
from report import fill_readme
from rival_shufflemixer import PublishedStyle
from torch import Tensor, nn

from model.cpu import mixing_kernel
from model.shufflemixer import PRESETS, ShuffleMixer

HERE = Path(__file__).parent
RIVAL, OURS, PLAIN, COMPILED = "published style", "ours", "ours, plain operations", "ours, compiled"
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
HD = (720, 1280)  # height and width of the HR output of inference


@dataclass(frozen=True)
class Settings:
    """The setup of a measurement."""

    device: str
    precision: str
    batch: int
    patch: int
    rounds: int
    threads: int


@dataclass(frozen=True)
class Results:
    """Seconds of each round, by case and implementation; `compile_seconds`: of the first compiled step, by case."""

    machine: str
    versions: str
    settings: Settings
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    compile_seconds: dict[str, float] = field(default_factory=dict)


def autocast(settings: Settings) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast context of a precision."""
    dtype = PRECISIONS[settings.precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast(settings.device, dtype)


def wait(settings: Settings) -> None:
    """Wait until the device has finished."""
    if settings.device == "cuda":
        torch.cuda.synchronize()


def stepper(network: nn.Module, lr: Tensor, slope: Tensor, settings: Settings) -> Callable[[], None]:
    """Run forward and backward as in training."""

    def step() -> None:
        network.zero_grad(set_to_none=True)
        with autocast(settings):
            sr = network(lr)
        sr.backward(slope.to(sr.dtype))
        wait(settings)

    return step


def inferrer(network: nn.Module, lr: Tensor, settings: Settings) -> Callable[[], None]:
    """Run inference on a whole image."""

    def infer() -> None:
        with torch.inference_mode(), autocast(settings):
            network(lr)
        wait(settings)

    return infer


def plainly(work: Callable[[], None]) -> Callable[[], None]:
    """Return the same work without the compiled mixing kernel."""

    def plain() -> None:
        extension, mixing_kernel.extension = mixing_kernel.extension, None
        try:
            work()
        finally:
            mixing_kernel.extension = extension

    return plain


def compare(ours: nn.Module, rival: nn.Module, lr: Tensor, slope: Tensor) -> None:
    """Raise ClickException unless both networks compute the same."""
    outputs = []
    for network in (ours, rival):
        network.zero_grad(set_to_none=True)
        sr = network(lr)
        sr.backward(slope)
        outputs.append(sr.detach())
    difference = float((outputs[0] - outputs[1]).abs().max())
    if not difference < 1e-5 * max(1.0, float(outputs[1].abs().max())):
        raise click.ClickException(f"outputs of ours and of the rival differ by {difference:.1e}")
    gradients = {name: parameter.grad for name, parameter in rival.named_parameters()}
    for name, parameter in ours.named_parameters():
        got, expected = parameter.grad, gradients[name]
        assert got is not None
        assert expected is not None
        apart = float((got - expected).abs().max() / expected.abs().max())
        if not apart < 1e-4:
            raise click.ClickException(f"gradients of {name} differ by {apart:.1e} of the largest")


def measure(name: str, scale: int, settings: Settings, compiled: bool, results: Results) -> None:
    """Time the training step and inference of one network."""
    device = torch.device(settings.device)
    torch.manual_seed(0)
    ours = ShuffleMixer.preset(name, scale).to(device)
    rival = PublishedStyle(ours.config).to(device)
    rival.load_state_dict(ours.state_dict())
    ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    lr = torch.rand(settings.batch, 3, settings.patch, settings.patch, device=device)
    slope = torch.randn(settings.batch, 3, settings.patch * scale, settings.patch * scale, device=device)
    image = torch.rand(1, 3, HD[0] // scale, HD[1] // scale, device=device)
    if device.type == "cpu":
        compare(ours, rival, lr[:2], slope[:2])

    def works(of: Callable[[nn.Module], Callable[[], None]]) -> dict[str, Callable[[], None]]:
        ways = {OURS: of(ours), RIVAL: of(rival)}
        if mixing_kernel.usable(torch.empty(1, ours.config.features, 1, 1, device=device)):
            ways[PLAIN] = plainly(ways[OURS])
        return ways

    cases = {
        f"step, {name} ×{scale}": works(lambda network: stepper(network, lr, slope, settings)),
        f"inference, {name} ×{scale}": works(lambda network: inferrer(network, image, settings)),
    }
    if compiled:
        case = f"step, {name} ×{scale}"
        faster = copy.deepcopy(ours)
        faster.compile()
        cases[case][COMPILED] = stepper(faster, lr, slope, settings)
        start = time.perf_counter()
        cases[case][COMPILED]()
        results.compile_seconds[case] = round(time.perf_counter() - start, 1)
    for case, ways in cases.items():
        times = rounds(ways, settings.rounds)
        results.seconds[case] = {way: [round(second, 5) for second in each] for way, each in times.items()}
        ratio = median_ratio(times[RIVAL], times[OURS])
        print(f"{case}: {ratio:.2f} × the {RIVAL}", flush=True)


def row(case: str, results: Results) -> list[str]:
    """Return a table row: medians in milliseconds, and the speed-up over the rival."""
    seconds = results.seconds[case]

    def milliseconds(way: str) -> str:
        return f"{statistics.median(seconds[way]) * 1e3:,.0f}" if way in seconds else ""

    def ratio(way: str) -> str:
        return f"{median_ratio(seconds[RIVAL], seconds[way]):.2f}" if way in seconds else ""

    ways = (OURS, PLAIN, COMPILED)
    spent = results.compile_seconds.get(case) if COMPILED in seconds else None
    times = [milliseconds(way) for way in (*ways, RIVAL)]
    return [case, *times, *(ratio(way) for way in ways), "" if spent is None else f"{spent:.0f}"]


def read(results: Results, out: Path) -> None:
    """Merge the cases of an earlier run with the same setup, so that a long run can be split."""
    path = out / "step.json"
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if all(earlier[key] == value for key, value in asdict(results).items() if key in ("machine", "settings")):
            results.seconds.update(earlier["seconds"])
            results.compile_seconds.update(earlier["compile_seconds"])


def write(results: Results, out: Path) -> str:
    """Write step.json and step.md, and the README's table if these are the repository's results; return the table."""
    out.mkdir(parents=True, exist_ok=True)
    head = ["case", *(f"{way}, ms" for way in (OURS, PLAIN, COMPILED, RIVAL)), "×", "× plain", "× compiled"]
    lines = table([*head, "compiling, s"], [row(case, results) for case in sorted(results.seconds, reverse=True)])
    settings = results.settings
    text = (
        f"Steps of {settings.batch} LR patches of {settings.patch} × {settings.patch}, images of {HD[1]} × {HD[0]}, "
        f"{settings.precision} on {settings.device}, {settings.rounds} rounds, threads: {settings.threads}; "
        f"{results.machine}; {results.versions}\n\n{lines}"
    )
    (out / "step.json").write_text(json.dumps(asdict(results), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (out / "step.md").write_text(f"# step\n\n{text}\n", encoding="utf-8")
    fill_readme(out, "step", text)
    return text


def peak_memory(batch: int, micro: int, precision: str, checkpointing: bool, patch: int) -> float:
    """Return the peak GiB of a step of base ×4 on CUDA, including weights and gradients."""
    settings = Settings("cuda", precision, batch, patch, 1, 1)
    network = ShuffleMixer.preset("base", 4).to("cuda")
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.activation_checkpointing = checkpointing
    lr = torch.rand(micro, 3, patch, patch, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    for _ in range(batch // micro):
        with autocast(settings):
            sr = network(lr)
        sr.float().abs().mean().backward()
    wait(settings)
    return torch.cuda.max_memory_allocated() / 2**30


def memory_table(patch: int, batch: int = 64, micro: int = 16) -> str:
    """Return the table of peak memory of base ×4 with the options that reduce it."""
    options = {
        "plain": (batch, "fp32", False),
        "bf16": (batch, "bf16", False),
        "activation checkpointing": (batch, "fp32", True),
        "bf16, activation checkpointing": (batch, "bf16", True),
        f"micro-batches of {micro}": (micro, "fp32", False),
        f"micro-batches of {micro}, bf16, activation checkpointing": (micro, "bf16", True),
    }
    rows = []
    for option, (size, precision, checkpointing) in options.items():
        torch.cuda.empty_cache()
        rows.append([option, f"{peak_memory(batch, size, precision, checkpointing, patch):.2f}"])
    return f"base ×4, batch {batch}, LR {patch} × {patch}\n\n" + table(["option", "peak, GiB"], rows)


@click.command()
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), show_default=True)
@click.option("--model", default="all", type=click.Choice(["all", *PRESETS]), show_default=True)
@click.option("--scale", "scales", default=[2, 4], multiple=True, type=click.Choice([2, 3, 4]), show_default=True)
@click.option("--precision", default="fp32", type=click.Choice(list(PRECISIONS)), show_default=True)
@click.option("--rounds", "count", default=7, show_default=True)
@click.option("--threads", type=int, help="Threads of torch.  [default: torch's own choice]")
@click.option("--batch", default=16, show_default=True)
@click.option("--patch", default=64, show_default=True, help="Side of the LR patches in pixels.")
@click.option(
    "--compiled/--no-compiled",
    default=False,
    show_default=True,
    help="Also measure torch.compile, which takes minutes.",
)
@click.option("--memory", is_flag=True, help="Measure the peak memory of base ×4 at batch 64 instead; needs CUDA.")
@click.option("--out", default=HERE / "results", type=click.Path(path_type=Path), help="Folder for the results.")
def main(
    device: str,
    model: str,
    scales: tuple[int, ...],
    precision: str,
    count: int,
    threads: int | None,
    batch: int,
    patch: int,
    compiled: bool,
    memory: bool,
    out: Path,
) -> None:
    """Time training steps and inference."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: there is no CUDA device")
    if memory:
        if device != "cuda":
            raise click.UsageError("--memory measures CUDA memory: expected --device cuda")
        print(f"{torch.cuda.get_device_name()}; {versions()}\n\n{memory_table(patch)}")
        return
    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings(device, precision, batch, patch, count, torch.get_num_threads())
    where = machine() if device == "cpu" else f"{torch.cuda.get_device_name()}; {machine()}"
    results = Results(where, versions(), settings)
    read(results, out)
    for name in PRESETS if model == "all" else [model]:
        for scale in scales:
            measure(name, scale, settings, compiled, results)
    print("\n" + write(results, out))


if __name__ == "__main__":
    main()
