"""Averages of weights, early stopping, label smoothing, and compilation."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Interruption, assert_same_end, fingerprint, stop_at
from test_methods import slow_cross_entropy, slow_distance
from test_trainers import run
from torch import Tensor, nn
from training_helpers import (
    copied_state,
    make_batch,
    make_method,
    make_model,
    small_data,
    small_recipe,
    states_equal,
)

from fastadv import PGD
from fastadv.data import Loader
from fastadv.models import small_cnn
from fastadv.trainers import (
    Attacked,
    LossResult,
    Recipe,
    Settings,
    Standard,
    TrainBatch,
    load_model,
)
from fastadv.trainers.arrest import Replayed
from fastadv.trainers.logs import read_records
from fastadv.trainers.monitor import Monitor, Validation

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
DOUBLE = torch.float64
STEPS = 4  # of an epoch of `small_data`


# Averages of weights


def slow_statistics(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Means over batches of what BatchNorm sees, in float64: name of a buffer -> value."""
    model = copy.deepcopy(model).double().train()
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            columns = inputs[0].transpose(0, 1).flatten(1)  # [C, B * H * W]
            mean = columns.sum(1) / columns.shape[1]
            variance = (columns - mean[:, None]).square().sum(1) / (columns.shape[1] - 1)
            for key, value in (("running_mean", mean), ("running_var", variance)):
                key = f"{name}.{key}"
                sums[key] = sums.get(key, torch.zeros_like(value)) + value

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for x in batches:
            model(x.double())
    return {name: total / len(batches) for name, total in sums.items()}


def test_swa_is_the_mean_of_the_epochs_last_weights(tmp_path: Path) -> None:
    model, ends = make_model(0), []

    def watch(progress: Any) -> None:
        if progress.epoch_step == STEPS:
            ends.append(copied_state(model))

    changes = {"epochs": 5, "swa_start": 3, "flip": True}
    result = run("standard", tmp_path, model=model, changes=changes, on_step=watch)
    averaged = result.model.state_dict()
    recipe = small_recipe("standard", **changes)
    loader = Loader(small_data().train, recipe.batch_size, seed=recipe.seed, train=True, pad=1)
    statistics = slow_statistics(result.model, [batch.x for batch in loader.epoch(4)])
    for name, _ in model.named_parameters():
        expected = sum(state[name].double() for state in ends[2:]) / 3
        assert torch.allclose(averaged[name].double(), expected, rtol=1e-6, atol=1e-7), name
    assert statistics
    for name, value in statistics.items():
        assert torch.allclose(averaged[name].double(), value, rtol=1e-5, atol=1e-6), name
    assert result.progress.averaged == 3
    assert not result.model.training

    live = load_model(tmp_path, small_cnn(4, 1), averaged=False).state_dict()
    assert states_equal(live, ends[-1])
    assert states_equal(load_model(tmp_path, small_cnn(4, 1)).state_dict(), averaged)


def test_until_swa_begins_the_model_itself_is_looked_at(tmp_path: Path) -> None:
    often = Settings(checkpoint_every=3, keep=9)
    plain = run("standard", tmp_path / "plain", settings=often)
    late = run("standard", tmp_path / "late", changes={"swa_start": 2}, settings=often)
    looks = [
        [
            r["clean_accuracy"]
            for r in read_records(tmp_path / name / "metrics.jsonl")
            if "clean_accuracy" in r
        ]
        for name in ("plain", "late")
    ]
    assert looks[0][0] == looks[1][0]
    # The training itself is the same, and the first checkpoints have no average.
    for which in ("step_000004", "step_000008"):
        models = [
            load_model(tmp_path / name, checkpoint=which, averaged=False)
            for name in ("plain", "late")
        ]
        assert states_equal(*(m.state_dict() for m in models))
    for which in ("step_000003", "step_000004"):
        models = [load_model(tmp_path / name, checkpoint=which) for name in ("plain", "late")]
        assert states_equal(*(m.state_dict() for m in models))
    assert not states_equal(plain.model.state_dict(), late.model.state_dict())


@pytest.mark.parametrize("stop_after", [3, 6, 10])
def test_a_run_with_swa_is_resumed_bit_for_bit(stop_after: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "changes": {"epochs": 3, "swa_start": 2},
        "settings": Settings(checkpoint_every=3),
    }
    whole = run("pgd_at", tmp_path / "whole", **options)
    with pytest.raises(Interruption):
        run("pgd_at", tmp_path / "cut", on_step=stop_at(stop_after), **options)
    torch.manual_seed(stop_after)
    resumed = run("pgd_at", tmp_path / "cut", resume=True, **options)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    assert states_equal(whole.model.state_dict(), resumed.model.state_dict())


# Early stopping


def slow_stop(scores: list[float], patience: int) -> int:
    """How many looks there are before the run ends."""
    for count in range(1, len(scores) + 1):
        before, recent = (
            scores[: max(count - patience, 0)],
            scores[max(count - patience, 0) : count],
        )
        if before and max(recent) <= max(before):
            return count
    return len(scores)


@pytest.mark.parametrize("patience", [1, 2, 3, 4])
def test_the_run_ends_when_patience_does(
    patience: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [0.1, 0.3, 0.3, 0.2, 0.4, 0.1, 0.2, 0.39, 0.5]
    left = iter(scores)
    monkeypatch.setattr(Monitor, "validate", lambda self: Validation(0.5, next(left)))
    changes = {"epochs": len(scores), "patience": patience}
    result = run("pgd_at", tmp_path, changes=changes)
    looks = slow_stop(scores, patience)
    assert result.progress.epoch == looks
    assert result.progress.best_score == max(scores[:looks])
    records = [r for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "epoch"]
    ended = [bool(r.get("stopped_early")) for r in records]
    assert ended == [False] * (looks - 1) + [looks < len(scores)]


def test_a_stopped_run_stays_stopped_unless_given_more_patience(tmp_path: Path) -> None:
    def go(**options: Any) -> Any:
        # A learning rate of 0 and no BatchNorm: no look is better than the first.
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        nn.init.zeros_(model[1].weight)
        changes = {"epochs": 9, "lr": 0.0, "patience": options.pop("patience", 2), "holdout": 24}
        return run("standard", tmp_path / "run", model=model, changes=changes, **options)

    with pytest.raises(Interruption):
        go(on_step=stop_at(5))
    resumed = go(resume=True)
    assert resumed.progress.epoch == 3 and resumed.record["stopped_early"] is True
    before = fingerprint(tmp_path / "run")
    again = go(resume=True)
    assert again.record == {} and again.progress.epoch == 3
    assert fingerprint(tmp_path / "run") == before
    assert go(resume=True, allow_changes=True, patience=4).progress.epoch == 5


# Label smoothing


@pytest.mark.parametrize("name", ["standard", "pgd_at", "fast", "arrest"])
def test_smoothed_labels_equal_the_formula(name: str) -> None:
    share, batch = 0.3, make_batch(dtype=DOUBLE)
    model, teacher = make_model(0, DOUBLE), make_model(1, DOUBLE)
    slow: Any = copy.deepcopy(model).train()
    method = make_method(name, model, teacher if name == "arrest" else None, label_smoothing=share)
    method.train_mode()
    taught = teacher.eval().forward_features(batch.x).detach()  # type: ignore[operator]
    adv = Replayed(batch.x, taught) if name == "arrest" else Attacked(batch.x)
    loss = method.training_loss(batch, adv).loss

    features = slow.forward_features(batch.x)
    logits = slow.forward_head(features)
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    expected = (1 - share) * slow_cross_entropy(logits, batch.y) - share * log_p.mean()
    if name == "arrest":
        expected = expected + 50 * slow_distance(features, taught).mean()
    loss.backward()
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-12)
    for ours, other in zip(model.parameters(), slow.parameters(), strict=True):
        assert torch.allclose(ours.grad, other.grad, rtol=1e-9, atol=1e-12)


class OwnLoss(Standard):
    """A method that knows neither smoothing nor weights."""

    name = "own"

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        return LossResult(self.model(adv.x).square().mean())


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("trades", {"label_smoothing": 0.1}, "label_smoothing must be 0 for trades"),
        (OwnLoss, {"label_smoothing": 0.1}, "label_smoothing must be 0 for own"),
        (OwnLoss, {"extra_fraction": 0.5, "extra_weight": 2.0}, "extra_weight must be 1 for own"),
        ("standard", {"extra_weight": 2.0}, "extra_weight must be 1 without extra images"),
        ("standard", {"extra_fraction": 0.5}, "extra_fraction must be 0 without extra images"),
    ],
)
def test_what_a_run_cannot_do_is_refused(
    method: Any, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        run(method, tmp_path, changes=changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"swa_start": 0}, r"swa_start must be in 1 \.\. 100"),
        ({"swa_start": 101}, r"swa_start must be in 1 \.\. 100 \(epochs\), got 101"),
        ({"swa_start": 75, "ema_decay": 0.99}, "ema_decay and swa_start exclude each other"),
        ({"patience": 0}, "patience must be >= 1, got 0"),
        ({"label_smoothing": 1.1}, r"label_smoothing must be in 0\.\.1, got 1\.1"),
        ({"extra_fraction": -0.1}, r"extra_fraction must be in 0\.\.1"),
        ({"extra_weight": 0.0}, "extra_weight must be > 0, got 0"),
        ({"extra_weight": math.nan}, "extra_weight must be > 0, got nan"),
    ],
)
def test_numbers_out_of_range_are_named(numbers: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe(**numbers)


# Compilation


class TinyNet(nn.Module):
    """A network that compiles quickly, with a feature split and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()

    def forward_head(self, features: Tensor) -> Tensor:
        return self.head(features.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def tiny_net(seed: int = 0) -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyNet()


@pytest.mark.compiles
def test_a_compiled_run_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs are what is tested here, not the code that inductor makes of them within half a minute."""
    real = torch.compile

    def traced(*arguments: Any, **options: Any) -> Any:
        return real(*arguments, **{**options, "backend": "aot_eager"})

    monkeypatch.setattr(torch, "compile", traced)
    counters = torch._dynamo.utils.counters["frames"]
    runs: dict[bool, tuple[list[float], dict[str, Tensor]]] = {}
    for compiled in (False, True):
        before = counters["ok"]
        folder, model = tmp_path / str(compiled), tiny_net()
        changes = {"compile": compiled, "engine": "compiled", "replay_epochs": 0, "lam": 2.0}
        run(
            "arrest",
            folder,
            model=model,
            teacher=tiny_net(1),
            changes=changes | {"finetune": False, "holdout": 24},
            settings=Settings(log_every=1),
        )
        losses = [r["loss"] for r in read_records(folder / "metrics.jsonl") if r["kind"] == "step"]
        runs[compiled] = losses, model.state_dict()
        assert (counters["ok"] > before) == compiled
    (plain, plain_state), (fast, fast_state) = runs[False], runs[True]
    assert len(plain) == 6
    assert fast == pytest.approx(plain, rel=1e-4)
    assert fast_state.keys() == plain_state.keys()
    for name, value in plain_state.items():
        assert torch.allclose(fast_state[name], value, rtol=1e-3, atol=1e-4), name


@pytest.mark.compiles
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_a_compiled_model_is_attacked_as_before(engine: str) -> None:
    batch, model = make_batch(), make_model(0).eval()
    attack = PGD(model, 0.1, 0.05, 3, engine=engine, precision="fp32")
    before = attack(batch.x, batch.y, seed=1)
    model.compile(backend="eager")
    assert torch.allclose(attack(batch.x, batch.y, seed=1), before, atol=1e-6)
    assert attack.last.engine == engine
