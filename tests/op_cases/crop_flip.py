"""Samples of crop_flip."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.ops import crop_flip
from op_cases.case import DTYPES, Arguments, Bad, OpCase, Shape
from op_cases.draw import Draw, Spec
from op_cases.random_start import HIGHEST_ID, SEED
from op_cases.random_words import words

# [N, C, H, W] of the data set, from which a batch is drawn.
_SHAPES: tuple[Shape, ...] = (
    (7, 3, 7, 9),
    (1, 1, 1, 1),
    (3, 33, 5, 4),
    (4, 3, 32, 32),
    (0, 3, 7, 9),
)
_BENCH_SHAPES: tuple[Shape, ...] = ((10000, 3, 32, 32), (256, 3, 224, 224))


def _arguments(
    spec: Spec,
    *,
    pad: int,
    mode: str = "constant",
    flip: bool = True,
    channels_last: bool = False,
) -> Arguments:
    """Each image of the batch drawn from the data set with repetition, under an id of its own."""
    draw = Draw(spec)
    count = spec.shape[0]
    batch = 0 if count == 0 else 5 if spec.shape not in _BENCH_SHAPES else 128
    if mode == "reflect":  # the largest border that an image of this size can have
        pad = min(pad, min(spec.shape[2:]) - 1)
    return {
        "images": draw.pixels(),
        "indices": draw.integers(0, max(count, 1), batch),
        "pad": pad,
        "mode": mode,
        "flip": flip,
        "seed": SEED,
        "sample_ids": draw.integers(0, HIGHEST_ID, batch),
        "dtype": spec.dtype,
        "channels_last": channels_last,
    }


def _formula(
    images: Tensor,
    indices: Tensor,
    pad: int,
    mode: str,
    flip: bool,
    seed: int,
    sample_ids: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, ...]:
    _, channels, height, width = images.shape
    out = torch.zeros((len(indices), channels, height, width), dtype=torch.float64)
    drawn = words(seed, sample_ids.tolist(), 4)
    for i, index in enumerate(indices.tolist()):
        image = images[index].cpu().float() / 255
        padded = F.pad(image[None], (pad,) * 4, mode=mode)[0]
        down, right = (int(word) % (2 * pad + 1) for word in drawn[i, :2])
        window = padded[:, down : down + height, right : right + width]
        out[i] = window.flip(-1) if flip and drawn[i, 2] & 1 else window
    return (out.to(images.device),)


def _scale(**_: object) -> tuple[float, ...]:
    return (1.0,)


def _traffic(arguments: Arguments, results: tuple[Tensor, ...]) -> int:
    """The batch's own images are read, one byte per pixel, not the data set."""
    return results[0].numel() * (1 + results[0].element_size())


def _indices(*values: int) -> Arguments:
    return {"indices": torch.tensor(values), "sample_ids": None}


_BAD = (
    Bad("images", TypeError, lambda k: {"images": k["images"].float()}),
    Bad("images", ValueError, lambda k: {"images": k["images"][0]}),
    Bad("indices", TypeError, lambda k: {"indices": k["indices"].int()}),
    Bad("indices", ValueError, lambda k: {"indices": k["indices"][:, None]}),
    Bad("indices", ValueError, lambda k: {"indices": k["indices"].to("meta"), "sample_ids": None}),
    Bad("indices", IndexError, lambda k: _indices(0, len(k["images"]))),
    Bad("indices", IndexError, lambda k: _indices(-1, 0)),
    Bad("images", TypeError, lambda k: {"images": k["images"].tolist()}),
    Bad("indices", TypeError, lambda k: {"indices": [0]}),
    Bad("pad", TypeError, lambda k: {"pad": 2.5}),
    Bad("pad", ValueError, lambda k: {"pad": -1}),
    Bad("pad", ValueError, lambda k: {"pad": 7, "mode": "reflect"}),
    Bad("mode", ValueError, lambda k: {"mode": "circular"}),
    Bad("seed", ValueError, lambda k: {"seed": 2**64}),
    Bad("sample_ids", ValueError, lambda k: {"sample_ids": k["sample_ids"][:2]}),
    Bad("sample_ids", ValueError, lambda k: {"sample_ids": k["sample_ids"].double()}),
    Bad("sample_ids", ValueError, lambda k: {"sample_ids": k["sample_ids"].to("meta")}),
    Bad("dtype", TypeError, lambda k: {"dtype": torch.uint8}),
)

_common = partial(
    OpCase,
    op="crop_flip",
    formula=_formula,
    scale=_scale,
    layout_of=(torch.contiguous_format,),
    function=crop_flip,
    bit_equal=DTYPES,
    shared=frozenset({"images"}),
    shapes=_SHAPES,
    large=(6, 3, 96, 96),
    bench_layouts=("contiguous",),
    traffic=_traffic,
)

CASES = (
    _common(
        variant="constant",
        arguments=partial(_arguments, pad=4),
        bench_shapes=_BENCH_SHAPES,
        bad=_BAD,
    ),
    _common(
        variant="channels-last",
        arguments=partial(_arguments, pad=4, channels_last=True),
        layout_of=(torch.channels_last,),
        bench_shapes=_BENCH_SHAPES,
    ),
    _common(variant="reflect", arguments=partial(_arguments, pad=4, mode="reflect")),
    _common(variant="wide-border", arguments=partial(_arguments, pad=11, flip=True)),
    _common(variant="plain", arguments=partial(_arguments, pad=0, flip=False)),
)
