"""The ways to run PGD and an ARREST step that `throughput.py` compares, each as its users would write it.

A builder takes a `Task` and returns a function that does the whole job once. Builders of packages that are not
installed raise ImportError.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv
from fastadv.trainers.arrest import Arrest, ArrestRecipe
from fastadv.trainers.method import LossResult, Runtime, TrainBatch
from fastadv.trainers.phases import PhaseTimer

EPS, ALPHA = 8 / 255, 2 / 255
LAMBDA, TAU = 50.0, 1.0  # at tau = 1 nothing is replayed: the step's full cost, (2K + 5) F
Run = Callable[[], object]


@dataclass(frozen=True)
class Task:
    """One batch to attack or train on: a model in eval mode, images [B, 3, 32, 32] and labels."""

    model: nn.Module
    x: Tensor
    y: Tensor
    steps: int

    def twin(self) -> nn.Module:
        """The model again, for an arrangement that changes it."""
        return copy.deepcopy(self.model)

    @property
    def device(self) -> torch.device:
        return self.x.device


def plain_step(adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Step, projection and clip as papers' code has them."""
    adv = adv + ALPHA * grad.sign()
    return torch.min(torch.max(adv, x - EPS), x + EPS).clamp(0, 1)


def start(x: Tensor) -> Tensor:
    return (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)


def attack_loop(forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, steps: int) -> Tensor:
    """PGD with `autograd.grad`, on whatever forward pass a user has made fast."""
    adv = start(x)
    for _ in range(steps):
        leaf = adv.detach().requires_grad_()
        loss = F.cross_entropy(forward(leaf), y)
        adv = plain_step(leaf.detach(), torch.autograd.grad(loss, leaf)[0], x)
    return adv


@contextmanager
def float32_products(tensor_cores: bool) -> Iterator[None]:
    """Whether a GPU may round the factors of float32 products to TensorFloat-32; torch lets convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tensor_cores
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def fp32_loop(task: Task, tensor_cores: bool = False) -> Run:
    """B0, as papers write it: float32, NCHW, `loss.backward()` into all weights. B1 is the same with TF32."""
    model = task.twin()

    def run() -> Tensor:
        adv = start(task.x)
        with float32_products(tensor_cores):
            for _ in range(task.steps):
                leaf = adv.detach().requires_grad_()
                F.cross_entropy(model(leaf), task.y).backward()
                assert leaf.grad is not None
                adv = plain_step(leaf.detach(), leaf.grad, task.x)
        model.zero_grad(set_to_none=True)
        return adv

    return run


def torchattacks_pgd(task: Task) -> Run:
    import torchattacks

    attack = torchattacks.PGD(task.twin(), eps=EPS, alpha=ALPHA, steps=task.steps)
    return lambda: attack(task.x, task.y)


def foolbox_pgd(task: Task) -> Run:
    import foolbox

    wrapped = foolbox.PyTorchModel(task.twin(), bounds=(0, 1), device=task.device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=task.steps, random_start=True)
    return lambda: attack(wrapped, task.x, task.y, epsilons=EPS)


def autocast_loop(task: Task) -> Run:
    """B2: bfloat16 autocast, channels-last, `autograd.grad`."""
    model = task.twin().to(memory_format=torch.channels_last)
    x = task.x.contiguous(memory_format=torch.channels_last)

    def forward(images: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return model(images)

    return lambda: attack_loop(forward, x, task.y, task.steps)


def compiled_autocast_loop(task: Task, mode: str | None = None) -> Run:
    """B3: B2 with frozen parameters under `torch.compile`."""
    model = task.twin().requires_grad_(False).to(memory_format=torch.channels_last)
    x = task.x.contiguous(memory_format=torch.channels_last)

    @torch.compile(mode=mode)
    def forward(images: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return model(images)

    return lambda: attack_loop(forward, x, task.y, task.steps)


def folded(model: nn.Module) -> nn.Module:
    """The model with BatchNorm folded by torch's own tool, frozen, bfloat16, channels-last."""
    from torch.fx.experimental.optimization import fuse

    narrow = fuse(copy.deepcopy(model).eval()).requires_grad_(False).bfloat16()
    return narrow.to(memory_format=torch.channels_last)


def compiled_folded_loop(task: Task, mode: str | None = None) -> Run:
    """B4: BatchNorm folded by hand, bfloat16 weights, under `torch.compile`."""
    model = torch.compile(folded(task.model), mode=mode)
    x = task.x.contiguous(memory_format=torch.channels_last)
    return lambda: attack_loop(lambda a: model(a.bfloat16()).float(), x, task.y, task.steps)


def fastadv_pgd(task: Task, engine: str = "auto", graphs: bool = True) -> Run:
    attack = fastadv.PGD(task.twin(), EPS, ALPHA, task.steps, engine=engine)
    if not graphs:
        without_graphs(attack, task.x)
    return lambda: attack(task.x, task.y)


def without_graphs(attack: fastadv.PGD, x: Tensor) -> None:
    """Keep an attack on a GPU from being recorded."""
    attack.engine_for(x).graphs = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    yield
    model.train()


def arrest_step(task: Task, attack: Callable[[nn.Module], Tensor], narrow: bool) -> Run:
    """An ARREST step (AFT + RGKD + NR) in plain PyTorch around a given attack."""
    model: Any = task.twin().train()
    teacher: Any = task.twin().eval().requires_grad_(False)
    x, y = task.x, task.y
    if narrow:
        model, teacher = (m.to(memory_format=torch.channels_last) for m in (model, teacher))
        x = x.contiguous(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, 0.01)

    def run() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=narrow):
            with torch.no_grad(), evaluating(model):
                wanted = teacher.forward_features(x)
                drift = plain_distance(model.forward_features(x).float(), wanted.float())
            with evaluating(model):
                adv = attack(model)
            noisy = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
            images = torch.where((drift > TAU)[:, None, None, None], noisy, adv)
            features = model.forward_features(images)
            loss = F.cross_entropy(model.forward_head(features).float(), y)
            loss = loss + LAMBDA * plain_distance(features.float(), wanted.float()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def plain_distance(u: Tensor, v: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(u.flatten(1), v.flatten(1)).abs()


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.SGD:
    """The optimiser of all arrangements: torch's one kernel over all parameters, as the trainers have it."""
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, fused=True)


def arrest_fp32(task: Task) -> Run:
    """B0's training step: everything in float32, attack by `loss.backward()`."""

    def attack(model: nn.Module) -> Tensor:
        adv = start(task.x)
        for _ in range(task.steps):
            leaf = adv.detach().requires_grad_()
            F.cross_entropy(model(leaf), task.y).backward()
            assert leaf.grad is not None
            adv = plain_step(leaf.detach(), leaf.grad, task.x)
        return adv

    return arrest_step(task, attack, narrow=False)


def arrest_autocast(task: Task) -> Run:
    """B2's training step."""
    return arrest_step(
        task, lambda model: attack_loop(model, task.x, task.y, task.steps), narrow=True
    )


def arrest_compiled(task: Task) -> Run:
    """B3's training step: the attack on a compiled frozen copy, whose weights are copied every step."""
    frozen = task.twin().requires_grad_(False).to(memory_format=torch.channels_last)
    forward = torch.compile(frozen)
    x = task.x.contiguous(memory_format=torch.channels_last)

    def attack(model: nn.Module) -> Tensor:
        with torch.no_grad():
            frozen.load_state_dict(model.state_dict())
        return attack_loop(forward, x, task.y, task.steps)

    return arrest_step(task, attack, narrow=True)


def arrest_method(task: Task, recipe: ArrestRecipe) -> Arrest:
    """The trainer's method on a task, whose model is both student and teacher."""
    from fastadv.engine.precision import fast_bf16

    model = task.twin().to(memory_format=torch.channels_last)
    dtype = torch.bfloat16 if fast_bf16(task.device) else None
    runtime = Runtime(task.device, dtype, PhaseTimer(task.device))
    return Arrest(recipe, model, runtime, {"teacher": task.twin()})


def arrest_fastadv(
    task: Task, engine: str = "auto", graphs: bool = True, training: str = ""
) -> Run:
    """The trainer's own step, without its loop; its training pass in a mode of `torch.compile`, if given."""
    method = arrest_method(task, ArrestRecipe(steps=task.steps, phi=90.0, engine=engine))
    if not graphs:
        without_graphs(method.pgd, task.x)
    if training:
        method.compile(training)
    return trainer_step(method, task, 0.01)


def trainer_step(method: Arrest, task: Task, lr: float) -> Run:
    """A step of the trainer's method, by an optimiser of the benchmark's own."""
    optimizer = make_optimizer(method.model, lr)
    x = task.x.contiguous(memory_format=torch.channels_last)
    ids = torch.arange(len(x), device=task.device)

    def update(result: LossResult) -> bool:
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        return True

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()  # results of the last step may be overwritten
        method.train_mode()
        method.step(TrainBatch(x, task.y, ids, epoch=0, step=0, run_seed=0), update)

    return run


_GPU_WAYS: dict[str, dict[str, Any]] = {
    "fastadv without graph": {"graphs": False},
    "fastadv, torch.compile": {"engine": "compiled"},
    "fastadv, torch.compile and graph": {"engine": "graph"},
}
ATTACKS: dict[str, Callable[[Task], Run]] = {
    "foolbox LinfPGD": foolbox_pgd,
    "torchattacks PGD": torchattacks_pgd,
    "B0 fp32, loss.backward()": fp32_loop,
    "B2 bf16 autocast": autocast_loop,
    "B3 torch.compile of B2, frozen": compiled_autocast_loop,
    "B4 torch.compile, folded, bf16": compiled_folded_loop,
    # Inductor's freezing is no rung: it folds constants only where nothing is differentiated.
    "B5 torch.compile of B4, max-autotune": partial(compiled_folded_loop, mode="max-autotune"),
    "fastadv": fastadv_pgd,
}
STEPS: dict[str, Callable[[Task], Run]] = {
    "B0 fp32, loss.backward()": arrest_fp32,
    "B2 bf16 autocast": arrest_autocast,
    "B3 torch.compile of the attack": arrest_compiled,
    "fastadv": arrest_fastadv,
}
# Further rungs on a GPU: TensorFloat-32, the attack without its graph, compiled, and compiled with a graph.
GPU_ATTACKS: dict[str, Callable[[Task], Run]] = {
    "B1 B0 with TF32": partial(fp32_loop, tensor_cores=True)
}
GPU_ATTACKS |= {name: partial(fastadv_pgd, **options) for name, options in _GPU_WAYS.items()}
# The training pass is 3 F of 23 F. Launched op by op it may still cost as much as the captured attack.
_GPU_TRAINING: dict[str, dict[str, Any]] = {
    "fastadv, training by torch.compile": {"training": "default"},
    "fastadv, training by torch.compile and graphs": {"training": "reduce-overhead"},
}
GPU_STEPS = {
    name: partial(arrest_fastadv, **options)
    for name, options in (_GPU_WAYS | _GPU_TRAINING).items()
}
COMPILED = tuple(
    name for name in (*ATTACKS, *STEPS, *_GPU_WAYS, *_GPU_TRAINING) if "torch.compile" in name
)
__all__ = ["ATTACKS", "COMPILED", "GPU_ATTACKS", "GPU_STEPS", "STEPS", "Run", "Task"]
