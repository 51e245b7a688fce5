"""Checkpoints from other runs or strangers: only content that this run would write is used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.checkpoints import CheckpointError
from model.training.ranks import Ranks
from model.training.settings import Config
from model.training.state import State, from_checkpoint, new_state, to_checkpoint
from model.training.vetting import check_content

CONFIG = Config(shards="s", scale=2, out="o", micro_batch="auto")
RANKS = Ranks(0, 1, torch.device("cpu"))
PLACE = {"sample": 128, "seed": 0, "length": 7}


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """The content of a checkpoint after two steps."""
    state = new_state(CONFIG, RANKS)
    for _ in range(2):
        state.optimiser.zero_grad()
        state.forward(torch.rand(1, 3, 6, 6)).square().mean().backward()
        state.optimiser.step()
        state.iteration += 1
    state.micro_batch = 16
    return to_checkpoint(state, PLACE, CONFIG, RANKS)


def fresh() -> State:
    return new_state(CONFIG, RANKS)


def check(content: dict[str, Any], state: State) -> dict[str, Any]:
    return check_content(content, to_checkpoint(state, {}, CONFIG, RANKS), list(state.network.parameters()))


def test_own_checkpoints_are_restored(trained: dict[str, Any]) -> None:
    state = fresh()
    checked = check(trained, state)
    assert checked.keys() == trained.keys()
    for name in ("params", "params_ema"):
        assert all(torch.equal(value, trained[name][key]) for key, value in checked[name].items())
    for index, moments in trained["optimiser"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(checked["optimiser"]["state"][index][name], value)
    assert from_checkpoint(trained, state, CONFIG, RANKS) == PLACE
    assert (state.iteration, state.micro_batch) == (2, 16)


def test_moments_get_the_strides_of_the_weights(trained: dict[str, Any]) -> None:
    """Fused Adam reads weights and moments in memory order."""
    other = copy.deepcopy(trained)
    for moments in other["optimiser"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"].contiguous()
    state = fresh()
    from_checkpoint(other, state, CONFIG, RANKS)
    for parameter, moments in state.optimiser.state.items():
        assert moments["exp_avg"].stride() == parameter.stride()
    for index, moments in enumerate(state.optimiser.state.values()):
        assert torch.equal(moments["exp_avg"], trained["optimiser"]["state"][index]["exp_avg"])


def test_tensors_that_share_memory_are_separated(trained: dict[str, Any]) -> None:
    other = copy.deepcopy(trained)
    other["params_ema"] = other["params"]
    other["optimiser"]["state"][0]["exp_avg"] = other["optimiser"]["state"][0]["exp_avg_sq"]
    state = fresh()
    from_checkpoint(other, state, CONFIG, RANKS)
    first = next(iter(state.optimiser.state.values()))
    assert first["exp_avg"].data_ptr() != first["exp_avg_sq"].data_ptr()


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        inner: Any = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value(inner[path[-1]]) if callable(value) else value

    change.__name__ = ".".join(map(str, path))
    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        inner: Any = content
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]

    change.__name__ = "without " + ".".join(map(str, path))
    return change


def with_nan(value: Tensor) -> Tensor:
    value = value.clone()
    value.view(-1)[0] = float("nan")
    return value


STATE, GROUP = ("optimiser", "state"), ("optimiser", "param_groups", 0)
HOSTILE: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (put(*STATE, 3, "exp_avg", value=torch.zeros(1)), r"optimiser.state.3.exp_avg: expected torch.float32 \(.*\(1,\)"),
    (put(*STATE, 3, "exp_avg_sq", value=torch.zeros(())), r"optimiser.state.3.exp_avg_sq: expected"),
    (put(*STATE, 3, "exp_avg", value=lambda t: t.double()), "expected torch.float32 .*, got torch.float64"),
    (put(*STATE, 3, "exp_avg", value=lambda t: t.flatten()), "optimiser.state.3.exp_avg"),
    (put(*STATE, 3, "exp_avg", value=lambda t: t.to_sparse()), "layout torch.sparse_coo"),
    (put(*STATE, 3, "exp_avg", value=lambda t: t.to("meta")), "optimiser.state.3.exp_avg"),
    (put(*STATE, 3, "exp_avg", value=with_nan), "exp_avg: expected finite values, got NaN"),
    (put(*STATE, 3, "exp_avg_sq", value=lambda t: t - 1), "got negative values"),
    (put(*STATE, 3, "exp_avg", value=7), "expected torch.float32 .*, got 7"),
    (put(*STATE, 3, "step", value=3), "step: expected torch.float32"),
    (put(*STATE, 3, "step", value=torch.tensor(-1.0)), "step: expected 0 to 2, got -1.0"),
    (put(*STATE, 3, "step", value=torch.tensor(float("nan"))), "step: expected 0 to 2, got nan"),
    (put(*STATE, 3, "step", value=torch.zeros(3)), "step: expected torch.float32"),
    (put(*STATE, 3, "max_exp_avg_sq", value=torch.zeros(1)), "got an extra one, max_exp_avg_sq"),
    (put(*STATE, 99999, value={}), "optimiser.state: expected a parameter number from 0 to .*, got 99999"),
    (put(*STATE, "a", value={}), "optimiser.state: expected a parameter"),
    (put(*STATE, value=[]), "optimiser.state: expected a mapping, got a list of length 0"),
    (drop(*STATE, 3, "exp_avg"), "optimiser.state.3: expected exp_avg, got no such entry"),
    (put(*GROUP, "params", value=lambda n: n[::-1]), "param_groups.0.params: expected 0 to"),
    (put(*GROUP, "params", value=lambda n: [*n, 0]), "param_groups.0.params: expected 0 to"),
    (put(*GROUP, "params", value=lambda n: [False, True, *n[2:]]), "param_groups.0.params: expected 0 to"),
    (put(*GROUP, "lr", value=torch.ones(1)), "param_groups.0.lr: expected a number"),
    (put(*GROUP, "lr", value=float("nan")), "param_groups.0.lr: expected a number from 0 to 1e\\+09, got nan"),
    (put(*GROUP, "betas", value=(2.0, float("inf"))), r"param_groups.0.betas: expected \(0.9, 0.99\)"),
    (put(*GROUP, "eps", value=0.0), "param_groups.0.eps: expected 1e-08"),
    (put(*GROUP, "amsgrad", value=True), "param_groups.0.amsgrad: expected False, got True"),
    (put("optimiser", "param_groups", value=[]), "param_groups: expected a list of 1"),
    (put("params", "tail.bias", value=torch.zeros(1)), r"params.tail.bias: expected torch.float32 \(3,\)"),
    (put("params", "tail.bias", value=with_nan), "params.tail.bias: expected finite values"),
    (put("params", "\x1b[31m", value=torch.zeros(1)), r"params: .*got an extra one, \\x1b\[31m"),
    (put("params_ema", "tail.bias", value=torch.zeros(3).int()), "params_ema.tail.bias"),
    (drop("params_ema", "tail.bias"), "params_ema: expected tail.bias, got no such entry"),
    (put("random", value=torch.zeros(3, dtype=torch.uint8)), r"random: expected torch.uint8 \(5056,\)"),
    (put("random", value=lambda t: torch.full_like(t, 255)), "mt19937"),
    (put("iteration", value=-1), "iteration: expected a whole number from 0 to"),
    (put("iteration", value=True), "iteration: expected a whole number from 0 to .*, got True"),
    (put("iteration", value=2.0), "iteration: expected a whole number"),
    (put("iteration", value=1 << 60), "iteration: expected a whole number"),
    (put("skipped", value="1"), "skipped: expected a whole number"),
    (put("micro_batch", value=0), "micro_batch: expected a whole number from 1"),
    (put("micro_batch", value=torch.ones(1)), "micro_batch: expected a whole number from 1"),
    (put("place", "sample", value=-4), "place.sample: expected a whole number"),
    (put("place", "sample", value=1 << 62), "place.sample: expected a whole number"),
    (put("place", "sample", value=None), "place.sample: expected a whole number"),
    (put("place", value=3), "place: expected a mapping, got 3"),
    (put("network", "features", value=1 << 40), "network: expected"),
    (put("config", "seed", value=1 << 70), "config.seed: expected a whole number"),
    (put("config", "out", value="x" * 100_000), "config.out: expected at most 65536 characters"),
    (put("config", "out", value=torch.ones(1)), "config.out: expected numbers, strings"),
    (drop("optimiser"), "missing or invalid: 'optimiser'"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=lambda value: getattr(value, "__name__", ""))
def test_invalid_content_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, trained: dict[str, Any]
) -> None:
    content = copy.deepcopy(trained)
    change(content)
    state = fresh()
    before = copy.deepcopy(state.network.state_dict())
    with pytest.raises(CheckpointError, match=message) as caught:
        from_checkpoint(content, state, CONFIG, RANKS)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500
    if "mt19937" not in message:
        assert all(torch.equal(value, before[name]) for name, value in state.network.state_dict().items())
        assert not state.optimiser.state
