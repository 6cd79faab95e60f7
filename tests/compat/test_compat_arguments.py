"""Wrong settings and calls of attacks under torchattacks' names: each is told in its caller's words."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn
from compat_helpers import short

import fastadv
from fastadv import compat

pytestmark = pytest.mark.usefixtures("one_thread")


def test_settings_are_read_and_set_with_their_checks() -> None:
    attack = compat.PGD(trained_small_cnn(half=False))
    attack.eps, attack.steps = 4 / 255, 3
    assert attack.own.eps == attack.eps == 4 / 255 and attack.own.steps == 3
    with pytest.raises(ValueError, match="steps must be >= 1"):
        attack.steps = 0
    with pytest.raises(AttributeError, match="did you mean 'eps'"):
        _ = attack.epsilon
    assert "eps=0.0156" in repr(attack) and "steps=3" in repr(attack) and "PGD(" in repr(attack)


def test_images_of_other_channels_than_the_normalisation_are_named() -> None:
    attack = short(compat.PGD, trained_small_cnn(half=False))
    attack.set_normalization_used([0.5, 0.5], [0.2, 0.2])
    with pytest.raises(ValueError, match=r"inputs must have 2 channels.*got \(6, 1, 8, 8\)"):
        attack(*digits_test(6))


def test_wrong_inputs_are_named() -> None:
    attack, (x, y) = short(compat.BIM, trained_small_cnn(half=False)), digits_test(4)
    for labels in (y.float(), y.bool(), [0.5, 1, 2, 3], "0123", {0: 1}, [[1], [2, 3]]):
        with pytest.raises(TypeError, match="labels must be integers"):
            attack(x, labels)
    with pytest.raises(TypeError, match="inputs must be a tensor or a NumPy array"):
        attack([1, 2], y)
    with pytest.raises(TypeError, match="model must be a module"):
        compat.PGD(lambda x: x)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda attack, x, y: attack(x + 1, y), "inputs must be finite and within bounds"),
        (lambda attack, x, y: attack(x, y[:3]), r"labels must have shape \(4,\), got \(3,\)"),
        (lambda attack, x, y: attack(x, y[:, None]), r".* pass labels\.flatten\(\)"),
        (
            lambda attack, x, y: attack(x[:3, 0], y[:1]),
            r"inputs must .* pass inputs\.unsqueeze\(0\) and labels\.reshape\(1\)",
        ),
        (lambda attack, x, y: attack((255 * x).long(), y), "inputs must be float32"),
        (lambda attack, x, y: attack(x, y + 10), r"labels must be in 0 \.\. 9"),
        (lambda attack, x, y: attack(x, y, epsilons=8), "epsilons must be at most 1 in linf"),
    ],
)
def test_errors_of_a_call_have_its_own_names(call: Any, words: str) -> None:
    attack, (x, y) = short(compat.BIM, trained_small_cnn(half=False)), digits_test(4)
    with pytest.raises((TypeError, ValueError), match=f"^{words}") as told:
        call(attack, x, y)
    assert not re.search(r"\b[xy]\b", str(told.value))


def test_an_error_of_the_model_keeps_its_words() -> None:
    class Picky(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("the x of this model is too small, and eps is not its concern")

    x, y = digits_test(4)
    with pytest.raises(ValueError, match="the x of this model is too small, and eps is not"):
        short(compat.BIM, Picky())(x, y)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (compat.APGD, {"n_restarts": 0}, "^n_restarts must be >= 1"),
        (compat.APGDT, {"eot_iter": "2"}, "^eot_iter must be an integer"),
        (compat.APGD, {"verbose": "no"}, "^verbose must be True or False"),
        (compat.Square, {"n_queries": 0}, "^n_queries must be >= 1"),
        (compat.Square, {"resc_schedule": "no"}, "^resc_schedule must be True or False"),
        (compat.FAB, {"verbose": 2}, "^verbose must be True or False"),
    ],
)
def test_wrong_settings_are_named_as_they_were_given(
    kind: Any, wrong: dict[str, Any], message: str
) -> None:
    model = trained_small_cnn(half=False)
    with pytest.raises((TypeError, ValueError), match=message):
        kind(model, **wrong)
    attack, ((name, value),) = kind(model), wrong.items()
    if name != "verbose":
        with pytest.raises((TypeError, ValueError), match=message):
            setattr(attack, name, value)


def test_attributes_that_would_have_no_effect_are_refused() -> None:
    model = trained_small_cnn(half=False)
    attack = short(compat.BIM, model)
    for name, value in (
        ("model", trained_small_cnn(half=False)),
        ("targeted", True),
        ("epss", 0.1),
    ):
        with pytest.raises(AttributeError, match=name):
            setattr(attack, name, value)
    apgd, square = short(compat.APGD, model), short(compat.Square, model)
    apgd.n_restarts, apgd.eot_iter, square.n_queries = 2, 3, 7
    assert (apgd.own.restarts, apgd.own.passes, square.own.queries) == (2, 3, 7)
    assert (apgd.n_restarts, apgd.eot_iter, square.n_queries) == (2, 3, 7)


def test_images_that_are_not_normalised_are_refused() -> None:
    """They would be cut to 0..1 without a word."""
    x, y = digits_test(4)
    attack = short(compat.PGD, trained_small_cnn(half=False))
    with pytest.raises(ValueError, match=r"mean must be the mean of images in 0\.\.1, got 128"):
        attack.set_normalization_used(128, 64)
    attack.set_normalization_used([0.5], [0.25])
    with pytest.raises(ValueError, match="inputs must be normalised by the mean and std"):
        attack((x - 0.5) / 0.1, y)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert attack(((x - 0.5) / 0.25).to(dtype), y).dtype == dtype


def test_flags_are_no_text() -> None:
    model = trained_small_cnn(half=False)
    with pytest.raises(TypeError, match="multi_targeted must be True or False, got 'no'"):
        compat.FAB(model, multi_targeted="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="save_predictions must be True or False, got 'no'"):
        compat.PGD(model).save([], save_predictions="no")  # type: ignore[arg-type]


def test_several_radii_are_a_list_or_an_array() -> None:
    x, y = digits_test(4)
    attack = short(compat.PGD, trained_small_cnn(half=False))
    assert len(attack(x, y, epsilons=torch.tensor([0.1, 0.2]))) == 2
    assert attack(x, y, epsilons=np.float32(0.1)).shape == x.shape
    for wrong, words in (("8/255", "'8/255'"), ([], "one radius or several")):
        with pytest.raises((TypeError, ValueError), match=f"epsilons must be .*{words}"):
            attack(x, y, epsilons=wrong)


def test_attacks_of_another_kind_are_not_joined() -> None:
    model = trained_small_cnn(half=False)
    for wrong in ([model, model], compat.PGD(model), [fastadv.PGD(model)] * 2):
        with pytest.raises(
            TypeError, match=r"attacks must be a list of attacks of fastadv\.compat"
        ):
            compat.MultiAttack(wrong)  # type: ignore[arg-type]
