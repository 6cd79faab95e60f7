"""The benchmark of AutoAttack by three searches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from attack_helpers import trained_small_cnn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import evaluation
from evaluation_found import REFERENCE, Found, Part, missed, table
from evaluation_table import markdown
from measure import machine

from fastadv.evaluation import AutoAttackResult, Stage

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def test_it_runs_and_keeps_the_seeds_of_earlier_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    pytest.importorskip("pyautoattack")
    # test_strength_benchmark.py has the benchmarks' training.
    monkeypatch.setattr(evaluation, "trained_network", lambda *_: trained_small_cnn())
    words = ["evaluation.py", "--quick", "--attacks", "apgd-ce", "--out", str(tmp_path)]
    words += ["--eps", "0.3"]  # so large that a search breaks images at once, and ends
    for seed in ("0", "1"):
        monkeypatch.setattr(sys, "argv", [*words, "--seeds", seed])
        evaluation.main()
    found = json.loads((tmp_path / "evaluation_digits.json").read_text())
    expected = [(search, seed) for search in evaluation.SEARCHES for seed in (0, 1)]
    assert [(row["search"], row["seed"]) for row in found["results"]] == expected
    for row in found["results"]:
        assert row["n"] == 16 and len(row["attacks"][0]["left"]) <= 16
        assert row["seconds"] == pytest.approx(sum(row["parts"])) and len(row["parts"]) == 2
    assert "## digits, SmallCNN from PGD-AT" in (tmp_path / "evaluation_digits.md").read_text()
    shown = capsys.readouterr().out
    assert "it alone" in shown and "that it breaks with another" in shown
    monkeypatch.setattr(sys, "argv", [*words, "--eps", "0.01"])
    with pytest.raises(SystemExit, match="another settings; choose another --name"):
        evaluation.main()


def result(robust: list[bool], fooled: list[int], correct: list[int]) -> AutoAttackResult:
    stages = tuple(Stage(f"attack {i}", n, seconds=1.0) for i, n in enumerate(correct))
    rows, images = torch.tensor(fooled), torch.empty(0)
    return AutoAttackResult(torch.tensor(robust), rows, images, stages, "ok", (), 0, 4, 2.0)


def test_what_each_attack_leaves_is_told_from_the_order_of_the_broken_images() -> None:
    # Image 0 was never right. The first attack breaks 3 and 1, the second 4; image 2 is left.
    part = Part(torch.tensor([10, 11, 12, 13, 14]), 2.0, result([0, 0, 1, 0, 0], [3, 1, 4], [2, 1]))
    found = Found.of("a", 0, [part])
    assert [attack.left for attack in found.attacks] == [[12, 14], [12]]
    assert found.robust == {12} and found.n == 5


def test_images_that_one_search_alone_breaks_are_counted() -> None:
    rows = torch.arange(3)
    one = Found.of(REFERENCE, 0, [Part(rows, 6.0, result([1, 0, 0], [1, 2], [1]))])
    other = Found.of("b", 0, [Part(rows, 2.0, result([0, 1, 1], [0], [2]))])
    assert missed(other, by=one) == 2 and missed(one, by=other) == 1
    assert "3.00" in table([one, other])


def test_the_markdown_tells_per_attack_and_seed_what_each_breaks_alone() -> None:
    rows, results = torch.arange(4), []
    left = {  # two attacks each: images that the first breaks, and the second
        (REFERENCE, 0): ([1, 2], [1]),
        (REFERENCE, 1): ([1], [2, 3]),
        ("fastadv engine", 0): ([1], [2]),
        ("fastadv engine", 1): ([1], [3]),
    }
    for (search, seed), (first, second) in left.items():
        broken = [*first, *(image for image in second if image not in first)]
        robust = [image not in broken for image in range(4)]
        counts = [4 - len(first), 4 - len(broken)]
        results.append(Found.of(search, seed, [Part(rows, 4.0, result(robust, broken, counts))]))
    content = {
        "machine": machine(torch.device("cpu")),
        "data": "digits",
        "network": "SmallCNN from a",
        "settings": {"eps": 0.1, "norm": "linf", "batch_size": 4},
        "images": 4,
        "busy": True,
        "results": [one.to_dict() for one in results],
    }
    text = markdown([content])
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| attack")]
    assert [line[3:7] for line in cells] == [
        ["+0.50", "1, 0", "0, 0", "0.50"],
        ["+0.50", "0, 1", "0, 0", "0.50"],
    ]
    assert "times as fast (busy machine)" in text
    assert (
        "image 2 (seeds 1; of 2 seeds pyautoattack breaks it with 2, fastadv leaves it with 1)"
        in text
    )
    alone = {**content, "results": [one.to_dict() for one in results[:2]]}
    assert "alone" not in markdown([alone])


def test_claims_are_held_against_the_network() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).eval()
    x = torch.rand(2, 1, 2, 2)
    y = model(x).argmax(1)
    flags, rows = torch.tensor([False, True]), torch.tensor([0])
    claim = AutoAttackResult(flags, rows, x[:1], (), "ok", (), 0, 4, 1.0)
    with pytest.raises(RuntimeError, match="not adversarial"):
        evaluation.check(model, x, y, claim, {"eps": 0.1, "norm": "linf"})
