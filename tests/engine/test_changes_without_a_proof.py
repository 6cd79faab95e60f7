"""Models that become something else after attacks, where the next attack needs no proof or a wrapper hides it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import assert_same_state, cross_entropy, images, plain_pgd, randomise, state_of
from foreign_models import Pooled, conv
from torch import Tensor, nn

import fastadv

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine"),
]

Y = torch.arange(8) % 4


def of_products() -> nn.Module:
    """A network that runs live because no copy is faster."""
    layers = [layer for _ in range(10) for layer in (nn.Linear(32, 32), nn.Tanh())]
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, 4), nn.Flatten(2), Tokens(), *layers, Mean(), nn.Linear(32, 4)
    )


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Looking(nn.Module):
    """A network that runs live because it looks at values that depend on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = randomise(Pooled(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(-x if float(x.detach().mean()) > 9 else x)


class Adapting(nn.Module):
    """Adapts the network to the images once it is told to, by those of its weights that require grad.

    Args:
        net: the network, which gets a layer behind it.
        by_steps: an optimizer changes the weights, as in TENT. Else other weights are computed for the pass.
    """

    def __init__(self, net: nn.Module, by_steps: bool) -> None:
        super().__init__()
        self.net, self.last = net, nn.Linear(4, 4)
        self.by_steps, self.on = by_steps, False

    def forward(self, x: Tensor) -> Tensor:
        weight = self.last.weight
        if self.on and weight.requires_grad:
            with torch.enable_grad():
                probabilities = self.last(self.net(x.detach())).softmax(1)
                loss = (probabilities * probabilities.log()).sum()
            if self.by_steps:
                loss.backward()
                with torch.no_grad():
                    weight += 5 * weight.grad
            else:
                weight = weight.detach() + 5 * torch.autograd.grad(loss, weight)[0]
        return F.linear(self.net(x), weight, self.last.bias)


def live_step(model: nn.Module, x: Tensor) -> Tensor:
    """One step of PGD by hand, of a model that gets its state back."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    adv = plain_pgd(model, x, Y, x, eps=0.01, alpha=0.01, steps=1, loss=cross_entropy)
    model.load_state_dict(state)
    model.zero_grad()
    return adv


def share_of_others(attack: fastadv.PGD, model: nn.Module, x: Tensor) -> float:
    """The share of the elements of a result that differ from those of the loop by hand."""
    wanted = live_step(model, x)
    return float(((attack(x, Y) - wanted).abs() > 1e-3).float().mean())


def used(model: nn.Module, x: Tensor, **options: Any) -> fastadv.PGD:
    attack = fastadv.PGD(
        model, eps=0.01, alpha=0.01, steps=1, random_start=False, precision="auto", **options
    )
    for _ in range(6):
        attack(x, Y)
    return attack


@pytest.mark.parametrize("network", [of_products, Looking])
@pytest.mark.parametrize("by_steps", [False, True])
def test_a_model_that_begins_to_adapt_does_so_in_the_next_attack(
    network: Callable[[], nn.Module], by_steps: bool
) -> None:
    torch.manual_seed(0)
    model, x = Adapting(network(), by_steps).eval(), images(8)
    attack = used(model, x)
    assert attack.last.engine == "eager"
    model.on = True
    before = state_of(model)
    for _ in range(3):
        found = attack(x, Y, seed=0)
        assert_same_state(state_of(model), before)
        assert float(((found - live_step(model, x)).abs() > 1e-3).float().mean()) < 0.01


@pytest.mark.parametrize("network", [of_products, Looking])
def test_an_attack_without_gradients_leaves_weights_that_begin_to_adapt(
    network: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model, x = Adapting(network(), True).eval(), images(8)
    attack = fastadv.Square(model, queries=3, precision="auto")
    for _ in range(6):
        attack(x, Y)
    model.on = True
    for _ in range(3):
        before = state_of(model)
        attack(x, Y, seed=0)
        assert_same_state(state_of(model), before)


def as_parallel(net: nn.Module) -> nn.Module:
    return nn.DataParallel(net)


def as_averaged(net: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(net)


def as_compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")  # type: ignore[return-value]


WRAPPERS = [as_parallel, as_averaged, pytest.param(as_compiled, marks=pytest.mark.compiles)]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("engine", ["auto", "compiled"])
def test_a_forward_method_that_is_put_in_a_wrappers_place_is_attacked(
    wrapper: Callable[[nn.Module], nn.Module], engine: str
) -> None:
    torch.manual_seed(0)
    net, x = randomise(Pooled(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8))), images(8)
    model = wrapper(net).eval()
    attack = used(model, x, engine=engine)
    plain = model.forward
    model.forward = lambda images: plain(images.flip(3))
    assert share_of_others(attack, model, x) < 0.01
    model.forward = plain
    assert share_of_others(attack, model, x) < 0.01


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_a_hook_for_all_modules_acts_on_wrappers_too(wrapper: type[nn.Module], pre: bool) -> None:
    torch.manual_seed(0)
    net, x = randomise(Pooled(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8))), images(8)
    model = wrapper(net).eval()
    attack = used(model, x)

    def turned(module: nn.Module, args: Any, out: Tensor | None = None) -> Any:
        if not isinstance(module, wrapper):
            return None
        return (args[0].flip(3),) if out is None else out.flip(1)

    register: Any = nn.modules.module.register_module_forward_hook
    if pre:
        register = nn.modules.module.register_module_forward_pre_hook
    with_hook = register(turned)
    try:
        assert share_of_others(attack, model, x) < 0.01
    finally:
        with_hook.remove()
    assert share_of_others(attack, model, x) < 0.01


class Writing(nn.Module):
    """Writes into its own weights in each forward pass, or learns, and so changes for good.

    Args:
        how: by which functions.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.last, self.how = Looking(), nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> Tensor:
        weight, h = self.last.weight, self.net(x)
        if self.how == "gradients":
            with torch.enable_grad():
                self.last(h.detach()).square().sum().backward()
        elif self.how == "optimizer":
            with torch.enable_grad():
                self.last(h.detach()).square().sum().backward()
            torch.optim.SGD([weight], 0.1).step()
        elif self.how == "data":
            weight.data.mul_(0.9)
        elif self.how == "exchanged data":
            weight.data = weight.data * 0.9
        elif self.how == "argument":
            with torch.no_grad():
                torch.mul(weight, 0.9, out=weight)
        elif self.how == "entry":
            with torch.no_grad():
                weight[0] = weight[0] * 0.9
        else:
            with torch.no_grad():
                weight *= 0.9
        return self.last(h)


@pytest.mark.parametrize(
    "how", ["gradients", "optimizer", "data", "exchanged data", "argument", "entry", "operator"]
)
@pytest.mark.parametrize("kind", [fastadv.FGSM, fastadv.Square])
def test_a_model_that_writes_into_its_weights_has_them_back(how: str, kind: type[Any]) -> None:
    """Also if it was recorded, which a single function may end."""
    torch.manual_seed(0)
    model, x = Writing(how).eval(), images(8)
    settings = {"queries": 3} if kind is fastadv.Square else {}
    for options in ({"precision": "auto"}, {"precision": "fp32"}, {"engine": "eager"}):
        attack, before = kind(model, **settings, **options), state_of(model)
        for _ in range(3):
            attack(x, Y, seed=0)
            assert_same_state(state_of(model), before)


class HookedGraph(nn.Module):
    """Turns its gradient by a hook of the graph, once it is told to; its operations stay the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.on = conv(3, 3), nn.Linear(8, 4), False
        self.body = nn.Sequential(nn.Flatten(2), Mean(), nn.Linear(64, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.on and h.grad_fn is not None:
            h.grad_fn.register_prehook(lambda grads: tuple(-g for g in grads))
        return self.last(self.body(h + 0.3 * x))


@pytest.mark.parametrize("on", [False, True])
def test_a_hook_in_the_graph_turns_the_attack(on: bool) -> None:
    torch.manual_seed(0)
    model, x = HookedGraph().eval(), images(8)
    model.on = on
    attack = used(model, x)
    for _ in range(2):
        model.on = not model.on
        for _ in range(2):
            assert share_of_others(attack, model, x) < 0.01
