"""Methods of the user's own: on the command line, under torchrun, in a report; and what they return wrongly."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from processes import ran, warm_python
from torch import nn
from training_helpers import make_model, small_data, small_recipe

from fastadv.cli import main
from fastadv.trainers import (
    Attacked,
    LossResult,
    Method,
    Recipe,
    Standard,
    TrainBatch,
    find_method,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SOURCE = '''
from dataclasses import dataclass

from torch.nn.functional import cross_entropy

from fastadv.trainers import AdversarialRecipe, Attacked, LossResult, Recipe
from fastadv.trainers.adversarial import AdversarialMethod
from fastadv.trainers.number import Number


@dataclass(frozen=True, kw_only=True)
class MixRecipe(AdversarialRecipe):
    """Numbers of mixed training.

    Attributes:
        share: weight of the clean images.
    """

    share: Number = 0.5


class MixAT(AdversarialMethod[MixRecipe, Attacked]):
    """Cross-entropy of clean and attacked images."""

    name = "mix_at"
    recipe_class = MixRecipe

    def attack(self, batch):
        return Attacked(self.perturb(batch))

    def training_loss(self, batch, adv):
        clean = cross_entropy(self.model(batch.x), batch.y)
        robust = cross_entropy(self.model(adv.x), batch.y)
        share = self.recipe.share
        return LossResult(share * clean + (1 - share) * robust, {"clean_loss": clean.detach()})


class Nameless(MixAT):
    name = None


class Borrowed(MixAT):
    name = "trades"


class Spaced(MixAT):
    name = "mix at"


class NoRecipe(MixAT):
    name = "no_recipe"
    recipe_class = dict


class Bare(MixRecipe):
    extra: float = 1.0


class BareRecipe(MixAT):
    name = "bare_recipe"
    recipe_class = Bare


@dataclass(frozen=True, kw_only=True)
class Demanding(MixRecipe):
    must: int


class NoDefault(MixAT):
    name = "no_default"
    recipe_class = Demanding


class Unfinished(AdversarialMethod[MixRecipe, Attacked]):
    name = "unfinished"
    recipe_class = MixRecipe


function = print
'''
QUICK = [
    *("--epochs", "1", "--pad", "1", "--flip", "false", "--monitor_images", "16"),
    *("--monitor_steps", "1", "--precision", "fp32", "--device", "cpu", "--train_images", "64"),
    *("--batch_size", "32", "--eps", ".1", "--alpha", ".05", "--steps", "1"),
    *("--attack_precision", "fp32"),
]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current directory, where no path leads, with a name of its own; gone afterwards."""
    name = f"own_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def test_a_class_in_the_current_directory_trains(
    own: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    method = f"{own}:MixAT"
    (tmp_path / "c.yaml").write_text("share: 0.125\nlr: 0.01\n")
    words = ["train", method, "--data", "digits", "--run", "r", *QUICK, "--config", "c.yaml"]
    assert main([*words, "--lr", "0.02", "--quiet"]) == 0
    recorded = json.loads((tmp_path / "r" / "run.json").read_text())
    assert recorded["method"] == "mix_at" and recorded["method_code"] == method
    assert (recorded["recipe"]["share"], recorded["recipe"]["lr"]) == (0.125, 0.02)
    assert "clean_loss" in (tmp_path / "r" / "metrics.jsonl").read_text()
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main(["train", method, "--help"])
    text = " ".join(capfd.readouterr().out.split())
    assert f"usage: fastadv train {method}" in text and "weight of the clean images" in text
    assert "Cross-entropy of clean and attacked images." in text


def test_opening_a_run_imports_no_method(
    own: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    method = f"{own}:MixAT"
    assert main(["train", method, "--data", "digits", "--run", "r", *QUICK, "--quiet"]) == 0
    del sys.modules[own]
    marker = tmp_path / "ran"
    (tmp_path / f"{own}.py").write_text(f"open({str(marker)!r}, 'w')\n{SOURCE}")
    capfd.readouterr()
    assert main(["eval", "r", "--attacks", "fgsm", "--max-examples", "16", "--device", "cpu"]) == 0
    assert main(["report", "r"]) == 0
    assert "mix_at" in capfd.readouterr().out
    for name in ("mix_at", "pgd_at"):
        assert main(["train", name, "--run", "r", "--resume"]) == 2
        said = capfd.readouterr().err
        assert f"fastadv train {method} --run r --resume`, if you trust that code" in said
    assert not marker.exists() and own not in sys.modules
    again = ["train", method, "--run", "r", "--resume", "--allow-changes", "--epochs", "2"]
    assert main([*again, "--quiet"]) == 0
    assert marker.exists()
    assert json.loads((tmp_path / "r" / "run.json").read_text())["recipe"]["epochs"] == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Absent", "has no class 'Absent'"),
        ("MixRecipe", "must be a subclass of fastadv.trainers.Method, got the class MixRecipe"),
        ("function", "must be a subclass of fastadv.trainers.Method, got a builtin_function"),
        ("Nameless", 'must have a name: write name = "nameless"'),
        (
            "Borrowed",
            "must have a name of its own, such as name = \"borrowed\" in its class, got 'trades'",
        ),
        ("Spaced", "must be a word of letters, digits, '_', '.' and '-', got 'mix at'"),
        ("NoRecipe", "recipe_class of method NoRecipe must be Recipe, AdversarialRecipe or"),
        ("BareRecipe", "recipe Bare must be decorated with @dataclass(frozen=True, kw_only=True)"),
        ("NoDefault", "field must of recipe Demanding must have a default"),
        ("Unfinished", "method Unfinished must define attack, training_loss"),
    ],
)
def test_a_class_that_is_no_method_is_refused(
    name: str, words: str, own: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", f"{own}:{name}", "--data", "digits", "--run", "r"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line


def test_modules_that_cannot_be_imported_are_named(
    own: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{own}_broken.py").write_text("import no_such_thing\n")
    (tmp_path / f"{own}_torn.py").write_text("def f(:\n")
    for module, words in (
        ("no_such_module", "no module named 'no_such_module'; is its folder on PYTHONPATH"),
        (f"{own}_broken", "no module named 'no_such_thing'"),
        (f"{own}_torn", "failed (SyntaxError:"),
    ):
        assert main(["train", f"{module}:X", "--data", "digits", "--run", "r"]) == 2
        assert words in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"or package\.module:Class, got 'nope'"):
        find_method("nope")


@pytest.mark.slow
@pytest.mark.processes
def test_torchrun_trains_it_from_the_current_directory(own: str, tmp_path: Path) -> None:
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastadv"]
    words = ["train", f"{own}:MixAT", "--data", "digits", "--run-dir", "r", *QUICK, "--quiet"]
    with warm_python() as python:
        done = ran(["-m", *launch, *words], {**os.environ, "PYTHON_EXEC": python}, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "r/checkpoints/step_000002" in done.stdout


# What a method returns


class Wrong(Standard):
    """Returns what its class says."""

    name = "wrong"
    attacked: ClassVar[Any] = staticmethod(lambda batch: Attacked(batch.x))
    result: ClassVar[Any] = staticmethod(lambda loss: LossResult(loss))
    logged: ClassVar[Any] = {}

    def attack(self, batch: TrainBatch) -> Any:
        return self.attacked(batch)

    def training_loss(self, batch: TrainBatch, adv: Attacked) -> Any:
        return self.result(batch.mean(self.cross_entropy(self.model(adv.x), batch.y)))

    def gauges(self) -> Any:
        return self.logged


ONE = torch.ones(())


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (
            {"attacked": lambda b: b.x},
            TypeError,
            r"attack must return Attacked\(x\).*got a tensor \[16, 1, 8, 8\]",
        ),
        ({"attacked": lambda b: None}, TypeError, r"attack must return Attacked\(x\).*got None"),
        (
            {"attacked": lambda b: Attacked(b.y)},
            TypeError,
            r"tensor of float images, got .* of int64",
        ),
        ({"attacked": lambda b: Attacked(b.x[0])}, ValueError, r"with images \[16, 1, 8, 8\], got"),
        (
            {"result": lambda loss: loss},
            TypeError,
            r"training_loss must return LossResult\(.*got a tensor \[\]",
        ),
        ({"result": lambda loss: (loss, {})}, TypeError, "got a tuple of 2"),
        (
            {"result": lambda loss: LossResult(0.5)},
            TypeError,
            "loss a scalar tensor of floats, got 0.5",
        ),
        (
            {"result": lambda loss: LossResult(loss[None])},
            ValueError,
            r"a scalar loss, .*got a tensor \[1\]",
        ),
        ({"result": lambda loss: LossResult(loss.detach())}, ValueError, "a loss with a gradient"),
        (
            {"result": lambda loss: LossResult(loss, [1])},
            TypeError,
            "metrics must be a dict .* a list of 1",
        ),
        (
            {"result": lambda loss: LossResult(loss, {"a": 0.5})},
            TypeError,
            r"metrics\['a'\] must be a scalar tensor",
        ),
        (
            {"result": lambda loss: LossResult(loss, {"a": ONE[None]})},
            ValueError,
            r"metrics\['a'\] must be a scalar,",
        ),
        (
            {"result": lambda loss: LossResult(loss, {"lr": ONE})},
            ValueError,
            "must not be called 'lr'",
        ),
        (
            {"logged": {"g": 1.0}},
            TypeError,
            r"Wrong.gauges: gauges\['g'\] must be a scalar tensor, got 1.0",
        ),
        (
            {"trainable": lambda self: self.model},
            TypeError,
            "trainable must return a dict of modules",
        ),
        ({"trainable": lambda self: {}}, ValueError, "trainable must return at least one model"),
        (
            {"passes": lambda self, epoch: None},
            TypeError,
            "passes must return a number .* got None",
        ),
    ],
)
def test_a_wrong_return_says_what_was_expected(
    change: dict[str, Any], kind: type[Exception], words: str, tmp_path: Path
) -> None:
    values = {
        name: staticmethod(value) if name in ("attacked", "result") else value
        for name, value in change.items()
    }
    method = type("Wrong", (Wrong,), values)
    options: dict[str, Any] = {"device": "cpu", "progress": False}
    with pytest.raises(kind, match=words):
        train(
            method,
            small_recipe("standard", epochs=1),
            data=small_data(),
            model="small_cnn",
            run_dir=tmp_path,
            **options,
        )


def test_a_class_without_name_is_refused_in_python_too(tmp_path: Path) -> None:
    class Anonymous(Method[Recipe, Attacked]):
        recipe_class = Recipe

        def attack(self, batch: TrainBatch) -> Attacked:
            return Attacked(batch.x)

        def training_loss(self, batch: TrainBatch, adv: Attacked) -> LossResult:
            return LossResult(nn.functional.cross_entropy(self.model(adv.x), batch.y))

        def passes(self, epoch: int) -> float:
            return 3

    with pytest.raises(ValueError, match='must have a name: write name = "anonymous"'):
        train(Anonymous, data=small_data(), model=make_model(), run_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
