"""Analyses of models: features, weights, entropies, curves of robustness, smallest perturbations, mergers."""

from __future__ import annotations

from fastadv.evaluation.analyses.analyse import analyse
from fastadv.evaluation.analyses.analysis import Analysis, AnalysisContext, Measured
from fastadv.evaluation.analyses.records import AnalysisRecord, load_records
from fastadv.evaluation.analyses.registry import ANALYSES
from fastadv.evaluation.analyses.settings import AnalysisSettings

__all__ = [
    "ANALYSES",
    "Analysis",
    "AnalysisContext",
    "AnalysisRecord",
    "AnalysisSettings",
    "Measured",
    "analyse",
    "load_records",
]
