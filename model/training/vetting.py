"""Checks of a checkpoint's content against what this run would write, before any of it is used.

A checkpoint may come from a stranger, and torch trusts an optimiser's state: fused Adam writes past the end of moments
that are shorter than their parameters. So only checked copies are loaded, each tensor in memory of its own with the
strides that this run uses.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model.checkpoints import CheckpointError

REQUIRED = ("network", "params", "params_ema", "iteration", "place", "optimiser", "scaler", "random")
COUNTS = ("iteration", "skipped", "skipped_in_row")
LARGEST = 1 << 53  # of a count: exact as a double, far beyond any run
LARGEST_INT = (1 << 63) - 1
MAX_TEXT = 1 << 16
# Options that change Adam's mathematics; others (fused, foreach) may differ.
ADAM = ("betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")


def check_content(
    content: Mapping[str, Any], expected: Mapping[str, Any], parameters: Sequence[Tensor]
) -> dict[str, Any]:
    """Return a checked copy of a checkpoint's content, without unknown entries.

    Args:
        content: the content of the file, with tensors on the CPU.
        expected: the content this run would write before its first step.
        parameters: the parameters of its optimiser, in order.

    Raises:
        CheckpointError: an entry is missing, out of range, or of another type, shape or dtype than expected.
    """
    for name in REQUIRED:
        if name not in content:
            raise CheckpointError(f"expected a train.py checkpoint; missing or invalid: {name!r}")
    if (network := _plain("network", content["network"])) != expected["network"]:
        raise CheckpointError(f"network: expected {expected['network']}, got {network!s:.400}")
    checked: dict[str, Any] = {}
    for name, ours in expected.items():
        if name not in content:
            continue
        theirs = content[name]
        if name in ("params", "params_ema"):
            checked[name] = _weights(name, theirs, ours)
        elif name in COUNTS:
            checked[name] = _integer(name, theirs, 0, LARGEST)
        elif name == "micro_batch":
            checked[name] = None if theirs is None else _integer(name, theirs, 1, LARGEST)
        elif name == "scaler":
            checked[name] = _scaler(name, theirs, ours)
        elif name == "place":
            checked[name] = _position(name, theirs)
        elif name != "optimiser":
            checked[name] = _tensor(name, theirs, ours) if isinstance(ours, Tensor) else _plain(name, theirs)
    checked["optimiser"] = _adam(content["optimiser"], expected["optimiser"], parameters, checked["iteration"])
    return checked


def _weights(path: str, theirs: Any, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    _keys(path, _mapping(path, theirs), ours)
    return {name: _tensor(f"{path}.{name}", theirs[name], one, _finite) for name, one in ours.items()}


def _adam(theirs: Any, ours: Mapping[str, Any], parameters: Sequence[Tensor], iteration: int) -> dict[str, Any]:
    """Return this run's parameter groups with the file's learning rates, and the states of some or all parameters."""
    _keys("optimiser", _mapping("optimiser", theirs), ("state", "param_groups"))
    groups = theirs["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(ours["param_groups"]):
        raise _mismatch("optimiser.param_groups", f"a list of {len(ours['param_groups'])}", groups)
    taken = []
    for number, (group, own) in enumerate(zip(groups, ours["param_groups"], strict=True)):
        path = f"optimiser.param_groups.{number}"
        numbers = _mapping(path, group).get("params")
        if not _all_integers(numbers) or numbers != own["params"]:
            raise _mismatch(f"{path}.params", f"0 to {len(parameters) - 1}", numbers)
        for name in ADAM:
            if name in group and name in own and _plain(f"{path}.{name}", group[name]) != own[name]:
                raise _mismatch(f"{path}.{name}", own[name], group[name])
        taken.append({**own, "lr": _number(f"{path}.lr", group.get("lr"), 0, 1e9)})
    states = {}
    for index, state in _mapping("optimiser.state", theirs["state"]).items():
        path = f"optimiser.state.{index}"
        if type(index) is not int or index >= len(parameters):
            raise _mismatch("optimiser.state", f"a parameter number from 0 to {len(parameters) - 1}", index)
        parameter = parameters[index]
        _keys(path, _mapping(path, state), ("step", "exp_avg", "exp_avg_sq"))
        step = _tensor(f"{path}.step", state["step"], torch.zeros(()))
        if not 0 <= float(step) <= iteration:  # also rejects NaN
            raise _mismatch(f"{path}.step", f"0 to {iteration}", float(step))
        states[index] = {
            "step": step,
            "exp_avg": _tensor(f"{path}.exp_avg", state["exp_avg"], parameter, _finite),
            "exp_avg_sq": _tensor(f"{path}.exp_avg_sq", state["exp_avg_sq"], parameter, _squares),
        }
    return {"state": states, "param_groups": taken}


def _scaler(path: str, theirs: Any, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return the loss scaler's state; it is empty except for fp16, and reset when the precision changes."""
    if not _mapping(path, theirs) or not ours:
        return {}
    _keys(path, theirs, ours)
    for name in ("growth_factor", "backoff_factor", "growth_interval"):
        if _plain(f"{path}.{name}", theirs[name]) != ours[name]:
            raise _mismatch(f"{path}.{name}", ours[name], theirs[name])
    scale = _number(f"{path}.scale", theirs["scale"], 2.0**-126, 2.0**127)
    tracker = _integer(f"{path}._growth_tracker", theirs["_growth_tracker"], 0, ours["growth_interval"])
    return {**ours, "scale": scale, "_growth_tracker": tracker}


def _position(path: str, theirs: Any) -> dict[str, Any]:
    """Return the position in the sample stream; `resume` compares it with this run's stream."""
    position = {name: _plain(f"{path}.{name}", value) for name, value in _mapping(path, theirs).items()}
    for name in ("sample", "length"):
        if name in position:
            _integer(f"{path}.{name}", position[name], 0, LARGEST)
    return position


def _tensor(path: str, theirs: Any, ours: Tensor, flaw_in: Callable[[Tensor], str | None] = lambda _: None) -> Tensor:
    """Return a copy on the CPU with the shape, dtype and strides of `ours`; `flaw_in` describes invalid values."""
    expected = f"{ours.dtype} {tuple(ours.shape)}"
    if not isinstance(theirs, Tensor):
        raise _mismatch(path, expected, theirs)
    if (
        theirs.layout != torch.strided
        or theirs.device.type != "cpu"
        or type(theirs) not in (Tensor, torch.nn.Parameter)
    ):
        raise CheckpointError(f"{path}: expected {expected}, got a tensor of layout {theirs.layout}")
    if theirs.dtype != ours.dtype or theirs.shape != ours.shape:
        raise CheckpointError(f"{path}: expected {expected}, got {theirs.dtype} {tuple(theirs.shape)}")
    copy = torch.empty_like(ours, device="cpu", requires_grad=False).copy_(theirs.detach())
    if (flaw := flaw_in(copy)) is not None:
        raise CheckpointError(f"{path}: {flaw}")
    return copy


def _finite(values: Tensor) -> str | None:
    whole = not values.is_floating_point() or bool(values.isfinite().all())
    return None if whole else "expected finite values, got NaN or infinity"


def _squares(values: Tensor) -> str | None:
    # Infinity is valid: the square of a large gradient.
    return None if bool((values >= 0).all()) else "expected means of squares, got negative values or NaN"


def _plain(path: str, value: Any) -> Any:
    """Return a copy of a setting: a number, a string, None, or a list or mapping of these."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _integer(path, value, -LARGEST_INT, LARGEST_INT)
    if isinstance(value, float):
        return value
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise CheckpointError(f"{path}: expected at most {MAX_TEXT} characters, got {len(value)}")
        return value
    if isinstance(value, list | tuple):
        return type(value)(_plain(f"{path}.{number}", inner) for number, inner in enumerate(value))
    return {
        name: _plain(f"{path}.{name}", inner)
        for name, inner in _mapping(path, value, "numbers, strings, lists or mappings").items()
    }


def _integer(path: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise _mismatch(path, f"a whole number from {low} to {high}", value)
    return value


def _number(path: str, value: Any, low: float, high: float) -> float:
    if type(value) not in (int, float) or not low <= value <= high:
        raise _mismatch(path, f"a number from {low:g} to {high:g}", value)
    return float(value)


def _all_integers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _mapping(path: str, value: Any, expected: str = "a mapping") -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise _mismatch(path, expected, value)
    return value


def _keys(path: str, theirs: Mapping[Any, Any], ours: Mapping[str, Any] | Sequence[str]) -> None:
    if missing := [name for name in ours if name not in theirs]:
        raise CheckpointError(f"{path}: expected {missing[0]}, got no such entry")
    if extra := [name for name in theirs if name not in ours]:
        raise CheckpointError(f"{path}: expected {len(ours)} entries, got an extra one, {str(extra[0])[:200]}")


def _mismatch(path: str, expected: object, got: object) -> CheckpointError:
    """Return an error of the form "expected X, got Y", with Y shortened."""
    if isinstance(got, Tensor):
        shown = f"a tensor of {got.dtype} {tuple(got.shape)}"
    elif got is None or isinstance(got, bool | int | float | str):
        shown = f"{got!r:.80}"
    else:
        shown = (
            f"a {type(got).__name__} of length {len(got)}"
            if isinstance(got, list | tuple | dict)
            else type(got).__name__
        )
    return CheckpointError(f"{path[:300]}: expected {expected}, got {shown}")
