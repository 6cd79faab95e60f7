"""Methods of one's own in unusual forms: states of any shape, schedules of one's own, several models, float64."""

from __future__ import annotations

import copy
import enum
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_helpers import make_model, small_data, small_recipe, states_equal

from fastadv.ranks import Ranks
from fastadv.trainers import (
    AdversarialRecipe,
    Attacked,
    LossResult,
    Schedule,
    Settings,
    TrainBatch,
    train,
)
from fastadv.trainers.adversarial import AdversarialMethod
from fastadv.trainers.method import Update
from fastadv.trainers.method_state import gather_state, shard_state

pytestmark = pytest.mark.usefixtures("one_thread")


class Plain(AdversarialMethod[AdversarialRecipe, Attacked]):
    """PGD-AT, for others to change."""

    name = "plain"
    recipe_class = AdversarialRecipe

    def attack(self, batch: TrainBatch) -> Attacked:
        return Attacked(self.perturb(batch))

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        return LossResult(F.cross_entropy(self.model(adv.x), batch.y))


class MeanTeacher(Plain):
    """Its second model is an average of the first one, with the scalars that BatchNorm has."""

    name = "mean_teacher"

    def setup(self) -> None:
        super().setup()
        self.mean = copy.deepcopy(self.model).eval()

    @torch.no_grad()
    def _follow(self, x: Tensor) -> Tensor:
        for ours, theirs in zip(self.mean.parameters(), self.model.parameters(), strict=True):
            ours.lerp_(theirs, 0.1)
        for ours, theirs in zip(self.mean.buffers(), self.model.buffers(), strict=True):
            ours.copy_(theirs)
        return self.mean(x)

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        apart = F.mse_loss(self.model(adv.x), self._follow(batch.x))
        return LossResult(super().training_loss(batch, adv).loss + apart)

    def state(self) -> dict[str, Tensor]:
        return self.mean.state_dict()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.mean.load_state_dict(state)


class OwnState(Plain):
    """A method whose state is what a test says."""

    name = "own_state"
    wrong: Any = None

    def state(self) -> dict[str, Tensor]:
        return self.wrong


class Interruption(Exception):
    """Ends a run within an epoch."""


def run(
    method: type[Plain],
    run_dir: Path,
    recipe: Any = None,
    stop_after: int | None = None,
    model: Callable[[], nn.Module] = make_model,
    **options: Any,
) -> nn.Module:
    def interrupt(progress: Any) -> None:
        if progress.step == stop_after:
            raise Interruption

    recipe = recipe or small_recipe("pgd_at")
    settings = Settings(log_every=2, checkpoint_every=1)
    fixed: dict[str, Any] = {"progress": False, "device": "cpu", "settings": settings}
    result = train(
        method,
        recipe,
        data=small_data(),
        model=model(),
        run_dir=run_dir,
        on_step=interrupt,
        **fixed,
        **options,
    )
    return result.model


def test_a_state_with_scalars_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    whole = run(MeanTeacher, tmp_path / "whole")
    with pytest.raises(Interruption):
        run(MeanTeacher, tmp_path / "cut", stop_after=3)
    again = run(MeanTeacher, tmp_path / "cut", resume=True)
    assert states_equal(dict(whole.state_dict()), dict(again.state_dict()))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"count": 3}, r"OwnState.state must return tensors by name, .* got 3 under 'count'"),
        ({"net": {"w": torch.zeros(2)}}, "must return tensors by name, .* got a dict under 'net'"),
        ([torch.zeros(2)], "OwnState.state must return a dict of tensors by name, got a list of 1"),
        (None, "must return a dict of tensors by name, got None"),
    ],
)
def test_a_state_that_could_not_be_resumed_ends_the_first_iteration(
    state: Any, message: str, tmp_path: Path
) -> None:
    OwnState.wrong = state
    with pytest.raises(TypeError, match=message):
        run(OwnState, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_processes_keep_their_own_part_of_a_state_and_share_scalars(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Second:
        rank, world_size = 1, 2

        def shard(self, value: Tensor) -> Tensor:
            return value.chunk(2)[self.rank]

    OwnState.wrong = {"rows": torch.ones(3, 2), "count": torch.tensor(4)}
    method = object.__new__(OwnState)
    monkeypatch.setattr(Ranks, "gather", lambda self, part: torch.cat((part, part + 1)))
    state = gather_state(method, Ranks(0, 2))
    assert state["rows"].shape == (6, 2) and state["count"].shape == ()
    own = shard_state(state, Second())  # type: ignore[arg-type]
    assert torch.equal(own["rows"], torch.full((3, 2), 2.0)) and int(own["count"]) == 4


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_a_schedule_that_gives_no_learning_rate_is_refused(value: float) -> None:
    class Late(Schedule):
        def factor(self, epoch: float, epochs: int) -> float:
            return 1.0 if epoch < 1 else value

    recipe = small_recipe("pgd_at", schedule=Late())
    assert recipe.lr_at(0.5) == recipe.lr
    with pytest.raises(
        ValueError, match=r"Late.factor must return a finite number >= 0, got .* after 1 of 2"
    ):
        recipe.lr_at(1)


def test_a_schedule_may_compute_in_tensors(tmp_path: Path) -> None:
    class Half(Schedule):
        def factor(self, epoch: float, epochs: int) -> float:
            return torch.tensor(0.5)  # type: ignore[return-value]

    run(Plain, tmp_path / "run", small_recipe("pgd_at", schedule=Half()))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["lr"] for line in lines if "lr" in json.loads(line)} == {0.025}


def test_a_step_that_updates_nothing_is_refused(tmp_path: Path) -> None:
    class Idle(Plain):
        name = "idle"

        def step(self, batch: TrainBatch, update: Update) -> None:
            self.training_loss(batch, self.attack(batch))

    with pytest.raises(ValueError, match=r"Idle.step must call update\(LossResult\(loss\)\)"):
        run(Idle, tmp_path / "run")


class Forgetful(Plain):
    """Its attack sets the model to evaluation mode, as published loops do."""

    name = "forgetful"
    restores = False

    def attack(self, batch: TrainBatch) -> Attacked:
        self.model.eval()
        return super().attack(batch)

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
        if self.restores:
            self.model.train()
        return super().training_loss(batch, adv)


def test_a_model_that_is_left_in_evaluation_mode_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"Forgetful must leave .* got 'model' in evaluation mode .*: call train\(\)",
    ):
        run(Forgetful, tmp_path / "forgets")

    class Careful(Forgetful):
        name = "careful"
        restores = True

    same, plain = run(Careful, tmp_path / "restores"), run(Plain, tmp_path / "plain")
    assert states_equal(dict(same.state_dict()), dict(plain.state_dict()))


def test_gradients_of_several_batches_are_added_by_their_losses(tmp_path: Path) -> None:
    class Pairs(Plain):
        name = "pairs"

        def step(self, batch: TrainBatch, update: Update) -> None:
            loss = self.training_loss(batch, self.attack(batch)).loss
            self.kept = loss if batch.step % 2 == 0 else update(LossResult((self.kept + loss) / 2))

    before = make_model().state_dict()
    after = run(Pairs, tmp_path / "run").state_dict()
    assert not states_equal(dict(before), dict(after))


class Colour(enum.Enum):
    """A kind of value that no run records."""

    RED = "red"


@dataclass(frozen=True, kw_only=True)
class ColouredRecipe(AdversarialRecipe):
    """A recipe with such a value."""

    colour: Colour = Colour.RED


def test_a_recipe_that_no_run_can_record_names_its_field(tmp_path: Path) -> None:
    class Coloured(Plain):
        name = "coloured"
        recipe_class = ColouredRecipe

    with pytest.raises(
        TypeError, match=r"colour must be a number, text, .* got <Colour.RED: 'red'>"
    ):
        run(Coloured, tmp_path / "run", ColouredRecipe(epochs=1, batch_size=16))
    assert not (tmp_path / "run").exists()


class InDouble(nn.Module):
    """A float64 network that converts its images itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model(0, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.double())


def test_float64_networks_are_trained_where_they_take_float32_images(tmp_path: Path) -> None:
    trained = run(Plain, tmp_path / "inside", model=InDouble)
    assert {p.dtype for p in trained.parameters()} == {torch.float64}
    with pytest.raises(
        TypeError, match=r"model must take float32 images, got one with weights of float64"
    ):
        run(Plain, tmp_path / "plain", model=lambda: make_model(0, torch.float64))
