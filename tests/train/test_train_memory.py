"""Running out of memory: in a step, in the search for a micro-batch, in validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build, write_image
from torch import nn
from trainings import invoke, last

from loader import ShardsError
from model.device import is_out_of_memory
from model.enlarge.upscalers import network_upscaler
from model.metrics import WINDOW
from model.shufflemixer import ShuffleMixer
from model.training import validation
from model.training.memory import fits_in_memory
from model.training.validation import fitting_upscaler, open_validation

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


def limit(monkeypatch: pytest.MonkeyPatch, pixels: int, error: Exception) -> list[tuple[int, int]]:
    """Make networks fail on inputs with more pixels; return the list of input sizes, which grows with each call."""
    forward, taken = ShuffleMixer.forward, []

    def limited(self: ShuffleMixer, lr: torch.Tensor) -> torch.Tensor:
        if lr.device.type != "meta" and lr.shape[0] * lr.shape[2] * lr.shape[3] > pixels:
            raise error
        taken.append((lr.shape[2], lr.shape[3]))
        return forward(self, lr)

    monkeypatch.setattr(ShuffleMixer, "forward", limited)
    return taken


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_out_of_memory_in_a_step_suggests_flags(
    error: Exception, training_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_out_of_memory(error)
    limit(monkeypatch, 2 * 12 * 12 - 1, error)
    result = invoke(training_shards, tmp_path / "a")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "iteration 1: out of memory for a micro-batch of 2 samples of 12 × 12 LR pixels in fp32" in result.stderr
    for flag in ("--micro-batch", "--activation-checkpointing", "--precision", "--lr-patch"):
        assert flag in result.stderr
    assert invoke(training_shards, tmp_path / "b", "--micro-batch", 1).exit_code == 0
    assert not fits_in_memory(lambda _: (_ for _ in ()).throw(error), CPU)(1)


def test_torchs_out_of_memory_error_is_recognised() -> None:
    """Torch's actual error for CPU memory."""
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_out_of_memory_in_the_loader_is_a_one_line_error(
    training_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __next__(self) -> None:
            raise MemoryError

    monkeypatch.setattr("train.PatchLoader.__iter__", lambda self: Full())
    result = invoke(training_shards, tmp_path / "a")
    assert result.exit_code == 1
    assert result.stderr == "Error: out of memory\n"


def noise(height: int, width: int) -> Any:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("error", [ERRORS[0], ERRORS[1]])
def test_images_too_large_for_memory_are_validated_in_tiles(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    network, image = ShuffleMixer.preset("tiny", 2), noise(150, 230)
    whole = network_upscaler(network, CPU)(image)
    notes: list[str] = []
    taken = limit(monkeypatch, 120 * 120, error)
    upscale = fitting_upscaler(network, CPU, notes.append)
    for _ in range(2):
        assert np.abs(upscale(image).astype(int) - whole).max() <= 1
    assert len(taken) == 8  # two images of four tiles
    assert len(notes) == 1
    assert "in tiles of" in notes[0]
    assert np.array_equal(upscale(image[:90, :100]), network_upscaler(network, CPU)(image[:90, :100]))
    limit(monkeypatch, 10, error)
    with pytest.raises(MemoryError, match="out of memory for a validation image of 150 × 230 LR pixels"):
        upscale(image)


def test_cpu_memory_is_estimated_before_enlarging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux overcommits memory and kills processes that use it: images that seem too large go straight to tiles."""
    network, image = ShuffleMixer.preset("tiny", 2), noise(150, 230)
    whole = network_upscaler(network, CPU)(image)
    taken = limit(monkeypatch, 1 << 40, ERRORS[0])
    monkeypatch.setattr(validation, "available_memory", lambda: 60 << 20)
    assert np.abs(fitting_upscaler(network, CPU, lambda _: None)(image).astype(int) - whole).max() <= 1
    assert max(height * width for height, width in taken) * 32 * 4 * 4 * 6 <= 60 << 20


def test_a_network_of_unknown_receptive_field_is_never_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles would change its result; the memory estimate may be wrong."""
    network = ShuffleMixer.preset("tiny", 2)
    network.blocks[0] = nn.AdaptiveAvgPool2d(20)
    lr, notes = noise(20, 20), list[str]()
    expected = fitting_upscaler(network, CPU, notes.append)(lr)
    monkeypatch.setattr(validation, "available_memory", lambda: 1)
    assert (fitting_upscaler(network, CPU, notes.append)(lr) == expected).all()
    assert not notes


def test_other_errors_of_a_network_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 1, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        fitting_upscaler(ShuffleMixer.preset("tiny", 2), CPU, lambda _: None)(noise(20, 20))


def test_validation_images_too_small_to_score_are_reported_before_training(
    training_shards: Path, tmp_path: Path
) -> None:
    """SSIM's window of 11 inside a border of 2 needs sides of 15 pixels; sides are multiples of the scale."""
    for name, side in (("fits", 16), ("small", 14)):
        write_image(tmp_path / name / f"{name}.png", noise(side, 40))
        write_image(tmp_path / name / "large.png", noise(40, 40))
        build(tmp_path / name, tmp_path / f"{name}-shards", scales=(2,))
    result = invoke(training_shards, tmp_path / "a", "--valid-shards", tmp_path / "small-shards")
    assert result.exit_code == 1
    text = f"expected validation images of at least 15 × 15 pixels (SSIM's window of {WINDOW} inside a border of 2)"
    assert text in result.stderr
    assert result.stderr.endswith("got 1 of 2 smaller: small\n")
    assert not (tmp_path / "a").exists()
    result = invoke(training_shards, tmp_path / "b", "--valid-shards", tmp_path / "fits-shards", "--iterations", 1)
    assert result.exit_code == 0, result.output
    assert last(tmp_path / "b")["iteration"] == 1
    with pytest.raises(ShardsError, match="scale"):
        open_validation(str(tmp_path / "fits-shards"), 4)
