"""Schemas of the native operations of the attack engine's CPU programs; the code is in csrc/cpu.

These are parts of the engine, not ops for users: they take packed filters and write into given memory. All
images are dense channels-last [B, C, H, W], in bfloat16 if nothing else is said. Every optional argument may be
None.

* ``conv3x3_supported(in_channels, out_channels)``: whether this processor and these channels are served:
  AVX512-BF16, and input channels in multiples of 16.
* ``conv3x3_pack_(packed, weight, scale, backward)``: transform filters [K, C, 3, 3], times ``scale`` [K], for
  the convolution or, ``backward``, for its gradient in the input.
* ``conv3x3_(out, x, packed, bias, add, mask, relu)``: stride 1, padding 1, by Winograd's F(4x4, 3x3);
  ``out = where(mask > 0, relu(conv(x) + bias + add), 0)``.
* ``conv3x3_float_lanes()``: the width of this processor's vectors for the next two, in floats: 16 with AVX-512, 8
  with AVX2, 0 where they cannot run.
* ``conv3x3_float_pack_(packed, weight, scale, backward, lanes)`` and
  ``conv3x3_float_(out, x, packed, bias, add, mask, relu, lanes)``: as the two above, in float32, for input
  channels in multiples of ``lanes``.
* ``conv_gather_(out, x, packed, tap_rows, tap_columns, taps, origins, steps, bias, add, mask, relu)``: any kernel
  and stride, on grids of results. Grid g has the results ``origins[2 g : 2 g + 2] + i * steps[1]`` and the next
  ``taps[g]`` of the taps and their filters. Its place i reads the inputs ``i * steps[0] + tap``. No result may be
  in two grids. The same last pass as above.
* ``conv_gather_float_(..., lanes)``: the same in float32, by vectors of ``lanes`` floats, for any number of input
  channels. Filters for at most 4 output channels are packed as [K, depth].
* ``conv_amx_supported(in_channels)``: whether this processor and these channels are served by ``conv_amx_``: AMX,
  and input channels in multiples of 32.
* ``conv_amx_pack_(packed, weight, scale, taps, backward)``: pack the ``taps`` of filters [K, C, h, w], places in
  h * w, times ``scale`` [K], for ``conv_amx_``.
* ``conv_amx_``: as ``conv_gather_``, by AMX.

The next four take images in bfloat16 or in float32.

* ``channel_affine_(out, x, scale, shift, add, mask, relu)``: ``out = where(mask > 0, relu(x * scale + shift),
  0) + add`` with ``scale`` and ``shift`` [C].
* ``merge_gradients_(out, x, add, mask)``: ``out = where(mask > 0, x + add, 0)``.
* ``pixel_means_(out, x)``: the means over height and width, ``out`` [B, C] float32.
* ``spread_pixel_means_(out, gradient, add, mask)``: their gradient, ``gradient`` [B, C] float32 at the means;
  ``out = where(mask > 0, gradient / (H * W) + add, 0)``.
"""

from __future__ import annotations

import torch

from fastadv.engine.precision import isa_limit
from fastadv.ops import NATIVE

POINTS = 36  # products per tile of F(4x4, 3x3)
VECTOR = 16  # output channels are packed in multiples of this
WIDE = 64  # and, for the gathering kernel, in blocks of this
FEW = 4  # channels, for which the gathering kernel in float32 has loops of their own
FLOAT_WIDE = {16: 64, 8: 16}  # in float32, by the lanes of the vectors

torch.library.define("fastadv::conv3x3_supported", "(int in_channels, int out_channels) -> bool")
torch.library.define("fastadv::conv_amx_supported", "(int in_channels) -> bool")
torch.library.define(
    "fastadv::conv3x3_pack_",
    "(Tensor(a!) packed, Tensor weight, Tensor? scale, bool backward) -> ()",
)
torch.library.define(
    "fastadv::conv3x3_",
    "(Tensor(a!) out, Tensor x, Tensor packed, Tensor? bias, Tensor? add, Tensor? mask, bool relu)"
    " -> ()",
)
torch.library.define("fastadv::conv3x3_float_lanes", "() -> int")
torch.library.define(
    "fastadv::conv3x3_float_pack_",
    "(Tensor(a!) packed, Tensor weight, Tensor? scale, bool backward, int lanes) -> ()",
)
torch.library.define(
    "fastadv::conv3x3_float_",
    "(Tensor(a!) out, Tensor x, Tensor packed, Tensor? bias, Tensor? add, Tensor? mask, bool relu, "
    "int lanes) -> ()",
)
torch.library.define(
    "fastadv::conv_amx_pack_",
    "(Tensor(a!) packed, Tensor weight, Tensor? scale, int[] taps, bool backward) -> ()",
)
for _name in ("conv_gather_", "conv_amx_"):
    torch.library.define(
        f"fastadv::{_name}",
        "(Tensor(a!) out, Tensor x, Tensor packed, int[] tap_rows, int[] tap_columns, int[] taps, "
        "int[] origins, int[] steps, Tensor? bias, Tensor? add, Tensor? mask, bool relu) -> ()",
    )
torch.library.define(
    "fastadv::conv_gather_float_",
    "(Tensor(a!) out, Tensor x, Tensor packed, int[] tap_rows, int[] tap_columns, int[] taps, "
    "int[] origins, int[] steps, Tensor? bias, Tensor? add, Tensor? mask, bool relu, int lanes) -> ()",
)
torch.library.define(
    "fastadv::channel_affine_",
    "(Tensor(a!) out, Tensor x, Tensor scale, Tensor shift, Tensor? add, Tensor? mask, bool relu)"
    " -> ()",
)
torch.library.define(
    "fastadv::merge_gradients_", "(Tensor(a!) out, Tensor x, Tensor? add, Tensor? mask) -> ()"
)
torch.library.define("fastadv::pixel_means_", "(Tensor(a!) out, Tensor x) -> ()")
torch.library.define(
    "fastadv::spread_pixel_means_",
    "(Tensor(a!) out, Tensor gradient, Tensor? add, Tensor? mask) -> ()",
)


def available() -> bool:
    """Whether the operations above can run: they are in the compiled part alone."""
    return NATIVE.library is not None


def supported(in_channels: int, out_channels: int) -> bool:
    """Whether this processor has our 3x3 convolution for these channels."""
    return available() and torch.ops.fastadv.conv3x3_supported(in_channels, out_channels)


def float_lanes() -> int:
    """The width of the vectors, in floats, of our convolutions in float32; 0 where they do not exist."""
    return int(torch.ops.fastadv.conv3x3_float_lanes()) if available() else 0


def amx_serves(in_channels: int) -> bool:
    """Whether this processor has our convolution by AMX for these channels."""
    return available() and has_amx() and torch.ops.fastadv.conv_amx_supported(in_channels)


def onednn_available(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether oneDNN is there and computes in this dtype, bfloat16 or float32, on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_amx() -> bool:
    """Whether the processor multiplies matrices of bfloat16 by AMX, many times as fast as by AVX512-BF16."""
    return isa_limit() is None and torch.cpu._is_amx_tile_supported()
