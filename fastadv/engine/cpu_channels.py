"""Schemas of the native passes over channels of the attack engine's CPU programs; the code is in csrc/cpu.

Like those of `fastadv.engine.cpu_convolution` they are parts of the engine, not ops for users. Maps are dense
channels-last [B, C, H, W], and rows are contiguous [..., C]. Both are bfloat16, on processors with AVX512-BF16.
Activations, norms, gates and the strided passes take float32 as well, on any processor.

* ``conv_depthwise_serves(tap_columns, in_step)``: whether ``conv_depthwise_`` has a form for these taps here.
* ``conv_depthwise_(out, x, packed, first_tap, taps, steps, origin, bias, add, mask, relu)``: a depthwise
  convolution, on the grid of results ``origin + i * steps[1]``; place i reads the block of ``taps`` inputs from
  ``i * steps[0] + first_tap`` on. The last pass is the last pass of ``conv3x3_``.
* ``activation_(out, x, kind)``: ``out = f(x)``, f by its place in `ACTIVATIONS`, of dense tensors of any shape.
* ``activation_backward_(out, gradient, x, kind)``: ``out = gradient * f'(x)``.
* ``rows_norm_(out, statistics, x, weight, bias, eps)``: LayerNorm of rows; ``statistics`` [rows, 2] float32 keeps
  each row's mean and 1 / deviation. ``weight`` and ``bias``, float32 [C], may be None.
* ``rows_norm_backward_(out, gradient, x, statistics, weight, add)``: its gradient in x, plus ``add`` unless None.
* ``channel_gate_(out, x, gate)``: ``out = x * gate``, with ``gate`` [B, C] in the dtype of x.
* ``channel_gate_backward_(out, sums, gradient, x, gate)``: ``out = gradient * gate``; ``sums`` [B, C] float32 is
  the gradient in the gate.
* ``strided_affine_(out, x, scale, shift, relu)``: ``out = relu(x * scale + shift)``, the ReLU optional; x is the
  first channels of a map, and ``scale`` and ``shift`` are float32 [C].
* ``strided_scale_(total, gradient, scale, add)``: ``total = gradient * scale``, plus its old value if ``add``;
  ``total`` is the first channels of a map.
* ``attention_weights_(scores, mask, scale)``: ``scores = softmax(scores * scale + mask)``, contiguous [heads, M,
  N], N at most `MOST_TOKENS`; ``mask`` is None or [a divisor of heads, M, N], repeated.
* ``attention_weights_backward_(gradient, weights, scale)``: the gradient in the scores, in place of the one in the
  weights.
"""

from __future__ import annotations

import torch

from fastadv.engine import cpu_convolution as convolution

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "hardswish", "hardsigmoid", "sigmoid", "relu6")
MOST_TOKENS = 1024  # of a row of attention weights
BLOCK = 32  # channels that the depthwise convolution computes together

torch.library.define("fastadv::conv_depthwise_serves", "(int tap_columns, int in_step) -> bool")
torch.library.define(
    "fastadv::conv_depthwise_",
    "(Tensor(a!) out, Tensor x, Tensor packed, int[] first_tap, int[] taps, int[] steps, "
    "int[] origin, Tensor? bias, Tensor? add, Tensor? mask, bool relu) -> ()",
)
torch.library.define("fastadv::activation_", "(Tensor(a!) out, Tensor x, int kind) -> ()")
torch.library.define(
    "fastadv::activation_backward_",
    "(Tensor(a!) out, Tensor gradient, Tensor x, int kind) -> ()",
)
torch.library.define(
    "fastadv::rows_norm_",
    "(Tensor(a!) out, Tensor(b!) statistics, Tensor x, Tensor? weight, Tensor? bias, float eps)"
    " -> ()",
)
torch.library.define(
    "fastadv::rows_norm_backward_",
    "(Tensor(a!) out, Tensor gradient, Tensor x, Tensor statistics, Tensor? weight, Tensor? add)"
    " -> ()",
)
torch.library.define("fastadv::channel_gate_", "(Tensor(a!) out, Tensor x, Tensor gate) -> ()")
torch.library.define(
    "fastadv::channel_gate_backward_",
    "(Tensor(a!) out, Tensor(b!) sums, Tensor gradient, Tensor x, Tensor gate) -> ()",
)
torch.library.define(
    "fastadv::strided_affine_",
    "(Tensor(a!) out, Tensor x, Tensor scale, Tensor shift, bool relu) -> ()",
)
torch.library.define(
    "fastadv::strided_scale_",
    "(Tensor(a!) total, Tensor gradient, Tensor scale, bool add) -> ()",
)
torch.library.define(
    "fastadv::attention_weights_", "(Tensor(a!) scores, Tensor? mask, float scale) -> ()"
)
torch.library.define(
    "fastadv::attention_weights_backward_",
    "(Tensor(a!) gradient, Tensor weights, float scale) -> ()",
)


def available() -> bool:
    """Whether this processor has the passes above in bfloat16."""
    return convolution.supported(convolution.VECTOR, 1)


def serves_depthwise(tap_columns: int, in_step: int) -> bool:
    """Whether the depthwise convolution has a form for these taps on this processor."""
    return available() and torch.ops.fastadv.conv_depthwise_serves(tap_columns, in_step)
