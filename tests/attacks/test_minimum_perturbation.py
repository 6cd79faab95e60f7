"""The smallest radius at which an attack succeeds, against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attack_helpers import assert_same_state, digits_test, images, state_of, trained_small_cnn
from linear_model import LinearModel
from torch import Tensor, nn

import fastadv
from fastadv import minimum_perturbation

pytestmark = pytest.mark.usefixtures("one_thread")


def plane() -> tuple[LinearModel, Tensor, Tensor, dict[str, Tensor]]:
    """A linear model, grey images, labels, and the distances from its boundary by norm."""
    model = LinearModel(torch.randn(2, 64, generator=torch.Generator().manual_seed(0))).eval()
    x = 0.4 + 0.2 * images(24, channels=1)
    logits = model(x).detach()
    gap = (logits[:, 0] - logits[:, 1]).abs()
    normal = (model.linear.weight[0] - model.linear.weight[1]).detach()
    return model, x, logits.argmax(1), {"linf": gap / normal.abs().sum(), "l2": gap / normal.norm()}


@pytest.mark.covering
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "make",
    [
        lambda model, **o: fastadv.FGSM(model, 0.1, **o),
        lambda model, **o: fastadv.PGD(model, 0.1, 0.05, 50, **o),
        lambda model, **o: fastadv.MIM(model, 0.1, 0.05, 3, **o),
        lambda model, **o: fastadv.APGD(model, 0.1, 5, **o),
    ],
    ids=["fgsm", "pgd", "mim", "apgd"],
)
def test_it_is_the_distance_from_a_plane(make: Any, norm: str, targeted: bool) -> None:
    model, x, y, distances = plane()
    attack = make(model, norm=norm, targeted=targeted, precision="fp32")
    labels = 1 - y if targeted else y
    largest = float(distances[norm].max()) * 1.5
    found = minimum_perturbation(attack, x, labels, max_eps=largest, iterations=14, seed=0)
    assert (found >= distances[norm] * (1 - 1e-3) - 1e-6).all()
    torch.testing.assert_close(found, distances[norm], rtol=1e-3, atol=largest * 2**-13)


def test_what_needs_no_attack_has_0_and_what_withstands_has_infinity() -> None:
    model, x, y, distances = plane()
    y = torch.where(torch.arange(24) < 3, 1 - y, y)
    median = float(distances["linf"].median())
    attack = fastadv.PGD(model, 0.1, 0.05, 5, precision="fp32")
    found = minimum_perturbation(attack, x, y, max_eps=median * (1 + 1e-4), seed=0)
    assert (found[:3] == 0).all()
    beyond = distances["linf"][3:] > median * (1 + 1e-3)
    assert beyond.any() and torch.equal(found[3:] == math.inf, beyond)


def test_the_attack_succeeds_there_and_not_below() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(32)
    attack = fastadv.PGD(model, 0.08, 0.02, 10, precision="bf16")
    found = minimum_perturbation(attack, x, y, max_eps=0.3, iterations=8, seed=5)
    assert found.isfinite().all()
    adv = attack(x, y, seed=5, eps=found)
    assert (model(adv).argmax(1) != y).all()
    below = attack(x, y, seed=5, eps=(found - 0.3 / 2**7).clamp(min=0))
    assert (model(below).argmax(1) == y)[found > 0].float().mean() > 0.8


def test_the_result_does_not_depend_on_the_company() -> None:
    model, (x, y), ids = trained_small_cnn(), digits_test(24), torch.arange(50, 74)
    attack = fastadv.PGD(model, 0.08, 0.02, 5, precision="fp32")
    options = dict(max_eps=0.3, iterations=8, seed=5)
    whole = minimum_perturbation(attack, x, y, sample_ids=ids, **options)
    part = minimum_perturbation(attack, x[7:15], y[7:15], sample_ids=ids[7:15], **options)
    torch.testing.assert_close(part, whole[7:15], rtol=0, atol=0.3 / 2**7)


def test_model_and_random_state_are_as_before() -> None:
    model, (x, y) = trained_small_cnn().train(), digits_test(8)
    before = state_of(model)
    attack = fastadv.PGD(model, steps=2, precision="fp32")
    minimum_perturbation(attack, x.bfloat16(), y, max_eps=0.3, iterations=2, seed=0)
    assert_same_state(state_of(model), before)


def test_an_empty_batch_has_no_radii() -> None:
    attack = fastadv.PGD(trained_small_cnn())
    x, y = torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.int64)
    assert minimum_perturbation(attack, x, y, max_eps=1.0).shape == (0,)


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ({"max_eps": 0}, ValueError, "max_eps must be > 0"),
        ({"max_eps": -1}, ValueError, "max_eps must be finite and >= 0"),
        ({"max_eps": "1"}, TypeError, "max_eps must be a number"),
        ({"iterations": 0}, ValueError, "iterations must be >= 1"),
        ({"attack": lambda x, y: x}, TypeError, "attack must be an attack of fastadv"),
        ({"attack": fastadv.CWL2(nn.Flatten())}, TypeError, "eps must not be given to CWL2"),
        ({"attack": fastadv.PGD(nn.Flatten(), 0)}, ValueError, "made with eps 0"),
    ],
)
def test_bad_arguments_are_refused(case: dict, error: type[Exception], message: str) -> None:
    x, y = digits_test(4)
    arguments = {"attack": fastadv.PGD(trained_small_cnn()), "max_eps": 0.1, **case}
    with pytest.raises(error, match=message):
        minimum_perturbation(arguments.pop("attack"), x, y, **arguments)


def test_nan_is_no_success() -> None:
    class NaNAwayFromGrey(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            away = (x - 0.5).flatten(1).abs().amax(1) > 1e-3
            logits = torch.stack((x.flatten(1).sum(1), x.new_full(x.shape[:1], 0.2)), 1)
            return torch.where(away[:, None], torch.nan, logits)

    x, y = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1])
    attack = fastadv.FGSM(NaNAwayFromGrey(), check_inputs=False)
    with pytest.warns(UserWarning, match="the model returned NaN at [12] points"):
        radii = minimum_perturbation(attack, x, y, max_eps=0.1)
    assert radii.tolist() == [float("inf"), 0.0]
