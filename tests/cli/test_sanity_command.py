"""Signs of gradient masking: each check on a model that fails it, and `fastadv eval --sanity`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_model import Staircase, linear_problem
from torch import Tensor, nn
from training_helpers import small_recipe

from fastadv.cli import main
from fastadv.evaluation import Subject, Surrogate, load_results, sanity_checks
from fastadv.evaluation.findings import Finding, findings_text, monotone
from fastadv.evaluation.sanity_file import SanityResult, add_sanity_result, load_sanity_results
from fastadv.trainers import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
SMALL: dict[str, Any] = {
    "steps": (1, 10),
    "eps_factors": (0.5, 1.0),
    "queries": 60,
    "progress": False,
}
CHECKS = ["random", "gradients", "eps", "loss", "steps", "unbounded", "black box"]


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_an_honest_model_shows_no_sign() -> None:
    model, x, y = linear_problem(classes=4, n=60)
    findings = sanity_checks(model, (x, y), eps=0.02, **SMALL)
    assert [finding.check for finding in findings] == CHECKS
    assert all(finding.ok and finding.verdict == "ok" for finding in findings), findings
    losses = [loss for _, loss in by_check(findings)["loss"].accuracies]
    # At radius 0 the loss is that of the clean images.
    clean = float(nn.functional.cross_entropy(model(x), y).detach())
    assert losses == sorted(losses) and losses[0] == pytest.approx(clean, rel=1e-5)
    text = findings_text(findings, 60, 0.02, "linf")
    assert text.splitlines()[0].endswith("no sign, which proves nothing") and text.count("\n") == 8


@pytest.mark.parametrize(("norm", "eps", "everything"), [("l2", 0.1, 8.0), ("l1", 0.4, 64.0)])
def test_an_honest_model_shows_no_sign_in_other_norms(
    norm: str, eps: float, everything: float
) -> None:
    model, x, y = linear_problem(classes=4, n=60)
    assert x[0].numel() == 64
    findings = by_check(sanity_checks(model, (x, y), eps=eps, norm=norm, **SMALL))
    assert [check for check, finding in findings.items() if not finding.ok] == []
    assert findings["unbounded"].accuracies == ((everything, 0.0),)
    accuracies = [accuracy for _, accuracy in findings["eps"].accuracies]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] > accuracies[-1]


def test_a_rise_by_as_much_as_the_slack_is_allowed() -> None:
    """4 of 100 images, then 5: in float32 the difference is a little more than .01."""
    assert monotone("steps", [(1.0, 0.04), (5.0, 0.05)], 0.01).ok
    assert not monotone("steps", [(1.0, 0.04), (5.0, 0.06)], 0.01).ok


def test_a_model_without_gradients_is_found_out() -> None:
    model, x, _ = linear_problem(classes=4, n=60)
    masked = Staircase(model, levels=20)
    found = by_check(sanity_checks(masked, (x, masked(x).argmax(1)), eps=0.1, **SMALL))
    assert "60 of the 60 images" in found["gradients"].message
    assert "is the stronger one" in found["black box"].message
    failed = {check for check, finding in found.items() if not finding.ok}
    assert {"gradients", "unbounded", "black box"} <= failed and "random" not in failed
    text = findings_text(list(found.values()), 60, 0.1, "linf")
    assert "of 7 checks are suspect" in text and "suspect  gradients" in text


def test_saturated_losses_count_as_gradients_of_zero() -> None:
    model, x, y = linear_problem(classes=4, n=60)

    def sure(images: Tensor) -> Tensor:
        return 1e4 * model(images)

    found = by_check(sanity_checks(sure, (x, y), eps=0.02, **SMALL))
    assert not found["gradients"].ok and found["gradients"].accuracies[0][1] > 0.5


def test_a_surrogate_that_breaks_more_than_the_white_box_is_a_sign() -> None:
    model, x, _ = linear_problem(classes=4, n=60)
    masked = Staircase(model, levels=20)
    data = (x, masked(x).argmax(1))
    findings = sanity_checks(masked, data, eps=0.03, surrogate=Surrogate(model, "plain"), **SMALL)
    last = findings[-1]
    assert last.check == "black box" and not last.ok
    assert last.message.startswith("pgd-10 made on plain leaves ")
    honest = sanity_checks(model, data, eps=0.03, surrogate=masked, **SMALL)
    assert len(honest) == 8 and honest[-1].ok


def test_a_random_model_is_told_and_its_gradients_are_averaged() -> None:
    model, x, y = linear_problem(classes=4, n=30)
    passes: list[int] = []

    def noisy(images: Tensor) -> Tensor:
        passes.append(len(images))
        return model(images) + 0.01 * torch.randn(len(images), 4)

    def run(eot: int) -> int:
        passes.clear()
        findings = sanity_checks(noisy, (x, y), eps=0.02, eot=eot, **SMALL)
        assert not by_check(findings)["random"].ok
        assert "draws random numbers" in by_check(findings)["random"].message
        return len(passes)

    assert run(3) > 1.5 * run(1)


class Falls(nn.Module):
    """Sure of its answer beyond a distance from the images that it saw first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.clean: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.clean is None or self.clean.shape != x.shape:
            self.clean = x.detach().clone()
        far = (x - self.clean).abs().amax((1, 2, 3)) > 0.015
        return torch.where(far[:, None], 3 * self.model(self.clean), self.model(x))


def test_a_loss_that_falls_as_eps_grows_is_found() -> None:
    model, x, y = linear_problem(classes=2, n=60)
    settings = {**SMALL, "eps_factors": (1.0, 4.0), "steps": (3,)}
    found = by_check(sanity_checks(Falls(model), (x, y), eps=0.01, **settings))
    assert not found["loss"].ok and "falls as eps grows" in found["loss"].message


def test_wrong_arguments_are_refused() -> None:
    model, x, y = linear_problem(classes=2, n=4)
    for arguments in ({"eps": 0.0}, {"queries": 0}, {"norm": "l3"}, {"eot": 0}, {"slack": 2.0}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must"):
            sanity_checks(model, (x, y), progress=False, **arguments)  # type: ignore[arg-type]


def test_findings_are_kept_and_none_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "eval.sanity.json"
    finding = Finding("eps", True, "it does not rise", ((0.0, 1.0), (0.1, 0.5)))
    first = SanityResult(Subject(run="a", weights="w"), (finding,), 10, 0.1, "linf")
    others = [SanityResult(first.subject, (finding,), 10, eps, "l2") for eps in (0.1, 0.2)]
    for result in (first, *others, first):
        add_sanity_result(file, result)
    assert load_sanity_results(file) == [first, *others]
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"eval\.sanity\.json: findings are damaged"):
        add_sanity_result(file, first)
    assert file.read_text() == "{}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for number, name in enumerate(("a", "b", "c")):
        train(
            "pgd_at",
            small_recipe("pgd_at", epochs=1, train_images=128, seed=number),
            data="digits",
            model="small_cnn",
            run_dir=folder / name,
            device="cpu",
            progress=False,
        )
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs", symlinks=True))


FEW = ("--max-examples", "24", "--device", "cpu", "--quiet")


def run(*words: str | Path) -> int:
    try:
        return main([str(word) for word in (*words, *FEW)])
    except SystemExit as stop:
        return int(str(stop.code))


def test_the_flag_prints_and_keeps_the_findings(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval", runs / "a", "--attacks", "clean", "--sanity", "--eps", "8/255") == 0
    out = capsys.readouterr().out
    assert "Signs of gradient masking, 24 images, 8/255 linf:" in out
    (kept,) = load_sanity_results(runs / "a" / "eval.sanity.json")
    assert kept.text() in out and [finding.check for finding in kept.findings] == CHECKS
    assert kept.n == 24 and kept.subject.run == "a"


def test_a_surrogate_is_a_run_a_file_or_a_function(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (weights,) = (runs / "b" / "checkpoints").glob("step_*/model.safetensors")
    common = ("eval", runs / "a", "--attacks", "clean", "pgd-2")
    assert run(*common) == 0
    assert run(*common, "--surrogate", runs / "b") == 0
    assert "pgd-2 from b " in capsys.readouterr().out
    assert run(*common, "--surrogate", weights, "--surrogate-model", "small_cnn") == 0
    results = load_results(runs / "a" / "eval.json")
    names = [(r.row.name, r.row.surrogate.partition(" ")[0]) for r in results]
    assert names == [("clean", ""), ("pgd-2", ""), ("pgd-2", "b"), ("pgd-2", "model")]
    assert results[2].row.correct == results[3].row.correct  # the same weights
    for words, message in (
        (("--surrogate", weights), "surrogate_model must be given with surrogate"),
        (("--surrogate-model", "small_cnn"), "surrogate_model must come with surrogate"),
        (("--surrogate", runs / "a"), "surrogate must be another model than the judged one"),
        (("--surrogate", runs / "nothing"), "surrogate must be a run directory, a file of weights"),
    ):
        assert run(*common, *words) == 2
        assert message in capsys.readouterr().err


def test_several_radii_and_bundles_on_the_command_line(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval", "--eps", "2/255", "8/255", runs / "a", "--attacks", "quick", "fgsm-rs") == 0
    rows = [(r.row.name, round(r.row.eps * 255)) for r in load_results(runs / "a" / "eval.json")]
    attacks = ("fgsm", "pgd-20", "fgsm-rs")
    assert rows == [("clean", 0), *((a, 2) for a in attacks), *((a, 8) for a in attacks)]
    capsys.readouterr()
    assert run("eval", runs / "a", "--attacks", "cwl2-3", "--cw-c", "2", "--cw-lr", "1/10") == 0
    assert "cwl2-3 (c 2, lr 0.1)" in capsys.readouterr().out
    assert run("eval", runs / "a", "--attacks", "standard", "--eot", "2") == 2
    assert "eot must be 1 for autoattack" in capsys.readouterr().err
    assert run("eval", runs / "a", "--eps", "abc") == 2
    assert "eps" in capsys.readouterr().err


def test_each_radius_of_autoattack_has_a_state_of_its_own(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastadv.evaluation import rows

    folders: list[Path] = []

    def stop(*_: Any, state_dir: Any, **__: Any) -> Any:
        folders.append(state_dir)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(rows, "autoattack", stop)
    autoattack = ("eval", runs / "a", "--attacks", "autoattack")
    for words in (
        ("--eps", "2/255"),
        ("--eps", "8/255"),
        ("--eps", "2/255", "8/255"),
        ("--eps", "8/255", "--surrogate", runs / "b"),
        ("--eps", "8/255", "--surrogate", runs / "c"),
    ):
        assert run(*autoattack, *words) == 2
    assert len(set(folders)) == 5 and folders[2].name.startswith("eps-0.00784")


def test_the_transfer_command_prints_and_writes_the_matrix(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [runs / name for name in "abc"]
    out = tmp_path / "m" / "matrix.json"
    words = ("--attack", "pgd-3", "--eps", "0.1", "--out", out)
    assert run("transfer", *models, *words) == 0
    text = capsys.readouterr().out
    assert "24 images, pgd-3 at 0.1 linf" in text and text.splitlines()[2].split()[-3:] == [
        "a",
        "b",
        "c",
    ]
    from fastadv.evaluation import TransferMatrix

    matrix = TransferMatrix.load(out)
    assert matrix.table() == text and matrix.names == ("a", "b", "c")
    # A pair is what `fastadv eval --surrogate` finds.
    assert (
        run("eval", runs / "a", "--attacks", "pgd-3", "--eps", "0.1", "--surrogate", runs / "c")
        == 0
    )
    (row,) = [result.row for result in load_results(runs / "a" / "eval.json")]
    assert row.accuracy == matrix.accuracy("c", "a")
    for wrong, message in (
        ([runs / "a"], "models must be two or more"),
        ([runs / "a", runs / "a"], "models must be two or more that differ"),
        ([*models, "--attack", "clean"], "attack must be one attack in a ball"),
        ([*models, "--out", "x.txt"], "out must end in one of"),
        ([*models, "--norm", "l2"], "eps must be given with norm l2"),
        ([*models, "--model", "small_cnn"], "model must come with a file of weights"),
        ([runs / "a", runs / "none"], "models must be a run directory"),
        ([*models, "--out", runs / "a" / "eval.json"], "was not written by `fastadv transfer`"),
        ([*models, "--out", runs / "a" / "run.json"], "was not written by `fastadv transfer`"),
    ):
        assert run("transfer", *wrong) == 2
        assert message in capsys.readouterr().err
