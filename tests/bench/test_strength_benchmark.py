"""The benchmark of the engine's strength against plain float32."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from attack_helpers import cross_entropy, digits_test, plain_pgd, trained_small_cnn

import fastadv
from fastadv.ops import random_start

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import strength

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:there are")
def test_it_runs_and_its_counts_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyautoattack")
    monkeypatch.setattr(strength, "APGD_STEPS", 5)
    monkeypatch.setattr(sys, "argv", ["strength.py", "--quick", "--out", str(tmp_path)])
    strength.main()
    found = json.loads((tmp_path / "strength_digits.json").read_text())
    assert found["images"] == 60 and found["points_per_image"] == pytest.approx(100 / 60)
    assert [row["attack"] for row in found["results"]] == [
        "PGD-20",
        "APGD-CE",
        "APGD-CE in float32",
    ]
    for row in found["results"]:
        assert row["engine"] - row["reference"] == row["reference_alone"] - row["engine_alone"]
        assert row["difference_points"] == pytest.approx(
            100 * (row["engine"] - row["reference"]) / row["n"]
        )
    assert "One image is 1.67 points" in capsys.readouterr().out


def test_in_float32_both_loops_are_one() -> None:
    model, (x, y), eps = trained_small_cnn(), digits_test(40), 0.08
    start = random_start(x, eps, seed=3)
    adv = strength.plain_pgd(model, x, y, start, eps, eps / 4)
    numbers = {"eps": eps, "alpha": eps / 4, "steps": 20}
    assert torch.equal(adv, plain_pgd(model, x, y, start, loss=cross_entropy, **numbers))
    engine = fastadv.PGD(model, eps, eps / 4, 20, precision="fp32")(x, y, start=start)
    assert (adv == engine).float().mean() > 0.99


def test_an_image_counts_where_clean_and_attacked_are_right() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(40)
    wrong = y.clone()
    wrong[:4] = (y[:4] + 1) % 10
    with torch.no_grad():
        right = model(x).argmax(1) == wrong
    found = strength.robust_under(lambda x, y, start: start, model, x, wrong, x, 0.1)
    assert torch.equal(found, right) and not found[:4].any()
    with pytest.raises(RuntimeError, match="40 images outside the linf ball"):
        strength.robust_under(lambda x, y, start: 1 - start, model, x, y, x, 0.1)


def test_the_probability_of_an_uneven_split() -> None:
    assert strength.split_probability(0, 0) == strength.split_probability(3, 3) == 1.0
    assert strength.split_probability(5, 0) == pytest.approx(2 / 32)
    assert strength.split_probability(1, 3) == pytest.approx(2 * 5 / 16)
