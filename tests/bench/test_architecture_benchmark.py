"""The benchmark that attacks other people's architectures: its verdicts, its limits and what it keeps."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import warm_context
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import architecture_check as check
import architecture_list as listed
import architecture_speed as speed
import architectures

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cosine", "precision", "warned", "wanted"),
    [
        (0.85, "bf16", False, "right"),
        (0.85, "bf16", True, "warned"),
        (0.75, "bf16", True, "WRONG"),
        (0.95, "fp32", False, "WRONG"),
        (0.995, "fp32", True, "warned"),
        (float("nan"), "fp32", False, "WRONG"),
    ],
)
def test_verdict(cosine: float, precision: str, warned: bool, wanted: str) -> None:
    assert check.verdict(cosine, precision, warned) == wanted


def test_cosine_is_per_image() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[0.0, 2.0], [3.0, 3.0], [0.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(check.cosine(a, b), torch.tensor([0.0, 1.0, 1.0, 0.0]).double())


def test_the_median_of_an_even_number_of_ratios_lies_between_the_middle_two() -> None:
    rows = {f"net{ratio}": {"ratio": ratio} for ratio in (1.0, 3.0, 1.2, 2.0)}
    assert "4 networks, ratio 1.00 to 3.00, median 1.60" in speed.summary(rows)


def test_own_architecture_is_examined() -> None:
    stages: list[str] = []
    row = check.examine("small_cnn", 2, CPU, tell=stages.append)
    assert row["verdict"] in ("right", "warned")
    assert row["engine"] and row["reason"] and row["precision"] in ("fp32", "bf16")
    assert len(row["cosines"]) == 2 and row["cosine"] == min(row["cosines"])
    assert row["logits_error"] < 0.1
    assert stages[0] == "building" and "the attack" in stages


def test_wrong_gradient_is_seen() -> None:
    """An attack that follows another network than the plain loop is WRONG, and its logits are off."""
    model, other = (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2))
    x, y = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    logits, gradient = check.plain_loop(other, x, y)
    row = check.attacked(model, x, y, logits, gradient)
    assert row["verdict"] == "WRONG" and row["logits_error"] > 0.1
    row = check.attacked(model, x, y, *check.plain_loop(model, x, y))
    assert row["verdict"] == "right" and row["cosine"] > 0.999


def test_failing_attack_is_wrong() -> None:
    def fails_for_fastadv(x: Tensor) -> Tensor:
        raise ValueError("no\nsecond line")

    x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
    row = check.attacked(fails_for_fastadv, x, y, x, x)  # type: ignore[arg-type]
    assert row == {"verdict": "WRONG", "note": "the attack fails: ValueError: no"}


def test_unbuildable_architecture_is_not_run() -> None:
    row = check.examine("no_such_model", 2, CPU)
    assert row["verdict"] == "not run" and "name must be one of" in row["note"]


class _CountsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += torch.is_grad_enabled()
        return self.linear(x.mean((2, 3)))


def test_changed_buffers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _CountsCalls()
    monkeypatch.setattr(check, "build", lambda name: listed.Built(model, 8))

    def careless(model: nn.Module, *_: Any) -> dict[str, Any]:
        model(torch.rand(2, 3, 8, 8))
        return {"verdict": "right"}

    monkeypatch.setattr(check, "attacked", careless)
    assert check.examine("any", 2, CPU)["verdict"] == "WRONG"


def test_constants_are_drawn_and_others_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    nn.init.zeros_(model[2].weight)
    model[1].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    check.draw_constants(model)
    after = dict(model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"1.weight", "2.weight", "2.bias"}
    assert ((after["1.weight"] >= 0.5) & (after["1.weight"] <= 1.5)).all()
    assert (after["2.weight"] >= 0.1).all()


def test_statistics_are_averages_over_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.Dropout())
    batches: list[Tensor] = []
    make = check.random_images

    def kept(*args: Any) -> Tensor:
        batches.append(make(*args))
        return batches[-1]

    monkeypatch.setattr(check, "random_images", kept)
    check.calibrate(model, 8, CPU)
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches])
    torch.testing.assert_close(model[0].running_mean, means.mean(0))
    assert model[0].momentum == 0.3 and not any(m.training for m in model.modules())


def _sleep(tell: architectures.Tell) -> None:
    tell("sleeping")
    time.sleep(60)


def _die(stage: str, tell: architectures.Tell) -> None:
    tell(stage)
    os._exit(3)


def _answer(tell: architectures.Tell) -> int:
    print("packages may print")
    return 42


@pytest.mark.slow
def test_process_of_its_own() -> None:
    assert architectures.apart(_answer, 60, 2**40) == 42


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "seconds", "memory", "why", "stage"),
    [
        (_sleep, 0.5, 2**40, "it took over 0.5 s", "sleeping"),
        (partial(_die, "the attack"), 60, 2**40, "died with code 3", "the attack"),
    ],
)
def test_process_is_stopped(
    work: Any,
    seconds: float,
    memory: int,
    why: str,
    stage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forking = SimpleNamespace(get_context=lambda kind: warm_context())  # without a new interpreter
    monkeypatch.setattr(architectures, "multiprocessing", forking)
    with pytest.raises(architectures.Stopped, match=why) as caught:
        architectures.apart(work, seconds, memory)
    assert caught.value.stage == stage
    assert caught.value.own_doing == ("died" in why)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_limit() -> None:
    with pytest.raises(architectures.Stopped, match="GiB"):
        architectures.apart(_sleep, 60, 2**20)


def options(out: Path, **changes: Any) -> argparse.Namespace:
    values = {
        "zoo": ["ours"],
        "only": "^small_cnn$",
        "batch": 2,
        "device": "cpu",
        "threads": 1,
        "seconds": 300.0,
        "memory": 16.0,
        "initial": False,
        "again": False,
        "retry": [],
        "out": out,
    }
    return argparse.Namespace(**(values | changes))


def test_results_are_kept_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def fake_row(name: str, _: argparse.Namespace) -> check.Row:
        ran.append(name)
        if name == "vgg16_bn":
            raise KeyboardInterrupt
        return {"verdict": "WRONG", "note": "a | b"}

    monkeypatch.setattr(architectures, "row_of", fake_row)
    with pytest.raises(KeyboardInterrupt):
        architectures.run(options(tmp_path, only="^(resnet18|vgg16_bn)$"))
    kept = json.loads((tmp_path / "architectures_cpu.json").read_text())
    assert list(kept["rows"]) == ["resnet18"] and kept["machine"]["packages"]["torch"]

    architectures.run(options(tmp_path, only="^(resnet18|small_cnn)$"))
    assert ran == ["resnet18", "vgg16_bn", "small_cnn"]
    architectures.run(options(tmp_path, retry=["WRONG"]))
    architectures.run(options(tmp_path, retry=["not run"]))
    assert ran[3:] == ["small_cnn"]
    table = (tmp_path / "architectures_cpu.md").read_text()
    assert "ours: 2 WRONG" in table and table.count("a \\| b") == 2


@pytest.mark.parametrize(
    ("stage", "own_doing", "wanted"),
    [
        ("the attack", True, "WRONG"),
        ("the attack", False, "not run"),
        ("the plain loop", True, "not run"),
    ],
)
def test_only_a_crash_in_the_attack_is_wrong(
    stage: str, own_doing: bool, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise architectures.Stopped("why", stage, own_doing)

    monkeypatch.setattr(architectures, "apart", stop)
    row = architectures.row_of("small_cnn", options(tmp_path))
    assert row == {"verdict": wanted, "note": f"why, at: {stage}"}


class _Plain(nn.Module):
    def __init__(self, classes: int, width: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class _Named(_Plain):
    pass


class _WithRelu(_Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.head(x))


def test_architectures_are_told_apart() -> None:
    text = listed._text_of(_Plain(10), 10)
    assert listed._text_of(_Named(100), 100) == text
    assert listed._text_of(_Plain(10, width=5), 10) != text
    assert listed._text_of(_WithRelu(10), 10) != text


def test_names_belong_to_zoos() -> None:
    assert [listed.zoo_of(n) for n in ("resnet18", "stack:a+b", "timm:a", "robustbench:a/b/c")] == [
        "ours",
        "ours",
        "timm",
        "robustbench",
    ]
    assert len(set(listed.TIMM)) == len(listed.TIMM) >= 60
