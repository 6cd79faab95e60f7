"""The checks for gradient masking that `fastadv eval --sanity` runs, and their file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fastadv.commands.judged import Images
from fastadv.evaluation import Subject, sanity_checks
from fastadv.evaluation.context import Model
from fastadv.evaluation.sanity_file import SanityResult, add_sanity_result


def find_masking(
    network: Model, images: Images, subject: Subject, file: Path, **settings: Any
) -> tuple[SanityResult, str]:
    """Look for signs of gradient masking, save the findings, and return them and their text.

    Args:
        network: the judged model.
        images: its images.
        subject: the model and its images, as the file records them.
        file: the file of findings. If it cannot be written, a note is printed.
        settings: the keyword arguments of `sanity_checks`.
    """
    findings = sanity_checks(network, images, **settings)
    other = settings["surrogate"]
    result = SanityResult(
        subject,
        tuple(findings),
        n=min(settings["max_examples"], len(images)),
        eps=settings["eps"],
        norm=settings["norm"],
        seed=settings["seed"],
        surrogate="" if other is None else other.name,
        eot=settings["eot"],
        bounds=settings["bounds"],
    )
    try:
        add_sanity_result(file, result)
    except (OSError, ValueError) as error:
        print(f"note: the findings on gradient masking are not kept: {error}", file=sys.stderr)
    return result, result.text()
