"""Figures that would come out too high must say so, or be refused."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from short_autoattack import patch_reference, shorten
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastadv import AutoAttack
from fastadv.evaluation import Result, Row, Subject, evaluate, sanity_checks
from fastadv.evaluation.attack_list import Ensemble
from fastadv.evaluation.autoattack import autoattack
from fastadv.evaluation.early_checks import UselessGradients
from fastadv.evaluation.sanity_file import SanityResult, add_sanity_result, load_sanity_results
from fastadv.evaluation.state_folder import hash_model
from fastadv.evaluation.transfer import transfer_matrix

pytestmark = pytest.mark.slow


class Linear(nn.Module):
    """Tells two classes by the mean of an image, at .5, in a form whose gradient can be spoilt."""

    def __init__(self, spoilt: str = "", classes: int = 2) -> None:
        super().__init__()
        self.spoilt, self.classes = spoilt, classes
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spoilt == "rounded":
            x = (x * 255).round() / 255
        score = self.scale * (x.flatten(1).mean(1) - 0.5)
        if self.spoilt == "nan":
            score = score + 0 * (x.flatten(1).sum(1) * 0).sqrt()
        columns = [-score, score, *[score - 100] * (self.classes - 2)]
        return torch.stack(columns, 1)


def bright_or_dark(n: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(n) % 2
    images = 0.4 + 0.2 * labels.float().view(-1, 1, 1, 1).expand(n, 1, 4, 4)
    return images.contiguous(), labels


FOLLOW_GRADIENTS = ["fgsm", "pgd-3", "cw-3", "mim-3", "apgd-ce-5", "fab-5", "min-fgsm", "cwl2-20"]


@pytest.mark.parametrize("spoilt", ["rounded", "nan"])
def test_gradients_that_lead_nowhere_make_rows_suspect(spoilt: str) -> None:
    attacks = [*FOLLOW_GRADIENTS, "square-50"]
    report = evaluate(Linear(spoilt), bright_or_dark(), attacks, eps=0.2, progress=False)
    status = {row.name: row.status for row in report.rows}
    assert {name: "suspect" for name in FOLLOW_GRADIENTS} | {"square-50": "ok"} == status
    note = report.rows[0].notes[-1]
    assert "gradient of 64 of 64 images is zero everywhere or not finite" in note


def test_gradients_that_lead_somewhere_raise_no_doubt() -> None:
    report = evaluate(Linear(), bright_or_dark(), FOLLOW_GRADIENTS, eps=0.2, progress=False)
    assert {row.status for row in report.rows} == {"ok"}


@pytest.mark.filterwarnings("ignore:lr . steps is")
def test_distances_by_too_few_steps_of_adam_make_their_row_suspect() -> None:
    report = evaluate(Linear(), bright_or_dark(), ["cwl2-19"], eps=0.2, progress=False)
    assert report.rows[0].status == "suspect" and "Adam needs more steps" in report.rows[0].notes[0]
    report = evaluate(Linear(), bright_or_dark(), "cwl2-5", eps=0.2, cw_lr=0.1, progress=False)
    assert report.rows[0].status == "ok"


def test_probabilities_in_place_of_logits_make_rows_suspect() -> None:
    data = bright_or_dark()
    for last, status in ((nn.Softmax(1), "suspect"), (nn.LogSoftmax(1), "ok")):
        model = nn.Sequential(Linear(), last)
        report = evaluate(
            model, data, ["clean", "pgd-3", "apgd-ce-5", "square-50"], eps=0.2, progress=False
        )
        found = {row.name: row.status for row in report.rows}
        expected = {"clean": "ok", "pgd-3": status, "apgd-ce-5": status, "square-50": "ok"}
        assert found == expected
        assert ("returns probabilities" in f"{report.rows[1].notes}") == (status == "suspect")


def test_device_without_values_is_refused_before_the_model_is_there() -> None:
    model = Linear()
    with pytest.raises(ValueError, match="device must be one that holds values"):
        evaluate(model, bright_or_dark(), "clean", device="meta", progress=False)
    assert model.scale.device.type == "cpu"


def test_surrogate_that_guesses_makes_rows_suspect() -> None:
    surrogate = Linear()
    surrogate.scale.data.zero_()
    with pytest.warns(UserWarning, match=r"surrogate Linear is right on 40 of 80 clean images"):
        report = evaluate(
            Linear(),
            bright_or_dark(),
            ["clean", "square-5"],
            eps=0.2,
            surrogate=surrogate,
            progress=False,
        )
    assert [row.status for row in report.rows] == ["ok", "suspect"]


def test_warnings_about_a_surrogate_point_at_the_callers_line() -> None:
    hidden = nn.Sequential(Linear(), nn.Dropout(0.5)).train()
    hidden[0].scale.data.zero_()
    settings: dict[str, Any] = {"eps": 0.2, "surrogate": lambda x: hidden(x), "progress": False}
    with pytest.warns(UserWarning, match="the surrogate") as told:
        evaluate(Linear(), bright_or_dark(), "square-5", **settings)
    places = [one.filename for one in told if "the surrogate" in str(one.message)]
    assert places == [__file__, __file__]


def test_step_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha must be > 0, got 0"):
        evaluate(Linear(), bright_or_dark(), "pgd-3", eps=0.2, alpha=0, progress=False)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"norm": "l2"}, "norm l2"), ({"bounds": (0.0, 255.0)}, "bounds 0 255")],
)
def test_default_radius_is_for_linf_and_images_in_0_1(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"eps must be given with {named}"):
        evaluate(Linear(), bright_or_dark(), "pgd-3", progress=False, **settings)


def test_first_of_tensors_that_lie_class_by_class_are_of_all_classes() -> None:
    images, labels = bright_or_dark()
    order = labels.argsort(stable=True)
    last = nn.Linear(16, 2)
    last.weight.data.zero_()
    last.bias.data = torch.tensor([1.0, 0.0])
    constant = nn.Sequential(nn.Flatten(), last)
    report = evaluate(
        constant, (images[order], labels[order]), "clean", max_examples=20, progress=False
    )
    assert (report.rows[0].correct, report.rows[0].n) == (10, 20)


def test_results_of_networks_that_share_weights_are_kept_side_by_side() -> None:
    row = Row("pgd-20", 100, 50, 0.03, 0, 1.0)
    keys = {
        Result(
            Subject(network=network, weights="w", checkpoint="best.pt", data="d", images="i"),
            row,
            "linf",
            (0.0, 1.0),
            10,
            "cpu",
            {},
        ).key
        for network in ("plain", "defended")
    }
    assert len(keys) == 2


def test_plain_attributes_of_a_model_are_part_of_its_identity() -> None:
    assert hash_model(Linear()) == hash_model(Linear())
    assert hash_model(Linear()) != hash_model(Linear("rounded"))


def test_default_radius_of_other_entries_is_for_linf_alone() -> None:
    model, data = Linear(), bright_or_dark()
    with pytest.raises(ValueError, match="eps must be given with norm l2"):
        AutoAttack(model, norm="l2")
    with pytest.raises(ValueError, match="eps must be given with norm l1"):
        autoattack(model, data, norm="l1")
    with pytest.raises(ValueError, match="eps must be given with bounds -1 1"):
        sanity_checks(model, data, bounds=(-1.0, 1.0))
    with pytest.raises(ValueError, match="eps must be given with norm l2"):
        transfer_matrix({"a": model, "b": Linear()}, data, norm="l2")


def test_transfer_tells_which_model_guesses() -> None:
    guess = Linear()
    guess.scale.data.zero_()
    models = {"good": Linear(), "guess": guess}
    matrix = transfer_matrix(models, bright_or_dark(), "fgsm", eps=0.2, progress=False)
    assert [note for note in matrix.notes if "seems to guess" in note] == [
        "guess seems to guess, so the images that are made on it say nothing about the other models"
    ]


def test_findings_within_other_bounds_are_kept_side_by_side(tmp_path: Path) -> None:
    file = tmp_path / "eval.sanity.json"
    subject = Subject(network="plain", weights="w")
    for bounds in ((0.0, 1.0), (-1.0, 1.0)):
        add_sanity_result(file, SanityResult(subject, (), 10, 0.1, "linf", bounds=bounds))
    assert [one.bounds for one in load_sanity_results(file)] == [(0.0, 1.0), (-1.0, 1.0)]


def test_state_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = Linear(), bright_or_dark()
    settings: dict[str, Any] = {"eps": 0.2, "progress": False, "state_dir": tmp_path}
    evaluate(model, data, "pgd-3", **settings)
    module = sys.modules["fastadv.evaluation.evaluate"]
    monkeypatch.setattr(module, "library_versions", lambda: {"fastadv": "0.0.1"})
    with pytest.raises(ValueError, match=r"versions was .* and is {'fastadv': '0.0.1'}"):
        evaluate(model, data, "pgd-3", **settings)


class Darkening(DataLoader[Any]):
    """Changes the batches that it reads, as loaders which normalise on the GPU do."""

    def __iter__(self) -> Any:
        return ((images - 0.4, labels) for images, labels in super().__iter__())


def test_loader_that_changes_its_batches_is_read_as_it_gives_them() -> None:
    loader = Darkening(TensorDataset(*bright_or_dark()), batch_size=16)
    with pytest.warns(UserWarning, match="about as many as by guessing"):
        report = evaluate(Linear(), loader, "clean", progress=False)
    assert (report.rows[0].correct, report.rows[0].n) == (40, 80)


def test_worst_images_outlast_an_interruption(tmp_path: Path) -> None:
    model, data = Linear(), bright_or_dark()
    settings: dict[str, Any] = dict(
        eps=0.2, batch_size=16, keep_images=5, progress=False, state_dir=tmp_path
    )
    whole = evaluate(model, data, "pgd-3", **settings).rows[0].worst
    finished = sorted((tmp_path / "batches").glob("pgd-3-*.json"))
    assert len(finished) == 5
    finished[0].unlink()  # as if the attack had been interrupted in one batch
    resumed = evaluate(model, data, "pgd-3", **settings).rows[0].worst
    assert whole is not None and resumed is not None and len(whole) == 5
    assert torch.equal(whole.indices, resumed.indices)
    assert torch.equal(whole.adversarials, resumed.adversarials)


def test_an_image_that_whole_runs_break_several_times_is_kept_once() -> None:
    report = evaluate(
        Linear(), bright_or_dark(), "pgd-3-3runs", eps=0.2, keep_images=100, progress=False
    )
    worst = report.rows[0].worst
    assert worst is not None and sorted(worst.indices.tolist()) == list(range(80))


def test_masking_checks_find_gradients_that_are_not_finite() -> None:
    images, labels = bright_or_dark(8)
    findings = sanity_checks(
        Linear("nan"), (images, labels), eps=0.05, eps_factors=(1.0,), steps=(1, 2), queries=5
    )
    (gradients,) = (finding for finding in findings if finding.check == "gradients")
    assert not gradients.ok and gradients.message.startswith("8 of the 8 images")


def test_autoattack_is_in_doubt_where_differences_of_logits_lead_nowhere() -> None:
    note = UselessGradients(cross_entropy=0, margin=5, n=10).note(Ensemble())
    assert note.startswith("the gradient of 5 of 10 images") and "square alone" in note
    assert UselessGradients(cross_entropy=9, margin=1, n=10).note(Ensemble()) == ""


class NaNOffTheGrid(nn.Module):
    """Is NaN at images that are not whole multiples of 1/255, as where a forward pass checks its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        off = (x - (x * 255).round() / 255).flatten(1).abs().amax(1) > 1e-4
        return torch.where(off[:, None], torch.nan, self.linear(x.flatten(1)))


def nan_off_the_grid() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = NaNOffTheGrid().eval()
    images = (torch.rand(12, 3, 2, 2) * 255).round() / 255
    return model, (images, model(images).argmax(1))


@pytest.mark.filterwarnings("ignore:the model returned NaN")
def test_an_attack_that_passes_over_nan_makes_its_row_suspect(tmp_path: Path) -> None:
    """FAB and C&W return images at which the model is finite, so that the last check does not see the NaN."""
    model, data = nan_off_the_grid()
    attacks = ["fab-3", "fab-t-3", "cwl2-5"]
    options: dict[str, Any] = dict(eps=0.3, progress=False, state_dir=tmp_path, batch_size=5)
    for _ in range(2):  # the second report is read from the state
        report = evaluate(model, data, attacks, **options)
        for row in report.rows:
            assert row.status == "suspect" and "model returned NaN at" in row.notes[0]
    matrix = transfer_matrix({"a": model, "b": model}, data, "fab-3", eps=0.3, progress=False)
    assert any("model returned NaN at" in note for note in matrix.notes)


@pytest.mark.parametrize("attack", ["min-fgsm", "min-pgd-2"])
def test_nan_at_a_judged_point_is_an_error_of_the_smallest_perturbation_too(attack: str) -> None:
    model, data = nan_off_the_grid()
    with pytest.raises(RuntimeError, match="logits that are not finite"):
        evaluate(model, data, attack, progress=False)


class _SpoiltOffTheGrid(torch.autograd.Function):
    """The identity; an element that is no multiple of a quarter has a gradient of the given value."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: float) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad.masked_fill((4 * x - (4 * x).round()).abs() > 1e-6, ctx.value), None


class SpoiltOffTheGrid(nn.Module):
    """Has the right gradient at the clean images alone."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.linear, self.value = nn.Linear(48, 4), value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(_SpoiltOffTheGrid.apply(x, self.value).flatten(1))


def spoilt_off_the_grid(value: float) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = SpoiltOffTheGrid(value).eval()
    images = torch.randint(1, 4, (12, 3, 4, 4)) / 4
    return model, (images, model(images).argmax(1))


BEYOND_THE_IMAGES = [
    *("pgd-3", "pgd-3-2", "pgd-3-2runs", "cw-3", "mim-3", "apgd-ce-3", "apgd-dlr-3", "apgd-t-3"),
    *("fab-5", "fab-t-5", "cwl2-3", "min-pgd-2"),
]


@pytest.mark.filterwarnings("ignore:the model's gradient in x is NaN", "ignore:lr . steps is")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_useless_gradients_on_an_attacks_way_make_its_row_suspect(
    norm: str, value: float, tmp_path: Path
) -> None:
    model, data = spoilt_off_the_grid(value)
    eps = {"linf": 0.02, "l2": 0.1, "l1": 0.4}[norm]
    options: dict[str, Any] = dict(
        eps=eps, norm=norm, batch_size=5, state_dir=tmp_path, progress=False
    )
    for _ in range(2):  # the second report is read from the state
        report = evaluate(model, data, ["fgsm", *BEYOND_THE_IMAGES, "square-5"], **options)
        status = {row.name: row.status for row in report.rows}
        assert {"fgsm": "ok", "square-5": "ok"} | dict.fromkeys(
            BEYOND_THE_IMAGES, "suspect"
        ) == status
        for row in report.rows[1:-1]:
            assert "elements or more of the gradients that the attack followed were NaN" in str(
                row.notes
            )


class FlatWhereRight(nn.Module):
    """Has a gradient at the clean images alone: at the points of a first step every logit is constant.

    With ``wrong`` it is so for images that the step breaks, which hides nothing.
    """

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.linear, self.wrong = nn.Linear(48, 4), wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moved = (x - (4 * x).round() / 4).abs().flatten(1).amax(1) > 1e-6
        logits = self.linear(x.flatten(1))
        clean = self.linear(((4 * x).round() / 4).flatten(1)).detach()
        flat = 60 * nn.functional.one_hot((clean.argmax(1) + int(self.wrong)) % 4, 4).float()
        return torch.where(moved[:, None], flat, logits)


@pytest.mark.parametrize("name", ["pgd-3", "pgd-3-2", "cw-3", "mim-3", "apgd-ce-3"])
def test_gradients_that_vanish_after_a_first_step_make_a_row_suspect(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    images = torch.randint(1, 4, (12, 3, 4, 4)) / 4
    for wrong in (False, True):
        model = FlatWhereRight(wrong).eval()
        data = (images, model(images).argmax(1))
        folder = tmp_path / str(wrong)
        for size in (5, 5, 12):  # the second report is read from the state
            where = folder / str(size)
            (row,) = evaluate(
                model, data, name, eps=0.02, batch_size=size, state_dir=where, progress=False
            ).rows
            hides = row.correct > 0
            assert row.status == ("suspect" if hides else "ok"), (row.correct, row.notes)
            assert not hides or "images that withstood it is zero everywhere" in row.notes[0]
            assert hides or wrong


@pytest.mark.parametrize("name", ["pgd-3", "apgd-ce-3"])
def test_vanished_gradients_of_a_surrogate_make_a_row_suspect(name: str) -> None:
    torch.manual_seed(0)
    images = torch.randint(1, 4, (12, 3, 4, 4)) / 4
    surrogate, judged = FlatWhereRight(False).eval(), FlatWhereRight(False).eval()
    judged.load_state_dict(surrogate.state_dict())
    data = (images, judged(images).argmax(1))
    (row,) = evaluate(judged, data, name, eps=0.02, surrogate=surrogate, progress=False).rows
    assert row.status == "suspect"


@pytest.mark.filterwarnings("ignore:the model's gradient in x is NaN")
def test_useless_gradients_are_counted_whatever_the_batches_and_the_passes() -> None:
    model, data = spoilt_off_the_grid(torch.nan)
    notes = {
        evaluate(model, data, "pgd-3", eps=0.02, batch_size=size, eot=eot, progress=False)
        .rows[0]
        .notes
        for size in (3, 5, 12)
        for eot in (1, 2)
    }
    # All three gradients are taken off the images: the start is random.
    (note,) = notes
    assert note[0].startswith(f"{12 * 48 * 3} elements or more of the gradients")


@pytest.mark.filterwarnings("ignore:the model's gradient in x is NaN")
@pytest.mark.parametrize("surrogate", [False, True])
def test_useless_gradients_put_transfers_in_doubt(surrogate: bool) -> None:
    model, data = spoilt_off_the_grid(torch.nan)
    good, _ = spoilt_off_the_grid(1.0)
    if surrogate:
        (row,) = evaluate(good, data, "pgd-3", eps=0.02, surrogate=model, progress=False).rows
        assert row.status == "suspect" and "were NaN or infinite" in row.notes[0]
    matrix = transfer_matrix({"a": model, "b": good}, data, "pgd-3", eps=0.02, progress=False)
    assert any("were NaN or infinite" in note for note in matrix.notes)


@pytest.mark.parametrize("engine", ["auto", "fp32", "reference"])
@pytest.mark.parametrize(
    ("norm", "attack"), [("linf", "apgd-ce"), ("l1", "apgd-ce"), ("linf", "fab-t")]
)
@pytest.mark.filterwarnings("ignore:the model's gradient in x is NaN")
def test_useless_gradients_make_autoattack_suspect(
    engine: Any, norm: str, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyautoattack")
    shorten(monkeypatch)
    patch_reference({"apgd-ce": {"n_restarts": 1, "n_iter": 20}}, monkeypatch)
    eps = {"linf": 0.02, "l1": 0.4}[norm]
    for value, status in ((torch.nan, "suspect"), (torch.inf, "suspect"), (1.0, "ok")):
        model, data = spoilt_off_the_grid(value)
        options: dict[str, Any] = dict(eps=eps, norm=norm, engine=engine, batch_size=5)
        result = autoattack(model, data, version=[attack], **options)
        assert result.status == status
        assert any("were NaN or infinite" in note for note in result.notes) == (status != "ok")
