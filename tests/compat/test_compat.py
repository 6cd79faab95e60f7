"""torchattacks' names and habits on our attacks."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import numpy as np
import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn
from compat_helpers import EPS, short
from torch import Tensor, nn

import fastadv
from fastadv import compat
from fastadv.engine.network_lock import locked

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY = [getattr(compat, n) for n in compat.__all__ if n not in ("Attack", "MultiAttack")]


def test_defaults_and_arguments_are_those_of_torchattacks() -> None:
    theirs = pytest.importorskip("torchattacks")
    for kind in EVERY:
        own = inspect.signature(kind).parameters
        for name, argument in inspect.signature(getattr(theirs, kind.__name__)).parameters.items():
            if name == "eps_for_division":
                continue
            assert name in own, f"{kind.__name__} lacks {name}"
            assert own[name].default == argument.default, f"{kind.__name__}.{name}"


def test_the_models_own_predictions_wait_while_another_thread_has_the_model() -> None:
    model, x = trained_small_cnn(half=False), digits_test(4)[0]
    entered = threading.Event()
    model.register_forward_hook(lambda *_: entered.set())
    attacks = [
        short(compat.BIM, model),
        compat.MultiAttack([short(compat.BIM, model), short(compat.FGSM, model)]),
    ]
    with locked(model):
        threads = [threading.Thread(target=attack, args=(x,), daemon=True) for attack in attacks]
        for thread in threads:
            thread.start()
        assert not entered.wait(timeout=0.3)
    for thread in threads:
        thread.join(timeout=60)
    assert entered.is_set()


@pytest.mark.parametrize("kind", EVERY)
def test_every_attack_breaks_images_within_its_ball(kind: Any) -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(32)
    attack = short(kind, model, alpha=0.05)
    adv = attack(x, y)
    assert adv.shape == x.shape and adv.min() >= 0 and adv.max() <= 1
    if hasattr(attack, "eps"):
        attack.eps = 0.0
        torch.testing.assert_close(attack(x, y), x, rtol=0, atol=2e-7)
    assert (model(adv).argmax(1) == y).sum() < (model(x).argmax(1) == y).sum()


def test_it_moves_the_images_as_the_own_attack_does() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(16)
    adv = short(compat.BIM, model, alpha=0.03)(x, y)
    own = fastadv.PGD(model, EPS, 0.03, 4, random_start=False, precision="fp32")
    assert torch.equal(adv, own(x, y))
    l2 = short(compat.PGDL2, model, eps=0.5)
    assert ((l2(x, y) - x).flatten(1).norm(dim=1) <= 0.5 + 1e-5).all() and l2.norm == "l2"


def test_it_moves_the_images_as_torchattacks_does() -> None:
    theirs = pytest.importorskip("torchattacks")
    model, (x, y) = trained_small_cnn(half=False).eval(), digits_test(16)
    steps: dict[str, Any] = {"eps": EPS, "alpha": 0.03, "steps": 4}
    in_l2 = {**steps, "eps": 0.8, "alpha": 0.2, "random_start": False}
    every = {"BIM": steps, "FGSM": {"eps": EPS}, "MIFGSM": steps, "PGDL2": in_l2}
    for name, options in every.items():
        wanted = getattr(theirs, name)(model, **options)(x, y)
        ours = getattr(compat, name)(model, **options)
        ours.own.precision = "fp32"
        assert ((ours(x, y) - wanted).abs() > 1e-6).float().mean() < 0.01, name


def test_pgdl2_starts_at_torchattacks_distances() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(200)
    x = x.clamp(0.2, 0.8)
    attack = compat.PGDL2(model, eps=0.1, alpha=1e-6, steps=1)
    attack.seed = 4
    for eps, adv in ((0.1, attack(x, y)), (0.05, attack(x, y, epsilons=0.05))):
        distance = (adv - x).flatten(1).norm(dim=1) / eps
        assert 0.4 < float(distance.mean()) < 0.6 and float(distance.min()) < 0.1
    assert torch.equal(attack(x, y), attack(x, y))
    attack.random_start = False
    assert float((attack(x, y) - x).abs().max()) < 1e-5


def test_labels_left_out_are_the_models_own() -> None:
    model, (x, _) = trained_small_cnn(half=False), digits_test(8)
    attack = short(compat.BIM, model)
    assert torch.equal(attack(x), attack(x, model(x).argmax(1)))


@pytest.mark.parametrize("width", [np.uint8, np.int8, np.int16, np.int32, np.int64])
def test_numpy_images_and_labels_of_any_width(width: Any) -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(8)
    attack = short(compat.BIM, model)
    adv = attack(x.numpy(), y.numpy().astype(width))
    assert isinstance(adv, np.ndarray) and np.array_equal(adv, attack(x, y).numpy())


def test_bytes_count_as_images_in_255ths() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(8)
    as_bytes = (x * 255).round().to(torch.uint8)
    attack = short(compat.BIM, model)
    assert torch.equal(attack(as_bytes, y), attack(as_bytes.float() / 255, y))


def test_several_radii_give_a_list() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(8)
    attack = short(compat.BIM, model, alpha=0.06)
    found = attack(x, y, epsilons=[0.05, EPS])
    assert [round(float((adv - x).abs().max()), 4) for adv in found] == [0.05, 0.1]
    assert torch.equal(found[1], attack(x, y))
    assert torch.equal(found[0], attack(x, y, epsilons=0.05))
    assert torch.equal(found[0], attack(x, y, epsilons=np.float64(0.05)))
    assert torch.equal(attack(x, y, epsilons=np.float32(0.0625)), attack(x, y, epsilons=0.0625))
    with pytest.raises(ValueError, match="epsilons must be None for CW"):
        short(compat.CW, model)(x, y, epsilons=0.1)


def test_normalised_images_are_attacked_in_units_of_the_image() -> None:
    inner, (x, y) = trained_small_cnn(half=False), digits_test(16)

    class Denormalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, z: Tensor) -> Tensor:
            return self.inner(z * 0.25 + 0.5)

    attack = short(compat.BIM, Denormalising())
    attack.set_normalization_used(mean=[0.5], std=[0.25])
    adv = attack((x - 0.5) / 0.25, y) * 0.25 + 0.5
    assert (adv - x).abs().max() <= EPS + 1e-5 and adv.min() >= -1e-6
    plain = short(compat.BIM, inner)(x, y)
    assert ((adv - plain).abs() > 1e-4).float().mean() < 0.02


def test_the_mean_of_several_gradients_is_followed() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(8)
    noisy = nn.Sequential(nn.Dropout(0.3), model)
    several = compat.EOTPGD(noisy, EPS, 0.03, 4, eot_iter=3, random_start=False)
    assert several.own.passes == several.eot_iter == 3
    assert torch.equal(several(x, y), compat.BIM(model, EPS, 0.03, 4)(x, y))  # in eval mode


def test_several_attacks_take_what_is_left() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(48)
    weak, strong = short(compat.BIM, model, eps=0.02, alpha=0.01), short(compat.BIM, model, eps=0.2)
    adv = compat.MultiAttack([weak, strong])(x, y)
    broken = model(weak(x, y)).argmax(1) != y
    assert broken.any()
    torch.testing.assert_close(adv[broken], weak(x, y)[broken], rtol=0, atol=1e-5)
    right = model(adv).argmax(1) == y
    assert torch.equal(adv[right], x[right])
    assert right.sum() <= (model(strong(x, y)).argmax(1) == y).sum()
    with pytest.raises(ValueError, match="at least two"):
        compat.MultiAttack([weak])


def test_several_attacks_take_numpy_images() -> None:
    model, (x, y) = trained_small_cnn(half=False), digits_test(16)
    several = compat.MultiAttack([short(compat.FGSM, model), short(compat.BIM, model)])
    found = several(x.numpy(), y.numpy())
    assert isinstance(found, np.ndarray) and np.array_equal(found, several(x, y).numpy())
