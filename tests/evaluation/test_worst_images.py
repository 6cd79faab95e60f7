"""The worst adversarial images: those broken with the largest margin, kept beside the results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from linear_model import linear_problem
from short_autoattack import shorten
from torch import Tensor, nn

from fastadv.cli import main
from fastadv.evaluation import Row, Subject, add_results, evaluate, load_results
from fastadv.evaluation.results import Result, worst_file
from fastadv.evaluation.worst import WorstImages, WorstKeeper
from fastadv.models import small_cnn

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def margins_of(model: nn.Module, adv: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        shares = model(adv).softmax(1)
    of_label = shares.gather(1, y[:, None])[:, 0]
    return shares.scatter(1, y[:, None], -1.0).amax(1) - of_label


@pytest.mark.parametrize("batch_size", [7, 64])
def test_the_kept_are_the_most_confidently_wrong_of_all_that_were_broken(batch_size: int) -> None:
    model, x, y = linear_problem(classes=3, n=64)
    seen: list[tuple[Tensor, Tensor]] = []

    def attack(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        adv = (x + 0.1 * torch.sign(torch.sin(1000 * x))).clamp(0, 1)
        seen.append((adv, y))
        return adv

    report = evaluate(
        model, (x, y), ["clean", ("wave", attack)],
        eps=0.11, batch_size=batch_size, keep_images=4, progress=False,
    )  # fmt: skip
    worst = report["wave"].worst
    assert worst is not None and report["clean"].worst is None
    adv, labels = torch.cat([a for a, _ in seen]), torch.cat([y for _, y in seen])
    margins = margins_of(model, adv, labels)
    broken = int((margins > 0).sum())
    assert broken > 4 and len(worst) == 4
    expected = margins.sort(descending=True).values[:4]
    torch.testing.assert_close(worst.margins, expected)
    torch.testing.assert_close(margins_of(model, worst.adversarials, worst.labels), expected)
    assert torch.equal(worst.originals, x[worst.indices])
    assert torch.equal(worst.labels, y[worst.indices])
    assert torch.equal(worst.predictions, model(worst.adversarials).argmax(1))
    assert bool((worst.predictions != worst.labels).all())


def test_restarts_add_to_one_another_and_nothing_is_kept_by_default() -> None:
    model, x, y = linear_problem(classes=3, n=64)
    options: dict[str, Any] = dict(eps=0.05, progress=False)
    report = evaluate(model, (x, y), ["pgd-2-3", "pgd-2"], keep_images=64, **options)
    for row in report.rows:
        broken = int((model(x).argmax(1) == y).sum()) - row.correct
        assert row.worst is not None and len(row.worst) == broken > 0
    assert all(row.worst is None for row in evaluate(model, (x, y), "pgd-2", **options).rows)
    with pytest.raises(ValueError, match="keep_images must be >= 0, got -1"):
        evaluate(model, (x, y), "pgd-2", keep_images=-1, **options)


def test_images_of_another_attack_are_not_handed_over() -> None:
    keeper = WorstKeeper(2)
    x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1])
    logits = torch.tensor([[0.0, 1.0], [5.0, 0.0], [0.0, 9.0]])
    keeper.see("a", x, x + 1, y, logits, torch.tensor([10, 11, 12]))
    assert keeper.take("b") is None and keeper.take("a") is None
    keeper.see("a", x, x + 1, y, logits, torch.tensor([10, 11, 12]))
    worst = keeper.take("a")
    assert worst is not None and worst.indices.tolist() == [11, 10]
    assert worst.predictions.tolist() == [0, 1]


def test_autoattack_keeps_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyautoattack")
    shorten(monkeypatch)
    torch.manual_seed(0)
    model = small_cnn(4, 1).eval()
    x = torch.rand(12, 1, 8, 8)
    y = model(x).argmax(1)
    report = evaluate(
        model, (x, y), "autoattack", eps=0.1, keep_images=3, progress=False, engine="fp32"
    )
    (row,) = report.rows
    assert row.correct < 12 and row.worst is not None
    assert len(row.worst) == min(3, 12 - row.correct)
    assert torch.equal(row.worst.originals, x[row.worst.indices])
    assert float((row.worst.adversarials - row.worst.originals).abs().max()) <= 0.1 + 1e-6
    assert bool((model(row.worst.adversarials).argmax(1) != row.worst.labels).all())


def images(margin: float = 0.5) -> WorstImages:
    one = torch.tensor([1])
    return WorstImages(
        *(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4), one, one - 1),
        *(torch.tensor([0.2 + margin]), torch.tensor([0.2]), one),
    )


def test_they_are_written_and_read_whole(tmp_path: Path) -> None:
    worst = images()
    file = worst.save(tmp_path / "worst" / "a.npz")
    again = WorstImages.load(file)
    assert all(
        torch.equal(a, b) for a, b in zip(vars(worst).values(), vars(again).values(), strict=True)
    )
    assert [path.name for path in file.parent.iterdir()] == ["a.npz"]
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"a\.npz: holds no adversarial images"):
        WorstImages.load(file)
    np.savez(tmp_path / "other.npz", image=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz: holds no adversarial images"):
        WorstImages.load(tmp_path / "other.npz")


def test_no_result_has_the_file_of_another(tmp_path: Path) -> None:
    row = Row("pgd-20", 10, 5, 8 / 255, 0, 1.0)
    result = Result(Subject(weights="a"), row, "linf", (0.0, 1.0), 256, "cpu", {})
    others = [
        replace(result, row=replace(row, eps=4 / 255)),
        replace(result, row=replace(row, seed=1)),
        replace(result, subject=Subject(weights="b")),
        replace(result, norm="l2"),
        replace(result, after=("fgsm",)),
    ]
    names = {worst_file(tmp_path / "eval.json", one) for one in (result, *others)}
    names.add(worst_file(tmp_path / "net.pt.eval.json", result))
    assert len(names) == len(others) + 2
    file = add_results(tmp_path / "eval.json", [replace(result, worst_file="worst/x.npz")])
    add_results(file, [result])  # found again, without images: those of this key are still there
    assert load_results(file)[0].worst_file == "worst/x.npz"


def test_the_command_line_keeps_them_with_what_found_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "net.pt"
    torch.save(small_cnn(10, 1).state_dict(), weights)
    words = ["eval", "--model", "small_cnn", "--weights", str(weights), "--data", "digits"]
    words += ["--max-examples", "60", "--device", "cpu", "--quiet", "--eps", "64/255"]
    with pytest.warns(UserWarning, match="guessing"):
        assert main([*words, "--attacks", "clean", "fgsm", "--keep-images", "5"]) == 0
    clean, fgsm = load_results(tmp_path / "net.pt.eval.json")
    assert clean.worst_file == "" and fgsm.worst_file.startswith("worst/fgsm-")
    assert len(WorstImages.load(tmp_path / fgsm.worst_file)) == min(
        5, clean.row.correct - fgsm.row.correct
    )
    assert fgsm.command.startswith("fastadv eval --model small_cnn --weights ")
    assert fgsm.command.endswith("--attacks clean fgsm --keep_images 5")
    assert fgsm.date.endswith("+00:00") and fgsm.subject.parameters == 56554
    (tmp_path / "net.pt.eval.json").unlink()
    with pytest.warns(UserWarning, match="guessing"):
        assert main([*words, "--attacks", "fgsm", "--keep-images", "0"]) == 0
    (entry,) = json.loads((tmp_path / "net.pt.eval.json").read_text())["rows"]
    assert entry["worst_file"] == "" and "worst" not in entry
