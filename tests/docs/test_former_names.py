"""Names of earlier versions still work: in classes of users, and in checkpoints."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from fastadv.trainers import Progress
from fastadv.trainers.pgd_at import PGDAT
from fastadv.trainers.progress import renamed


def test_a_method_may_still_name_its_supported_fields_as_before() -> None:
    with pytest.warns(DeprecationWarning, match=r"Former\.heeds is now called supports"):

        class Former(PGDAT):
            heeds = frozenset({"extra_weight"})

    assert Former.supports == {"extra_weight"}


def test_a_checkpoint_may_still_count_looks() -> None:
    stored = asdict(Progress(step=7, validations_since_best=2))
    stored["looks_since_best"] = stored.pop("validations_since_best")
    assert Progress(**renamed(stored)) == Progress(step=7, validations_since_best=2)
    assert "looks_since_best" in stored
