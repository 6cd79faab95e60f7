"""The ops under DistributedDataParallel: two processes on halves of a batch train like one on all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from op_cases import CASES
from op_cases.case import OpCase, mapped, replaced, tensors_of
from op_cases.draw import Spec
from processes import spawn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.slow

# Without those that already return the mean of the batch: squares of means are not means of squares.
DIFFERENTIABLE = [
    case
    for case in CASES.values()
    if case.differentiable and not case.arguments(Spec(case.shapes[0])).get("mean", False)
]
PROCESSES, ROWS, STEPS = 2, 4, 2


class Loss(nn.Module):
    """The mean over the batch of what an op makes of trainable arguments."""

    def __init__(self, case: OpCase) -> None:
        super().__init__()
        self.case = case
        shape = (ROWS, 3, 5, 7) if len(case.shapes[0]) == 4 else (ROWS, *case.gradient_shape[1:])
        self.arguments = case.arguments(Spec(shape, torch.float64))
        self.shared = [name for name in case.differentiable if name in case.shared]
        self.with_rows = [name for name in self.arguments if name not in case.shared]
        self.scaled = [name for name in case.differentiable if name in self.with_rows]
        self.weights = nn.ParameterList(tensors_of(self.arguments, self.shared))
        # One factor for each element of a row, other than 1, so that each has a gradient of its own.
        factors = (t[0].detach().abs() + 0.5 for t in tensors_of(self.arguments, self.scaled))
        self.factors = nn.ParameterList(factors)

    def forward(self, first: int, last: int) -> Tensor:
        arguments = mapped(self.arguments, lambda t: t[first:last], self.with_rows)
        rows = tensors_of(arguments, self.scaled)
        products = [t * factor for t, factor in zip(rows, self.factors, strict=True)]
        arguments = replaced(arguments, self.scaled, products)
        arguments = replaced(arguments, self.shared, self.weights)
        return self.case.call_public(arguments)[0].square().mean()


class Losses(nn.Module):
    """One loss of every differentiable op."""

    def __init__(self) -> None:
        super().__init__()
        self.losses = nn.ModuleList(Loss(case) for case in DIFFERENTIABLE)

    def forward(self, first: int, last: int) -> Tensor:
        return torch.stack([loss(first, last) for loss in self.losses]).sum()


def _train(model: nn.Module, first: int, last: int) -> list[list[Tensor]]:
    """The gradients of each step."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(STEPS):
        optimiser.zero_grad()
        model(first, last).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        optimiser.step()
    return found


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # Processes meet in a file; the sockets that gloo then opens have ports of the system's choice.
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    share = ROWS // PROCESSES
    gradients = _train(DistributedDataParallel(Losses()), rank * share, (rank + 1) * share)
    torch.save(gradients, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.processes
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    spawn(_process, (str(tmp_path),), PROCESSES)
    whole = Losses()
    names = [f"{loss.case.name}: {n}" for loss in whole.losses for n, _ in loss.named_parameters()]
    expected = _train(whole, 0, ROWS)
    for rank in range(PROCESSES):
        for step, gradients in enumerate(torch.load(tmp_path / f"{rank}.pt")):
            for name, found, wanted in zip(names, gradients, expected[step], strict=True):
                assert wanted.abs().max() > 0, f"{name} has no gradient to compare"
                where = f"{name}, step {step}, rank {rank}"
                torch.testing.assert_close(found, wanted, msg=lambda m, w=where: f"{w}: {m}")
