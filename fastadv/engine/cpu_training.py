"""Schemas of the native operations of training passes on the CPU; the code is in csrc/cpu.

Like those of `fastadv.engine.cpu_convolution` they are parts of the engine, not ops for users. Images are dense
channels-last bfloat16 [B, C, H, W].

* ``conv_weight_serves(in_channels, out_channels)``: whether this processor and these channels are served by the
  next one: AMX, and channels in multiples of 32.
* ``conv_weight_gradient_(out, gradient, x, stride, padding, dilation)``: the gradient of a convolution of ``x``
  in its weights; ``gradient`` is the one in the results, ``out`` is channels-last float32 [K, C, h, w]. Products
  are of bfloat16, sums in float32.
* ``batch_norm_train_(out, statistics, x, weight, bias, running_mean, running_var, momentum, eps)``: BatchNorm in
  training mode; ``statistics`` [2, C] float32 keeps the means and 1 / deviations. ``weight``, ``bias`` and the
  running statistics, float32 [C], may be None; the latter move.
* ``batch_norm_train_backward_(out, at_parameters, gradient, x, statistics, weight)``: its gradient in ``x``, and
  in the weight and the bias, ``at_parameters`` [2, C] float32.
"""

from __future__ import annotations

import torch

from fastadv.engine import cpu_convolution as convolution

torch.library.define("fastadv::conv_weight_serves", "(int in_channels, int out_channels) -> bool")
torch.library.define(
    "fastadv::conv_weight_gradient_",
    "(Tensor(a!) out, Tensor gradient, Tensor x, int[] stride, int[] padding, int[] dilation)"
    " -> ()",
)
torch.library.define(
    "fastadv::batch_norm_train_",
    "(Tensor(a!) out, Tensor(b!) statistics, Tensor x, Tensor? weight, Tensor? bias, "
    "Tensor(c!)? running_mean, Tensor(d!)? running_var, float momentum, float eps) -> ()",
)
torch.library.define(
    "fastadv::batch_norm_train_backward_",
    "(Tensor(a!) out, Tensor(b!) at_parameters, Tensor gradient, Tensor x, Tensor statistics, "
    "Tensor? weight) -> ()",
)


def available() -> bool:
    """Whether the operations above can run: they are in the compiled part alone."""
    return convolution.available()


def serves_weight_gradient(in_channels: int, out_channels: int) -> bool:
    """Whether this processor has our gradient in the weights for these channels."""
    return (
        available()
        and convolution.has_amx()
        and bool(torch.ops.fastadv.conv_weight_serves(in_channels, out_channels))
    )
