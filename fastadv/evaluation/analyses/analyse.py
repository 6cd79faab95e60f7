"""The function `analyse`, which runs analyses on one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from fastadv.evaluation.analyses.analysis import Analysis, AnalysisContext, Measured
from fastadv.evaluation.analyses.registry import check_needs, check_settings_used, find_analyses
from fastadv.evaluation.analyses.settings import AnalysisSettings
from fastadv.evaluation.context import evaluation_mode
from fastadv.evaluation.early_checks import check_takes_images
from fastadv.evaluation.model_doubts import doubts_about
from fastadv.evaluation.samples import Samples, as_samples
from fastadv.ops.values import did_you_mean, shown


def analyse(
    model: nn.Module,
    data: Any = None,
    what: Sequence[str] = (),
    *,
    teacher: nn.Module | None = None,
    train: Any = None,
    max_examples: int | None = None,
    train_examples: int | None = None,
    device: torch.device | str | None = None,
    **settings: Any,
) -> dict[str, Measured]:
    """Analyse a model.

    Args:
        model: a float32 module on images [B, C, H, W] in 0..1. Analyses of features need a model with the feature
            split of `fastadv.models`.
        data: images, as for ``evaluate``; None where no analysis needs any.
        what: names of analyses, such as ``["cosine", "frobenius"]``; see docs/analyses.md.
        teacher: the standard model, for ``"cosine"``.
        train: images of the training set, in the same forms as `data`, for ``"entropy"`` and ``"random-labels"``.
        max_examples: use only so many of `data`, as for ``evaluate``.
        train_examples: use only so many of `train`.
        device: as for ``evaluate``.
        settings: fields of `AnalysisSettings`, such as ``eps=8 / 255``; fields that no chosen analysis uses are
            refused.

    Returns:
        The findings of each analysis, by its name, in the order of `what`.

    Raises:
        ImportError: when a library is missing, before anything is computed.
        TypeError: for a model or settings of another type.
        ValueError: for an unknown name, or where an input that an analysis needs is missing.
        RuntimeError: for a model that does not take images of this size.
    """
    chosen = find_analyses(what)
    checked = settings_of(chosen, settings)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {shown(model)}")
    for analysis in chosen:
        check_needs(analysis, model, teacher is not None, train is not None)
        if "images" in analysis.needs and data is None:
            raise ValueError(f"data must be given with {analysis.name}: images to analyse")
    needed = {need for analysis in chosen for need in analysis.needs}
    for need, name, value in (
        ("images", "max_examples", max_examples),
        ("train", "train_examples", train_examples),
    ):
        if need not in needed and value is not None:
            names = ", ".join(analysis.name for analysis in chosen)
            raise ValueError(f"{name} must be left out with {names}, got {value!r}")
    return run_analyses(
        model,
        chosen,
        checked,
        samples=as_samples(data, (0.0, 1.0), max_examples) if "images" in needed else None,
        train=as_samples(train, (0.0, 1.0), train_examples) if "train" in needed else None,
        teacher=teacher,
        device=device,
    )


def settings_of(chosen: Sequence[Analysis], given: dict[str, Any]) -> AnalysisSettings:
    """The settings of some analyses.

    Args:
        chosen: the analyses.
        given: the settings given by the caller, by name.

    Raises:
        ImportError: when a library of an analysis is missing.
        TypeError: for an unknown setting, or a value of another type.
        ValueError: for a value out of range, or a setting that no chosen analysis uses.
    """
    known = [field.name for field in fields(AnalysisSettings)]
    for name in given:
        if name not in known:
            raise TypeError(f"analyse has no argument {name!r}{did_you_mean(name, known)}")
    settings = AnalysisSettings(**given)
    check_settings_used(chosen, list(given))
    for analysis in chosen:
        analysis.check(settings)
    return settings


def run_analyses(
    model: nn.Module,
    chosen: Sequence[Analysis],
    settings: AnalysisSettings,
    *,
    samples: Samples | None,
    train: Samples | None,
    teacher: nn.Module | None,
    device: torch.device | str | None,
    on_measured: Callable[[Measured], None] | None = None,
) -> dict[str, Measured]:
    """Run analyses whose needs have been checked.

    Args:
        model: the model.
        chosen: the analyses.
        settings: the settings of all analyses.
        samples: the images, where an analysis needs them.
        train: the training set, where an analysis needs it.
        teacher: the standard model, where an analysis needs it.
        device: device of the run; by default the device of the model.
        on_measured: called with the findings of each analysis when it has ended.

    Returns:
        The findings of each analysis, by its name.
    """
    found = {}
    doubts: list[str] = []
    if any({"images", "train"} & set(analysis.needs) for analysis in chosen):
        doubts += doubts_about(model)
        doubts += [] if teacher is None else doubts_about(teacher, "teacher")
    with evaluation_mode(model, device) as where:
        for images in (samples, train):
            if images is not None:
                check_takes_images(model, f"model {type(model).__name__}", images, where)
        if teacher is not None and samples is not None:
            with evaluation_mode(teacher, where):
                check_takes_images(teacher, f"teacher {type(teacher).__name__}", samples, where)
        context = AnalysisContext(model, where, settings, samples, train, teacher)
        for analysis in chosen:
            measured = analysis.compute(context)
            if {"images", "train"} & set(analysis.needs):
                notes = (*measured.notes, *(f"{doubt}." for doubt in doubts if doubt))
                measured = replace(measured, notes=notes)
            found[analysis.name] = measured
            if on_measured is not None:
                on_measured(found[analysis.name])
    return found
