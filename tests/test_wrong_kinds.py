"""Arguments of another kind are refused by name, whichever public function gets them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastadv import data, evaluation, losses, models, ops

pytestmark = pytest.mark.usefixtures("one_thread")

X, Y = torch.rand(3, 2, 4, 4), torch.arange(3)
LOGITS, OTHERS = torch.randn(3, 4), torch.randn(3, 4)
FEATURES = torch.randn(3, 5, 2, 2)
LINEAR = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32, 4))
CNN = models.small_cnn(4, 2)
IMAGES = data.from_tensors((255 * torch.rand(6, 2, 8, 8)).byte(), torch.arange(6) % 4)
PAIR = {"clean_logits": LOGITS, "adv_logits": OTHERS, "y": Y}
RUN = {"model": LINEAR, "data": (X, Y), "eps": 0.1, "seed": 0, "batch_size": 2, "device": None}

# A function and arguments with which it works.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "pgd_step": (ops.pgd_step, {"adv": X, "grad": X, "x": X, "eps": 0.1, "alpha": 0.1}),
    "random_start": (ops.random_start, {"x": X, "eps": 0.1, "norm": "l2", "seed": 1}),
    "trades": (losses.trades, {**PAIR, "beta": 1.0}),
    "mart": (losses.mart, {**PAIR, "beta": 1.0, "code_constants": False}),
    "hat": (losses.hat, {**PAIR, "helper_logits": LOGITS, "helper_y": Y, "gamma": 1.0}),
    "kd": (losses.kd, {"student_logits": LOGITS, "teacher_logits": OTHERS, "temperature": 1.0}),
    "lbgat": (losses.lbgat, {**PAIR, "natural_logits": OTHERS, "beta": 1.0}),
    "feature_distance": (
        losses.feature_distance,
        {"features": FEATURES, "teacher_features": FEATURES, "kind": "mse"},
    ),
    "arrest": (
        losses.arrest,
        {"adv_logits": LOGITS, "y": Y, "adv_features": FEATURES, "teacher_features": FEATURES, "lam": 1.0},
    ),
    "vfd": (
        losses.vfd,
        {"adv_features": FEATURES, "clean_features": FEATURES, "vanilla_features": FEATURES},
    ),
    "small_cnn": (models.small_cnn, {"num_classes": 2, "in_channels": 1}),
    "resnet18": (models.resnet18, {"num_classes": 2, "in_channels": 1, "layer2_stride": 2}),
    "create_model": (models.create_model, {"name": "small_cnn", "num_classes": 2, "in_channels": 1}),
    "Normalized": (models.Normalized, {"model": CNN, "mean": 0.5, "std": 0.5}),
    "form_of": (models.form_of, {"model": CNN}),
    "copy_weights": (models.copy_weights, {"target": models.small_cnn(4, 2), "source": CNN}),
    "load_published_state_dict": (
        models.load_published_state_dict,
        {"model": models.small_cnn(4, 2), "state": CNN.state_dict(), "strict": True},
    ),
    "from_tensors": (data.from_tensors, {"images": IMAGES.images, "labels": IMAGES.labels}),
    "ImageData": (
        data.ImageData,
        {"images": IMAGES.images, "labels": IMAGES.labels, "num_classes": 4, "name": "x"},
    ),
    "Loader": (data.Loader, {"data": IMAGES, "batch_size": 2, "train": True, "mode": "constant"}),
    "load_dataset": (data.load_dataset, {"name": "digits"}),
    "subset": (data.subset, {"data": IMAGES, "n": 2, "seed": 0}),
    "wilson_interval": (evaluation.wilson_interval, {"correct": 3, "n": 5, "confidence": 0.9}),
    "Cubic": (evaluation.Cubic, {"c3": 0.0, "c2": 0.0, "c1": 1.0, "c0": 0.0}),
    "ardist": (
        evaluation.ardist,
        {"clean": 80.0, "robust": 50.0, "curve": evaluation.ARREST_CIFAR10_CURVE},
    ),
    "trade_off_sum": (evaluation.trade_off_sum, {"clean": 80.0, "robust": 50.0}),
    "fit_cubic": (
        evaluation.fit_cubic,
        {"points": [(80.0, 50.0), (81.0, 49.0), (82.0, 48.0), (83.0, 46.0)]},
    ),
    "cosine_similarity_to": (
        evaluation.cosine_similarity_to,
        {"model": CNN, "teacher": CNN, "data": IMAGES, "batch_size": 2},
    ),
    "masking_checks": (
        evaluation.masking_checks,
        {**RUN, "eps_factors": (0.5, 1.0), "steps": (1, 2), "progress": False},
    ),
    "delta_z": (
        evaluation.delta_z,
        {"extractors": dict.fromkeys((0.1, 0.2, 0.3), LINEAR), "data": (X, Y), "eps": 0.1, "steps": 1},
    ),
    "autoattack": (
        evaluation.autoattack,
        {**RUN, "version": ["apgd-ce"], "max_examples": 1, "engine": "fp32", "norm": "linf", "state_dir": None},
    ),
    "AutoAttack": (
        evaluation.AutoAttack(LINEAR, eps=0.1, version=["apgd-ce"], engine="fp32"),
        {"x": X, "y": Y, "seed": 0},
    ),
    "evaluate": (
        evaluation.evaluate,
        {**RUN, "attacks": ["clean", "pgd-1"], "on_row": None, "state_dir": None, "progress": False},
    ),
}  # fmt: skip
WRONG = (
    None, [None], {1: 2}, object(), -1, torch.nan, 1 + 2j, b"text", np.zeros(5), torch.zeros(5),
    torch.zeros(()), torch.zeros(0), torch.zeros(3, 4, dtype=torch.complex64), X.to("meta"), X.to_sparse(),
)  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_message_names_the_argument(name: str) -> None:
    function, good = CALLS[name]
    function(**good)
    refused = 0
    for argument, wrong in ((a, w) for a in good for w in WRONG):
        try:
            function(**{**good, argument: wrong})
        except (TypeError, ValueError) as error:
            assert re.search(rf"\b{argument}\b", str(error)), f"{argument}={wrong!r:.60}: {error!r}"
            assert "unexpected keyword" not in str(error)
            refused += 1
    assert refused >= 8 * len([a for a in good if good[a] is not None]) - 8


def test_a_device_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match=r"device must be one of torch's, .* got 'gpu'"):
        evaluation.evaluate(LINEAR, (X, Y), "clean", device="gpu", progress=False)

    with pytest.raises(ValueError, match=r"device must be one of torch's, .* got 'x'"):
        data.Loader(IMAGES, 2, train=True, device="x")


@pytest.mark.parametrize("dataset", [None, 3, iter([])])
def test_a_streamed_dataset_is_map_style(dataset: Any) -> None:
    with pytest.raises(TypeError, match=r"dataset must be a map-style Dataset, .* got"):
        data.StreamedData(dataset, 10, "x")


@pytest.mark.parametrize("results", [None, 3, [None], ["row"]])
def test_only_results_are_added_to_results(results: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="results must be a list of results, got"):
        evaluation.add_results(tmp_path / "eval.json", results)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [0, -2, 2.0, True, "10"])
def test_sizes_of_models_are_counts(count: object) -> None:
    for make in (
        models.small_cnn,
        models.resnet18,
        models.preact_resnet18,
        models.vgg16_bn,
        models.wrn_28_10,
    ):
        for name in ("num_classes", "in_channels"):
            with pytest.raises((TypeError, ValueError), match=rf"{name} must be (>= 1|an integer)"):
                make(**{name: count})  # type: ignore[operator]
