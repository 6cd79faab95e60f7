"""Each analysis against a plain formula or a property that it must have, on small networks."""

from __future__ import annotations

import builtins
import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn
from torch import Tensor, nn
from training_helpers import make_model, small_data

from fastadv import PGD
from fastadv.evaluation import AnalysisSettings, Measured, analyse, delta_z, evaluate
from fastadv.evaluation.analyses import ANALYSES
from fastadv.evaluation.analyses.analyse import run_analyses
from fastadv.evaluation.analyses.pictures import images_of, picture_of
from fastadv.evaluation.samples import as_samples
from fastadv.models import Stack, importance_ratios

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def noisy(size: float, seed: int = 0) -> nn.Module:
    """The trained network with weights that are somewhat off."""
    model, generator = trained_small_cnn(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def one(name: str, model: nn.Module, data: Any = None, **options: Any) -> Measured:
    return analyse(model, data, [name], **options)[name]


def test_cosine_is_the_plain_formula_and_1_for_the_model_itself() -> None:
    model, teacher, (x, y) = noisy(0.05), trained_small_cnn(), digits_test(40)
    found = one("cosine", model, (x, y), teacher=teacher, batch_size=16)
    with torch.no_grad():
        u, v = (m.eval().forward_features(x).flatten(1).double() for m in (model, teacher))
    plain = nn.functional.cosine_similarity(u, v)
    torch.testing.assert_close(
        torch.tensor(found.column("cosine")).double(), plain, atol=1e-5, rtol=0
    )
    assert found.summary["mean cosine"] == pytest.approx(float(plain.mean()), abs=1e-5)
    angles = plain.arccos().rad2deg()
    assert found.summary["mean angle in degrees"] == pytest.approx(float(angles.mean()), abs=0.01)
    assert found.column("label") == y.tolist()
    assert one("cosine", teacher, (x, y), teacher=trained_small_cnn()).summary[
        "mean cosine"
    ] == pytest.approx(1, abs=1e-6)


def test_frobenius_norms_are_of_every_weight_with_two_axes() -> None:
    model = trained_small_cnn()
    found = one("frobenius", model)
    expected = {n: float(p.detach().norm()) for n, p in model.named_parameters() if p.dim() > 1}
    assert found.column("layer") == list(expected)
    assert found.column("norm") == pytest.approx(list(expected.values()), rel=1e-5)
    total = math.sqrt(sum(norm**2 for norm in expected.values()))
    assert found.summary["norm of all layers"] == pytest.approx(total, rel=1e-5)
    flat = [p.square().mean().sqrt() for p in model.parameters() if p.dim() > 1]
    assert found.column("rms") == pytest.approx([float(value.detach()) for value in flat], rel=1e-5)
    with pytest.raises(ValueError, match="layers with weights"):
        one("frobenius", nn.Flatten())


def test_entropy_is_that_of_the_probabilities() -> None:
    model, (x, y) = noisy(0.05), digits_test(50)
    found = one("entropy", model, train=(x, y), batch_size=20)
    with torch.no_grad():
        shares = model.eval()(x).double().softmax(1)
    plain = -(shares * shares.log()).sum(1)
    assert found.summary["mean entropy"] == pytest.approx(float(plain.mean()), abs=1e-5)
    assert sum(found.column("images")) == 50 and sum(found.column("share")) == pytest.approx(1)
    for low, high, count, _ in found.rows:
        inside = (plain > low + 1e-4) & (plain < high - 1e-4)
        near = (plain > low - 1e-4) & (plain < high + 1e-4)
        assert int(inside.sum()) <= count <= int(near.sum())


def test_a_model_without_an_opinion_has_the_largest_entropy() -> None:
    model = trained_small_cnn()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = one("entropy", model, train=digits_test(10))
    assert found.summary["mean entropy"] == pytest.approx(math.log(10))
    assert found.column("images")[-1] == 10


def test_random_labels_are_learned_from_features_that_tell_images_apart_and_from_no_others() -> (
    None
):
    data = small_data(images=60).train
    found = one("random-labels", make_model(), train=data, epochs=40)
    accuracies = found.column("accuracy")
    assert found.column("epoch") == list(range(1, 41))
    assert accuracies[-1] > accuracies[0] and accuracies[-1] > 0.5
    assert found.column("loss")[-1] < found.column("loss")[0]
    assert found == one("random-labels", make_model(), train=data, epochs=40), (
        "one seed, one result"
    )
    blind = make_model()
    with torch.no_grad():
        for parameter in blind.parameters():
            parameter.zero_()
    constant = one("random-labels", blind, train=data, epochs=40).column("accuracy")[-1]
    assert constant < accuracies[-1] - 0.1, "equal features cannot tell labels apart"


def test_the_curves_are_the_evaluation_s_accuracies() -> None:
    model, data = trained_small_cnn(), digits_test(48)
    radii = (0.02, 0.1, 0.3)
    over_eps = one("eps-curve", model, data, radii=radii, steps=3, seed=5)
    report = evaluate(model, data, ["clean", "pgd-3"], eps=list(radii), seed=5, progress=False)
    assert over_eps.column("eps") == [0.0, *radii]
    expected = [report.rows[0].correct, *(report.at("pgd-3", eps).correct for eps in radii)]
    assert over_eps.column("correct") == expected and expected == sorted(expected)[::-1]
    over_steps = one("steps-curve", model, data, eps=0.1, alpha=0.05, step_counts=[1, 4], seed=5)
    report = evaluate(
        model, data, ["clean", "pgd-1", "pgd-4"], eps=0.1, alpha=0.05, seed=5, progress=False
    )
    assert over_steps.column("steps") == [0, 1, 4]
    assert over_steps.column("correct") == [row.correct for row in report.rows]
    assert [tuple(row[2:4]) for row in over_steps.rows] == [row.interval for row in report.rows]


def test_each_image_is_broken_at_its_smallest_radius_and_not_well_below_it() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(30)
    found = one("minimum", model, (x, y), steps=5, pictures=4, max_eps=0.4, batch_size=13)
    radii = [math.inf if r is None else r for r in found.column("radius")]
    right = model.eval()(x).argmax(1) == y
    assert [r == 0 for r in radii] == (~right).tolist()
    chosen = [i for i, r in enumerate(radii) if 0 < r < math.inf]
    assert len(chosen) == found.summary["images broken"] > 10
    predictions = torch.tensor(found.column("prediction"))
    assert bool((predictions != y)[chosen].all())
    # FGSM-like steps inside a much smaller ball do not reach the boundary.
    small = torch.tensor(radii)[chosen] / 4
    attack = PGD(model, 0.4, 0.1, 5, precision="fp32")
    adv = attack(x[chosen], y[chosen], seed=3, eps=small)
    assert float((model(adv).argmax(1) == y[chosen]).float().mean()) > 0.9
    assert found.originals is not None and found.adversarials is not None
    assert found.originals.shape == (4, 1, 8, 8)
    distance = (found.adversarials - found.originals).flatten(1).abs().amax(1)
    shown = torch.tensor([radii[i] for i in chosen[:4]])
    assert bool((distance <= shown + 1e-6).all()) and bool((distance > shown / 2).all())
    assert found.summary["mean radius"] == pytest.approx(np.mean([radii[i] for i in chosen]))


def make_stack(count: int = 3) -> Stack:
    torch.manual_seed(0)
    return Stack([make_model(i) for i in range(count)], 4)


def test_the_merger_s_ratios_and_weights() -> None:
    stack = make_stack()
    with torch.no_grad():
        stack.merger.weight[:, : stack.widths[0]] *= 3
    found = one("importance", stack)
    assert found.column("ratio") == importance_ratios(stack)
    assert found.column("ratio")[0] == max(found.column("ratio"))
    weights = one("merger-weights", stack)
    matrix = torch.tensor([row[2:] for row in weights.rows])
    torch.testing.assert_close(matrix, stack.merger.weight.detach().t())
    assert weights.column("extractor").count(2) == stack.widths[1]


def test_delta_z_is_that_of_the_extractors() -> None:
    stack, data = make_stack(), small_data().test
    options: dict[str, Any] = {"eps": 0.1, "steps": 3, "seed": 2}
    radii = (0.3, 0.1, 0.2)
    found = one("delta-z", stack, data, extractor_eps=radii, **options)
    expected = delta_z(dict(zip(radii, stack.extractors, strict=True)), data, **options)
    assert tuple(found.column("extractor eps")) == expected.radii == (0.1, 0.2, 0.3)
    assert tuple(found.column("delta z")) == expected.delta_z
    assert found.column("curvature") == [None, *expected.curvature, None]
    assert bool(found.summary["concave"]) == expected.concave
    with pytest.raises(ValueError, match=r"extractor_eps must be 3 different radii.*got no radius"):
        one("delta-z", stack, data)


class PrincipalComponents:
    """In place of UMAP, whose first use compiles for most of a minute: the first two principal components."""

    def __init__(self, **options: Any) -> None:
        assert options["n_components"] == 2 and options["n_neighbors"] == 15
        assert 0 <= options["random_state"] < 2**32

    def fit_transform(self, features: np.ndarray) -> np.ndarray:
        centred = features - features.mean(0)
        return np.asarray(centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T)


@pytest.mark.parametrize("name", ["tsne", "umap"])
def test_features_of_three_kinds_are_placed_in_the_plane(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    stand_in = SimpleNamespace(UMAP=PrincipalComponents)
    monkeypatch.setitem(sys.modules, "umap", stand_in)  # type: ignore[arg-type]
    model, (x, y) = trained_small_cnn(), digits_test(40)
    options: dict[str, Any] = {"eps": 0.15, "steps": 3, "points": 30, "batch_size": 8}
    found = one(name, model, (x, y), **options)
    assert [found.column("kind").count(k) for k in ("clean", "noisy", "adversarial")] == [30] * 3
    places = torch.tensor([row[4:] for row in found.rows])
    assert places.shape == (90, 2) and bool(places.isfinite().all())
    spread = places - places.mean(0)
    clean, noise = places[:30], places[30:60]
    moved = (clean - noise).norm(dim=1).median()
    assert float(moved) < float(spread.norm(dim=1).median()), "noise moves an image but little"
    picked = torch.arange(30) * 40 // 30
    assert found.column("label")[:30] == y[picked].tolist()
    assert found.column("prediction")[:30] == model.eval()(x[picked]).argmax(1).tolist()
    accuracy = found.summary
    assert accuracy["accuracy, adversarial"] < accuracy["accuracy, clean"]


@pytest.mark.parametrize(("name", "module"), [("tsne", "sklearn.manifold"), ("umap", "umap")])
def test_a_missing_library_is_named_before_anything_is_computed(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = builtins.__import__

    def without(wanted: str, *args: Any, **kwargs: Any) -> Any:
        if wanted == module:
            raise ImportError(wanted)
        return plain(wanted, *args, **kwargs)

    def never(images: Tensor) -> Tensor:
        raise AssertionError("called")

    model = trained_small_cnn()
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(model, "forward", never)
    with pytest.raises(ImportError, match=f"{name} needs .*pip install"):
        one(name, model, digits_test(4))


def test_the_model_is_left_as_it_was() -> None:
    model = trained_small_cnn().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analyse(model, digits_test(10), ["cosine", "entropy", "minimum"], teacher=trained_small_cnn(),
            train=digits_test(10), steps=2)  # fmt: skip
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_is_wrong_is_said() -> None:
    model, data = trained_small_cnn(), digits_test(8)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "what must be one of .*did you mean 'cosine'", {"what": ["cosin"]}),
        (ValueError, "what must name at least one", {"what": []}),
        (TypeError, "what must be a list", {"what": "cosine"}),
        (ValueError, "teacher must be given with cosine", {"what": ["cosine"]}),
        (ValueError, "train must be given with entropy", {"what": ["entropy"]}),
        (TypeError, "must be a Stack.*got SmallCNN", {"what": ["importance"]}),
        (TypeError, "no argument 'step'; did you mean 'steps'", {"what": ["minimum"], "step": 3}),
        (ValueError, "epochs must be left out with minimum; it is for random-labels", {
            "what": ["minimum"], "epochs": 3}),
        (ValueError, "radii must be ascending", {"what": ["eps-curve"], "radii": [0.2, 0.1]}),
        (ValueError, "eps must be > 0", {"what": ["steps-curve"], "eps": 0.0}),
        (ValueError, "steps must be >= 1", {"what": ["minimum"], "steps": 0}),
        (ValueError, "data must be given with minimum", {"what": ["minimum"], "data": None}),
    ]  # fmt: skip
    for kind, message, options in cases:
        with pytest.raises(kind, match=message):
            analyse(model, **{"data": data, **options})
    with pytest.raises(TypeError, match="model must be a module"):
        analyse(lambda x: x, data, ["frobenius"])  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="there are layer, parameters"):
        one("frobenius", model).column("size")


def test_every_analysis_is_described_and_uses_settings_that_exist() -> None:
    fields = AnalysisSettings.__dataclass_fields__
    for name, analysis in ANALYSES.items():
        assert analysis.name == name and analysis.title and set(analysis.uses) <= set(fields)


def test_pictures_of_every_analysis_and_of_the_smallest_perturbations() -> None:
    pytest.importorskip("matplotlib")
    model, data = trained_small_cnn(), digits_test(24)
    found = analyse(
        model,
        data,
        [
            "cosine",
            "frobenius",
            "entropy",
            "random-labels",
            "eps-curve",
            "steps-curve",
            "minimum",
            "tsne",
        ],
        teacher=noisy(0.02),
        train=data,
        steps=2,
        epochs=2,
        radii=[0.1, 0.2],
        step_counts=[1, 2],
        pictures=3,
    )
    found |= analyse(make_stack(), small_data().test, ["importance", "merger-weights", "delta-z"],
                     extractor_eps=[0.1, 0.2, 0.3], steps=2)  # fmt: skip
    for name, measured in found.items():
        shared = {"a": measured, **({"b": measured} if ANALYSES[name].shared else {})}
        picture = picture_of(shared)
        assert picture.startswith(b"\x89PNG") and len(picture) > 3000
        if not ANALYSES[name].shared:
            with pytest.raises(ValueError, match="of one model"):
                picture_of({"a": measured, "b": measured})
    with pytest.raises(ValueError, match="one analysis"):
        picture_of({"a": found["cosine"], "b": found["entropy"]})
    assert images_of(found["cosine"]) is None
    tiled = images_of(found["minimum"])
    assert tiled is not None and tiled.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["entropy", "eps-curve", "minimum"])
def test_a_model_that_refuses_the_images_is_named_with_their_size(name: str) -> None:
    linear, data = nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), digits_test(8)
    with pytest.raises(RuntimeError, match=r"^model Sequential, on images of 1x8x8: mat1 and mat2"):
        one(name, linear, data, train=data if name == "entropy" else None)


def test_a_teacher_that_refuses_the_images_is_named_before_the_first_analysis() -> None:
    teacher, data = nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), digits_test(8)
    measured: list[object] = []
    with pytest.raises(RuntimeError, match=r"^teacher Sequential, on images of 1x8x8: mat1 and"):
        run_analyses(
            trained_small_cnn(),
            [ANALYSES["frobenius"], ANALYSES["cosine"]],
            AnalysisSettings(),
            samples=as_samples(data, (0.0, 1.0)),
            train=None,
            teacher=teacher,
            device=None,
            on_measured=measured.append,
        )
    assert measured == []
