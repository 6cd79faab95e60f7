"""AutoAttack: against a closed form and the library's own loop, its warnings, and its side effects."""

from __future__ import annotations

import contextlib
import logging
import sys

import pytest
import torch
from linear_model import Staircase, linear_problem
from short_autoattack import shorten
from torch import nn

from fastadv.evaluation import autoattack, evaluate
from fastadv.evaluation.autoattack import merge_warnings

pyautoattack = pytest.importorskip("pyautoattack")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
EPS = 0.02
FAST = ("apgd-ce", "apgd-t")


@pytest.fixture
def short(monkeypatch):
    shorten(monkeypatch)


@pytest.mark.parametrize("engine", ["auto", "fp32", "reference"])
def test_the_standard_version_agrees_with_the_closed_form(engine, monkeypatch):
    if engine == "reference":  # whose settings are the library's own
        shorten(monkeypatch)
    # apgd-t and fab-t try every other class, and for a linear model each class alone is a convex problem.
    model, x, y = linear_problem(classes=5, n=10, wrong=3)
    exact = model.exactly_robust(x, y, EPS)
    result = autoattack(model, (x, y), eps=EPS, batch_size=10, engine=engine)
    assert torch.equal(result.robust, exact)
    assert 0 < int(exact.sum()) < 7
    assert [stage.name for stage in result.stages] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert result.stages[-1].correct == int(exact.sum())
    assert (result.status, result.notes, result.seed, result.batch_size) == ("ok", (), 0, 10)

    assert (result.search == engine) == (engine != "auto")

    adversarial = result.adversarial
    assert len(result.fooled) == len(adversarial) == 7 - int(exact.sum())
    assert (adversarial - x[result.fooled]).abs().max() <= EPS + 1e-6
    assert (model(adversarial).argmax(1) != y[result.fooled]).all()


def test_evaluate_reports_it(short):
    model, x, y = linear_problem(classes=4, n=12)
    report = evaluate(
        model, (x, y), ("clean", "autoattack"), eps=EPS, batch_size=12, progress=False
    )
    row = report["autoattack"]
    assert row.correct == int(model.exactly_robust(x, y, EPS).sum()) == row.stages[-1].correct
    assert (row.n, row.status, row.eps) == (12, "ok", EPS)
    assert report.versions["pyautoattack"] and report.batch_size == 12


def test_the_library_itself_finds_the_same_images():
    model, x, y = linear_problem(classes=5, n=16, wrong=2)
    ours = autoattack(
        model, (x, y), eps=EPS, version=FAST, batch_size=8, seed=3, engine="reference"
    )
    library = pyautoattack.AutoAttack(model, eps=EPS, seed=3, version="standard")
    library.attacks_to_run = list(FAST)
    library.apgd_targeted.n_target_classes = 4
    with _side_effects_undone():
        adversarial, _ = library.run_standard_evaluation(x, y, batch_size=8)
    changed = (adversarial != x).flatten(1).any(1)
    assert torch.equal(changed.nonzero().flatten(), ours.fooled.sort().values)
    assert torch.equal(adversarial[ours.fooled], ours.adversarial)


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.08), ("l1", 0.4)])
def test_other_norms(norm, eps, short):
    model, x, y = linear_problem(classes=4, n=16)
    result = autoattack(model, (x, y), eps=eps, norm=norm, version=("apgd-ce", "apgd-t", "fab-t"))
    order = {"l2": 2, "l1": 1}[norm]
    size = torch.linalg.vector_norm(
        (result.adversarial - x[result.fooled]).flatten(1), order, dim=1
    )
    assert result.status == "ok"
    assert 0 < len(result.fooled) < 16
    assert (size <= eps + 1e-4).all()


def test_other_bounds():
    model, x, y = linear_problem(classes=4, n=20)
    unit = autoattack(model, (x, y), eps=EPS, version=FAST)
    wide = autoattack(_Shifted(model), (4 * x - 2, y), eps=4 * EPS, bounds=(-2, 2), version=FAST)
    assert torch.equal(unit.robust, wide.robust)
    assert (wide.adversarial - (4 * x - 2)[wide.fooled]).abs().max() <= 4 * EPS + 4e-6


def test_the_seed_decides(short):
    model, x, y = linear_problem(classes=4, n=6)
    runs = [
        autoattack(model, (x, y), eps=0.1, version=("square",), seed=seed) for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0].adversarial, runs[1].adversarial)
    assert not torch.equal(runs[0].adversarial, runs[2].adversarial)


def test_nothing_is_left_behind_in_the_process(short):
    model, x, y = linear_problem(classes=4, n=8)
    model.train()
    model.linear.weight.grad = torch.ones_like(model.linear.weight)

    def trace(frame, event, argument):
        return None

    old_trace = sys.gettrace()
    torch.manual_seed(11)
    generator = torch.random.get_rng_state()
    handlers = list(logging.getLogger("auto-attack").handlers)
    sys.settrace(trace)
    try:
        result = autoattack(model, (x, y), eps=EPS, version=("apgd-ce", "fab-t"))
        assert sys.gettrace() is trace
    finally:
        sys.settrace(old_trace)
    assert result.status == "ok"
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert logging.getLogger("auto-attack").handlers == handlers
    assert torch.equal(model.linear.weight.grad, torch.ones_like(model.linear.weight))
    assert model.linear.bias.grad is None
    assert model.training and model.linear.weight.requires_grad


def test_a_dynamic_model_is_suspect_and_the_next_model_is_not():
    model, x, y = linear_problem(classes=4, n=8)
    dynamic = autoattack(_Dynamic(model), (x, y), eps=EPS, version=("apgd-ce",))
    assert dynamic.status == "suspect"
    assert any("takes gradients in its forward pass" in note for note in dynamic.notes)
    assert autoattack(model, (x, y), eps=EPS, version=("apgd-ce",)).status == "ok"


@pytest.mark.parametrize(
    ("around", "said", "library_says"),
    [
        (nn.Sequential, None, None),
        (lambda model: _Noisy(model), "draws random numbers", "randomized defense"),
        (lambda model: nn.Sequential(model, nn.Softmax(1)), "probabilities", "probability"),
        (lambda model: _Dynamic(model), "takes gradients", "dynamic defense"),
    ],
)
def test_the_model_is_checked_as_by_the_library(around, said, library_says, monkeypatch):
    model, x, y = linear_problem(classes=4, n=8)
    model = around(model).eval()
    result = autoattack(model, (x, y), eps=EPS, version=("apgd-ce",))
    assert result.status == ("suspect" if said else "ok")
    assert [said in note for note in result.notes] == [True] * bool(said)

    found, logger = [], logging.Logger("library")
    monkeypatch.setattr(logger, "warning", found.append)
    checks = pyautoattack.checks
    with _side_effects_undone():
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))
        checks.check_randomized(model, x, y, logger=logger)
        checks.check_range_output(model, x, logger=logger)
        checks.check_dynamic(model, x, logger=logger)
    assert [library_says in message for message in found] == [True] * bool(library_says)


def test_a_backward_pass_at_inference_is_seen_too():
    class Backward(_Dynamic):
        def forward(self, x):
            with torch.enable_grad():
                torch.zeros(1, requires_grad=True).sum().backward()
            return self.model(x)

    model, x, y = linear_problem(classes=4, n=8)
    result = autoattack(Backward(model), (x, y), eps=EPS, version=("apgd-ce",))
    assert result.status == "suspect" and "takes gradients" in result.notes[0]


def test_square_beating_the_gradient_attacks_is_suspect():
    model, x, _ = linear_problem(classes=4, n=20)
    masked = Staircase(model, levels=50)
    y = masked(x).argmax(1)
    result = autoattack(masked, (x, y), eps=0.1, version=("apgd-ce", "apgd-t", "square"))
    assert result.stages[0].correct > result.stages[2].correct
    assert result.status == "suspect"
    text = " ".join(result.notes)
    left, after = result.stages[1].correct, result.stages[2].correct
    assert f"square broke {left - after} images of the {left}" in text and "zero gradient" in text


def test_violations_are_found_independently(monkeypatch):
    model, x, y = linear_problem(classes=4, n=10)
    monkeypatch.setattr(pyautoattack.autopgd_base.APGDAttack, "perturb", lambda self, x, y: 1 - x)
    result = autoattack(model, (x, y), eps=EPS, version=("apgd-ce",), engine="reference")
    assert result.status == "invalid"
    assert "10 images outside the linf ball" in result.notes[0]
    assert result.robust.all() and len(result.fooled) == 0


def test_the_reference_alone_needs_the_library(monkeypatch, short):
    model, x, y = linear_problem(classes=4, n=4)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    report = evaluate(model, (x, y), ("clean", "autoattack"), eps=EPS, progress=False)
    assert report["autoattack"].correct == int(model.exactly_robust(x, y, EPS).sum())
    with pytest.raises(ImportError, match="pip install pyautoattack"):
        evaluate(model, (x, y), ("clean", "autoattack"), engine="reference", progress=False)
    with pytest.raises(ImportError, match="pip install pyautoattack"):
        autoattack(model, (x, y), eps=EPS, engine="reference")


@pytest.mark.parametrize(
    ("classes", "arguments", "message"),
    [
        (3, {}, "apgd-t needs at least 4 classes, the model has 3"),
        (2, {"version": ("apgd-dlr",)}, "apgd-dlr needs at least 3 classes"),
        (4, {"version": "plus"}, "version must be 'standard' or a list"),
        (4, {"version": ("apgd",)}, "version must be one of apgd-ce"),
        (4, {"version": ()}, "at least one attack"),
        (4, {"version": ("fab", "fab")}, "no attack twice"),
        (4, {"seed": -1}, "seed must be in"),
        (4, {"eps": -1.0}, "eps must be"),
        (4, {"norm": "l3"}, "norm must be one of"),
    ],
)
def test_wrong_arguments(classes, arguments, message):
    model, x, y = linear_problem(classes=classes, n=4)
    with pytest.raises(ValueError, match=message):
        autoattack(model, (x, y), **arguments)


def test_images_must_have_four_axes():
    model, x, y = linear_problem(classes=4, n=4)
    with pytest.raises(ValueError, match=r"images \[N, C, H, W\]"):
        autoattack(model, (x.flatten(1), y))


def test_no_image_left_to_attack():
    model, x, y = linear_problem(classes=4, n=4, wrong=4)
    result = autoattack(model, (x, y), eps=EPS)
    assert not result.robust.any() and len(result.fooled) == 0 and result.status == "ok"
    assert result.adversarial.shape == (0, 1, 8, 8)


def test_two_classes_with_the_attacks_that_allow_it(short):
    model, x, y = linear_problem(classes=2, n=30)
    result = autoattack(model, (x, y), eps=0.01, version=("apgd-ce", "fab-t"))
    assert torch.equal(result.robust, model.exactly_robust(x, y, 0.01))


def test_warnings_that_differ_in_numbers_are_merged():
    messages = ["there are 3 points", "other", "there are 12 points", "there are 1 points"]
    merged = ["there are 3 points (2 more like this)", "other"]
    assert merge_warnings(messages) == merged
    # The merged messages of two processes stand for six and two.
    both = ["there are 3 points (5 more like this)", "other (1 more like this)"]
    assert merge_warnings([*merged, *merged]) == both


class _Shifted(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((x + 2) / 4)


class _Noisy(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) + 0.1 * torch.randn(len(x), 4)


class _Dynamic(nn.Module):
    """Takes a gradient of its own at inference."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.enable_grad():
            probe = torch.zeros(1, requires_grad=True)
            torch.autograd.grad(probe.sum(), probe)
        return self.model(x)


@contextlib.contextmanager
def _side_effects_undone():
    """The library's own loop unsets the trace function and trips its counters."""
    trace, counts = sys.gettrace(), dict(pyautoattack.checks.funcs)
    with torch.random.fork_rng():
        yield
    sys.settrace(trace)
    pyautoattack.checks.funcs.update(counts)
