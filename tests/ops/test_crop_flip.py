"""Crop and flip: exact pixels, the distribution of windows, what the draws depend on."""

from __future__ import annotations

import pytest
import torch
from op_cases.running import places
from torch import Tensor

from fastadv.ops import backend, crop_flip

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
everywhere = pytest.mark.parametrize(("device", "name"), places("crop_flip"))
PAD = 2
PLACES = 2 * PAD + 1


def _pixels(device: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)


def _scaled(images: Tensor) -> Tensor:
    """The images in 0..1, on the CPU: CUDA divides by a number by multiplying with its reciprocal."""
    return images.cpu().float() / 255


@everywhere
def test_every_pixel_value_is_scaled_exactly(device: str, name: str) -> None:
    images = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 16, 16)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    expected = torch.tensor([v / 255 for v in range(256)], dtype=torch.float32)
    with backend(name):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = crop_flip(images, one, 0, flip=False, dtype=dtype)
            assert torch.equal(out.flatten().cpu(), expected.to(dtype))


@everywhere
def test_without_pad_and_flip_it_gathers(device: str, name: str) -> None:
    images = _pixels(device, 9, 3, 5, 6)
    indices = torch.tensor([8, 0, 3, 3, 8], device=device)
    with backend(name):
        out = crop_flip(images, indices, 0, flip=False)
    assert torch.equal(out.cpu(), _scaled(images[indices]))


@everywhere
def test_windows_and_mirrors_are_equally_likely(device: str, name: str) -> None:
    """An image whose every pixel has a value of its own tells where the window was."""
    count = 5000
    values = 1 + torch.arange(49, dtype=torch.uint8, device=device).view(1, 1, 7, 7)
    indices = torch.zeros(count, dtype=torch.int64, device=device)
    ids = torch.arange(count, device=device)
    with backend(name):
        out = crop_flip(values, indices, PAD, seed=4, sample_ids=ids)
    found = (out[:, 0] * 255).round().long().cpu() - 1
    centre, right_of_it = found[:, 3, 3], found[:, 3, 4]
    down, across = centre // 7 - 3, centre % 7 - 3
    mirrored = right_of_it < centre
    share = mirrored.double().mean()
    assert abs(float(share) - 0.5) < 4 * (0.25 / count) ** 0.5
    # The window is cut before it is mirrored, so that `across` is its true place either way.
    windows = torch.bincount((down + PAD) * PLACES + across + PAD, minlength=PLACES**2)
    assert len(windows) == PLACES**2
    expected = count / PLACES**2
    assert float((windows - expected).abs().max()) < 4.5 * expected**0.5


@everywhere
def test_a_border_wider_than_the_image_is_black(device: str, name: str) -> None:
    """Most windows then miss the image altogether: all but 15 of 441 places."""
    images = _pixels(device, 3, 2, 3, 2).clamp(min=1)
    indices = torch.arange(3, device=device).repeat(100)
    ids = torch.arange(300, device=device)
    with backend(name):
        out = crop_flip(images, indices, 10, seed=1, sample_ids=ids)
    empty = (out == 0).flatten(1).all(1)
    assert 0.92 < float(empty.double().mean()) < 1
    assert float(out.max()) > 0


@everywhere
def test_draws_depend_on_seed_and_sample_id_alone(device: str, name: str) -> None:
    images = _pixels(device, 20, 3, 8, 8)
    indices = torch.arange(20, device=device)
    with backend(name):
        whole = crop_flip(images, indices, seed=3)
        assert torch.equal(whole[[7, 2]], crop_flip(images, indices[[7, 2]], seed=3))
        assert torch.equal(whole, crop_flip(images, indices, seed=3, sample_ids=indices))
        assert not torch.equal(whole, crop_flip(images, indices, seed=4))
        assert not torch.equal(whole, crop_flip(images, indices, seed=3, sample_ids=indices + 20))
        same = crop_flip(images, indices[[1, 1]], seed=3, sample_ids=indices[[1, 1]])
        assert torch.equal(same[0], same[1])


@everywhere
def test_flip_alone_mirrors_about_half(device: str, name: str) -> None:
    images = _pixels(device, 200, 1, 3, 5)
    indices = torch.arange(200, device=device)
    with backend(name):
        out = crop_flip(images, indices, 0, seed=3).cpu()
    plain = _scaled(images)
    same = (out == plain).flatten(1).all(1)
    mirrored = (out == plain.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 70 < int(same.sum()) < 130


@everywhere
def test_the_largest_reflected_border(device: str, name: str) -> None:
    images = _pixels(device, 1, 1, 4, 4)
    indices = torch.zeros(64, dtype=torch.int64, device=device)
    ids = torch.arange(64, device=device)
    with backend(name):
        out = crop_flip(images, indices, 3, "reflect", seed=0, sample_ids=ids).cpu()
    padded = torch.nn.functional.pad(_scaled(images), (3, 3, 3, 3), mode="reflect")
    windows = padded.unfold(2, 4, 1).unfold(3, 4, 1).reshape(-1, 16)
    known = torch.cat((windows, windows.view(-1, 4, 4).flip(-1).reshape(-1, 16)))
    for image in out.reshape(-1, 16):
        assert (known == image).all(1).any()


def test_the_op_itself_refuses_indices_beyond_the_data_set() -> None:
    """Where a call is compiled, the function's own check is left out."""
    images = _pixels("cpu", 9, 3, 8, 8)
    for bad in (9, -1):
        indices = torch.tensor([0, bad])
        with pytest.raises(IndexError, match=rf"indices must be in 0 .. 8, got {bad}"):
            torch.ops.fastadv.crop_flip(
                images, indices, 0, "constant", False, 0, indices, torch.float32, False
            )


def test_no_seed_follows_torchs_generator() -> None:
    images, indices = _pixels("cpu", 9, 3, 8, 8), torch.arange(9)
    torch.manual_seed(0)
    first, second = crop_flip(images, indices), crop_flip(images, indices)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(crop_flip(images, indices), first)


def test_a_plain_gather_draws_no_seed() -> None:
    images, indices = _pixels("cpu", 9, 3, 8, 8), torch.arange(9)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    crop_flip(images, indices, 0, flip=False)
    assert torch.equal(torch.rand(1), expected)
