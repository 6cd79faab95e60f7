"""The checks for gradient masking that `fastadv eval --sanity` runs, and their file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fastadv.commands.images import Images
from fastadv.evaluation import Subject, sanity_checks
from fastadv.evaluation.context import Model
from fastadv.evaluation.sanity_file import SanityResult, add_sanity_result

_IMAGES = 200  # at most


def find_masking(
    network: Model, images: Images, subject: Subject, file: Path, **settings: Any
) -> SanityResult:
    """Look for signs of gradient masking, save the findings, and return them.

    Args:
        network: the judged model.
        images: its images.
        subject: the model and its images, as the file records them.
        file: the file of findings. If it cannot be written, a note is printed.
        settings: the keyword arguments of `sanity_checks`. Of the images at most 200 are used.
    """
    settings["max_examples"] = min(settings["max_examples"] or _IMAGES, _IMAGES)
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
    return result
