"""Small data, recipes and methods for the tests of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.data import ImageData, Splits
from fastadv.models import create_model, small_cnn
from fastadv.trainers import (
    AdversarialRecipe,
    ArrestRecipe,
    DmAtRecipe,
    FreeRecipe,
    LasAtRecipe,
    Method,
    NFgsmRecipe,
    Recipe,
    RstRecipe,
    Runtime,
    TrainBatch,
    find_method,
)
from fastadv.trainers.phases import PhaseTimer

CPU = torch.device("cpu")
# Few, small and plain: what is tested is the course of things, not the accuracy.
SMALL: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 16,
    "lr": 0.05,
    "pad": 1,
    "flip": False,
    "precision": "fp32",
    "monitor_images": 16,
    "monitor_steps": 2,
    "seed": 3,
}
ATTACK: dict[str, Any] = {"eps": 0.1, "alpha": 0.05, "steps": 3, "attack_precision": "fp32"}
SMALL_STRATEGY: dict[str, Any] = {
    "strategy": "small_cnn",
    "strategy_every": 2,
    "strategy_lr": 0.1,
    "eps_choices": (13, 26, 40),
    "alpha_choices": (6, 12),
    "steps_choices": (1, 2, 4),
}


def small_recipe(method: str, **changes: Any) -> Recipe:
    """A recipe of any method for `small_data`."""
    kind = find_method(method).recipe_class
    numbers = SMALL | (ATTACK if issubclass(kind, AdversarialRecipe) else {})
    if kind is NFgsmRecipe:
        numbers = numbers | {"steps": 1}
    if kind is FreeRecipe:  # which has no passes of the attack alone
        numbers = {name: value for name, value in numbers.items() if name != "attack_precision"}
    if kind is ArrestRecipe and changes.get("replay", True) and changes.get("replay_epochs", 1):
        numbers = numbers | {"replay_epochs": 1, "phi": 20.0}
    if kind is LasAtRecipe:
        numbers = numbers | SMALL_STRATEGY
    if kind in (RstRecipe, DmAtRecipe):
        numbers = numbers | {"extra_fraction": 0.0}
    return kind(**(numbers | changes))


def small_data(images: int = 72, test_images: int = 24) -> Splits:
    """Images [N, 1, 8, 8] whose class is where they are bright."""
    generator = torch.Generator().manual_seed(0)

    def make(count: int, name: str) -> ImageData:
        labels = torch.randint(0, 4, (count,), generator=generator)
        pixels = torch.randint(0, 100, (count, 1, 8, 8), generator=generator)
        for row, label in zip(pixels, labels.tolist(), strict=True):
            top, left = 4 * (label // 2), 4 * (label % 2)
            row[:, top : top + 4, left : left + 4] += 120
        return ImageData(pixels.to(torch.uint8), labels, 4, name)

    return Splits(make(images, "squares train"), make(test_images, "squares test"))


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small network for `small_data`, with BatchNorm statistics that are not the initial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = small_cnn(num_classes=4, in_channels=1).to(dtype)
        model.train()
        with torch.no_grad():
            for _ in range(3):
                model(torch.rand(32, 1, 8, 8, dtype=dtype))
    return model


def make_batch(
    size: int = 8, dtype: torch.dtype = torch.float32, epoch: int = 0, step: int = 0
) -> TrainBatch:
    """Random images with labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(size, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 4, (size,), generator=generator)
    return TrainBatch(x, y, torch.arange(100, 100 + size), epoch, step, run_seed=5)


def make_method(
    name: str, model: nn.Module, teacher: nn.Module | None = None, **changes: Any
) -> Method[Any, Any]:
    """A method by name on the CPU, in the precision of its tensors."""
    teachers = {} if teacher is None else {"teacher": teacher}
    dtype = next(model.parameters()).dtype

    def build(network: str) -> nn.Module:
        return create_model(network, num_classes=4, in_channels=1).to(dtype)

    builds = name == "las_at"
    runtime = Runtime(CPU, None, PhaseTimer(CPU), build=build if builds else None)
    return find_method(name)(small_recipe(name, **changes), model, runtime, teachers)


def states_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts agree bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    """A state dict that does not change with the model."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def check_step(
    method: Method[Any, Any], loss: Tensor, slow: Mapping[str, nn.Module], expected: Tensor
) -> None:
    """Compare a method's loss, its gradients and its models' buffers with plain float64 code on copies of them."""
    loss.backward()
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-11)
    for name, ours in method.trainable().items():
        for a, b in zip(ours.parameters(), slow[name].parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            assert torch.allclose(a.grad, b.grad, rtol=1e-8, atol=1e-11)
        for a, b in zip(ours.buffers(), slow[name].buffers(), strict=True):
            assert torch.allclose(a, b, rtol=1e-12)
