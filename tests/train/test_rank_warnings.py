"""Training on several ranks emits no warnings: gradients have the strides that DDP expects."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from trainings import command, finish, start

ONE_RANK = """
import sys, warnings
import torch
from torch import distributed, nn
from model.training.ranks import Ranks

class Odd(torch.autograd.Function):
    "A gradient with unusual strides along dimensions of size 1, as some CUDA operators return them."
    @staticmethod
    def forward(ctx, weight):
        return weight * 2
    @staticmethod
    def backward(ctx, slope):
        return torch.empty_strided(slope.shape, (1, 3, 7, 11)).copy_(slope)

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 1, 1, 1))
    def forward(self, x):
        return x * Odd.apply(self.weight)

warnings.simplefilter("error")
distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
network = Scaled()
wrapped = Ranks(0, 2, torch.device("cpu")).wrap(network)
for _ in range(3):
    network.zero_grad()
    torch.autograd.backward(wrapped(torch.ones(1)).sum())
    assert network.weight.grad.tolist() == [[[[1.0]]]] * 8
    assert network.weight.grad.stride() == network.weight.stride()
distributed.destroy_process_group()
"""


@pytest.mark.parametrize(("model", "kernels"), [("tiny", "1"), ("base", "1"), ("base", "0")])
def test_ddp_does_not_complain(model: str, kernels: str, training_shards: Path, tmp_path: Path) -> None:
    flags = ["--model", model, "--iterations", 2, "--log-every", 1, "--valid-shards", training_shards]
    words = command(training_shards, tmp_path / "a", *flags)
    torchrun = [words[0], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = finish(start([*torchrun, *words[1:]], SRSHARDS_KERNELS=kernels))[0]
    assert "iteration 2/2" in output
    assert not re.search(r"\bwarn|Warning", output), output


def test_gradients_get_the_strides_of_their_weights(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", ONE_RANK, str(tmp_path / "meet")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (run.returncode, run.stderr) == (0, "")
