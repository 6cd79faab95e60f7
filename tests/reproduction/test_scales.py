"""The numbers of a training at a scale: radii, step sizes and replays."""

from __future__ import annotations

from typing import Any

import pytest

from fastadv.reproduction.cost import Estimate
from fastadv.reproduction.scales import PAPER, SMALL, TINY
from fastadv.reproduction.specs import resolve, spec

RADIUS = 0.1 * 255 / 8


def numbers(method: str, scale: Any) -> Any:
    return resolve(spec(method), scale, scale.data, 0).recipe


@pytest.mark.parametrize("scale", [SMALL, TINY])
def test_fewer_replays_of_free_leave_its_step_at_the_radius(scale: Any) -> None:
    recipe = numbers("free", scale)
    assert recipe.steps == scale.steps < 8
    assert recipe.alpha == pytest.approx(recipe.eps) and recipe.eps == pytest.approx(
        scale.radius * 8 / 255
    )


def test_fewer_steps_of_pgd_are_larger() -> None:
    for scale, steps in ((PAPER, 10), (SMALL, 5), (TINY, 2)):
        recipe = numbers("pgd_at", scale)
        assert recipe.steps == steps
        assert recipe.alpha * steps == pytest.approx(scale.radius * 20 / 255)


def test_the_radii_that_las_at_chooses_from_grow_with_the_scale() -> None:
    assert numbers("las_at", PAPER).eps_choices == tuple(range(3, 16))
    tiny = numbers("las_at", TINY)
    assert tiny.eps_choices == tuple(round(RADIUS * eps) for eps in range(3, 16))
    assert tiny.alpha_choices == tuple(round(RADIUS * alpha) for alpha in range(1, 6))


def test_an_estimate_counts_one_training_and_one_second_in_the_singular() -> None:
    assert str(Estimate(1, 1.2, 0.4, "cpu")).startswith(
        "about 1 second for 1 training and at most 0 seconds for the attacks, on one cpu"
    )
    assert "about 2.0 hours for 3 trainings" in str(Estimate(3, 7200.0, 0.4, "cpu"))
