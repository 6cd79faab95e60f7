"""The state in which a model is judged: eval mode, frozen, float32 without TF32. It is restored afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from fastadv.attacks.arguments import check_model
from fastadv.engine.frozen import frozen
from fastadv.engine.network_lock import locked
from fastadv.float32 import full_float32
from fastadv.ops.values import check_device

Model = nn.Module | Callable[[Tensor], Tensor]


@contextmanager
def evaluation_mode(
    model: Model, device: torch.device | str | None = None
) -> Iterator[torch.device]:
    """Hold a model in evaluation mode, in full float32.

    On exit the training flag of every module, the value, ``grad`` and ``requires_grad`` of every parameter, the
    device of the model and the precision settings of torch are restored. Parameters keep their ``requires_grad``
    inside, because some models adapt to the images in their forward pass. The same holds for networks that the
    model runs without having registered them, such as a network in a closure. Other threads that evaluate or
    attack them wait.

    Args:
        model: a module, or any other callable.
        device: device of the evaluation; by default the device of the model's parameters, else the CPU.

    Yields:
        The device of the evaluation.

    Raises:
        TypeError: when parameters or buffers are floating point but not float32, or the model cannot be called.
        ValueError: when there is no such device.
    """
    check_model(model)
    with ExitStack() as stack:
        # First, so that a model moved inside a caller's inference mode gets ordinary parameters.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        home = device_of(model)
        target = check_device(device) if device is not None else home
        if isinstance(model, nn.Module):
            check_float32(model)
        stack.enter_context(locked(model))
        stack.enter_context(frozen(model, keep_parameters=True))
        if isinstance(model, nn.Module):
            assert_eval(model)
            if target != home:
                stack.callback(model.to, home)
                model.to(target)
        stack.enter_context(full_float32())
        stack.enter_context(torch.autocast(target.type, enabled=False))
        yield target


@contextmanager
def all_in_evaluation_mode(
    models: Sequence[Model], device: torch.device | str | None = None
) -> Iterator[torch.device]:
    """Hold several models in `evaluation_mode` on one device, by default the device of the first model.

    They are locked all at once. So two threads with the same models in another order do not wait for each other.

    Yields:
        The device of the evaluation.
    """
    first, *others = models
    with ExitStack() as stack:
        stack.enter_context(locked(*models))
        target = stack.enter_context(evaluation_mode(first, device))
        for model in others:
            stack.enter_context(evaluation_mode(model, target))
        yield target


def check_float32(model: nn.Module) -> None:
    """Require that every floating-point parameter and buffer is float32."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise TypeError(
                f"model must be float32, {name} is {tensor.dtype}; convert it with model.float()"
            )


def assert_eval(model: Model) -> None:
    """Require that no module is in training mode.

    Raises:
        RuntimeError: naming the first module in training mode.
    """
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if module.training:
                raise RuntimeError(
                    f"model must be in eval mode, {name or type(model).__name__} is in training mode"
                )


def device_of(model: Model) -> torch.device:
    """The device of a module's first parameter or buffer; the CPU for other callables."""
    if isinstance(model, nn.Module):
        for tensor in chain(model.parameters(), model.buffers()):
            return tensor.device
    return torch.device("cpu")


@contextmanager
def private_generators(seed: int) -> Iterator[None]:
    """Seed torch's default generators, and restore all of them on exit."""
    # torch.manual_seed seeds the generators of all CUDA devices.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
