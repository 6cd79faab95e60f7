"""Judging robust models: accuracy under attack, AutoAttack, transfer, analyses, checks, metrics and plots."""

from __future__ import annotations

from fastadv.evaluation.analyses import AnalysisSettings, Measured, analyse
from fastadv.evaluation.autoattack import AutoAttackResult, autoattack
from fastadv.evaluation.cost import multiply_adds
from fastadv.evaluation.distances import Distances
from fastadv.evaluation.ensemble import AutoAttack
from fastadv.evaluation.evaluate import evaluate
from fastadv.evaluation.findings import Finding
from fastadv.evaluation.metrics import (
    ARREST_CIFAR10_CURVE,
    ARREST_CIFAR100_CURVE,
    Cubic,
    ardist,
    cosine_similarity_to,
    fit_cubic,
    trade_off_sum,
    wilson_interval,
)
from fastadv.evaluation.plots import TradeOffPoint, plot_trade_off
from fastadv.evaluation.report import Report
from fastadv.evaluation.result_row import Row, Stage
from fastadv.evaluation.results import Result, Subject, add_results, load_results
from fastadv.evaluation.sanity import masking_checks, sanity_checks
from fastadv.evaluation.stacking import DeltaZ, delta_z
from fastadv.evaluation.transfer import Surrogate, transfer_matrix
from fastadv.evaluation.transfer_table import TransferMatrix
from fastadv.evaluation.worst import WorstImages

__all__ = [
    "ARREST_CIFAR10_CURVE",
    "ARREST_CIFAR100_CURVE",
    "AnalysisSettings",
    "AutoAttack",
    "AutoAttackResult",
    "Cubic",
    "DeltaZ",
    "Distances",
    "Finding",
    "Measured",
    "Report",
    "Result",
    "Row",
    "Stage",
    "Subject",
    "Surrogate",
    "TradeOffPoint",
    "TransferMatrix",
    "WorstImages",
    "add_results",
    "analyse",
    "ardist",
    "autoattack",
    "cosine_similarity_to",
    "delta_z",
    "evaluate",
    "fit_cubic",
    "load_results",
    "masking_checks",
    "multiply_adds",
    "plot_trade_off",
    "sanity_checks",
    "trade_off_sum",
    "transfer_matrix",
    "wilson_interval",
]
