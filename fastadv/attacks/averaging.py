"""The mean of several gradients, for models that draw random numbers (EOT, expectation over transformations).

Source: A. Athalye, N. Carlini and D. Wagner, "Obfuscated gradients give a false sense of security", ICML 2018,
section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastadv.engine.engines import Engine, InputGradient


def mean_gradient(
    engine: Engine, x: Tensor, value_of: Callable[[Tensor], Tensor], passes: int
) -> InputGradient:
    """The mean of several gradients and values, with the logits of the last pass.

    Args:
        engine: the engine that computes each gradient, within its session.
        x: images [B, ...].
        value_of: logits [B, C] -> the loss to maximise, [B] or scalar.
        passes: number of gradients. A single one is the engine's own gradient, valid until its next call.

    Raises:
        ValueError: if there are several passes in float16, where each gradient has its own scale.
    """
    found = engine.gradient(x, value_of)
    if passes == 1:
        return found
    if engine.precision == "fp16":
        raise ValueError(f"precision must be 'fp32' or 'bf16' with passes {passes}, got 'fp16'")
    value, grad = found.value.clone(), found.grad.to(x.dtype, copy=True)
    for _ in range(passes - 1):
        found = engine.gradient(x, value_of)
        value += found.value
        grad += found.grad
    return InputGradient(value / passes, found.logits, grad / passes)
