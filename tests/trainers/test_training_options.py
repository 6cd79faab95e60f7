"""Averages of weights, early stopping, label smoothing, extra images, compilation, and what is logged."""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import Interruption, assert_same_end, fingerprint
from test_methods import slow_cross_entropy, slow_distance
from test_pair_methods import PAIRS, TEACHER_OF, images_of
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
from fastadv.cli import main
from fastadv.data import DataFormatError, ImageData, Loader, from_tensors, load_npz
from fastadv.models import small_cnn
from fastadv.trainers import (
    Attacked,
    LossResult,
    Recipe,
    Settings,
    Standard,
    TrainBatch,
    announcement,
    load_model,
    train,
)
from fastadv.trainers.arrest import Replayed
from fastadv.trainers.logs import MetricsLog, read_records
from fastadv.trainers.monitor import Monitor, Validation

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
DOUBLE = torch.float64
STEPS = 4  # of an epoch of `small_data`


def stop_at(step: int) -> Callable[[Any], None]:
    """A callback that interrupts a run after so many steps."""

    def stop(progress: Any) -> None:
        if progress.step == step:
            raise Interruption

    return stop


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


# Extra images


def extra_data(count: int = 10) -> ImageData:
    """Images unlike `small_data`: black but for one pixel that numbers them."""
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(1, count + 1, dtype=torch.uint8)
    return from_tensors(images, torch.arange(count) % 4, 4, "extra")


def mixed_loader(fraction: float = 0.25, count: int = 10, **options: Any) -> Loader:
    settings: dict[str, Any] = {"seed": 5, "train": True, "pad": 0, "flip": False} | options
    return Loader(
        small_data().train, 16, extra=extra_data(count), extra_fraction=fraction, **settings
    )


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_each_batch_has_its_part_of_extra_images(fraction: float) -> None:
    data, loader = small_data().train, mixed_loader(fraction)
    assert len(loader) == STEPS
    seen: list[int] = []
    for x, y, ids in loader.epoch(1):
        extra = ids >= 72
        assert int(extra.sum()) == loader.extra_per_batch == 16 * fraction
        assert torch.equal(x[extra][:, 0, 0, 0] * 255, (ids[extra] - 71).float())
        assert torch.equal(y[extra], (ids[extra] - 72) % 4)
        assert torch.equal(x[~extra], data.images[ids[~extra]].float() / 255)
        assert torch.equal(y[~extra], data.labels[ids[~extra]])
        seen += ids.tolist()
    drawn = [i for i in seen if i >= 72]
    times = [drawn.count(i) for i in range(72, 82)]
    assert max(times) - min(times) <= 1  # all of them before any a second time
    others = [i for i in seen if i < 72]
    assert len(set(others)) == len(others) == STEPS * (16 - loader.extra_per_batch)


def test_mixed_batches_depend_on_seed_and_epoch_alone() -> None:
    ids = lambda loader, *place: [batch.ids.tolist() for batch in loader.epoch(*place)]  # noqa: E731
    loader = mixed_loader()
    epoch = ids(loader, 3)
    torch.manual_seed(0)
    assert ids(mixed_loader(), 3) == epoch
    assert ids(loader, 3, 2) == epoch[2:]
    assert ids(loader, 4) != epoch and ids(mixed_loader(seed=6), 3) != epoch
    shards = [ids(mixed_loader(rank=rank, world_size=2), 3) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shards, strict=True)] == epoch


def test_weights_are_one_in_the_mean() -> None:
    loader = mixed_loader(0.25)
    batch = next(loader.epoch(0))
    weights = loader.weights_of(batch.ids, 3.0)
    assert weights is not None
    assert weights.double().mean().item() == pytest.approx(1, abs=1e-6)
    extra = batch.ids >= 72
    ratio = weights[extra][:, None] / weights[~extra]
    assert torch.allclose(ratio, torch.full_like(ratio, 3.0))
    assert loader.weights_of(batch.ids, 1.0) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fraction": 0.0}, "extra_fraction must be in 0..1 and give at least one"),
        ({"fraction": 0.01}, "at least one extra image in a batch of 16, got 0.01"),
        ({"count": 0}, "extra must have at least one image"),
        ({"drop_last": False}, "extra must be None in evaluation"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mixed_loader(**options)


def test_extra_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    large = from_tensors(torch.zeros(4, 3, 9, 9, dtype=torch.uint8), torch.arange(4))
    with pytest.raises(ValueError, match=r"extra must have images \[1, 8, 8\] .*\[3, 9, 9\]"):
        run("standard", tmp_path, extra=large, changes={"extra_fraction": 0.5})
    foreign = from_tensors(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.tensor([7]))
    with pytest.raises(ValueError, match=r"extra must have labels in 0 \.\. 3 .*got 7"):
        run("standard", tmp_path, extra=foreign, changes={"extra_fraction": 0.5})


SINGLES: list[tuple[str, dict[str, Any]]] = [
    ("standard", {}),
    ("pgd_at", {}),
    ("fast", {}),
    ("arrest", {}),
    ("arrest", {"distill": False}),
]


@pytest.mark.parametrize(("name", "numbers"), [*SINGLES, *PAIRS])
def test_every_method_weighs_its_images(name: str, numbers: dict[str, Any]) -> None:
    base, teacher = make_batch(5, DOUBLE), make_model(1, DOUBLE).eval()
    adv_x = (base.x + 0.05 * torch.sin(50 * base.x)).clamp(0, 1)
    needed = name in TEACHER_OF | {"arrest"} or numbers.get("fixed", False)
    method = make_method(name, make_model(0, DOUBLE), teacher if needed else None, **numbers)
    for model in method.trainable().values():
        model.eval()  # so that an image's loss does not depend on the batch around it

    def loss(rows: slice, weights: Tensor | None = None) -> Tensor:
        x = base.x[rows]
        batch = TrainBatch(x, base.y[rows], base.ids[rows], 0, 0, 5, weights)
        if name == "arrest":
            taught: Any = teacher.forward_features(x)  # type: ignore[operator]
            adv: Attacked = Replayed(adv_x[rows], taught.detach())
        else:
            adv = images_of(method, x, adv_x[rows])
        return method.training_loss(batch, adv).loss.detach()

    alone = torch.stack([loss(slice(row, row + 1)) for row in range(5)])
    weights = torch.tensor([3.0, 0.5, 1.0, 2.0, 0.0], dtype=DOUBLE)
    everyone = slice(None)
    assert torch.allclose(loss(everyone), alone.mean(), rtol=1e-10)
    assert torch.allclose(loss(everyone, weights), (weights * alone).mean(), rtol=1e-10)


def test_training_with_extra_images_follows_their_weights(tmp_path: Path) -> None:
    seen: list[TrainBatch] = []

    class Watching(Standard):
        def attack(self, batch: TrainBatch) -> Attacked:
            seen.append(batch)
            return Attacked(batch.x)

    changes = {"extra_fraction": 0.25, "extra_weight": 3.0}
    run(Watching, tmp_path / "a", extra=extra_data(), changes=changes)
    assert len(seen) == 2 * STEPS
    for batch in seen:
        assert batch.weights is not None and batch.weights.shape == batch.y.shape
        assert torch.equal(batch.weights > 1, batch.ids >= 72)
    description = Path(tmp_path / "a" / "run.json").read_text()
    assert '"extra": {' in description


def test_a_run_with_extra_images_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "extra": extra_data(),
        "changes": {"extra_fraction": 0.5, "extra_weight": 0.5},
        "settings": Settings(checkpoint_every=3),
    }
    run("trades", tmp_path / "whole", **options)
    with pytest.raises(Interruption):
        run("trades", tmp_path / "cut", on_step=stop_at(6), **options)
    with pytest.raises(ValueError, match=r"data\.extra"):
        run("trades", tmp_path / "cut", resume=True, **(options | {"extra": extra_data(9)}))
    run("trades", tmp_path / "cut", resume=True, **options)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_extra_images_come_from_a_numpy_archive(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(40) % 10
    np.savez(tmp_path / "more.npz", image=pixels, label=labels)
    read = load_npz(tmp_path / "more.npz")
    assert read.images.shape == (40, 1, 8, 8) and read.num_classes == 10
    assert np.array_equal(read.images.numpy()[:, 0], pixels[..., 0])
    assert read.labels.tolist() == labels.tolist()
    words = ["train", "standard", "--data", "digits", "--run", str(tmp_path / "run")]
    words += ["--extra", str(tmp_path / "more.npz"), "--extra-fraction", "1/4", "--quiet"]
    words += ["--epochs", "1", "--device", "cpu", "--precision", "fp32", "--extra-weight", "0.5"]
    assert main(words) == 0
    assert '"more.npz"' in (tmp_path / "run" / "run.json").read_text()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros(1)}, "image"),
        ({"image": np.zeros((2, 8, 8), np.uint8), "label": np.zeros(2, int)}, "N, H, W, C"),
        ({"image": np.zeros((2, 8, 8, 1)), "label": np.zeros(2, int)}, "must be uint8"),
        ({"image": np.zeros((2, 8, 8, 1), np.uint8), "label": np.zeros(3, int)}, "labels must be"),
        ({"image": np.array([object()]), "label": np.zeros(1, int)}, "not a .npz archive"),
    ],
)
def test_archives_of_another_kind_are_named(
    arrays: dict[str, Any], words: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataFormatError, match=words):
        load_npz(tmp_path / "bad.npz")


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_text("no archive")
    with pytest.raises(DataFormatError, match=r"bad\.npz: not a \.npz archive"):
        load_npz(tmp_path / "bad.npz")
    with pytest.raises(FileNotFoundError):
        load_npz(tmp_path / "nowhere.npz")


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


# Logs


def test_drift_is_the_mean_distance_from_the_teachers_features(tmp_path: Path) -> None:
    teacher, data = make_model(1).eval(), small_data()
    changes = {"monitor_images": 24}
    result = run("arrest", tmp_path, teacher=teacher, data=data, changes=changes)
    x = data.test.images.double() / 255
    model, old = (copy.deepcopy(m).double().eval() for m in (result.model, teacher))
    with torch.no_grad():
        expected = slow_distance(model.forward_features(x), old.forward_features(x)).mean()
    assert result.record["drift"] == pytest.approx(float(expected), rel=1e-4)
    assert "drift" not in run("pgd_at", tmp_path / "other").record


class Masked(nn.Module):
    """A model that sees the upper half of an image only."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:, :, :4].flatten(1))


def test_zero_gradients_of_the_attack_are_logged(tmp_path: Path) -> None:
    result = run("pgd_at", tmp_path, model=Masked(), settings=Settings(log_every=2))
    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["zero_gradients"] for r in records] == [0.5] * len(records)
    assert result.record["zero_gradients"] == 0.5
    assert "zero_gradients" not in run("standard", tmp_path / "standard").record


def test_models_without_comparable_features_have_no_drift(tmp_path: Path) -> None:
    cut = run("hat", tmp_path / "cut", teacher=make_model(1), changes={"epochs": 1})
    assert 0 < cut.record["drift"] < 1
    changes = {"epochs": 1, "monitor_steps": 0}
    for name, model, teacher in (
        ("uncut", Masked(), Masked()),
        ("mixed", small_cnn(4, 1), Masked()),
        ("sizes", small_cnn(4, 1), tiny_net()),
    ):
        result = run("hat", tmp_path / name, model=model, teacher=teacher, changes=changes)
        assert "drift" not in result.record


def test_the_summary_has_all_columns_whenever_they_begin(tmp_path: Path) -> None:
    # Looks are at every second epoch, and there is replay in the first alone.
    changes = {"epochs": 3, "monitor_every": 2, "replay_epochs": 1}
    run("arrest", tmp_path, changes=changes)
    with open(tmp_path / "summary.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    filled = lambda name: [row[name] != "" for row in rows]  # noqa: E731
    assert filled("replayed") == [True, False, False]
    assert filled("drift") == filled("robust_accuracy") == [False, True, True]
    assert filled("loss") == [True] * 3
    # A column that begins after the log was opened again.
    log = MetricsLog(tmp_path, 12)
    log.epoch(epoch=4, step=16, late=0.5)
    with open(tmp_path / "summary.csv", encoding="utf-8") as file:
        assert [row["late"] for row in csv.DictReader(file)] == ["", "", "", "0.5"]


# What is said before the start


def test_the_announcement_estimates_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcement, "_seconds_of", lambda work: 0.5)
    changes = {"epochs": 3, "replay_epochs": 1}
    run("arrest", tmp_path, progress=True, changes=changes)
    # PGD-3 is 3 steps, a training pass 3 passes, the teacher 1, the drift of the first epoch 1.
    seconds = 0.5 * STEPS * (3 * 3 + 5 + 4 + 4)
    error = capsys.readouterr().err
    assert f"time: about {seconds:.0f} s, going by one batch" in error


def test_the_announcement_changes_nothing(tmp_path: Path) -> None:
    class Dropping(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
            self.append(nn.Linear(144, 4))

    ends = []
    for show in (False, True):
        torch.manual_seed(0)
        result = run("pgd_at", tmp_path / str(show), model=Dropping(), progress=show)
        ends.append(result.model.state_dict())
    assert states_equal(*ends)


def test_the_announcement_counts_extra_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"epochs": 1, "extra_fraction": 0.25}
    run("standard", tmp_path, progress=True, extra=extra_data(), changes=changes)
    assert "72 images and 4 of 10 extra images per iteration" in capsys.readouterr().err


def test_some_of_the_training_images(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watching(Standard):
        def attack(self, batch: TrainBatch) -> Attacked:
            seen.append(batch.y)
            return super().attack(batch)

    changes = {"train_images": 32, "holdout": 8, "epochs": 1}
    recipe = small_recipe("standard", **changes)
    data = small_data()
    result = train(
        Watching, recipe, data=data, model=make_model(0), run_dir=tmp_path / "r", progress=False
    )
    assert result.progress.step == 2
    counts = torch.cat(seen).bincount(minlength=4)
    assert counts.sum() == 32 and counts.max() - counts.min() <= 1
    many = small_recipe("standard", train_images=65, holdout=8)
    with pytest.raises(ValueError, match="train_images must be <= 64, the images there, got 65"):
        train(
            "standard", many, data=data, model="small_cnn", run_dir=tmp_path / "q", progress=False
        )
    with pytest.raises(ValueError, match="train_images must be >= 1, got 0"):
        small_recipe("standard", train_images=0)
