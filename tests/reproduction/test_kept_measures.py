"""Measurements that the directory of a run keeps: they are used again under equal conditions alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadv.models import create_model
from fastadv.reproduction import run_store
from fastadv.reproduction.images import Source
from fastadv.reproduction.measures import CosineMeasure
from fastadv.reproduction.run_store import RunStore, TrainedRun
from fastadv.reproduction.scales import TINY
from fastadv.reproduction.specs import RunSpec, spec

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(folder: Path, run: RunSpec, **numbers: Any) -> TrainedRun:
    """A run at the scale "tiny" with some numbers changed."""
    store = RunStore(folder, replace(TINY, **numbers), Source("digits"), "cpu")
    return TrainedRun(store, store.resolve(run, 0), 0, {})


def test_a_figure_of_few_images_is_not_taken_for_that_of_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untrained(place: Path) -> torch.nn.Module:
        torch.manual_seed("standard" in str(place))
        return create_model("small_cnn", 10, 1)

    monkeypatch.setattr(run_store, "load_model", untrained)
    measure = CosineMeasure(spec("standard"))
    few, many, again = (
        measure.measure(trained(tmp_path, spec("pgd_at"), test_images=n)) for n in (2, 40, 2)
    )
    assert (few.n, many.n) == (2, 40)
    assert few.value != many.value and again == few


def test_a_figure_at_one_radius_is_not_taken_for_that_at_another(tmp_path: Path) -> None:
    near, far = (trained(tmp_path, spec("standard"), radius=radius) for radius in (1.0, 2.0))
    assert near.run.name == far.run.name  # standard training has no radius
    assert near.cached("a figure", lambda: 1) == 1
    assert far.cached("a figure", lambda: 2) == 2
    assert near.cached("a figure", lambda: 3) == 1
