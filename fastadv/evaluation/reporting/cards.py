"""Model cards: one JSON file per model and threat, with everything that its robust accuracy depends on."""

from __future__ import annotations

import json
import re
from typing import Any

from fastadv.evaluation.attack_list import AUTOATTACK, CLEAN
from fastadv.evaluation.comparison import Line
from fastadv.evaluation.reporting.summary import Summary
from fastadv.evaluation.results import Result
from fastadv.evaluation.wording import format_eps

_FORMAT = 1
_MAX_NAME_LENGTH = 200  # bytes of a card's name; file systems take 255


def model_cards(summary: Summary) -> dict[str, dict[str, Any]]:
    """The cards of all models that were attacked in a ball, by the names of their files.

    The cards leave out adversarial images of a surrogate and attacks without a ball. The robust accuracy of a card
    is the accuracy under AutoAttack, or else the lowest accuracy under one of the attacks.
    """
    cards: dict[str, dict[str, Any]] = {}
    for line in summary.comparison.white_box:
        attacked = [result for title, result in line.cells.items() if title != CLEAN]
        if attacked:
            parts = (summary.comparison.label(line), line.norm, format_eps(line.eps))
            stem = "-".join(re.sub(r"[^A-Za-z0-9_.+-]", "_", part) for part in parts)[
                -_MAX_NAME_LENGTH:
            ]
            cards[_free(stem, cards)] = _card(line, attacked)
    return cards


def card_text(card: dict[str, Any]) -> str:
    """A card as JSON text."""
    return json.dumps(card, indent=2) + "\n"


def _free(stem: str, taken: dict[str, Any]) -> str:
    """A file's name that no other card has."""
    number = 1
    while (name := f"{stem}{f'-{number}' if number > 1 else ''}.json") in taken:
        number += 1
    return name


def _card(line: Line, attacked: list[Result]) -> dict[str, Any]:
    by_ensemble = [result for result in attacked if result.row.name == AUTOATTACK]
    chosen = min(by_ensemble or attacked, key=lambda result: result.row.correct)
    subject, clean = line.subject, line.cells.get(CLEAN)
    return {
        "format": _FORMAT,
        "name": line.run.name,
        "method": line.run.method,
        "architecture": subject.network or line.run.network,
        "parameters": subject.parameters or None,
        "multiply_adds": subject.multiply_adds or None,
        "checkpoint": subject.checkpoint,
        "weights_sha256": subject.weights,
        "training_seed": line.run.seed,
        "threat": {
            "norm": line.norm,
            "eps": line.eps,
            "eps_text": format_eps(line.eps),
            "bounds": list(chosen.bounds),
        },
        "data": {"name": subject.data, "images": line.n, "sha256": subject.images},
        "clean_accuracy": None if clean is None else _accuracy(clean),
        "robust_accuracy": {**_accuracy(chosen), **_attack(chosen)},
        "attacks": [{**_accuracy(result), **_attack(result)} for result in attacked],
    }


def _accuracy(result: Result) -> dict[str, Any]:
    row = result.row
    low, high = row.interval
    counts = {"correct": row.correct, "of": row.n}
    return {"accuracy": row.accuracy, "interval_95": [low, high], **counts}


def _attack(result: Result) -> dict[str, Any]:
    """The settings that an accuracy depends on, besides the model, the threat and the data."""
    row, is_ensemble = result.row, result.row.name == AUTOATTACK
    return {
        "attack": row.name,
        "variant": row.variant or None,
        "version": "standard" if is_ensemble else None,
        "search": row.search or None,
        "stages": [{"name": s.name, "correct": s.correct, "search": s.search} for s in row.stages],
        "alpha": row.alpha,
        "steps": row.steps,
        "after": list(result.after),
        "status": row.status,
        "notes": list(row.notes),
        "seed": row.seed,
        "batch_size": result.batch_size,
        "device": result.device,
        "versions": result.versions,
        "seconds": row.seconds,
        "command": result.command,
        "date": result.date,
    }
