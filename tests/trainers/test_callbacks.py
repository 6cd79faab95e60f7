"""Callbacks: when they are called, that they change nothing, and the ready ones with stand-ins."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import Interruption
from training_helpers import small_data, small_recipe, states_equal

from fastadv.cli import main
from fastadv.trainers import Callback, MlflowCallback, Settings, WandbCallback, train
from fastadv.trainers.logs import read_records
from fastadv.trainers.trackers import MLFLOW_FILE

pytestmark = pytest.mark.usefixtures("one_thread")


def run(folder: Path, *callbacks: Callback, method: str = "pgd_at", **options: Any) -> Any:
    settings = options.pop("settings", Settings(log_every=3))
    return train(
        method,
        small_recipe(method, **options.pop("changes", {})),
        data=small_data(),
        model="small_cnn",
        run_dir=folder,
        device="cpu",
        progress=False,
        settings=settings,
        callbacks=callbacks,
        **options,
    )


class Recorder(Callback):
    """Writes down its calls; draws random numbers, and spoils what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def on_start(self, run: Any) -> None:
        self.calls.append(("start", run))
        self._meddle({})

    def on_step(self, metrics: Any) -> None:
        self.calls.append(("step", dict(metrics)))
        self._meddle(metrics)

    def on_epoch(self, metrics: Any) -> None:
        self.calls.append(("epoch", dict(metrics)))
        self._meddle(metrics)

    def on_end(self, finished: bool) -> None:
        self.calls.append(("end", finished))

    def of(self, kind: str) -> list[Any]:
        return [value for name, value in self.calls if name == kind]

    @staticmethod
    def _meddle(metrics: Any) -> None:
        torch.rand(3), random.random(), np.random.rand(2), torch.manual_seed(7)
        torch.set_grad_enabled(False)
        metrics.clear()


def test_callbacks_get_the_records_and_change_nothing(tmp_path: Path) -> None:
    recorder = Recorder()
    plain, seen = run(tmp_path / "plain"), run(tmp_path / "seen", recorder)
    assert states_equal(plain.model.state_dict(), seen.model.state_dict())
    assert [kind for kind, _ in recorder.calls] == (
        ["start"] + 2 * ["step", "step", "epoch"] + ["end"]
    )
    (start,) = recorder.of("start")
    assert (start.method, start.step, start.total_steps) == ("pgd_at", 0, 8)
    assert start.recipe["steps"] == 3 and start.run_dir == tmp_path / "seen" and start.identity
    records = read_records(tmp_path / "seen" / "metrics.jsonl")
    for kind in ("step", "epoch"):
        logged = [{k: v for k, v in r.items() if k != "kind"} for r in records if r["kind"] == kind]
        for told, line in zip(recorder.of(kind), logged, strict=True):
            assert told == pytest.approx(line, rel=1e-5)
    assert [told["step"] for told in recorder.of("step")] == [3, 4, 6, 8]
    assert "robust_accuracy" in recorder.of("epoch")[0]
    numbers = [
        [{k: v for k, v in r.items() if "second" not in k} for r in read_records(path)]
        for path in (tmp_path / "plain" / "metrics.jsonl", tmp_path / "seen" / "metrics.jsonl")
    ]
    assert numbers[0] == numbers[1]
    assert recorder.of("end") == [True]


class Breaking(Recorder):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def _break(self, where: str) -> None:
        if where == self.where:
            raise KeyError(f"broken in {where}")

    def on_start(self, run: Any) -> None:
        super().on_start(run)
        self._break("on_start")

    def on_step(self, metrics: Any) -> None:
        super().on_step(metrics)
        self._break("on_step")

    def on_epoch(self, metrics: Any) -> None:
        super().on_epoch(metrics)
        self._break("on_epoch")

    def on_end(self, finished: bool) -> None:
        super().on_end(finished)
        self._break("on_end")


@pytest.mark.parametrize("where", ["on_start", "on_step", "on_epoch", "on_end"])
def test_an_exception_ends_the_run_which_can_go_on(where: str, tmp_path: Path) -> None:
    others = Recorder(), Recorder()
    with pytest.raises(KeyError, match=f"broken in {where}"):
        run(tmp_path / "cut", others[0], Breaking(where), others[1])
    assert others[0].of("end") == [where == "on_end"]
    # One that was never started has nothing to end.
    assert others[1].of("end") == ([] if where == "on_start" else [where == "on_end"])
    again = run(tmp_path / "cut", others[0], resume=True)
    whole = run(tmp_path / "whole")
    assert states_equal(again.model.state_dict(), whole.model.state_dict())


def test_a_failure_at_the_end_does_not_hide_that_of_the_run(tmp_path: Path) -> None:
    def stop(progress: Any) -> None:
        raise Interruption

    with pytest.raises(Interruption), pytest.warns(UserWarning, match="KeyError at the end"):
        run(tmp_path, Breaking("on_end"), on_step=stop)


def test_what_is_no_callback_is_refused(tmp_path: Path) -> None:
    for callbacks, words in (
        (Recorder(), "callbacks must be a list of Callback, got Recorder"),
        ([print], r"callbacks\[0\] must be a fastadv.trainers.Callback"),
        ([Recorder], r"call it: Recorder\(\)"),
    ):
        with pytest.raises(TypeError, match=words):
            train(
                "standard",
                data=small_data(),
                model="small_cnn",
                run_dir=tmp_path,
                callbacks=callbacks,
            )  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# The ready ones


class FakeWandb(ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.codes: list[int] = []
        self.broken = False

    def init(self, **options: Any) -> FakeWandb:
        self.inits.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if self.broken:
            raise ConnectionError("no network")
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


class FakeMlflow(ModuleType):
    def __init__(self) -> None:
        super().__init__("mlflow")
        self.starts: list[dict[str, Any]] = []
        self.params: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ends: list[str] = []
        self.active: Any = None

    def active_run(self) -> Any:
        return self.active

    def start_run(self, **options: Any) -> Any:
        self.starts.append(options)
        return SimpleNamespace(info=SimpleNamespace(run_id=options.get("run_id", "abc123")))

    def log_params(self, values: dict[str, Any]) -> None:
        self.params.append(values)

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def end_run(self, status: str) -> None:
        self.ends.append(status)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


def cut(folder: Path, *callbacks: Callback, **options: Any) -> None:
    """Interrupt a run in its second epoch."""

    def stop(progress: Any) -> None:
        if progress.step == 6:
            raise Interruption

    with pytest.raises(Interruption):
        run(folder, *callbacks, on_step=stop, **options)


def test_the_command_line_logs_to_both(
    tmp_path: Path, wandb: FakeWandb, mlflow: FakeMlflow
) -> None:
    words = ["train", "standard", "--data", "digits", "--run", str(tmp_path / "r"), "--quiet"]
    small = ["--epochs", "1", "--train_images", "64", "--batch_size", "32", "--device", "cpu"]
    assert (
        main(
            [*words, *small, "--pad", "1", "--monitor_images", "16", "--log", "wandb, MLflow,wandb"]
        )
        == 0
    )
    records = read_records(tmp_path / "r" / "metrics.jsonl")
    for fake in (wandb, mlflow):
        assert [step for step, _ in fake.logged] == [2, 2]
        step, epoch = (values for _, values in fake.logged)
        assert step["step/loss"] == pytest.approx(records[0]["loss"], rel=1e-5)
        assert epoch["epoch/clean_accuracy"] == pytest.approx(
            records[1]["clean_accuracy"], rel=1e-5
        )
        assert all(isinstance(value, float) for value in {**step, **epoch}.values())
    assert wandb.inits[0]["project"] == "fastadv" and wandb.inits[0]["name"] == "r"
    assert wandb.inits[0]["config"]["method"] == "standard" and wandb.codes == [0]
    assert mlflow.params[0]["model.name"] == "small_cnn" and mlflow.ends == ["FINISHED"]
    assert "log: wandb" in (tmp_path / "r" / "config.yaml").read_text()


def test_a_resumed_run_goes_on_there(tmp_path: Path, wandb: FakeWandb, mlflow: FakeMlflow) -> None:
    settings = Settings(log_every=3, log="wandb,mlflow")
    cut(tmp_path, settings=settings)
    assert (wandb.codes, mlflow.ends) == ([1], ["FAILED"])
    run(tmp_path, settings=settings, resume=True)
    first, second = wandb.inits
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert mlflow.starts == [{"run_name": tmp_path.name}, {"run_id": "abc123"}]
    assert len(mlflow.params) == 1 and (tmp_path / MLFLOW_FILE).read_text() == "abc123\n"
    run(tmp_path, settings=settings, overwrite=True)
    assert mlflow.starts[2] == {"run_name": tmp_path.name} and wandb.inits[2]["id"] != first["id"]


def test_an_active_run_of_mlflow_is_used_and_left_open(tmp_path: Path, mlflow: FakeMlflow) -> None:
    mlflow.active = object()
    run(tmp_path, MlflowCallback(), method="standard")
    assert mlflow.logged and not mlflow.starts and not mlflow.ends


def test_a_tracker_that_fails_costs_no_run(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.broken = True
    callback = WandbCallback("mine", mode="offline")
    with pytest.warns(UserWarning, match="did not take the metrics of step 3 .*no network") as seen:
        result = run(tmp_path, callback)
    assert sum("no network" in str(w.message) for w in seen) == 1
    assert result.progress.step == 8 and wandb.codes == [0]
    assert (wandb.inits[0]["project"], wandb.inits[0]["mode"]) == ("mine", "offline")


def test_what_is_not_installed_or_unknown_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=rf"pip install 'fastadv\[{name}\]'"):
            run(tmp_path, settings=Settings(log=name))
    with pytest.raises(
        ValueError, match="log must be one of tensorboard, wandb, mlflow, got 'wandbb'"
    ):
        Settings(log="wandbb")
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_both_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars: list[tuple[str, float, int]] = []
    made: list[dict[str, Any]] = []

    class Writer:
        def __init__(self, folder: str, **options: Any) -> None:
            made.append({"folder": folder, **options})

        def add_scalar(self, *scalar: Any) -> None:
            scalars.append(scalar)

        def close(self) -> None:
            made.append({"closed": True})

    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    settings = Settings(tensorboard=True, log="tensorboard", log_every=3)
    run(tmp_path, settings=settings, method="standard")
    assert made == [{"folder": str(tmp_path / "tensorboard"), "purge_step": 1}, {"closed": True}]
    assert {name.partition("/")[0] for name, _, _ in scalars} == {"step", "epoch"}


class Moving(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step(self, metrics: Any) -> None:
        os.chdir(self.folder)


def test_a_run_stays_where_it_is_when_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    result = run(Path("r"), Moving(tmp_path / "elsewhere"), method="standard")
    assert result.checkpoint.is_relative_to(tmp_path / "r") and result.checkpoint.is_dir()
    assert not any((tmp_path / "elsewhere").iterdir())
