"""How many rows the passes of AutoAttack's own attacks have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastadv.evaluation.autoattack_hunt import Hunt


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
    hunt = Hunt(runner, 0.1, nothing, "bf16", nothing, nothing, state)
    assert hunt.rows == rows
