"""Random networks and changes: the engine's gradients against those of the plain float32 loop."""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attack_helpers import assert_same_state, state_of
from changes import change
from networks import random_network
from torch import Tensor, nn

import fastadv

# The smallest cosine of an image's gradient with the plain loop's. The engine's own limits, of the few images that
# it compares, are .99 and .8; an image can be further off where float32 itself is, next to a kink.
COSINES = {"fp32": 0.98, "bf16": 0.6, "fp16": 0.8}
ENGINES: Counter[str] = Counter()  # which engines ran, and why, to be shown in the end


def run(rng: random.Random) -> None:
    """One network, attacked, changed and attacked again."""
    image = (rng.choice((1, 3, 3, 4)), rng.choice((4, 6, 8, 9)), rng.choice((4, 6, 8, 9)))
    classes = rng.choice((2, 3, 10))
    model = random_network(rng, image, classes)
    options: dict[str, Any] = {"precision": rng.choice(("auto", "auto", "bf16", "fp32"))}
    options["engine"] = rng.choice(("auto", "auto", "compiled", "eager"))
    attack = fastadv.PGD(model, steps=rng.randint(1, 3), **options)
    done = "as drawn"
    for _ in range(rng.randint(1, 4)):
        size = rng.choice((1, 2, 3, 5, 8, 13))
        x = _images(rng, (size, *image))
        if not sound(model, x):  # torch itself has no gradient of it
            return
        try:
            check(attack, model, x, rng)
        except AssertionError as error:
            raise AssertionError(f"{error}; {options}, {done}, batch of {size}\n{model}") from error
        except ValueError as error:
            if options["engine"] != "compiled" or "engine must be" not in str(error):
                raise
            ENGINES[f"refused: {str(error)[:110]}"] += 1
        except NotImplementedError as error:
            # Asked for by name, bfloat16 has torch's own error where an operator has no such kernel.
            if options["precision"] != "bf16" or "BFloat16" not in str(error):
                raise
            ENGINES[f"refused: {str(error)[:110]}"] += 1
        done += f", {change(rng, model)}"


def _images(rng: random.Random, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    x = torch.rand(shape, generator=generator)
    way = rng.choice(("plain", "plain", "channels-last", "strided", "extremes"))
    if way == "channels-last":
        return x.contiguous(memory_format=torch.channels_last)
    if way == "strided":
        return torch.stack((x, 1 - x), -1)[..., 0]
    return x.round() if way == "extremes" else x


def sound(model: nn.Module, x: Tensor) -> bool:
    """Whether torch itself has a finite gradient of a model."""
    try:
        _, grad = plain_gradient(model, x)
    except (RuntimeError, ValueError):
        return False
    return bool(grad.isfinite().all())


def check(attack: fastadv.PGD, model: nn.Module, x: Tensor, rng: random.Random) -> None:
    """One use of an attack."""
    logits, grad = plain_gradient(model, x)
    y = torch.randint(0, logits.shape[1], (len(x),))
    before = state_of(model)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        adv = attack(x, y, seed=1)
        engine = attack.engine_for(x)
        ENGINES[f"{engine.name} {engine.precision}: {engine.reason[:80]}"] += 1
        with engine.session(model, 0, current=True):
            found = engine.gradient(engine.images(x), _value)
            found_logits, found_grad = found.logits.clone(), found.grad.clone()
        again = attack(x, y, seed=1)
    assert_same_state(state_of(model), before)
    assert torch.equal(adv, again), "two calls with one seed give other images"
    _check_ball(attack, adv, x)
    if engine.name == "eager":
        logits, grad = plain_gradient(model, x, as_given=True)
    _compare(engine, model, x, (found_logits, found_grad), (logits, grad))
    if engine.name == "eager" and engine.precision == "fp32":
        # Frozen weights let torch choose another kernel now and then, which rounds otherwise.
        told = _tells(model, x, grad, "fp32")
        if told.any():
            off = float((found_grad - grad)[told].abs().max() / grad[told].abs().max())
            assert off < 1e-4, f"the live model's gradient is {off:.2g} from the plain loop's"


def _check_ball(attack: fastadv.PGD, adv: Tensor, x: Tensor) -> None:
    assert adv.shape == x.shape and adv.dtype == x.dtype
    assert adv.min() >= 0 and adv.max() <= 1, "outside the bounds"
    assert (adv - x).abs().max() <= attack.settings.eps + 1e-7, "outside the ball"


def _value(logits: Tensor) -> Tensor:
    weights = torch.cos(torch.arange(logits.shape[1], dtype=logits.dtype) * 2.3 + 0.4)
    return logits @ weights


def plain_gradient(model: nn.Module, x: Tensor, as_given: bool = False) -> tuple[Tensor, Tensor]:
    """Logits and gradient of the live model in eval mode, as anyone computes them.

    On contiguous images, unless the layout is to be as given: for one channels-last image, torch 2.13 has
    a wrong gradient of instance_norm.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        layout = torch.preserve_format if as_given else torch.contiguous_format
        leaf = x.clone(memory_format=layout).requires_grad_()
        logits = model(leaf.clone())
        (grad,) = torch.autograd.grad(_value(logits).sum(), leaf)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return logits.detach(), grad


def _tells(model: nn.Module, x: Tensor, grad: Tensor, precision: str) -> Tensor:
    """Per image, whether its gradient tells something: not 0, and about the same where the image hardly moves.

    Others are made of rounding errors, or next to a kink. The image moves as far as the precision rounds. In a
    narrow precision what the layers hand on, forward and backward, is rounded as well, as whoever computes in it
    must do.
    """
    size, least = (1e-4, 0.99) if precision == "fp32" else (4e-3, 0.95)
    tells = grad.flatten(1).abs().amax(1) > 0
    for _ in range(2):
        _, moved = plain_gradient(model, x + size * torch.randn_like(x))
        tells &= _cosines(moved, grad) > least
    if precision != "fp32":
        with _changed_layers(
            model, lambda out: out + (out.bfloat16().to(out.dtype) - out).detach()
        ):
            _, rounded = plain_gradient(model, x)
        tells &= _cosines(rounded, grad) > least
        # Gradients are rounded, too: where their terms nearly cancel, that turns the sign of what is left.
        for _ in range(8):
            with _changed_layers(model, lambda out: out * (1 + torch.randn_like(out) * 2**-9)):
                _, moved = plain_gradient(model, x)
            tells &= _cosines(moved, grad) > least
    return tells


def _is_exact(model: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """Per image, whether a gradient is that in float64, and not what rounding leaves of a sum that vanishes."""
    try:
        other = copy.deepcopy(model).double()
        _, exact = plain_gradient(other, x.double())
    except RuntimeError:  # something in it stays in float32, or cannot be copied
        return torch.ones(len(x), dtype=torch.bool)
    return _cosines(exact, grad) > 0.9


@contextmanager
def _changed_layers(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, the results of all layers are changed."""

    def changed(layer: nn.Module, args: Any, out: Any) -> Any:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return None
        return change(out)

    layers = [m for m in model.modules() if not list(m.children())]
    handles = [layer.register_forward_hook(changed) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compare(
    engine: Any,
    model: nn.Module,
    x: Tensor,
    found: tuple[Tensor, Tensor],
    wanted: tuple[Tensor, Tensor],
) -> None:
    told = _tells(model, x, wanted[1], engine.precision)
    for _ in range(2):
        cosines = _cosines(found[1], wanted[1])[told]
        if not len(cosines) or float(cosines.min()) >= COSINES[engine.precision]:
            return
        told &= _is_exact(model, x, wanted[1])
    described = f"{engine.name} {engine.precision} ({engine.reason})"
    if engine.precision != "fp32":
        with torch.autocast("cpu", torch.bfloat16):
            _, narrow = plain_gradient(model, x)
        own = _cosines(narrow, wanted[1])[told]
        assert float(own[cosines.argmin()]) < 0.9, (
            f"cosines of {described} with the plain loop: {_short(cosines)}; "
            f"autocast has {_short(own)}"
        )
        ENGINES["narrow gradients far off, those of autocast too"] += 1
        return
    raise AssertionError(f"cosines of {described} with the plain loop: {_short(cosines)}")


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Per image; 1 where both vanish, 0 where one does."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    lengths = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(lengths > 0, (a * b).sum(1) / lengths, (a == b).all(1).double())


def _short(cosines: Tensor) -> str:
    return ", ".join(f"{c:.3f}" for c in cosines.tolist())
