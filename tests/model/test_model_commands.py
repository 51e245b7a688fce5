"""The commands of `model` with unusual files and environments: errors, left-out images, messages."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from helpers import ROOT, photograph
from PIL import Image as Pillow

from loader.errors import ShardsError
from model import run_log
from model.checkpoints import load_checkpoint
from model.enlarge import export, upscale
from model.enlarge.allocator import keep_freed_memory
from model.enlarge.export import ExportError, largest_difference
from model.enlarge.upscalers import NonFiniteError, network_upscaler
from model.evaluate import curves, evaluate
from model.evaluate.pairs import read_pairs
from model.metrics import psnr, ssim
from model.shufflemixer import ShuffleMixer
from prep.console import progress

CPU = torch.device("cpu")


def small(scale: int = 2) -> ShuffleMixer:
    torch.manual_seed(0)
    return ShuffleMixer(8, 3, 1, 2, scale)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save({"params": small().state_dict()}, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.fixture
def hr(tmp_path: Path) -> Path:
    (tmp_path / "hr").mkdir()
    for number, name in enumerate(("a", "b")):
        Pillow.fromarray(photograph(40, 50, number)).save(tmp_path / "hr" / f"{name}.png")
    return tmp_path / "hr"


def run(command: object, *arguments: object) -> Result:
    result = CliRunner().invoke(command.main, [str(argument) for argument in arguments])  # type: ignore[attr-defined]
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


# NaN and infinity


def test_scores_of_nan_are_nan() -> None:
    plane = np.full((20, 20), 7.0)
    broken = plane.copy()
    broken[3, 3] = math.nan
    assert math.isnan(psnr(plane, broken))
    assert math.isnan(ssim(plane, broken))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_output_is_an_error(value: float) -> None:
    network = small()
    torch.nn.init.constant_(network.tail.bias, value)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="expected finite output from the network, got NaN or infinity"):
        network_upscaler(network, CPU)(photograph(8, 8))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weights_are_rejected_by_every_command(
    value: float, hr: Path, weights: Path, tmp_path: Path
) -> None:
    state = small().state_dict()
    state["tail.bias"][0] = value
    torch.save(state, weights)
    for command, arguments in (
        (evaluate, ["--hr", hr, "--scale", 2]),
        (upscale, [hr / "a.png", "--out", tmp_path / "large.png"]),
        (export, ["--onnx", tmp_path / "net.onnx"]),
    ):
        result = run(command, *arguments, "--checkpoint", weights)
        assert result.exit_code == 1
        assert (
            result.stderr == f"Error: {weights}: tail.bias: expected finite weights, got NaN or infinity among them\n"
        )
        assert "mean" not in result.stdout
    assert not (tmp_path / "large.png").exists()
    assert not (tmp_path / "net.onnx").exists()


def test_overflow_error_names_the_image(hr: Path, weights: Path, tmp_path: Path) -> None:
    state = {name: value * 1e30 for name, value in small().state_dict().items()}
    torch.save(state, weights)
    result = run(evaluate, "--hr", hr, "--scale", 2, "--checkpoint", weights, "--device", "cpu")
    assert result.exit_code == 1
    assert "Error: image a: expected finite output from the network, got NaN or infinity" in result.stderr
    result = run(upscale, hr / "a.png", "--checkpoint", weights, "--out", tmp_path / "large.png")
    assert result.exit_code == 1
    assert f"Error: {hr / 'a.png'}: expected finite output from the network" in result.stderr
    assert not (tmp_path / "large.png").exists()


def test_export_rejects_non_finite_output() -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    network, broken = small(), small()
    exported = export.export_onnx(network, {})
    for value in (math.nan, math.inf):
        torch.nn.init.constant_(broken.tail.bias, value)  # type: ignore[arg-type]
        with pytest.raises(ExportError, match="got NaN or infinity from torch"):
            largest_difference(broken, exported)
    model = onnx.load_from_string(exported)
    (bias,) = (one for one in model.graph.initializer if one.name == "tail.bias")
    bias.raw_data = np.full(3, np.nan, np.float32).tobytes()
    with pytest.raises(ExportError, match="got NaN or infinity from onnxruntime"):
        largest_difference(network, model.SerializeToString())


# evaluate


def test_small_images_are_left_out_of_the_mean(hr: Path) -> None:
    before = run(evaluate, "--hr", hr, "--scale", 2, "--bicubic").stdout.splitlines()
    Pillow.fromarray(photograph(12, 40)).save(hr / "aa.png")
    Pillow.fromarray(photograph(1, 1)).save(hr / "c.png")
    result = run(evaluate, "--hr", hr, "--scale", 2, "--bicubic")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == before
    assert result.stderr.splitlines() == [
        "image aa left out: SSIM needs 11 x 11 pixels inside a border of 2, got 12 x 40",
        "image c left out: expected at least 2 x 2 pixels, got 1 x 1",
        "mean of 2 images; 2 left out as too small",
    ]
    facts = json.loads(run(evaluate, "--hr", hr, "--scale", 2, "--bicubic", "--json").stdout)
    assert list(facts["left_out"]) == ["aa", "c"]
    assert list(facts["images"]) == ["a", "b"]
    for name in ("a", "b"):
        (hr / f"{name}.png").unlink()
    result = run(evaluate, "--hr", hr, "--scale", 2, "--bicubic")
    assert result.exit_code == 1
    assert "expected at least one image that can be scored, got 2 that are too small" in result.stderr
    assert "mean" not in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sheet", "folder.png"], "folder.png: expected a regular file or a new path, got a folder"),
        (["--sheet", "pipe.png"], "pipe.png: expected a regular file or a new path"),
        (["--sheet", "hr/sheet.png"], "hr/sheet.png: expected a path outside the input hr"),
        (["--sheet", "weights.pt/sheet.png"], "weights.pt: File exists"),
        (["--sheet", "sheet.jpg"], "expected a name that ends in .png, got 'sheet.jpg'"),
        (["--sheet", "/proc/sheet.png"], "/proc: "),
        (["--save", "/proc/self"], "/proc/self: "),
    ],
)
def test_outputs_are_checked_first(
    flags: list[str], message: str, hr: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.setattr(evaluate, "open_network", None)  # must not be reached
    result = run(evaluate, "--hr", "hr", "--scale", 2, "--checkpoint", "weights.pt", *flags)
    assert result.exit_code in (1, 2)
    assert message in result.stderr


def test_lr_files_may_have_the_names_of_hr(hr: Path, tmp_path: Path) -> None:
    lr = tmp_path / "lr"
    for folder in (lr, lr / "X2"):
        folder.mkdir()
        for name in ("a", "b"):
            Pillow.fromarray(photograph(20, 25, ord(name))).save(folder / f"{name}.png")
        pairs = list(read_pairs(hr, lr, 2))
        assert [pair.name for pair in pairs] == ["a", "b"]
        assert np.array_equal(pairs[1].lr, photograph(20, 25, ord("b")))
    Pillow.fromarray(photograph(20, 25, 99)).save(lr / "X2" / "c.png")
    with pytest.raises(ShardsError, match="no HR image"):
        list(read_pairs(hr, lr, 2))


def test_equal_names_match_in_any_normal_form(tmp_path: Path) -> None:
    for folder, name, size in (("hr", "\u00fc", 40), ("lr", "u\u0308", 20)):
        (tmp_path / folder).mkdir()
        Pillow.fromarray(photograph(size, size)).save(tmp_path / folder / f"{name}.png")
    (pair,) = read_pairs(tmp_path / "hr", tmp_path / "lr", 2)
    assert np.array_equal(pair.lr, photograph(20, 20))


def test_hr_names_may_look_like_lr_names(tmp_path: Path) -> None:
    for folder, size in (("hr", 40), ("lr", 20)):
        (tmp_path / folder).mkdir()
        for name in ("a", "ax2"):
            Pillow.fromarray(photograph(size, size, len(name))).save(tmp_path / folder / f"{name}.png")
    pairs = {pair.name: pair.lr for pair in read_pairs(tmp_path / "hr", tmp_path / "lr", 2)}
    assert np.array_equal(pairs["ax2"], photograph(20, 20, 3))


def test_control_characters_in_names_are_escaped(hr: Path, weights: Path) -> None:
    (hr / "a.png").rename(hr / "\x1b[31ma.png")
    result = run(evaluate, "--hr", hr, "--scale", 2, "--bicubic")
    assert result.exit_code == 0
    assert r"\x1b[31ma " in result.stdout
    for command in (evaluate, upscale):
        flags = ["--hr", hr, "--scale", 2] if command is evaluate else [hr]
        output = run(command, *flags, "--checkpoint", weights).output
        assert "\x1b" not in output
    (hr / "\x1b[31ma.png").write_text("nothing")
    assert "\x1b" not in run(upscale, hr, "--checkpoint", weights, "--overwrite").stderr


# upscale


def test_failed_picture_does_not_block_its_namesake(hr: Path, weights: Path) -> None:
    (hr / "a.jpg").write_bytes((hr / "a.png").read_bytes()[:500])
    result = run(upscale, hr, "--checkpoint", weights)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {hr / 'a.jpg'}: expected")
    assert result.stderr.count("\n") == 1
    assert (hr / "a_x2.png").exists()


def test_unsupported_output_formats_are_not_taken_for_folders(hr: Path, weights: Path, tmp_path: Path) -> None:
    result = run(upscale, hr / "a.png", "--checkpoint", weights, "--out", tmp_path / "b.gif")
    assert result.exit_code == 2
    assert "b.gif: expected a folder, or a name that ends in one of .png" in result.stderr
    assert not (tmp_path / "b.gif").exists()
    assert run(upscale, hr / "a.png", "--checkpoint", weights, "--out", tmp_path / "v1.5").exit_code == 0
    assert (tmp_path / "v1.5" / "a_x2.png").exists()


def test_checkpoint_is_never_replaced(hr: Path, weights: Path) -> None:
    target = weights.rename(hr / "b_x2.png")
    result = run(upscale, hr / "b.png", "--checkpoint", target, "--overwrite")
    assert result.exit_code == 1
    assert "is an input file" in result.stderr
    result = run(export, "--onnx", target, "--checkpoint", target)
    assert result.exit_code == 1
    assert "expected a path outside the input" in result.stderr
    assert load_checkpoint(target).weights_key == "params"


def test_progress_is_printed_without_a_terminal(
    hr: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    flags = ["--checkpoint", weights, "--out", tmp_path / "b.png", "--tile", 20]
    result = run(upscale, hr / "a.png", *flags)
    assert result.exit_code == 0
    assert [line.partition(",")[0] for line in result.stderr.splitlines()] == [f"{n}/6 tiles" for n in range(1, 7)]


def test_freed_memory_is_kept() -> None:
    """Freed large arrays are reused without page faults."""
    code = """if True:
        import resource
        import numpy as np
        from model.enlarge.allocator import keep_freed_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                np.ones(12 << 20)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        before = faults()
        keep_freed_memory()
        faults()
        print(before, faults())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    before, after = map(int, done.stdout.split())
    assert after <= before // 10
    keep_freed_memory()


# curves


def test_malformed_logs_are_rejected(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    good = '{"iteration": 1, "loss": 0.5}\n'
    log.write_text(
        good + "[" * 200_000 + "\n" + '{"a":' * 9000 + "\n" + '{"iteration": 2, "loss": null}\n' + "x" * 99999
    )
    assert curves.read_curves(log).loss == {1: 0.5}
    for line, message in (
        ('{"iteration": 1, "loss": 1' + "0" * 400 + "}", "loss: expected a number, got a value of type int"),
        ('{"iteration": 1' + "0" * 400 + ', "loss": 1}', "iteration: expected a whole number, got a value of type int"),
        ('{"iteration": "\\u001b[31m", "loss": 1}', "iteration: expected a whole number, got "),
        ('{"iteration": {}, "loss": 1}', "iteration: expected a whole number, got a value of type dict"),
    ):
        log.write_text(good + line + "\n")
        result = run(curves, log, "--out", tmp_path / "c.png")
        assert result.exit_code == 1
        assert message in result.stderr
        assert "\x1b" not in result.stderr
    os.truncate(log, run_log.MAX_LOG + 1)
    assert "more than" in run(curves, log, "--out", tmp_path / "c.png").stderr
    log.unlink()
    os.mkfifo(log)
    assert "a pipe" in run(curves, log, "--out", tmp_path / "c.png").stderr
    assert not (tmp_path / "c.png").exists()


def test_labels_are_not_parsed_as_formulas(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a$\\frac{$", "$x$"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"iteration": 1, "loss": 0.5, "psnr_y": 20}\n')
    result = run(curves, tmp_path / "a$\\frac{$", tmp_path / "$x$", "--out", tmp_path / "c.png")
    assert result.exit_code == 0, result.output


# Unix conventions

COMMANDS = {
    "evaluate": ["--hr", "hr", "--scale", "2", "--bicubic"],
    "upscale": ["hr/a.png", "--checkpoint", "weights.pt", "--overwrite"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_full_devices_and_closed_streams(command: str, hr: Path, weights: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", f"model.{command}", *COMMANDS[command]]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    script = '"$@" >/dev/full; echo $?; "$@" 2>&- >/dev/null; echo $?'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["1", "0"]
    assert done.stderr == "Error: standard output: No space left on device\n"


def test_closed_pipe_ends_the_command(hr: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "model.evaluate", *COMMANDS["evaluate"]]
    done = subprocess.run(
        words,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
        check=False,
    )
    os.close(writing)
    assert done.returncode == -signal.SIGPIPE
    assert done.stderr == ""
