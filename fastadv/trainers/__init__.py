"""Training: one loop for all methods, one short file per method."""

from __future__ import annotations

from fastadv.trainers.arrest import Arrest, ArrestRecipe
from fastadv.trainers.checkpoint import CheckpointError
from fastadv.trainers.loop import NonFiniteLossError, Progress, Settings
from fastadv.trainers.method import Attacked, LossResult, Method, Runtime, TrainBatch
from fastadv.trainers.methods import find_method, method_names
from fastadv.trainers.pgd_at import PGDAT
from fastadv.trainers.recipe import AdversarialRecipe, Recipe
from fastadv.trainers.schedules import (
    Constant,
    Cosine,
    Cyclic,
    MultiStep,
    Piecewise,
    Schedule,
    Step,
)
from fastadv.trainers.standard import Standard
from fastadv.trainers.training import TrainResult, train
from fastadv.trainers.weights import load_model, load_teacher

__all__ = [
    "PGDAT",
    "AdversarialRecipe",
    "Arrest",
    "ArrestRecipe",
    "Attacked",
    "CheckpointError",
    "Constant",
    "Cosine",
    "Cyclic",
    "LossResult",
    "Method",
    "MultiStep",
    "NonFiniteLossError",
    "Piecewise",
    "Progress",
    "Recipe",
    "Runtime",
    "Schedule",
    "Settings",
    "Standard",
    "Step",
    "TrainBatch",
    "TrainResult",
    "find_method",
    "load_model",
    "load_teacher",
    "method_names",
    "train",
]
