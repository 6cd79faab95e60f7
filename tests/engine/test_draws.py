"""Random numbers of models that always run live: they follow the seed, and nobody else's are touched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import fastadv

X = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 5, (8,), generator=torch.Generator().manual_seed(1))


def net(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(),
                         nn.Linear(144, 5))  # fmt: skip


class Holder:
    """A callable object that is no module."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)

    def logits(self, x: Tensor) -> Tensor:
        return self.model(x)


def logits_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return model(x)


WRAPPINGS: list[Callable[[nn.Module], Callable[[Tensor], Tensor]]] = [
    lambda model: lambda x: model(x),
    lambda model: partial(logits_of, model),
    Holder,
    lambda model: Holder(model).logits,
]


def refused(*_: object, **__: object) -> None:
    raise AssertionError("the generator is being put back")


@pytest.mark.parametrize("wrap", WRAPPINGS)
def test_callable_that_draws_nothing_leaves_the_generator_to_other_threads(
    wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastadv.engine.frozen._forked_random_state", refused)
    attack = fastadv.PGD(wrap(net().eval()), steps=2, random_start=False)
    # What another thread would draw meanwhile.
    seen = []
    loss = nn.CrossEntropyLoss()

    def drawing_loss(logits: Tensor, y: Tensor) -> Tensor:
        torch.default_generator.manual_seed(torch.default_generator.initial_seed() + 1)
        seen.append(torch.default_generator.initial_seed())
        return loss(logits, y)

    torch.manual_seed(100)
    fastadv.PGD(attack.model, steps=2, random_start=False, loss=drawing_loss)(X, Y)
    assert torch.default_generator.initial_seed() == seen[-1] > 100


def test_train_mode_without_dropout_leaves_the_generator_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastadv.engine.frozen._forked_random_state", refused)
    fastadv.PGD(net(), steps=2, random_start=False, train_mode=True)(X, Y)


@pytest.mark.parametrize("wrap", [None, *WRAPPINGS])
def test_draws_follow_the_seed_and_are_taken_back(
    wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]] | None,
) -> None:
    model = net(dropout=0.5).train()
    target = model if wrap is None else wrap(model)
    attack = fastadv.PGD(
        target, eps=0.3, alpha=0.1, steps=3, random_start=False, train_mode=wrap is None
    )
    torch.manual_seed(7)
    first = attack(X, Y, seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(8)
    assert torch.equal(attack(X, Y, seed=3), first)
    assert not torch.equal(attack(X, Y, seed=4), first)
    torch.manual_seed(7)
    assert torch.equal(torch.get_rng_state(), state)


def test_model_that_seeds_torch_itself_keeps_its_numbers() -> None:
    model = net(dropout=0.5).train()

    def fixed(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return model(x)

    torch.manual_seed(7)
    state = torch.get_rng_state()
    adv = fastadv.pgd_fused(fixed, X, Y, eps=0.3, alpha=0.1, steps=1, random_start=False, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(fixed(x), Y, reduction="sum"), x)
    assert torch.equal(adv, (X + 0.1 * grad.sign()).clamp(0, 1))


@pytest.mark.compiles
def test_callable_around_a_scripted_part_is_governed_from_the_start() -> None:
    with pytest.warns(DeprecationWarning):
        model = torch.jit.script(net(dropout=0.5).train())
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = fastadv.pgd_fused(
        lambda x: model(x), X, Y, eps=0.3, alpha=0.1, steps=2, random_start=False, seed=3
    )
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    again = fastadv.pgd_fused(
        lambda x: model(x), X, Y, eps=0.3, alpha=0.1, steps=2, random_start=False, seed=3
    )
    assert torch.equal(first, again)


@pytest.mark.compiles
def test_module_that_calls_a_compiled_function_is_governed_from_the_start() -> None:
    compiled = torch.compile(lambda x: x * (torch.rand_like(x) < 0.5), backend="eager")

    class Calls(nn.Module):
        def __init__(self, held: bool) -> None:
            super().__init__()
            self.net = net()
            self.function = compiled if held else None

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.function(x) if self.function else compiled(x))

    for model in (Calls(held=True), Calls(held=False)):
        attack = fastadv.PGD(
            model, eps=0.3, alpha=0.1, steps=2, random_start=False, train_mode=True
        )
        torch.manual_seed(7)
        state = torch.get_rng_state()
        first = attack(X, Y, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(8)
        assert torch.equal(attack(X, Y, seed=3), first)
