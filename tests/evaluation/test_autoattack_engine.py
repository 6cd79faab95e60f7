"""AutoAttack on the engine: what it finds, who confirms it, and what its figures depend on."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn
from linear_model import linear_problem
from short_autoattack import aim_at, patch_reference, shorten
from torch import Tensor, nn

import fastadv
from fastadv import attacks
from fastadv.attacks.apgd_pool import APGDPool
from fastadv.attacks.apgd_runs import FinishedRun
from fastadv.engine.engines import Engine, InputGradient
from fastadv.evaluation import AutoAttack, autoattack, autoattack_stages, evaluate
from fastadv.evaluation.result_row import row_from_dict

pyautoattack = pytest.importorskip("pyautoattack")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
EPS = 0.02
FAST = ("apgd-ce", "apgd-t")


class Liar(Engine):
    """An engine that takes every image for broken whose plain logits say that it is not."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name, self.precision, self.reason = engine.name, engine.precision, engine.reason

    def session(self, *arguments: Any, **options: Any) -> Any:
        return self._engine.session(*arguments, **options)

    def images(self, x: Tensor) -> Tensor:
        return self._engine.images(x)

    def logits(self, x: Tensor) -> Tensor:
        return self._engine.logits(x).roll(1, 1)

    def gradient(self, x: Tensor, value_of: Any) -> InputGradient:
        found = self._engine.gradient(x, value_of)
        return InputGradient(found.value, found.logits.roll(1, 1), found.grad)


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> None:
    """All engines in another precision than float32 lie."""
    honest = fastadv.APGD.engine_for

    def engine_for(self: Any, x: Tensor) -> Engine:
        engine = honest(self, x)
        return engine if engine.precision == "fp32" else Liar(engine)

    monkeypatch.setattr(attacks.Attack, "engine_for", engine_for)
    monkeypatch.setattr("fastadv.engine.selection.fast_bf16", lambda device: True)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine runs in bfloat16, also where the hardware has none."""
    monkeypatch.setattr("fastadv.engine.selection.fast_bf16", lambda device: True)


def test_it_is_called_as_the_other_attacks_are(narrow: None) -> None:
    model, x, y = linear_problem(classes=5, n=40, wrong=4)
    attack = AutoAttack(model, eps=EPS, norm="Linf", version=FAST, batch_size=16, seed=1)
    assert fastadv.AutoAttack is AutoAttack
    with pytest.raises(RuntimeError, match="last must be read after a call"):
        attack.last  # noqa: B018
    adv = attack(x, y)
    exact = model.exactly_robust(x, y, EPS)
    right = model(x).argmax(1) == y
    assert torch.equal(model(adv).argmax(1) == y, exact)
    assert torch.equal(attack.last.robust, exact) and attack.last.search == "bf16"
    assert torch.equal((adv != x).flatten(1).any(1), right & ~exact)
    assert (adv - x).abs().max() <= EPS + 1e-6
    short = attack(x.bfloat16(), y)
    assert short.dtype == torch.bfloat16
    assert (short.float() - x.bfloat16().float()).abs().max() <= EPS
    with pytest.raises(TypeError, match=r"sample_id.* did you mean"):
        attack(x, y, sample_id=None)


@pytest.mark.parametrize(
    ("engine", "norm", "eps", "version"),
    [("auto", "linf", 0.06, FAST), ("fp32", "l2", 0.4, ("apgd-ce", "apgd-dlr"))],
)
@pytest.mark.filterwarnings("ignore:there are")
def test_it_leaves_as_many_images_as_the_reference(
    engine: Any,
    norm: str,
    eps: float,
    version: Any,
    narrow: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    aim_at(3, monkeypatch)
    model, (x, y) = trained_small_cnn(), digits_test(12)
    settings: dict[str, Any] = dict(eps=eps, norm=norm, version=version, batch_size=12)
    expected = autoattack(model, (x, y), engine="reference", **settings)
    result = autoattack(model, (x, y), engine=engine, **settings)
    assert abs(int(result.robust.sum()) - int(expected.robust.sum())) <= 1
    assert 1 < int(result.robust.sum()) < 11
    assert result.status == "ok" and [stage.name for stage in result.stages] == list(version)
    with torch.no_grad():
        assert (model(result.adversarial).argmax(1) != y[result.fooled]).all()
    assert all((stage.refinement_seconds > 0) == (engine == "auto") for stage in result.stages)


def test_targeted_apgd_aims_at_the_nine_likeliest_wrong_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x, y = linear_problem(classes=12, n=6, wrong=0)
    aims: dict[int, list[int]] = {}
    whole = APGDPool.run

    def run(self: APGDPool, runs: Any, *arguments: Any) -> Any:
        runs = list(runs)
        for one in runs:
            aims.setdefault(one.image, []).append(one.target)
        return whole(self, runs, *arguments)

    monkeypatch.setattr(APGDPool, "run", run)
    result = autoattack(model, (x, y), eps=1e-4, version=("apgd-t",), engine="fp32")
    assert result.robust.all()
    others = model(x).scatter(1, y[:, None], -torch.inf)
    expected = others.topk(9, dim=1).indices.tolist()
    assert aims == dict(enumerate(expected))


@pytest.mark.parametrize("refuses", [False, True])
def test_a_search_in_float32_is_not_made_again_in_float32(
    refuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the model refuses a point that its copy takes for misclassified."""
    shorten(monkeypatch)
    monkeypatch.setattr("fastadv.engine.selection.fast_bf16", lambda device: False)
    honest = attacks.Attack.engine_for

    def engine_for(self: Any, images: Tensor) -> Engine:
        engine = honest(self, images)
        return Liar(engine) if refuses and engine.name == "compiled" else engine

    model, x, y = linear_problem(classes=5, n=24, wrong=2)
    exact = model.exactly_robust(x, y, EPS)
    with monkeypatch.context() as patched:
        patched.setattr(attacks.Attack, "engine_for", engine_for)
        report = evaluate(model, (x, y), ["autoattack"], eps=EPS, progress=False)
    row = report["autoattack"]
    assert row.search == "fp32" and row.correct == int(exact.sum()) > 0
    assert any(stage.refinement_seconds > 0 for stage in row.stages) == refuses
    assert (sum(stage.unconfirmed for stage in row.stages) > 0) == refuses
    table = report.table()
    assert "searched in float32; the plain model in float32 has confirmed" in table
    assert ("steps of the plain model after these searches broke" in table) == refuses
    assert "float32 steps" not in table and "bfloat16" not in table


def test_without_bf16_it_searches_on_a_copy_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastadv.engine.selection.fast_bf16", lambda device: False)
    model, (x, y) = trained_small_cnn(), digits_test(20)
    engines: set[str] = set()
    honest = fastadv.APGD.engine_for

    def engine_for(self: Any, x: Tensor) -> Engine:
        engine = honest(self, x)
        engines.add(engine.name)
        return engine

    monkeypatch.setattr(attacks.Attack, "engine_for", engine_for)
    settings: dict[str, Any] = dict(eps=0.06, version=("apgd-ce",), batch_size=20)
    result = autoattack(model, (x, y), **settings)
    assert "compiled" in engines
    assert result.search == "fp32" and [stage.search for stage in result.stages] == ["fp32"]
    with torch.no_grad():
        assert (model(result.adversarial).argmax(1) != y[result.fooled]).all()
    engines.clear()
    live = autoattack(model, (x, y), engine="fp32", **settings)
    assert engines == {"eager"}
    assert abs(int(result.robust.sum()) - int(live.robust.sum())) <= 1
    assert 2 < int(result.robust.sum()) < 19


def test_nothing_counts_that_float32_does_not_confirm(lying: None) -> None:
    model, x, y = linear_problem(classes=5, n=40, wrong=4)
    exact = model.exactly_robust(x, y, EPS)
    result = autoattack(model, (x, y), eps=EPS, version=FAST, batch_size=16)
    assert result.search == "bf16" and result.status == "ok"
    assert (model(result.adversarial).argmax(1) != y[result.fooled]).all()
    # The engine's own finds are worthless here: what is broken was found by going on in float32.
    assert torch.equal(result.robust, exact) and 0 < int(exact.sum()) < 36
    assert sum(stage.unconfirmed for stage in result.stages) >= 36
    assert sum(stage.refined for stage in result.stages) > 0


@pytest.mark.parametrize("serves", [True, False])
def test_float32_steps_run_on_a_copy_where_one_serves(
    serves: bool, lying: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch)
    model, x, y = linear_problem(classes=5, n=24, wrong=2)
    exact = model.exactly_robust(x, y, EPS)
    ran: set[tuple[str, str]] = set()
    honest = attacks.Attack.engine_for

    def engine_for(self: Any, images: Tensor) -> Engine:
        if not serves and self.precision == "fp32" and self.engine == "compiled":
            raise ValueError("engine must be 'eager' or 'auto' for this model")
        engine = honest(self, images)
        ran.add((engine.precision, engine.name))
        return engine

    monkeypatch.setattr(attacks.Attack, "engine_for", engine_for)
    result = autoattack(model, (x, y), eps=EPS, version=("apgd-ce", "square"), batch_size=16)
    assert (("fp32", "compiled") in ran) == serves
    assert result.search == "bf16" and result.stages[0].refined > 0
    assert torch.equal(result.robust, exact) and 0 < int(exact.sum()) < 22


def test_it_depends_on_neither_batches_nor_order() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(12)
    settings: dict[str, Any] = dict(eps=0.06, version=("apgd-ce", "apgd-dlr"), engine="fp32")
    first = autoattack(model, (x, y), batch_size=12, **settings)
    small = autoattack(model, (x, y), batch_size=5, **settings)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    turned = autoattack(model, (x[order], y[order]), batch_size=9, sample_ids=order, **settings)
    assert torch.equal(first.robust, small.robust)
    assert torch.equal(first.robust[order], turned.robust)
    assert torch.equal(first.fooled.sort().values, small.fooled.sort().values)
    assert [stage.correct for stage in first.stages] == [stage.correct for stage in turned.stages]


seen: list[tuple[int, list[int]]] = []  # sizes and ids of the batches that it was given


class Square(attacks.APGD):
    """Stands for an attack that this package may have one day."""

    def __init__(self, model: Any, eps: float, queries: int, **options: Any) -> None:
        assert queries == 5000
        super().__init__(model, eps, 20, loss="dlr-t", **options)

    def __call__(self, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        seen.append((len(x), options["sample_ids"].tolist()))
        return super().__call__(x, y, **options)


@pytest.mark.parametrize("lie", [False, True])
def test_attacks_of_this_package_take_the_place_of_the_references(
    lie: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("lying" if lie else "narrow")
    monkeypatch.setattr("fastadv.evaluation.autoattack_run._MOST_ROWS", 1)  # beyond the batch size
    seen.clear()
    own = autoattack_stages.BY_BATCH["square"]
    monkeypatch.setitem(autoattack_stages.BY_BATCH, "square", replace(own, kind=Square))
    model, x, y = linear_problem(classes=4, n=40, wrong=3)
    result = autoattack(model, (x, y), eps=EPS, version=("square",), batch_size=32)
    assert torch.equal(result.robust, model.exactly_robust(x, y, EPS))
    assert [stage.search for stage in result.stages] == ["bf16"]
    # 37 images in batches of 32; the last is not filled up, as every row costs 5000 passes.
    assert [size for size, _ in seen[:1]] == [32]
    assert (5, [35, 36, 37, 38, 39]) in seen
    # Where bfloat16 has found something, float32 tries the others of the batch, too.
    left = [i for i in range(3, 35) if i not in result.fooled.tolist()]
    assert any(set(left) <= set(ids) < set(range(3, 35)) for _, ids in seen)
    # Any query breaks images at this radius, so that the reference needs few of its 5000.
    for engine in ("fp32", "reference"):
        easy = autoattack(model, (x[3:7], y[3:7]), eps=1.0, version=("square",), engine=engine)
        assert [stage.search for stage in easy.stages] == [engine] and not easy.robust.any()


def test_in_l1_auto_pgd_searches_here(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    own = autoattack_stages.BY_BATCH_L1["apgd-ce"]
    twice = replace(own, settings={**own.settings, "restarts": 2})  # in the place of five times
    monkeypatch.setitem(autoattack_stages.BY_BATCH_L1, "apgd-ce", twice)
    patch_reference({"apgd-ce": {"n_restarts": 2}}, monkeypatch)
    model, x, y = linear_problem(classes=4, n=12, wrong=2)
    settings: dict[str, Any] = dict(eps=0.4, norm="l1", version=FAST, batch_size=16)
    found = autoattack(model, (x, y), **settings)
    assert found.search == "bf16" and [stage.search for stage in found.stages] == ["bf16"] * 2
    reference = autoattack(model, (x, y), engine="reference", **settings)
    assert 0 < int(reference.robust.sum()) < 10
    assert int(found.robust.sum()) <= int(reference.robust.sum())
    moved = (found.adversarial - x[found.fooled]).flatten(1).abs().sum(1)
    assert moved.max() <= 0.4 * (1 + 1e-5)


def test_in_l1_auto_pgd_has_the_restarts_and_targets_of_the_reference() -> None:
    own = autoattack_stages.BY_BATCH_L1
    assert own["apgd-ce"].settings["restarts"] == own["apgd-dlr"].settings["restarts"] == 5
    assert own["apgd-t"].settings["target_classes"] == 5
    assert "restarts" not in own["apgd-t"].settings
    library = pyautoattack.AutoAttack(torch.nn.Flatten(), eps=1.0, norm="L1", device="cpu")
    assert library.apgd.n_restarts == 5 and library.apgd_targeted.n_target_classes == 5
    assert library.apgd_targeted.n_restarts == 1 and library.apgd.n_iter == 100


def test_in_l1_the_reference_attacks_random_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fastadv.evaluation.autoattack"], "RAND_PASSES", 2)
    model, x, y = linear_problem(classes=4, n=3)
    result = autoattack(model, (x, y), eps=32.0, norm="l1", version="rand")  # breaks all at once
    assert result.search == "reference" and not result.robust.any()


def test_images_outside_the_ball_make_a_result_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Any, runs: Any, take: Any, verifier: Any, ids: Any = None) -> None:
        runs = list(runs)
        x, _ = take(torch.tensor([run.image for run in runs]))
        assert not any(verifier.confirm([run.image for run in runs], 1 - x))
        verifier.record(
            [FinishedRun(run, one, 0.0, True, 0.1, 1) for run, one in zip(runs, x, strict=True)]
        )

    monkeypatch.setattr(APGDPool, "run", run)
    model, x, y = linear_problem(classes=4, n=10)
    result = autoattack(model, (x, y), eps=EPS, version=("apgd-ce",), engine="fp32")
    assert result.status == "invalid" and "10 images outside the linf ball" in result.notes[0]
    assert result.robust.all() and len(result.fooled) == 0


def test_a_state_belongs_to_one_way_of_searching(tmp_path: Path, narrow: None) -> None:
    model, x, y = linear_problem(classes=4, n=6)
    settings: dict[str, Any] = dict(eps=EPS, version=("apgd-ce",), state_dir=tmp_path)
    autoattack(model, (x, y), **settings)
    with pytest.raises(ValueError, match="search was 'bf16' and is 'fp32'"):
        autoattack(model, (x, y), engine="fp32", **settings)
    with pytest.raises(ValueError, match="search was 'bf16' and is None"):
        autoattack(model, (x, y), engine="reference", **settings)
    with pytest.raises(ValueError, match="sample_ids was None"):
        autoattack(model, (x, y), sample_ids=torch.arange(6) + 1, **settings)


def test_a_row_says_how_it_was_found(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    model, x, y = linear_problem(classes=4, n=8)
    report = evaluate(model, (x, y), ["clean", "autoattack"], eps=EPS, progress=False)
    row = report["autoattack"]
    assert row.search == "bf16" and report["clean"].search == ""
    table = report.table()
    assert "autoattack: apgd-ce, apgd-t" in table and " searched in bfloat16" in table
    assert "the plain model in float32 has confirmed every adversarial image" in table
    assert "float32 steps after these searches broke" in table
    entry = report.to_dict()["rows"][1]
    assert row_from_dict(entry) == row
    entry.pop("search")  # as earlier versions wrote it
    entry["stages"] = [{"name": one["name"], "correct": one["correct"]} for one in entry["stages"]]
    old = row_from_dict(entry)
    assert old.search == "reference" and old.stages[0].search == "reference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "bf16"}, "engine must be one of"),
        ({"sample_ids": torch.arange(3)}, r"sample_ids must be an int64 tensor of shape \(4,\)"),
        ({"sample_ids": [0, 1, 2, 3]}, "sample_ids must be an int64 tensor"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    model, x, y = linear_problem(classes=4, n=4)
    with pytest.raises(ValueError, match=message):
        autoattack(model, (x, y), **change)
    with pytest.raises(ValueError, match="engine must be one of"):
        evaluate(model, (x, y), "clean", engine="compiled")


def test_a_callable_is_searched_in_float32() -> None:
    model, x, y = linear_problem(classes=4, n=8)
    result = autoattack(lambda images: model(images), (x, y), eps=EPS, version=("apgd-ce",))
    assert result.search == "fp32"


class Noisy(nn.Module):
    """Logits and gradients that are right on average only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + 0.02 * torch.randn_like(x))


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.filterwarnings("ignore:fastadv attacks")
def test_models_that_draw_random_numbers_have_a_version(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["fastadv.evaluation.autoattack"], "RAND_PASSES", 4)
    model, x, y = linear_problem(classes=4, n=12, wrong=2)
    calls: list[int] = []
    noisy = Noisy(model).eval()
    noisy.register_forward_hook(lambda *_: calls.append(1))
    result = autoattack(noisy, (x, y), eps=EPS, version="rand", engine=engine)
    assert [stage.name for stage in result.stages] == ["apgd-ce", "apgd-dlr"]
    assert result.status == "ok" and len(calls) > 4 * 100
    exact = model.exactly_robust(x, y, EPS)
    assert int((result.robust != exact).sum()) <= 4
    plain = autoattack(noisy, (x, y), eps=EPS, version=("apgd-ce",), engine=engine)
    assert plain.status == "suspect" and "draws random numbers" in plain.notes[0]


@pytest.mark.parametrize("engine", ["auto", "fp32"])
@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-t", "fab-t", "square"])
def test_nan_among_the_logits_near_images_makes_a_result_suspect(
    attack: str, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attacks pass over such points, so that an image seems robust that only they break."""
    settings = {"target_classes": 1} if attack == "fab-t" else {"queries": 50}
    if attack in autoattack_stages.BY_BATCH:
        own = autoattack_stages.BY_BATCH[attack]
        changed = replace(own, settings={**own.settings, **settings})
        monkeypatch.setitem(autoattack_stages.BY_BATCH, attack, changed)

    class NaNFarFrom(nn.Module):
        def __init__(self, model: nn.Module, x: Tensor) -> None:
            super().__init__()
            self.model = model
            self.register_buffer("limit", x.mean((1, 2, 3)).amax() + 0.0005)

        def forward(self, x: Tensor) -> Tensor:
            bright = x.mean((1, 2, 3)) > self.limit
            return self.model(x) + torch.where(bright, torch.nan, 0.0)[:, None]

    linear, x, y = linear_problem(classes=5, n=12)
    x = x * 0.1 + 0.5 - 0.1 * x.mean((1, 2, 3), keepdim=True)
    y = linear(x).argmax(1)
    options: Any = dict(eps=0.004, version=[attack], engine=engine)
    assert autoattack(linear, (x, y), **options).status == "ok"
    found = autoattack(NaNFarFrom(linear, x).eval(), (x, y), **options)
    assert found.status == "suspect"
    assert "the model returned NaN at" in " ".join(found.notes)
