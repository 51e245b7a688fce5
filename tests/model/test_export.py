"""ONNX export: equal values at any size, no local paths, and error messages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from helpers import ROOT

from model.enlarge import export
from model.enlarge.export import ExportError, export_onnx, largest_difference, main
from model.shufflemixer import ShuffleMixer


def network(scale: int, kernel_size: int = 3) -> ShuffleMixer:
    torch.manual_seed(scale)
    return ShuffleMixer(8, kernel_size, 1, 2, scale).eval()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("scale", [3, 4])
def test_onnxruntime_matches_torch_at_any_size(scale: int, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net = network(scale)
    torch.save({"params": net.state_dict()}, tmp_path / "weights.pt")
    result = run("--onnx", tmp_path / "new" / "net.onnx", "--checkpoint", tmp_path / "weights.pt")
    assert result.exit_code == 0, result.output
    assert "ONNX opset 18" in result.stdout
    assert "largest difference between onnxruntime and torch" in result.stdout
    data = (tmp_path / "new" / "net.onnx").read_bytes()
    assert str(ROOT).encode() not in data

    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (lr,), (hr,) = session.get_inputs(), session.get_outputs()
    assert (lr.name, lr.shape) == ("lr", ["batch", 3, "height", "width"])
    assert (hr.name, hr.shape) == ("hr", ["batch", 3, f"{scale}*height", f"{scale}*width"])
    notes = session.get_modelmeta().custom_metadata_map
    assert notes["scale"] == str(scale)
    assert notes["weights"] == "params"
    for shape in ((1, 3, 16, 16), (3, 3, 41, 27), (1, 3, 1, 5)):
        image = torch.rand(shape, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            expected = net(image).numpy()
        np.testing.assert_allclose(session.run(None, {"lr": image.numpy()})[0], expected, rtol=0, atol=1e-5)


def test_differing_export_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    net = network(2)
    onnx = export_onnx(net, {})
    assert largest_difference(net, onnx) < 1e-5
    with torch.no_grad():
        net.to_feat.weight += 0.1
    assert largest_difference(net, onnx) > 1e-3
    with pytest.raises(ExportError, match="expected a file that onnxruntime loads"):
        largest_difference(net, onnx[: len(onnx) // 2])

    torch.save(net.state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr(export, "export_onnx", lambda *_: onnx)
    result = run("--onnx", tmp_path / "net.onnx", "--checkpoint", tmp_path / "weights.pt")
    assert result.exit_code == 1
    assert "nothing written" in result.stderr
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_missing_package_is_a_one_line_error(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def find_all_but_missing(name: str, *more: Any) -> Any:
        return None if name == missing else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_all_but_missing)
    torch.save(network(2).state_dict(), tmp_path / "weights.pt")
    result = run("--onnx", tmp_path / "net.onnx", "--checkpoint", tmp_path / "weights.pt")
    assert result.exit_code == 1
    assert f"{missing}: pip install 'srshards[export]'" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "net.onnx").exists()


def test_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(network(2).state_dict(), tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("nothing")
    monkeypatch.setattr(export, "export_onnx", lambda *_: b"")
    monkeypatch.setattr(export, "largest_difference", lambda *_: 0.0)
    for arguments, code, message in (
        (["--onnx", tmp_path / "x.onnx"], 2, "--checkpoint"),
        (["--onnx", tmp_path / "x.onnx", "--checkpoint", tmp_path / "absent.pt"], 1, "absent.pt: no such file"),
        (["--onnx", tmp_path / "x.onnx", "--checkpoint", tmp_path / "text.pt"], 1, "damaged file"),
        (["--onnx", tmp_path / "text.pt" / "x", "--checkpoint", tmp_path / "weights.pt"], 1, "text.pt"),
    ):
        result = run(*arguments)
        assert result.exit_code == code
        assert message in result.stderr
        assert "Traceback" not in result.output
