"""Random small classifiers, assembled from layers and torch functions of many kinds.

A network is drawn as a list of blocks. Each block is drawn for the shape that reaches it and keeps the batch axis
first. The draws come from a `random.Random`, so that a seed gives the same network everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from network_layers import (
    Attention,
    Buffered,
    Function,
    Normalize,
    Quantized,
    Residual,
    Tempered,
)
from torch import Tensor, nn

Shape = tuple[int, ...]
Block = Callable[[random.Random, Shape], nn.Module]
WIDTHS = (1, 3, 4, 6, 8, 16, 17, 32, 48)


def _convolution(rng: random.Random, shape: Shape) -> nn.Module:
    """Any geometry that leaves at least one pixel."""
    channels, size = shape[1], min(shape[2:])
    while True:
        kernel = tuple(rng.choice((1, 1, 2, 3, 3, 3, 4, 5)) for _ in range(2))
        if rng.random() < 0.7:
            kernel = (kernel[0], kernel[0])
        stride, dilation = rng.choice((1, 1, 1, 2, 3)), rng.choice((1, 1, 1, 2))
        if shape[3] == 1:  # strides of channels-last images of one column can crash torch 2.13
            stride = 1
        padding: int | str | tuple[int, int] = rng.choice((0, 1, 1, 2, (1, 0)))
        if stride == 1 and rng.random() < 0.2:
            padding = "same"
        groups = rng.choice([g for g in (1, 1, 1, 2, 4, channels) if channels % g == 0])
        out = rng.choice([w for w in WIDTHS if w % groups == 0] or [groups])
        smallest = (
            0 if padding == "same" else min(padding) if isinstance(padding, tuple) else padding
        )
        if padding == "same" or size + 2 * smallest >= dilation * (max(kernel) - 1) + 1:
            break
    mode = rng.choice(("zeros", "zeros", "zeros", "reflect", "circular", "replicate"))
    if mode != "zeros" and (padding == "same" or isinstance(padding, tuple) or padding >= size):
        mode = "zeros"
    return nn.Conv2d(
        channels, out, kernel, stride, padding, dilation, groups, rng.random() < 0.6, mode
    )


def _normalisation(rng: random.Random, shape: Shape) -> nn.Module:
    channels, one_pixel = shape[1], shape[2] * shape[3] == 1
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.BatchNorm2d(channels, affine=rng.random() < 0.8),
        lambda: nn.BatchNorm2d(channels),
        lambda: nn.LayerNorm(list(shape[1:])),
        lambda: nn.GroupNorm(rng.choice([g for g in (1, 2, 4) if channels % g == 0]), channels),
        lambda: Function("channels-last layer norm", _channels_last_norm(channels)),
    ]
    if not one_pixel:
        kinds.append(lambda: nn.InstanceNorm2d(channels, affine=rng.random() < 0.5))
    return rng.choice(kinds)()


def _channels_last_norm(channels: int) -> Callable[[Tensor], Tensor]:
    return lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (channels,)).permute(0, 3, 1, 2)


def _activation(rng: random.Random, shape: Shape) -> nn.Module:
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.ReLU(inplace=rng.random() < 0.5),
        lambda: nn.LeakyReLU(rng.choice((0.01, 0.1, 0.3)), inplace=rng.random() < 0.5),
        lambda: nn.SiLU(inplace=rng.random() < 0.5),
        nn.GELU,
        nn.Softplus,
        nn.Tanh,
        nn.ELU,
        nn.Hardswish,
        lambda: nn.PReLU(rng.choice((1, shape[1]))),
        lambda: Function("torch.relu_", lambda x: torch.relu_(x * 1.0)),
        lambda: Function("clamp(min=0)", lambda x: x.clamp(min=0)),
        lambda: Function("torch.maximum(x, 0.1 x)", lambda x: torch.maximum(x, 0.1 * x)),
        lambda: Function("where", lambda x: torch.where(x > 0, x, 0.2 * x)),
        lambda: Function("x * sigmoid(1.7 x)", lambda x: x * torch.sigmoid(1.7 * x)),
    ]
    return rng.choice(kinds)()


def _pooling(rng: random.Random, shape: Shape) -> nn.Module:
    size = min(shape[2:])
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.AdaptiveAvgPool2d(rng.randint(1, size)),
        lambda: nn.AdaptiveMaxPool2d(rng.randint(1, size)),
        lambda: Function("mean of rows", lambda x: x.mean(2, keepdim=True)),
        lambda: Function("amax of columns", lambda x: x.amax(3, keepdim=True)),
    ]
    if size >= 2:
        kinds += [
            lambda: nn.MaxPool2d(2, ceil_mode=rng.random() < 0.5),
            lambda: nn.AvgPool2d(2),
            lambda: nn.LPPool2d(2, 2),
        ]
    if size >= 3:
        kinds += [
            lambda: nn.MaxPool2d(3, 2, 1),
            lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=rng.random() < 0.5),
            lambda: nn.AvgPool2d(3, 1, 1, ceil_mode=True),
        ]
    return rng.choice(kinds)()


def _half_shuffled(x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return torch.cat((second, first.flip(3)), 1)


def _gated(x: Tensor) -> Tensor:
    value, gate = x.split(x.shape[1] // 2, 1)
    return value * gate.sigmoid()


def _written(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out.add_(x).mul_(0.7)
    return out


def _rolled(x: Tensor) -> Tensor:
    return x.roll(1, 2) - 0.5 * x


def _by_images(x: Tensor) -> Tensor:
    """Works on numbers that contain the batch size."""
    batch, channels = x.shape[:2]
    flat = x.reshape(batch * channels, -1)
    return (flat - flat.mean(1, keepdim=True)).view(x.shape)


def _standardised(x: Tensor) -> Tensor:
    return (x - x.mean((2, 3), keepdim=True)) / (
        x.var((1, 2, 3), keepdim=True, unbiased=False) + 0.1
    ).sqrt()


def _low_frequencies(x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(x)
    return torch.fft.irfft2(spectrum[..., : max(1, spectrum.shape[-1] - 1)], s=x.shape[-2:])


def _turned(x: Tensor) -> Tensor:
    turn = torch.tensor([[0.8, -0.3, 0.1], [0.2, 0.9, 0.0]], device=x.device, dtype=x.dtype)
    grid = F.affine_grid(turn.expand(x.shape[0], 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _transposed(rng: random.Random, shape: Shape) -> nn.Module:
    """A transposed convolution."""
    channels = shape[1]
    groups = rng.choice([g for g in (1, 1, 2, channels) if channels % g == 0])
    stride = rng.choice((1, 2))
    out = groups * rng.choice((1, 2, 4))
    return nn.ConvTranspose2d(
        channels, out, 3, stride, 1, rng.choice((0, stride - 1)), groups, rng.random() < 0.5
    )


def _functional(rng: random.Random, shape: Shape) -> nn.Module:
    channels, height, width = shape[1:]
    found: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        ("flip", lambda x: x.flip(3)),
        ("transpose", lambda x: x.transpose(2, 3)),
        ("pad", lambda x: F.pad(x, (1, 0, 1, 1), value=0.3)),
        ("interpolate nearest", lambda x: F.interpolate(x, size=(4, 5))),
        ("interpolate bilinear", lambda x: F.interpolate(x, size=(5, 4), mode="bilinear")),
        ("slice", lambda x: x[:, :, : max(1, height // 2)]),
        ("every second", lambda x: x[..., ::2]),
        ("written in place", _written),
        ("roll", _rolled),
        ("by images", _by_images),
        ("standardised", _standardised),
        ("unbind and stack", lambda x: torch.stack(x.unbind(3), 3) * 0.9),
        ("einsum", lambda x: torch.einsum("bchw,bchv->bchw", x, x).tanh()),
        ("normalize", lambda x: F.normalize(x, dim=1)),
        ("float and back", lambda x: x.double().mul(1.5).to(x.dtype)),
        ("contiguous", lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
        ("detached half", lambda x: x + 0.5 * x.detach()),
        ("expand", lambda x: x + x.mean(1, keepdim=True).expand(-1, channels, -1, -1)),
        ("cumsum", lambda x: 0.3 * x.cumsum(2)),
        ("sorted", lambda x: x.sort(3).values),
        ("top values", lambda x: x.topk(1, dim=2).values),
        ("quantized", lambda x: x + 0.5 * Quantized.apply(x, 64)),
        ("low frequencies", _low_frequencies),
        ("spectrum", lambda x: torch.fft.rfft(x, dim=3).real * 0.5),
        ("grid sample", _turned),
        ("antialiased", lambda x: F.interpolate(x, (4, 4), mode="bilinear", antialias=True)),
        ("local response", lambda x: F.local_response_norm(x, 3)),
    ]
    if channels % 2 == 0:
        found += [("half shuffled", _half_shuffled), ("gated", _gated)]
    if height % 2 == 0 and width % 2 == 0:
        found.append(("pixel unshuffle", lambda x: F.pixel_unshuffle(x, 2)))
    return Function(*rng.choice(found))


def _residual(rng: random.Random, shape: Shape) -> nn.Module:
    channels = shape[1]
    layers: list[nn.Module] = [nn.Conv2d(channels, channels, 3, padding=1, bias=rng.random() < 0.5)]
    if rng.random() < 0.7:
        layers.append(_normalisation(rng, shape))
    if rng.random() < 0.5:
        layers.insert(0, nn.ReLU())
    return Residual(
        nn.Sequential(*layers), rng.choice(("add", "add", "cat", "gate")), rng.random() < 0.4
    )


def _attention(rng: random.Random, shape: Shape) -> nn.Module:
    heads = rng.choice([h for h in (1, 2, 4) if shape[1] % h == 0])
    return Attention(shape[1], heads, rng.random() < 0.5)


def _squeeze(rng: random.Random, shape: Shape) -> nn.Module:
    """Squeeze and excitation."""
    channels = shape[1]
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1))
    return Residual(gate, "gate", False)


BLOCKS: tuple[tuple[Block, int], ...] = (
    (_convolution, 6),
    (_normalisation, 4),
    (_activation, 5),
    (_pooling, 2),
    (_functional, 3),
    (_residual, 3),
    (_attention, 1),
    (_squeeze, 1),
    (_transposed, 1),
    (lambda rng, shape: Buffered(shape[1]), 1),
    (lambda rng, shape: Tempered(rng.random() < 0.5), 1),
    (lambda rng, shape: nn.Dropout(0.3), 1),
    (lambda rng, shape: nn.Conv2d(shape[1], rng.choice((16, 32)), 3, padding=1), 3),
)


def _head(rng: random.Random, shape: Shape, classes: int) -> list[nn.Module]:
    """From features [B, C, H, W] to logits."""
    kind = rng.choice(("mean", "pool", "flatten", "max", "tokens"))
    if kind == "flatten":
        return [nn.Flatten(), nn.Linear(shape[1] * shape[2] * shape[3], classes)]
    last = nn.Linear(shape[1], classes, bias=rng.random() < 0.8)
    if kind == "pool":
        return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), last]
    if kind == "mean":
        return [Function("mean", lambda x: x.mean((2, 3))), last]
    if kind == "max":
        return [Function("amax", lambda x: x.amax((2, 3))), last]
    return [
        Function("first token", lambda x: x.flatten(2).transpose(1, 2)[:, 0] + x.mean((2, 3))),
        nn.Sequential(nn.LayerNorm(shape[1]), last),
    ]


def random_network(rng: random.Random, image: Shape, classes: int) -> nn.Sequential:
    """A classifier of images [B, *image], in eval mode, with settled normalisation statistics.

    Args:
        rng: decides the layers; torch's generator, seeded from it, the weights.
        image: shape of one image, [C, H, W].
        classes: number of classes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.randrange(2**31))
        x = torch.rand(8, *image)
        layers: list[nn.Module] = [Normalize(image[0])] if rng.random() < 0.5 else []
        model = nn.Sequential(*layers).train()
        x = model(x).detach()
        for _ in range(rng.randint(1, 9)):
            block = rng.choices([b for b, _ in BLOCKS], [w for _, w in BLOCKS])[0](
                rng, tuple(x.shape)
            )
            result = block.train()(x.clone()).detach()
            if not result.numel() or not result.isfinite().all() or result[0].numel() > 20000:
                continue
            layers.append(block)
            x = result
        for layer in _head(rng, tuple(x.shape), classes):
            layers.append(layer)
        return nn.Sequential(*layers).eval()
