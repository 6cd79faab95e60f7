"""The fused squares are those of the operations of torch that define them, bit by bit."""

from __future__ import annotations

import pytest
import torch

from fastadv.attacks.square_points import square_points, square_points_by_torch, words_for
from fastadv.ops import NATIVE

pytestmark = pytest.mark.skipif(NATIVE.library is None, reason="needs the compiled part")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(9, 3, 8, 8), (4, 1, 5, 12), (3, 40, 6, 4)])
def test_it_gives_the_bits_of_torch(shape: tuple[int, ...], channels_last: bool) -> None:
    drawn = torch.Generator().manual_seed(0)
    images, highest, lowest = torch.rand((3, *shape), generator=drawn).unbind()
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    count = 2 + words_for(shape[1])
    words = torch.randint(2**32, (shape[0], count), generator=drawn)
    for given in ((images, highest, lowest), (images.double(), highest.double(), lowest.double())):
        before = given[0].clone()
        for side in (1, 2, min(shape[2:])):
            found = square_points(*given, words, side)
            assert torch.equal(found, square_points_by_torch(*given, words, side))
            assert not torch.equal(found, given[0]) and torch.equal(before, given[0])


def test_the_largest_words_stay_within_the_image() -> None:
    images, ends = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    words = torch.tensor([[2**32 - 1, 2**32 - 1, 1], [0, 0, 1]])
    found = square_points(images, ends, -ends, words, 3)
    assert found[0, 0, 1:, 1:].eq(1).all() and found[1, 0, :3, :3].eq(1).all()
    assert found.sum() == 18


def test_the_op_refuses_what_it_cannot_take() -> None:
    images, words = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, dtype=torch.int64)
    op = torch.ops.fastadv.square_points
    with pytest.raises(ValueError, match="side must be from 1 to 4, got 5"):
        op(images, images, images, words, 5)
    with pytest.raises(ValueError, match="words must be int64"):
        op(images, images, images, words[:, :2], 2)
    with pytest.raises(ValueError, match="must have the shape of images"):
        op(images, images[:1], images, words, 2)
    with pytest.raises(TypeError, match="images must be float32 or float64"):
        op(images.half(), images.half(), images.half(), words, 2)


def test_only_the_low_32_bits_of_a_word_count() -> None:
    """Other numbers, as from a plain random int64, once put squares outside of the images."""
    images, ends = torch.zeros(64, 1, 4, 4), torch.ones(64, 1, 4, 4)
    words = torch.randint(-(2**63), 2**63 - 1, (64, 3), generator=torch.Generator().manual_seed(0))
    words[:, 2] = 1
    found = torch.ops.fastadv.square_points(images, ends, -ends, words, 2)
    assert torch.equal(
        found, torch.ops.fastadv.square_points(images, ends, -ends, words & 0xFFFFFFFF, 2)
    )
    assert found.flatten(1).sum(1).eq(4).all()
