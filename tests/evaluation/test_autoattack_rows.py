"""The passes and the results of AutoAttack: their rows, and the engine that they are of."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from linear_model import linear_problem

from fastadv.evaluation import evaluate
from fastadv.evaluation.autoattack_run import AutoAttackRun
from fastadv.evaluation.result_row import Row

EPS = 0.02


@pytest.mark.parametrize(
    ("shape", "batch_size", "rows"),
    [
        ((1, 8, 8), 64, 512),
        ((1, 8, 8), 1000, 1000),
        ((1, 28, 28), 64, 250),
        ((3, 32, 32), 16, 64),
        ((3, 32, 32), 80, 80),
        ((3, 224, 224), 8, 8),
    ],
)
@pytest.mark.parametrize("has_state", [False, True])
def test_small_images_fill_a_pass(
    shape: tuple[int, ...], batch_size: int, has_state: bool, rows: int
) -> None:
    samples = SimpleNamespace(image_shape=shape)
    runner: Any = SimpleNamespace(samples=samples, batch_size=batch_size)
    state: Any = Path() if has_state else None
    nothing: Any = None
    run = AutoAttackRun(runner, 0.1, nothing, "bf16", nothing, nothing, state)
    assert run.rows == rows


def test_the_search_is_part_of_a_results_key() -> None:
    from fastadv.evaluation.results import Result, Subject

    keys = {
        Result(
            Subject(),
            Row("autoattack", 10, 5, EPS, 0, 1.0, search=search),
            "linf",
            (0.0, 1.0),
            256,
            "cpu",
            {},
        ).key
        for search in ("bf16", "fp32", "reference")
    }
    assert len(keys) == 3


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "fp32", "reference"])
def test_evaluate_hands_the_choice_on(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def stop(*_: Any, **options: Any) -> None:
        asked.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["fastadv.evaluation.rows"], "autoattack", stop)
    model, x, y = linear_problem(classes=4, n=12, wrong=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(
            model,
            (x, y),
            ["fgsm", "autoattack"],
            eps=EPS,
            engine=engine,
            worst_case=True,
            progress=False,
        )
    assert asked["engine"] == engine
    assert set(asked["sample_ids"].tolist()) < set(range(2, 12))  # the indices in the data
