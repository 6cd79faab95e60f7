"""Models that change themselves in their forward pass: attacked as they are, and left as they were."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastadv
from fastadv.engine.frozen import frozen
from fastadv.engine.kept_attributes import kept_attributes

X, Y = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4


class Adapting(nn.Module):
    """Takes two steps towards certain predictions before each prediction, from the same scales each time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
        )
        self.adapted = [self.network[1].weight, self.network[1].bias]
        self.first = [p.detach().clone() for p in self.adapted]
        self.optimizer = torch.optim.SGD(self.adapted, 1.0)

    def entropy(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()

    def descend(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        self.entropy(x).backward()
        self.optimizer.step()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter, first in zip(self.adapted, self.first, strict=True):
                parameter.copy_(first)
        with torch.enable_grad():
            for _ in range(2):
                self.descend(x)
        return self.network(x)


class AdaptingToValues(Adapting):
    """Adapts to images that have no gradient."""

    def descend(self, x: Tensor) -> None:
        super().descend(x.detach())


class AdaptingFunctionally(Adapting):
    """Leaves its parameters alone, and predicts with others."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            found = torch.autograd.grad(self.entropy(x.detach()), self.adapted)
        pairs = zip(("1.weight", "1.bias"), self.adapted, found, strict=True)
        return functional_call(self.network, {name: p - g for name, p, g in pairs}, (x,))


def plain_attack(model: Callable[[Tensor], Tensor]) -> Tensor:
    adv = X.clone()
    for _ in range(3):
        adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(adv), Y), adv)
        adv = adv.detach() + 2 / 255 * grad.sign()
        adv = adv.clamp(X - 8 / 255, X + 8 / 255).clamp(0, 1)
    return adv


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("kind", [Adapting, AdaptingToValues, AdaptingFunctionally])
def test_a_model_that_adapts_in_its_forward_pass_adapts_under_attack(
    kind: type[Adapting], train_mode: bool
) -> None:
    """With parameters that require no grad it would not adapt, and another network would be attacked."""
    model = kind().train(train_mode)
    parameter = model.network[0].weight
    parameter.grad = torch.ones_like(parameter)
    weights = [p.detach().clone() for p in model.parameters()]
    attack = fastadv.PGD(
        model, steps=3, random_start=False, train_mode=train_mode, precision="fp32"
    )
    found = [attack(X, Y), attack(X, Y)]
    assert all(map(torch.equal, model.parameters(), weights))
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(p.grad is None for p in model.parameters() if p is not parameter)
    expected = plain_attack(model)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


class AdaptingLayer(nn.Module):
    """Moves its weights after each prediction, and goes on from there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.layer(x.flatten(1))
        (grad,) = torch.autograd.grad(logits.float().logsumexp(1).sum(), self.layer.weight)
        logits = self.layer(x.flatten(1))
        with torch.no_grad():
            self.layer.weight.sub_(grad, alpha=0.5)
        return logits


def test_weights_that_adapt_are_cast_anew_at_every_pass() -> None:
    """Autocast keeps cast weights to the end of its outermost context, which is the whole attack."""
    model = AdaptingLayer().eval()
    options: dict[str, Any] = dict(steps=3, random_start=False, precision="bf16", engine="eager")
    # The mean of the losses, as in the plain loop: gradients in bfloat16 depend on their scale.
    found = fastadv.PGD(model, loss=lambda logits, y: F.cross_entropy(logits, y), **options)(X, Y)

    def narrow(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    assert torch.equal(found, plain_attack(narrow))


def test_a_function_around_a_model_that_adapts_is_attacked_as_it_is() -> None:
    model = Adapting().eval()
    attack = fastadv.PGD(lambda x: model(x), steps=3, random_start=False)
    assert torch.equal(attack(X, Y), plain_attack(model))


@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_a_model_that_adapts_is_evaluated_as_it_is() -> None:
    model = AdaptingToValues().eval()
    with torch.no_grad():
        clean = (model(X).argmax(1) == Y).float().mean().item()
    report = fastadv.evaluate(model, (X, Y), ["clean", "pgd-2"], progress=False)
    assert report.rows[0].accuracy == pytest.approx(clean)


class Spiking(nn.Module):
    """Keeps a membrane's voltage from pass to pass: as an attribute, and in a dictionary."""

    def __init__(self, reset: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Linear(192, 4)
        self.reset, self.voltage = reset, torch.zeros(1)
        self.memories: dict[str, Tensor | float] = {"v": 0.0}

    def forward(self, x: Tensor) -> Tensor:
        if self.reset:
            self.voltage, self.memories["v"] = torch.zeros(1), 0.0
        for _ in range(2):
            self.voltage = 0.5 * self.voltage + self.network(x.flatten(1))
            self.memories["v"] = self.memories["v"] + self.voltage.tanh()
        return self.memories["v"]  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("settings", [{}, {"engine": "eager"}, {"train_mode": True}])
def test_the_state_that_passes_leave_in_attributes_is_as_before_an_attack(
    settings: dict[str, object], reset: bool
) -> None:
    """Such as the voltages of spiking networks, which the caller's next pass would begin with."""
    model = Spiking(reset)
    voltage = model.voltage
    fastadv.PGD(model, steps=2, **settings)(X, Y)  # type: ignore[arg-type]
    assert model.voltage is voltage
    assert model.memories == {"v": 0.0}


class Counting(nn.Module):
    """Counts its passes, in a number and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.passes, self.modes = nn.Linear(192, 4), 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.modes.append(self.training)
        return self.network(x.flatten(1))


@pytest.mark.parametrize("settings", [{"engine": "eager"}, {"train_mode": True}])
def test_a_model_that_counts_its_passes_keeps_the_count(settings: dict[str, object]) -> None:
    """Such as the queries of a black-box attack."""
    model = Counting()
    fastadv.PGD(model, steps=3, precision="fp32", **settings)(X, Y)  # type: ignore[arg-type]
    seen = model.passes
    assert seen >= 3
    assert model.modes == [bool(settings.get("train_mode", False))] * seen
    fastadv.evaluate(model, (X, Y), ["clean"], progress=False)
    assert model.passes > seen


def test_whether_a_model_learns_is_found_out_without_another_pass() -> None:
    model = Counting()
    fastadv.PGD(model, steps=3, precision="fp32", train_mode=True)(X, Y)
    assert model.passes == 3
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_unchanged_values_are_not_written_back_even_if_they_are_nan() -> None:
    """Of a file that is open for reading, this would end the process."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4)).eval()
    assert isinstance(model[2].running_var, Tensor)
    model[2].running_var[0] = torch.nan
    before = model[2].running_var._version
    written: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten.copy_.default:
                written.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch(), frozen(model, keep_parameters=True):
        pass
    assert not written
    assert model[2].running_var._version == before


def test_a_lazy_network_in_a_function_gets_its_weights_under_attack() -> None:
    """Its weights have no shape yet, so that nothing can be kept of them or asked of them."""
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    adv = fastadv.PGD(lambda x: network(x), steps=2)(X, Y)
    assert adv.shape == X.shape
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_expanded_weights_are_put_back() -> None:
    layer = nn.Linear(4, 4)
    layer.bias = nn.Parameter(torch.ones(1).expand(4))
    with frozen(layer, keep_parameters=True):
        layer.bias.data[:1] = 3
    assert torch.equal(layer.bias, torch.ones(4))


@pytest.mark.parametrize("settings", [{}, {"engine": "eager"}, {"train_mode": True}])
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_the_state_in_containers_of_containers_is_as_before_an_attack(
    settings: dict[str, object],
) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Linear(192, 4)
            self.memories: list[dict[str, Tensor]] = [{"v": torch.zeros(1)}]

        def forward(self, x: Tensor) -> Tensor:
            v = 0.5 * self.memories[0]["v"] + self.network(x.flatten(1))
            self.memories[0]["v"] = v.mean(0, keepdim=True).detach()
            return v

    model = Layers()
    before = model.memories[0]["v"]
    fastadv.PGD(model, steps=2, **settings)(X, Y)  # type: ignore[arg-type]
    assert model.memories[0]["v"] is before


class _Adjoint(torch.autograd.Function):
    """A linear layer whose backward pass runs it again, as the adjoint method of neural ODEs does."""

    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
        ctx.wanted = weight.requires_grad
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            wanted = (x, weight) if ctx.wanted else (x,)
            grads = torch.autograd.grad(x @ weight.T, wanted, grad)
        return grads if ctx.wanted else (*grads, None)


@pytest.mark.parametrize("train_mode", [False, True])
def test_a_backward_pass_may_take_the_gradients_that_its_forward_pass_saw_wanted(
    train_mode: bool,
) -> None:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(4, 192))

        def forward(self, x: Tensor) -> Tensor:
            return _Adjoint.apply(x.flatten(1), self.weight)

    model = Flow()
    settings = {"eps": 8 / 255, "steps": 3, "random_start": False, "train_mode": train_mode}
    adv = fastadv.PGD(model, engine="eager", precision="fp32", **settings)(X, Y)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 4, bias=False))
    plain[1].weight = model.weight
    assert torch.equal(adv, fastadv.PGD(plain, engine="eager", precision="fp32", **settings)(X, Y))
    assert model.weight.requires_grad
    assert model.weight.grad is None


def test_parameters_whose_memory_a_pass_gives_back_are_left_alone() -> None:
    """As FSDP does with the parameters that it has gathered. A read of them would end the process."""
    layer = nn.Linear(192, 4)
    with frozen(layer, keep_parameters=True):
        layer.weight.untyped_storage().resize_(0)
        layer.bias.data.fill_(3)
    assert layer.weight.untyped_storage().size() == 0
    assert not torch.equal(layer.bias, torch.full((4,), 3.0))


class OnThirdGpu(nn.Parameter):
    """A parameter that says where it would be."""

    device = property(lambda self: torch.device("cuda", 2))  # type: ignore[assignment]


class Holder(nn.Module):
    """May hold networks that it has not registered."""


@pytest.mark.parametrize(
    ("kind", "gpu"), [("module", 2), ("list", 2), ("function", 2), ("without weights", 0)]
)
def test_the_generator_of_a_models_gpu_is_seeded_and_put_back(
    monkeypatch: pytest.MonkeyPatch, kind: str, gpu: int
) -> None:
    """That of the current GPU, number 0, for a model that may run on any."""
    generators = tuple(torch.Generator().manual_seed(number) for number in range(3))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    network, holder = nn.Linear(2, 2), Holder()
    network.weight = OnThirdGpu(torch.ones(2, 2))
    if kind == "list":
        holder.networks = [network]  # type: ignore[assignment]
    models = {"module": network, "function": lambda x: network(x)}
    with frozen(models.get(kind, holder), seed=77):
        assert [number for number in range(3) if generators[number].initial_seed() == 77] == [gpu]
    assert [g.initial_seed() for g in generators] == [0, 1, 2]


class AsksForGradients(nn.Module):
    """Computes something else where its weights require grad."""

    def __init__(self, asks: Callable[[Any, Tensor], bool]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.other, self.asks = nn.Linear(192, 4), nn.Linear(192, 4), asks

    def forward(self, x: Tensor) -> Tensor:
        own = self.other if self.asks(self, x) else self.network
        return own(x.flatten(1))


QUESTIONS: dict[str, Callable[[Any, Tensor], bool]] = {
    "a weight": lambda m, x: m.network.weight.requires_grad,
    "all weights": lambda m, x: all(p.requires_grad for p in m.parameters()),
    "a product": lambda m, x: (2 * m.network.weight).grad_fn is not None,
    "its leaves": lambda m, x: not (2 * m.network.weight).is_leaf,
}


@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
@pytest.mark.parametrize("asks", QUESTIONS.values(), ids=QUESTIONS.keys())
@pytest.mark.parametrize("settings", [{}, {"engine": "eager"}, {"precision": "fp32"}])
def test_a_model_that_asks_whether_its_weights_require_grad_is_attacked_as_it_is(
    settings: dict[str, Any], asks: Callable[[Any, Tensor], bool]
) -> None:
    model = AsksForGradients(asks).eval()
    adv = plain_attack(model)
    for target in (model, lambda x: model(x)):
        attack = fastadv.PGD(target, steps=3, random_start=False, **settings)
        for _ in range(2):
            assert torch.equal(attack(X, Y), adv)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert not torch.equal(plain_attack(model), adv)
    assert torch.equal(attack(X, Y), plain_attack(model))


def test_a_copy_of_a_model_that_asks_whether_its_weights_require_grad_is_refused() -> None:
    model = AsksForGradients(QUESTIONS["a weight"])
    with pytest.raises(ValueError, match="asks whether its weights require grad"):
        fastadv.PGD(model, engine="compiled")(X, Y)


@pytest.mark.parametrize("kind", [list, collections.deque, dict.fromkeys])
def test_a_large_memory_bank_is_put_back(kind: Callable[[range], Any]) -> None:
    """The types of its entries are asked at once, and the entries are compared as objects."""
    part = nn.Linear(2, 2)
    part.bank = bank = kind(range(2000))
    part.banks = [bank]
    keys = list(bank)
    for change in (
        lambda: bank.pop(keys[-1]) if isinstance(bank, dict) else bank.pop(),
        bank.clear,
    ):
        with kept_attributes([part], tensors_only=False):
            change()
        assert part.bank is part.banks[0] is bank and list(bank) == keys
    other = torch.zeros(1)
    with kept_attributes([part], tensors_only=True):
        bank[1000] = other
    assert list(bank) == keys and (bank[1000] is not other)
    with kept_attributes([part], tensors_only=True):
        bank[1000] = "no tensor"
    assert bank[1000] == "no tensor"


@pytest.mark.parametrize("train_mode", [True, "moving"])
def test_hooks_that_keep_activations_where_weights_require_grad_find_them_again(
    train_mode: Any,
) -> None:
    """As those of Opacus do, which otherwise take activations out of an empty list."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).train()
    activations: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        if module.training and any(p.requires_grad for p in module.parameters()):
            activations.append(args[0].detach())

    def pop() -> None:
        activations.pop()

    model[1].register_forward_hook(keep)
    model[1].register_full_backward_hook(lambda module, grads, out: pop())
    attack = fastadv.PGD(model, steps=3, train_mode=train_mode)
    for _ in range(2):
        attack(X, Y)
    assert not activations
