"""The checks for masked gradients, on honest and on masked models."""

from __future__ import annotations

import pytest
import torch
from linear_model import Staircase, linear_problem
from test_doubtful_figures import spoilt_off_the_grid
from torch import nn

from fastadv.evaluation import masking_checks

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = {"progress": False}


def test_masking_checks_pass_an_honest_model():
    model, x, y = linear_problem(classes=4, n=80)
    findings = masking_checks(model, (x, y), eps=0.02, **QUIET)
    assert [finding.check for finding in findings] == ["eps", "steps", "unbounded", "gradients"]
    assert all(finding.ok for finding in findings), findings
    eps = findings[0].accuracies
    assert eps[0] == (0.0, 1.0) and eps[-1][1] < 0.5


def test_masking_checks_find_a_masked_gradient():
    model, x, _ = linear_problem(classes=4, n=80)
    masked = Staircase(model, levels=20)
    findings = {
        f.check: f for f in masking_checks(masked, (x, masked(x).argmax(1)), eps=0.02, **QUIET)
    }
    assert not findings["unbounded"].ok
    assert "still right when any image is allowed" in findings["unbounded"].message


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:the model's gradient in x is")
def test_masking_checks_look_at_gradients_beyond_the_images(value):
    """The gradients at the images themselves are right, so that a first step is a good one."""
    model, data = spoilt_off_the_grid(value)
    *_, gradients = masking_checks(model, data, eps=0.02, **QUIET)
    assert not gradients.ok and gradients.accuracies == ((0.0, 0.0), (1.0, 1.0))
    assert "images that withstood a run of PGD have a gradient that is zero everywhere" in str(
        gradients
    )
    assert ("were NaN or infinite" in gradients.message) == (value != 0)
    *_, gradients = masking_checks(spoilt_off_the_grid(1.0)[0], data, eps=0.02, **QUIET)
    assert "gradients that the attack followed" not in gradients.message


def test_masking_checks_find_accuracy_that_rises_with_eps():
    model, x, y = linear_problem(classes=2, n=80)
    findings = masking_checks(
        _GrowsSure(model, x), (x, y), eps=0.01, eps_factors=(1, 4), steps=(3,), **QUIET
    )
    assert not findings[0].ok and "rises with eps" in findings[0].message


class _GrowsSure(nn.Module):
    """Linear near real images and sure of the clean answer farther away, so that a longer step fails."""

    def __init__(self, model, images):
        super().__init__()
        self.model, self.images = model, images

    def forward(self, x):
        distances = torch.cdist(x.flatten(1), self.images.flatten(1), p=torch.inf)
        distance, nearest = distances.detach().min(1)
        clean = self.images[nearest]
        return torch.where(distance[:, None] > 0.015, self.model(clean), self.model(x))


def test_masking_checks_leave_out_balls_larger_than_the_range_of_images():
    model, x, y = linear_problem(classes=2, n=10)
    findings = masking_checks(model, (x, y), eps=0.6, steps=(1,), **QUIET)
    assert [point for point, _ in findings[0].accuracies] == [0.0, 0.15, 0.3, 0.6]


def test_masking_checks_refuse_wrong_arguments():
    model, x, y = linear_problem(classes=2, n=4)
    for arguments in (
        {"eps": 0.0},
        {"steps": (5, 1)},
        {"eps_factors": ()},
        {"slack": 1.5},
        {"norm": "l3"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must"):
            masking_checks(model, (x, y), **arguments, **QUIET)
