"""Training: one loop for all methods, one short file per method."""

from __future__ import annotations

from fastadv.interruption import Interrupted
from fastadv.lost_ranks import LostRanksError
from fastadv.trainers.act import Act, ActRecipe
from fastadv.trainers.adversarial import AdversarialMethod
from fastadv.trainers.afs import Afs, AfsRecipe
from fastadv.trainers.alp import Alp, AlpRecipe
from fastadv.trainers.arrest import Arrest, ArrestRecipe
from fastadv.trainers.callbacks import Callback, RunStart
from fastadv.trainers.checkpoint import CheckpointError
from fastadv.trainers.dm_at import DmAt, DmAtRecipe
from fastadv.trainers.endings import NonFiniteLossError, TrainingInterrupted
from fastadv.trainers.fast import Fast, FastRecipe
from fastadv.trainers.fat import Fat, FatRecipe
from fastadv.trainers.free import Free, FreeRecipe
from fastadv.trainers.grad_align import GradAlign, GradAlignRecipe
from fastadv.trainers.hat import Hat, HatRecipe
from fastadv.trainers.kd_at import KdAt, KdAtRecipe
from fastadv.trainers.las_at import LasAt, LasAtRecipe
from fastadv.trainers.lbgat import Lbgat, LbgatRecipe
from fastadv.trainers.mart import Mart, MartRecipe
from fastadv.trainers.method import Attacked, LossResult, Method, Runtime, TrainBatch
from fastadv.trainers.methods import find_method, method_names
from fastadv.trainers.n_fgsm import NFgsm, NFgsmRecipe
from fastadv.trainers.number import Number
from fastadv.trainers.pgd_at import PGDAT
from fastadv.trainers.progress import Progress
from fastadv.trainers.recipe import AdversarialRecipe, Recipe
from fastadv.trainers.rst import Rst, RstRecipe
from fastadv.trainers.run_lock import RunInUseError
from fastadv.trainers.s2o import S2o, S2oRecipe
from fastadv.trainers.sat import Sat, SatRecipe
from fastadv.trainers.schedules import (
    Constant,
    Cosine,
    Cyclic,
    EpochCosine,
    EpochOneCycle,
    Interpolated,
    MultiStep,
    OneCycle,
    Piecewise,
    Schedule,
    Step,
)
from fastadv.trainers.settings import Settings
from fastadv.trainers.standard import Standard
from fastadv.trainers.tla import Tla, TlaRecipe
from fastadv.trainers.trackers import MlflowCallback, TensorBoardCallback, WandbCallback
from fastadv.trainers.trades import Trades, TradesRecipe
from fastadv.trainers.training import TrainResult, train
from fastadv.trainers.vfd import Vfd, VfdRecipe
from fastadv.trainers.weights import load_model, load_teacher
from fastadv.trainers.zero_grad import ZeroGrad, ZeroGradRecipe

__all__ = [
    "PGDAT",
    "Act",
    "ActRecipe",
    "AdversarialMethod",
    "AdversarialRecipe",
    "Afs",
    "AfsRecipe",
    "Alp",
    "AlpRecipe",
    "Arrest",
    "ArrestRecipe",
    "Attacked",
    "Callback",
    "CheckpointError",
    "Constant",
    "Cosine",
    "Cyclic",
    "DmAt",
    "DmAtRecipe",
    "EpochCosine",
    "EpochOneCycle",
    "Fast",
    "FastRecipe",
    "Fat",
    "FatRecipe",
    "Free",
    "FreeRecipe",
    "GradAlign",
    "GradAlignRecipe",
    "Hat",
    "HatRecipe",
    "Interpolated",
    "Interrupted",
    "KdAt",
    "KdAtRecipe",
    "LasAt",
    "LasAtRecipe",
    "Lbgat",
    "LbgatRecipe",
    "LossResult",
    "LostRanksError",
    "Mart",
    "MartRecipe",
    "Method",
    "MlflowCallback",
    "MultiStep",
    "NFgsm",
    "NFgsmRecipe",
    "NonFiniteLossError",
    "Number",
    "OneCycle",
    "Piecewise",
    "Progress",
    "Recipe",
    "Rst",
    "RstRecipe",
    "RunInUseError",
    "RunStart",
    "Runtime",
    "S2o",
    "S2oRecipe",
    "Sat",
    "SatRecipe",
    "Schedule",
    "Settings",
    "Standard",
    "Step",
    "TensorBoardCallback",
    "Tla",
    "TlaRecipe",
    "Trades",
    "TradesRecipe",
    "TrainBatch",
    "TrainResult",
    "TrainingInterrupted",
    "Vfd",
    "VfdRecipe",
    "WandbCallback",
    "ZeroGrad",
    "ZeroGradRecipe",
    "find_method",
    "load_model",
    "load_teacher",
    "method_names",
    "train",
]
