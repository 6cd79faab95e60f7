"""Multiply-adds of networks against the sums of their layers, and where they are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_helpers import train_quickly
from torch import Tensor, nn
from training_helpers import copied_state, make_model, states_equal

from fastadv.cli import main
from fastadv.evaluation import load_results, multiply_adds
from fastadv.models import Normalized, Stack, create_model

pytestmark = pytest.mark.usefixtures("one_thread")
# Of 8x8 images: 3x3 convolutions at 8x8, then at 4x4, and the classifier.
BODY = 9 * 32 * 64 + 9 * 32 * 64 * 16 + 9 * 64 * 64 * 16
SMALL = BODY + 64 * 4


def by_hooks(model: nn.Module, x: Tensor) -> int:
    """The sum over the convolutions and linear layers that images pass, from their outputs' shapes."""
    total = 0

    def add(module: Any, _: Any, out: Tensor) -> None:
        nonlocal total
        weights = module.weight[0].numel()
        total += weights * out[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    model(x)
    return total


def test_a_small_network_costs_the_sum_of_its_layers() -> None:
    model = make_model(0).train()
    before, state = copied_state(model), torch.get_rng_state()
    assert multiply_adds(model, (1, 8, 8)) == SMALL
    assert model.training and states_equal(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert multiply_adds(Normalized(model, 0.5, 0.2), (1, 8, 8)) == SMALL


def test_a_stack_costs_its_extractors_and_its_merger() -> None:
    stack = Stack([make_model(0), make_model(1), make_model(2)], 4)
    assert multiply_adds(stack, (1, 8, 8)) == 3 * BODY + 3 * 64 * 4
    assert multiply_adds(stack.subset([2]), (1, 8, 8)) == SMALL


@pytest.mark.parametrize(
    ("name", "billions"),
    [("resnet18", 0.56), ("preact_resnet18", 0.56), ("wrn_28_10", 5.24), ("vgg16_bn", 0.31)],
)
def test_networks_cost_what_is_known_of_them(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = create_model(name)
        found = multiply_adds(model, (3, 32, 32))
        assert found == by_hooks(model.eval(), torch.empty(1, 3, 32, 32))
    assert found / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize("shape", [(8, 8), (1, 0, 8), (1, 8, 8, 8)])
def test_shapes_that_are_no_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape must be"):
        multiply_adds(make_model(0), shape)


def branching() -> nn.Module:
    """A network whose cost cannot be counted without values."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = create_model("small_cnn", 10, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x if float(x.detach().sum()) > -1 else -x)

    return Branching()


@pytest.mark.slow
def test_results_and_reports_have_both_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert train_quickly("standard", run, "--quiet") == 0
    words = ["--attacks", "clean", "fgsm", "--max-examples", "20", "--quiet", "--device", "cpu"]
    assert main(["eval", str(run), *words]) == 0
    expected = BODY + 64 * 10
    assert {r.subject.multiply_adds for r in load_results(run / "eval.json")} == {expected}
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "multiply-adds" in text and f"{expected:,}" in text and "56,554" in text
    (card,) = (json.loads(f.read_text()) for f in (tmp_path / "out" / "cards").iterdir())
    assert (card["parameters"], card["multiply_adds"]) == (56554, expected)
    assert "multiply_adds" in (tmp_path / "out" / "report.csv").read_text().splitlines()[0]

    # What cannot be counted is left open, and judged all the same.
    monkeypatch.chdir(tmp_path)
    other = ["--model", "test_cost:branching", "--data", "digits", "--out", "other.json"]
    assert main(["eval", *other, *words]) == 0
    assert load_results("other.json")[0].subject.multiply_adds == 0
