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
# Likewise, with the size of the batch; the second is a whole data set in one call.
_BENCH_BATCHES: dict[Shape, int] = {
    (10000, 3, 32, 32): 128,
    (50000, 3, 32, 32): 50000,
    (256, 3, 224, 224): 128,
}


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
    batch = 0 if count == 0 else _BENCH_BATCHES.get(spec.shape, 5)
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


def _usual(
    images: Tensor,
    indices: Tensor,
    pad: int,
    dtype: torch.dtype,
    shifts: Tensor,
    flipped: Tensor,
) -> Tensor:
    """Pad the batch, take every image's window from a view of all windows, mirror where drawn."""
    height, width = images.shape[2:]
    padded = F.pad(images[indices].to(dtype) / 255, (pad,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 2 pad + 1, 2 pad + 1, H, W]
    rows = torch.arange(len(indices), device=images.device)
    cropped = windows[rows, :, shifts[:, 0], shifts[:, 1]]
    return torch.where(flipped[:, None, None, None], cropped.flip(-1), cropped)


def _usual_keywords(arguments: Arguments) -> Arguments:
    """With the draws made beforehand, which favours the rival."""
    ids, pad = arguments["sample_ids"], arguments["pad"]
    drawn = torch.from_numpy(words(arguments["seed"], ids.tolist(), 4).astype("int64")).to(
        ids.device
    )
    keywords = {name: arguments[name] for name in ("images", "indices", "pad", "dtype")}
    return {**keywords, "shifts": drawn[:, :2] % (2 * pad + 1), "flipped": drawn[:, 2] % 2 == 1}


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
    Bad("dtype", TypeError, lambda k: {"dtype": torch.zeros(3).numpy()}),
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
    bench_compiled=False,
    traffic=_traffic,
)

CASES = (
    _common(
        variant="constant",
        arguments=partial(_arguments, pad=4),
        rival=_usual,
        rival_keywords=_usual_keywords,
        bench_shapes=tuple(_BENCH_BATCHES),
        bad=_BAD,
    ),
    _common(
        variant="channels-last",
        arguments=partial(_arguments, pad=4, channels_last=True),
        layout_of=(torch.channels_last,),
        bench_shapes=((10000, 3, 32, 32),),
    ),
    _common(variant="reflect", arguments=partial(_arguments, pad=4, mode="reflect")),
    _common(variant="wide-border", arguments=partial(_arguments, pad=11, flip=True)),
    _common(variant="plain", arguments=partial(_arguments, pad=0, flip=False)),
)
