"""All analyses by name, and checks that their inputs and settings are given."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastadv.evaluation.analyses.analysis import Analysis
from fastadv.evaluation.analyses.cosine import CosineSimilarity
from fastadv.evaluation.analyses.embeddings import TSNEEmbedding, UMAPEmbedding
from fastadv.evaluation.analyses.entropy import PosteriorEntropy
from fastadv.evaluation.analyses.extractors import DeltaZCurve
from fastadv.evaluation.analyses.frobenius import FrobeniusNorms
from fastadv.evaluation.analyses.merger import ImportanceRatios, MergerWeights
from fastadv.evaluation.analyses.random_labels import RandomLabelFit
from fastadv.evaluation.analyses.robustness import RobustnessOverEps, RobustnessOverSteps
from fastadv.evaluation.analyses.smallest import SmallestPerturbation
from fastadv.models import Stack
from fastadv.ops.values import check_choice

_ALL: tuple[type[Analysis], ...] = (
    CosineSimilarity,
    FrobeniusNorms,
    PosteriorEntropy,
    RandomLabelFit,
    TSNEEmbedding,
    UMAPEmbedding,
    RobustnessOverEps,
    RobustnessOverSteps,
    SmallestPerturbation,
    ImportanceRatios,
    MergerWeights,
    DeltaZCurve,
)
ANALYSES: dict[str, Analysis] = {kind.name: kind() for kind in _ALL}


def find_analyses(what: Sequence[str]) -> list[Analysis]:
    """The analyses with these names, each once, in this order.

    Raises:
        TypeError: for a single word in place of a list.
        ValueError: for an empty list, or an unknown name.
    """
    if isinstance(what, str):
        raise TypeError(f"what must be a list of names, got {what!r}; write [{what!r}]")
    if not what:
        raise ValueError(f"what must name at least one of {', '.join(ANALYSES)}, got an empty list")
    for name in what:
        check_choice("what", name, ANALYSES)
    return [ANALYSES[name] for name in dict.fromkeys(what)]


def check_settings_used(analyses: Sequence[Analysis], given: Sequence[str]) -> None:
    """Refuse settings on which no chosen analysis depends.

    Args:
        analyses: the analyses to run.
        given: names of the settings that the caller has given.

    Raises:
        ValueError: naming the setting, and the analyses that use it.
    """
    used = {name for analysis in analyses for name in (*analysis.uses, "batch_size")}
    for name in given:
        if name not in used:
            users = ", ".join(one.name for one in ANALYSES.values() if name in one.uses)
            names = ", ".join(analysis.name for analysis in analyses)
            raise ValueError(f"{name} must be left out with {names}; it is for {users}")


def check_needs(analysis: Analysis, model: nn.Module, teacher: bool, train: bool) -> None:
    """Refuse an analysis that lacks an input.

    Args:
        analysis: the analysis.
        model: the model to analyse.
        teacher: whether there is a teacher.
        train: whether there are images of the training set.

    Raises:
        TypeError: the analysis needs a merger, and the model is not one.
        ValueError: the analysis needs a teacher or a training set, which is missing.
    """
    if "merger" in analysis.needs and not isinstance(model, Stack):
        raise TypeError(
            f"model must be a Stack, the merger of a run of afs, with {analysis.name}, got {type(model).__name__}"
        )
    if "teacher" in analysis.needs and not teacher:
        raise ValueError(
            f"teacher must be given with {analysis.name}: the standard model, whose features are compared "
            "with the model's"
        )
    if "train" in analysis.needs and not train:
        raise ValueError(f"train must be given with {analysis.name}: images of the training set")
