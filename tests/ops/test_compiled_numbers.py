"""Ops and losses in torch.compile, one graph each, while their numbers change: schedules, warm-ups, sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadv import losses, ops
from fastadv.ops.registry import REGISTRY
from fastadv.ops.traced import SUFFIX, traced_schema

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# More than torch.compile takes for constants before it gives up.
NUMBERS = (0.5, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 0.25, 0.35)

torch.manual_seed(0)
X, GRAD = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
ADV = (X + 0.05 * GRAD).clamp(0, 1)
A, B, C, Y = torch.randn(4, 10), torch.randn(4, 10), torch.randn(4, 10), torch.arange(4)
SCALE = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
FEATURES, TEACHER, DISTANCE = torch.randn(4, 6, 2, 2), torch.randn(4, 6, 2, 2), torch.rand(4)

Call = Callable[[float], Tensor]
OPS: dict[str, Call] = {
    "pgd_step both": lambda v: ops.pgd_step(ADV, GRAD, X, eps=v, alpha=v / 4),
    "pgd_step l2": lambda v: ops.pgd_step(ADV, GRAD, X, eps=v, alpha=v / 4, norm="l2"),
    "pgd_step sparsity": lambda v: ops.pgd_step(ADV, GRAD, X, 2.0, 1.0, "l1", sparsity=v),
    "pgd_step bounds": lambda v: ops.pgd_step(ADV, GRAD, X, 0.1, 0.05, bounds=(-v, 1 + v)),
    "pgd_step_": lambda v: ops.pgd_step_(ADV.clone(), GRAD, X, eps=v, alpha=0.01),
    "pgd_step per channel": lambda v: ops.pgd_step(
        ADV, GRAD, X, v * SCALE, v / 4, bounds=(-v, 1 + SCALE)
    ),
    "random_start per channel": lambda v: ops.random_start(X, v * SCALE, bounds=(-v, 1), seed=0),
    "random_start": lambda v: ops.random_start(X, v, seed=0),
    "noisy_replay tau": lambda v: ops.noisy_replay(X, ADV, DISTANCE, v, 0.1, seed=0),
    "noisy_replay eps": lambda v: ops.noisy_replay(X, ADV, DISTANCE, 0.5, v, seed=0),
    "replay_mask": lambda v: torch.stack(
        [t.double() for t in ops.replay_mask(FEATURES, TEACHER, v)]
    ),
    "momentum_update_": lambda v: ops.momentum_update_(GRAD.clone(), ADV, v),
}
Loss = Callable[[Tensor, Tensor, float], Tensor]
LOSSES: dict[str, Loss] = {
    "cross_entropy": lambda a, b, v: losses.cross_entropy(a, Y, label_smoothing=v),
    "kl": lambda a, b, v: losses.kl(a, b, temperature=v),
    "kd": lambda a, b, v: losses.kd(a, b, v),
    "trades": lambda a, b, v: losses.trades(a, b, Y, v),
    "mart": lambda a, b, v: losses.mart(a, b, Y, v),
    "mart of the code": lambda a, b, v: losses.mart(a, b, Y, v, code_constants=True),
    "alp": lambda a, b, v: losses.alp(a, b, Y, v, reduction="none").square().sum(),
    "act alpha": lambda a, b, v: sum(losses.act(a, b, Y, v), torch.zeros(())),
    "act temperature": lambda a, b, v: losses.act(a, b, Y, 0.5, v).robust,
    "hat beta": lambda a, b, v: losses.hat(a, b, C, Y, Y, v),
    "hat gamma": lambda a, b, v: losses.hat(a, b, C, Y, Y, 1.0, v),
    "lbgat": lambda a, b, v: losses.lbgat(a, b, Y, C, v),
    "lbgat from 0": lambda a, b, v: losses.lbgat(a, b, Y, C, v - 0.1),
    "arrest": lambda a, b, v: losses.arrest(a, Y, FEATURES, TEACHER, v),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _ways(names: list[str], dynamic: tuple[str, ...]) -> list[Any]:
    """Every name with a second graph, of a number that changes; some names have it as their first graph too."""
    found = [pytest.param(name, None, id=name) for name in names]
    return found + [pytest.param(name, True, id=f"{name}, dynamic") for name in dynamic]


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("name", "dynamic"), _ways(list(OPS), ("pgd_step both", "pgd_step per channel", "replay_mask"))
)
def test_an_op_goes_on_when_its_number_changes(name: str, dynamic: bool | None) -> None:
    call = OPS[name]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for number in NUMBERS:
        assert torch.equal(compiled(number), call(number)), number
    assert graphs() <= 2  # one for the first number, one for all others


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("name", "dynamic"), _ways(list(LOSSES), ("trades", "act alpha", "arrest"))
)
def test_a_loss_and_its_gradients_go_on_when_its_number_changes(
    name: str, dynamic: bool | None
) -> None:
    loss = LOSSES[name]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)

    def value_and_gradients(function: Loss, number: float) -> list[Tensor | None]:
        a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
        value = function(a, b, number)
        value.backward()
        return [value.detach(), a.grad, b.grad]

    for number in NUMBERS:
        found, wanted = (value_and_gradients(f, number) for f in (compiled, loss))
        for mine, theirs in zip(found, wanted, strict=True):
            assert (mine is None and theirs is None) or torch.equal(mine, theirs), number
    assert graphs() <= 2


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["trades", "kl", "hat gamma", "lbgat"])
def test_integers_are_numbers_too(name: str) -> None:
    loss = LOSSES[name]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for number in (*range(1, 11), 0.5):
        assert torch.equal(compiled(A, B, number), loss(A, B, number)), number


@pytest.mark.compiles
def test_inductor_goes_on_too() -> None:
    def training_loss(a: Tensor, b: Tensor, beta: float, eps: float) -> Tensor:
        start = ops.random_start(X, eps, seed=1)
        return losses.trades(a, b + start.mean(), Y, beta)

    # One graph: the default's first, of constants, is that of test_ops_in_torch.py. Torch's own functions
    # are called, as code for them takes g++ many seconds and is not what is tested.
    plain = {"fallback_by_default": True}
    compiled = torch.compile(training_loss, fullgraph=True, dynamic=True, options=plain)
    for number in NUMBERS:
        wanted = training_loss(A, B, number, number / 10)
        torch.testing.assert_close(
            compiled(A, B, number, number / 10), wanted, rtol=1e-6, atol=1e-6
        )
    assert graphs() == 1


@pytest.mark.compiles
def test_a_number_of_a_module_may_change() -> None:
    class Objective(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.beta = 1.0

        def forward(self, a: Tensor, b: Tensor, share: float) -> Tensor:
            return losses.trades(a, b, Y, self.beta * share)

    objective = Objective()
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    for number in NUMBERS:
        assert torch.equal(compiled(A, B, number), losses.trades(A, B, Y, number))


@pytest.mark.compiles
def test_a_constant_stays_one() -> None:
    """The form for numbers that change reads them on the host, which a CUDA graph must not do."""
    seen: list[str] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes if "fastadv" in str(node.target))
        return graph

    compiled = torch.compile(
        lambda x: ops.random_start(x, 0.1, seed=0), backend=count, fullgraph=True
    )
    compiled(X)
    assert seen == ["fastadv.random_start"]


@pytest.mark.compiles
def test_a_wrong_number_is_refused_where_it_changes() -> None:
    compiled = torch.compile(lambda v: losses.trades(A, B, Y, v), backend="aot_eager")
    for number in (1.0, 2.0, 3.0):
        compiled(number)
    with pytest.raises(ValueError, match="beta must be finite and >= 0"):
        compiled(-1.0)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_op_with_floats_has_a_form_for_numbers_that_change(name: str) -> None:
    schema = REGISTRY[name].overload._schema
    floats = [a.name for a in schema.arguments if str(a.type) == "float"]
    assert (traced_schema(REGISTRY[name].schema) is not None) == bool(floats)
    if floats:
        form = getattr(torch.ops.fastadv, name + SUFFIX).default
        kinds = {a.name: str(a.type) for a in form._schema.arguments}
        assert all(kinds[argument] == "Tensor" for argument in floats)
        assert torch.Tag.cudagraph_unsafe in form.tags
        assert [a.name for a in form._schema.arguments] == [a.name for a in schema.arguments]


@pytest.mark.compiles
@pytest.mark.parametrize("wanted", [False, True])
def test_the_forms_pass_torchs_own_checks(wanted: bool) -> None:
    def tensor(number: float) -> Tensor:
        return torch.tensor(number, dtype=torch.float64)

    start = (X, tensor(0.1), None, "linf", tensor(0.0), tensor(1.0), 3, None)
    torch.library.opcheck(torch.ops.fastadv.random_start_traced, start)
    a, b = A.clone().requires_grad_(wanted), B.clone().requires_grad_(wanted)
    kl = (a, b, None, "kl", tensor(0.0), tensor(2.0), True, wanted, wanted)
    torch.library.opcheck(torch.ops.fastadv.softmax_losses_traced, kl)
    momentum = (GRAD.clone(), ADV, tensor(0.5), None)
    torch.library.opcheck(torch.ops.fastadv.momentum_update__traced, momentum)
