"""AutoAttack with few steps, for tests of what happens around its attacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastadv.evaluation import autoattack_pool, autoattack_stages
from fastadv.evaluation.autoattack_library import ReferenceAttacks

STEPS, QUERIES = 10, 200


def aim_at(targets: int, patch: pytest.MonkeyPatch) -> None:
    """Let Auto-PGD try so many classes for an image, and not nine, here and in the reference."""
    patch.setattr(autoattack_pool, "TARGET_CLASSES", targets)
    patch_reference({"apgd-t": {"n_target_classes": targets}}, patch)


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Let FAB, Square, and Auto-PGD in l1 run for few steps, those of the reference too.

    Auto-PGD in the other norms keeps its 100 steps, by which it finds what there is to find. FAB and Square take
    most of the time of a whole AutoAttack, and hardly break an image that Auto-PGD leaves.
    """
    for name in ("BY_BATCH", "BY_BATCH_L1"):
        short = {attack: _short(own) for attack, own in getattr(autoattack_stages, name).items()}
        patch.setattr(autoattack_stages, name, short)
    few = {"n_iter": STEPS}
    patch_reference({"fab": few, "fab-t": few, "square": {"n_queries": QUERIES}}, patch)


def patch_reference(settings: dict[str, dict[str, int]], patch: pytest.MonkeyPatch) -> None:
    """Change attributes of the reference's attacks, by the name of the attack."""
    chosen = ReferenceAttacks._method

    def method(self: ReferenceAttacks, attack: str) -> Any:
        found = chosen(self, attack)
        for name, value in settings.get(attack, {}).items():
            assert hasattr(found, name)
            setattr(found, name, value)
        return found

    patch.setattr(ReferenceAttacks, "_method", method)


def _short(own: autoattack_stages.StandardAttack) -> autoattack_stages.StandardAttack:
    few = {"queries": QUERIES} if "queries" in own.settings else {"steps": STEPS}
    return replace(own, settings={**own.settings, **few})
