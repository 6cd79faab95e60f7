"""All attacks with random settings on small networks: ball, bounds, state, seeds, and refused settings."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from attack_helpers import ORDERS, assert_same_state, state_of
from engine_fuzz import sound
from networks import random_network
from torch import Tensor, nn

import fastadv
from fastadv.attacks import Attack

_STEPPED = (fastadv.PGD, fastadv.MIM, fastadv.FriendlyPGD)
_EVERY = (
    *(*_STEPPED, fastadv.FGSM, fastadv.FGSMRS, fastadv.CW),
    *(fastadv.APGD, fastadv.CWL2, fastadv.FAB, fastadv.Square),
)
_DIAMETERS: dict[str, Callable[[int], float]] = {
    "linf": lambda n: 1.0,
    "l2": math.sqrt,
    "l1": float,
}
_NARROW = (torch.bfloat16, torch.float16)


def run(rng: random.Random) -> None:
    """One attack of good settings, then one call with a wrong argument."""
    image = (rng.choice((1, 3)), rng.choice((3, 5, 8)), rng.choice((4, 6)))
    classes = rng.choice((2, 3, 5, 10))
    model = random_network(rng, image, classes)
    images = torch.rand(2, *image)
    if not (sound(model, images) and sound(model, images[:1])):  # some take no image alone
        return
    if rng.random() < 0.3:
        model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(rng.random() < 0.8)
        parameter.grad = torch.ones_like(parameter) if rng.random() < 0.3 else None
    kind = rng.choice(_EVERY)
    settings = random_settings(rng, kind, math.prod(image))
    batch = _random_batch(rng, image, classes, settings.get("bounds", (0.0, 1.0)))
    if settings["train_mode"] and not _trains(model, batch[0]):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _check_good(rng, kind, model, settings, *batch)
        except AssertionError as error:
            raise AssertionError(
                f"{error}; {kind.__name__} {settings}, {batch[0].shape}\n{model}"
            ) from error
        _check_refused(rng, kind, model, settings, *batch)


def _trains(model: nn.Module, x: Tensor) -> bool:
    """Whether a model itself takes a batch in train mode: BatchNorm needs several values of a channel."""
    if len(x) == 0:  # which an attack hands back without asking the model
        return True
    other = copy.deepcopy(model).train()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            other(x.float())
    except ValueError:
        return False
    return True


def random_settings(rng: random.Random, kind: type[Attack], elements: int) -> dict[str, Any]:
    """Settings that the attack is documented to take."""
    low = rng.choice((0.0, 0.0, 0.0, -1.0, -0.3))
    high = low + rng.choice((1.0, 1.0, 2.0, 0.5))
    found: dict[str, Any] = {
        "bounds": (low, high),
        "precision": rng.choice(("auto", "fp32", "fp32", "bf16")),
        "engine": rng.choice(("auto", "auto", "eager", "compiled")),
        "train_mode": rng.random() < 0.1,
    }
    if found["train_mode"]:
        found["engine"] = rng.choice(("auto", "eager"))
    if kind is fastadv.CWL2:
        return found | {
            "c": 10 ** rng.uniform(-3, 1),
            "kappa": rng.choice((0.0, 0.5)),
            "steps": rng.randint(1, 6),
            "lr": rng.choice((0.01, 0.5)),
            "search_steps": rng.randint(1, 3),
        }
    found["norm"] = rng.choice(("linf", "linf", "l2", "l1"))
    largest = (high - low) * _DIAMETERS[found["norm"]](elements)
    found["eps"] = largest * rng.choice((0.0, 1e-3, 0.03, 0.03, 0.2, 1.0))
    if kind is fastadv.APGD:
        found |= {
            "steps": rng.randint(1, 8),
            "restarts": rng.choice((1, 1, 2)),
            "rho": rng.random(),
        }
        return found | {"loss": rng.choice(("ce", "cw"))}
    if kind is fastadv.FAB:
        found |= {
            "steps": rng.randint(1, 4),
            "target_classes": rng.choice((None, 1, 3)),
            "restarts": rng.choice((1, 1, 2)),
            "early_stop": rng.random() < 0.7,
        }
        return found | {"alpha_max": rng.random(), "eta": 1 + rng.random(), "beta": rng.random()}
    if kind is fastadv.Square:
        found |= {"queries": rng.randint(1, 20), "p_init": 1 - rng.random()}
        found |= {"restarts": rng.choice((1, 1, 2)), "rescale_schedule": rng.random() < 0.5}
    if kind is not fastadv.CW:
        found["loss"] = rng.choice(("ce", "ce", "cw"))
    if kind in (*_STEPPED, fastadv.CW):
        found |= {"steps": rng.randint(1, 5), "alpha": largest * rng.choice((0.0, 0.01, 0.3))}
        found["random_start"] = rng.random() < 0.6
        if found["random_start"] and rng.random() < 0.3:
            found["restarts"] = 2
        found["keep"] = rng.choice(("last", "last", "best"))
    if kind is fastadv.FGSMRS and rng.random() < 0.5:
        found["alpha"] = largest * rng.random()
    if kind is fastadv.MIM:
        found["decay"] = rng.choice((0.0, 0.9, 1.0))
    if kind is fastadv.FriendlyPGD:
        found["tau"] = rng.randint(0, 3)
    if found["norm"] == "l1" and kind is not fastadv.Square:
        found["sparsity"] = rng.choice((0.0, 0.5, 0.95, 0.999))
    return found


def _random_batch(
    rng: random.Random, image: tuple[int, ...], classes: int, bounds: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    size = rng.choice((0, 1, 2, 3, 7))
    low, high = bounds
    x = low + (high - low) * torch.rand(size, *image)
    if rng.random() < 0.3:
        x = x.contiguous(memory_format=torch.channels_last)
    if rng.random() < 0.2:
        x = x.round().clamp(low, high)
    x = x.to(rng.choice((torch.float32, torch.float32, torch.float32, *_NARROW)))
    limits = torch.tensor(bounds).to(x.dtype)
    y = torch.randint(
        0, classes, (size,), dtype=rng.choice((torch.int64, torch.int32, torch.uint8))
    )
    return x.clamp(limits[0], limits[1]), y


def _call_options(rng: random.Random, kind: type[Attack], x: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {"seed": rng.randrange(-(2**63), 2**63)}
    if rng.random() < 0.3:
        found["sample_ids"] = torch.randint(0, 2**40, (len(x),))
    if rng.random() < 0.2 and kind is not fastadv.CWL2:
        found["start"] = x.flip(-1)
    return found


def _check_good(
    rng: random.Random,
    kind: type[Attack],
    model: nn.Module,
    settings: dict[str, Any],
    x: Tensor,
    y: Tensor,
) -> None:
    options = _call_options(rng, kind, x)
    x_before, y_before, before = x.clone(), y.clone(), state_of(model)
    try:
        attack = kind(model, **settings)
        adv = attack(x, y, **options)
    except (
        ValueError
    ) as error:  # a combination that the documents refuse, or a model that has no copy
        assert any(word in str(error) for word in (*settings, *options, "model")), f"{error!r}"
        assert_same_state(state_of(model), before)
        return
    again = attack(x, y, **options)
    anew = kind(model, **settings)(x, y, **options)
    assert_same_state(state_of(model), before)
    assert torch.equal(x, x_before) and torch.equal(y, y_before), "the batch has changed"
    assert adv.dtype == x.dtype and adv.shape == x.shape
    assert adv.stride() == x.stride(), f"strides {adv.stride()}, those of x {x.stride()}"
    assert not adv.requires_grad
    assert torch.equal(adv, again) or attack.last.engine == "eager", (
        "a second call gives other images"
    )
    if attack.settings.precision == "fp32":
        assert torch.equal(adv, anew), "a second attack gives other images"
    low, high = torch.tensor(attack.settings.bounds).tolist()
    if len(x):
        assert adv.min() >= low and adv.max() <= high, f"outside the bounds: {adv.aminmax()}"
        assert adv.isfinite().all()
        _check_ball(attack, adv, x)


def _check_ball(attack: Attack, adv: Tensor, x: Tensor) -> None:
    settings = attack.settings
    if isinstance(attack, fastadv.CWL2):
        return
    distance = (adv.double() - x.double()).flatten(1).norm(ORDERS[settings.norm], dim=1).max()
    rounding = (
        1e-6
        * max(map(abs, settings.bounds))
        * (1 if settings.norm == "linf" else adv[0].numel() ** 0.5)
    )
    if settings.norm == "l1":
        rounding *= adv[0].numel() ** 0.5
    limit = settings.eps * (1 + 1e-5) + rounding
    assert distance <= limit, f"outside the ball: {float(distance)}, eps {settings.eps}"
    assert attack.last.outside_share == 0, f"last says {attack.last.outside_share} is outside"


_WRONG = (
    None, "text", "0.1", -1, -0.5, math.nan, math.inf, 2**70, 1j, [], {}, (1.0,), (1.0, 0.0), object(),
    b"x", True, 0, 1.5, torch.tensor(0.1), torch.zeros(2), np.zeros(2), float, 255, 8,
)  # fmt: skip
_NUMPY = (np.float32(0.1), np.int64(2), np.bool_(True), np.str_("l2"))


def _check_refused(
    rng: random.Random,
    kind: type[Attack],
    model: nn.Module,
    settings: dict[str, Any],
    x: Tensor,
    y: Tensor,
) -> None:
    """A wrong setting or argument is refused by name, or serves; the model stays as it was."""
    options = _call_options(rng, kind, x)
    before = state_of(model)
    name = rng.choice([*settings, *options, "x", "y", "epsilon", "unknown"])
    value = rng.choice((*_WRONG, *_NUMPY, *_wrong_batches(x, y)))
    call = {"x": x, "y": y, **options}
    if name == "seed" and value is None:  # then one is drawn from torch's generator
        return
    if name in ("steps", "restarts", "queries") and isinstance(value, int) and value > 1000:
        return  # a right setting, of a run without end
    if name in call:
        call[name] = value
    else:
        settings = {**settings, name: value}
    what = f"{kind.__name__} with {name}={value!r:.80}"
    try:
        adv = kind(model, **settings)(**call)
        if isinstance(call["x"], Tensor) and len(adv):
            low, high = torch.tensor(settings["bounds"]).tolist()
            assert adv.min() >= low and adv.max() <= high, f"{what} leaves the bounds"
    except (TypeError, ValueError) as error:
        known = (*settings, *call, "model")
        assert any(word in str(error) for word in known), (
            f"{what}: no argument is named: {error!r:.300}"
        )
    except RuntimeError as error:  # the model's own, of images with another number of axes
        wrong_axes = name == "x" and isinstance(value, Tensor) and value.dim() != x.dim()
        assert wrong_axes and "conv2d" in str(error), f"{what}: {error!r:.300}"
    assert_same_state(state_of(model), before)


def _wrong_batches(x: Tensor, y: Tensor) -> tuple[Any, ...]:
    found = [
        x.double() * 300, -x - 5, x.to(torch.uint8), x.to_sparse(), x.to("meta"), x[:, :0], x.flatten(), x[None],
        x.to(torch.complex64), x.tolist(), x.float().numpy(), torch.full_like(x, math.nan), y.float(), y - 100,
        y[:0], y.tolist(), torch.full((len(y),), 1000), y[:, None], y.to("meta"), y.bool(), y.to_sparse(),
    ]  # fmt: skip
    return tuple(found)
