"""Export a network to ONNX: `python -m model.export --onnx FILE --checkpoint FILE`.

The exported network maps `lr`, float32 (batch, 3, height, width), RGB in [0, 1], to `hr`, float32
(batch, 3, height·scale, width·scale), not clamped; batch, height and width are dynamic. If onnxruntime is installed,
its output is compared with torch's before the file is written.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import torch

from loader.errors import ShardsError, one_line
from loader.system.safefile import write_atomically
from model.enlarge.networks import describe, open_network
from model.enlarge.options import Weights, weights_option
from model.enlarge.outputs import check_output
from model.shufflemixer import ShuffleMixer
from prep.console.errors import errors_as_messages
from prep.console.paths import GivenPath
from prep.console.unix import UnixCommand

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 18  # the lowest that torch's exporter supports for Resize; in runtimes since 2023
PACKAGES = ("onnx", "onnxscript")
CHECKED_SHAPES = ((1, 3, 17, 31), (2, 3, 40, 24))
TOLERANCE = 1e-4  # for values in [0, 1]: both compute in float32, but in different orders


class ExportError(ShardsError):
    """A failed export, or one whose values differ from the network's; the message is one line."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def export_onnx(network: ShuffleMixer, notes: Mapping[str, str]) -> bytes:
    """Return `network`, which must be on the CPU, as an ONNX file with `notes` as metadata.

    Raises ExportError if a required package is not installed.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ExportError(f"export needs {' and '.join(missing)}: pip install 'srshards[export]'")
    names = {0: "batch", 2: "height", 3: "width"}
    network = network.eval()
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            network,
            (torch.rand(2, 3, 24, 40),),  # distinct sizes above 1: the exporter may merge equal ones
            dynamo=True,
            opset_version=OPSET,
            input_names=["lr"],
            output_names=["hr"],
            dynamic_shapes=({axis: torch.export.Dim(name) for axis, name in names.items()},),
            verbose=False,
        )
    assert program is not None
    model: ModelProto = program.model_proto
    _forget_sources(model)
    for axis, name in names.items():
        factor = network.config.scale if axis > 1 else 1
        model.graph.output[0].type.tensor_type.shape.dim[axis].dim_param = f"{factor}*{name}" if factor > 1 else name
    for key, value in notes.items():
        model.metadata_props.add(key=key, value=value)
    data: bytes = model.SerializeToString()
    return data


def largest_difference(network: ShuffleMixer, onnx: bytes) -> float:
    """Return the largest absolute difference between torch and onnxruntime on random images of several sizes.

    Needs onnxruntime. Raises ExportError if it cannot load the file, if the shapes differ, or if either output has
    NaN or infinity.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base class
        raise ExportError(f"expected a file that onnxruntime loads, got {type(error).__name__}: {error}") from error
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for shape in CHECKED_SHAPES:
        lr = torch.rand(shape, generator=generator)
        with torch.inference_mode():
            expected = network.eval()(lr).numpy()
        (got,) = session.run(["hr"], {"lr": lr.numpy()})
        if got.shape != expected.shape:
            raise ExportError(f"expected shape {expected.shape} from onnxruntime for input {shape}, got {got.shape}")
        for what, values in (("torch", expected), ("onnxruntime", got)):
            if not np.isfinite(values).all():
                raise ExportError(f"expected finite output from the network, got NaN or infinity from {what}")
        largest = max(largest, float(np.abs(got - expected).max()))
    return largest


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about missing optional packages and its own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*LeafSpec", FutureWarning)
            yield
    finally:
        log.setLevel(level)


def _forget_sources(model: ModelProto) -> None:
    """Remove the stack traces, with local paths, that torch attaches to every node."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


@click.command(cls=UnixCommand)
@click.option("--onnx", "path", type=GivenPath(), required=True, help="ONNX file to write.")
@click.option("--checkpoint", type=GivenPath(), required=True, help="Checkpoint of the network.")
@weights_option
def main(path: Path, checkpoint: Path, weights: Weights) -> None:
    """Export a network to ONNX with dynamic batch, height and width."""
    with errors_as_messages():
        check_output(path, [checkpoint])
        loaded, network = open_network(checkpoint, weights)
        notes = {"scale": str(loaded.config.scale), "weights": loaded.weights_key, "network": str(loaded.config)}
        click.echo(describe(loaded, network))
        onnx = export_onnx(network, notes)
        if importlib.util.find_spec("onnxruntime") is None:
            checked = "not compared with torch: onnxruntime is not installed (pip install 'srshards[export]')"
        else:
            difference = largest_difference(network, onnx)
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"expected a difference of at most {TOLERANCE} from torch, got {difference:.2e} by onnxruntime; "
                    "nothing written"
                )
            checked = f"largest difference between onnxruntime and torch {difference:.2e}"
        write_atomically(path, onnx)
    click.echo(f"{one_line(str(path))}: ONNX opset {OPSET}, {len(onnx)} bytes, {checked}")
