"""Which queries of Square need no pass: against the points themselves."""

from __future__ import annotations

import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn
from torch import Tensor, nn

import fastadv
from fastadv.attacks.square_ahead import AcceptedShare, _next_changes, _pass_size
from fastadv.attacks.square_points import square_points
from fastadv.attacks.square_proposals import Squares
from fastadv.attacks.square_tried import TriedSquares

pytestmark = pytest.mark.usefixtures("one_thread")


class Ends(Squares):
    """The ends of a ball, without the engine of a batch."""

    def __init__(self, lowest: Tensor, highest: Tensor) -> None:
        self.lowest, self.highest = lowest, highest


def drawn(images: int, queries: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2**32, (images, queries, 3), generator=generator)


@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 4, 3), (2, 2, 5)])
def test_a_query_is_fresh_if_its_square_is_new_and_changes_the_image(
    shape: tuple[int, ...],
) -> None:
    """Images at the ends of the ball, but for an element, as after a given start."""
    generator, count, queries = torch.Generator().manual_seed(0), 4, 40
    lowest, highest = torch.zeros(count, *shape), torch.ones(count, *shape)
    images = torch.randint(2, (count, *shape), generator=generator).float()
    images[0, 0, 0, 0] = 0.5
    sides = torch.tensor([1, 2, 1, 2])
    tried = TriedSquares.of(Ends(lowest, highest), images, 1)
    assert tried is not None
    seen: list[set[tuple[int, ...]]] = [set() for _ in range(count)]
    valid = torch.arange(queries) < torch.tensor([40, 40, 25, 40])[:, None]
    for _ in range(3):
        words = drawn(count, queries, generator)
        done = tried.exhausted(sides, images)
        fresh = tried.fresh(words, sides, valid)
        assert not fresh[done].any() and not fresh[~valid].any()
        for i in range(count):
            ends = (
                one[i].expand(queries, *shape).contiguous() for one in (images, highest, lowest)
            )
            points = square_points(*ends, words[i], int(sides[i]))
            for query in valid[i].nonzero().flatten().tolist():
                square = square_of(words[i, query], int(sides[i]), shape)
                changes = not torch.equal(points[query], images[i])
                assert bool(fresh[i, query]) == (changes and square not in seen[i])
                seen[i].add(square)
            rows = torch.full((int(fresh[i].sum()),), i)
            tried.add(rows, words[i, fresh[i]], sides)
        images = images.clone()
        images[1] = highest[1]
        tried.forget(torch.tensor([False, True, False, False]))
        seen[1].clear()
        if int(sides[3]) == 2:  # a smaller square begins a new table
            sides = torch.tensor([1, 2, 1, 1])
            seen[3].clear()
    tried.keep(torch.tensor([2]))
    every = drawn(1, 4000, generator)
    tried.add(torch.zeros(4000, dtype=torch.int64), every[0], sides[2:3])
    assert tried.exhausted(sides[2:3], images[2:3]).tolist() == [True]


def square_of(words: Tensor, side: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The row, column and signs of the square that some words draw."""
    row, column, signs = words.tolist()
    places = (length - side + 1 for length in shape[1:])
    return *(w * n >> 32 for w, n in zip((row, column), places, strict=True)), signs % 2 ** shape[0]


def test_no_table_is_kept_of_many_squares() -> None:
    large = torch.zeros(1, 3, 64, 64)
    assert TriedSquares.of(Ends(large, large + 1), large, 1) is None
    deep = torch.zeros(1, 40, 4, 4)
    assert TriedSquares.of(Ends(deep, deep + 1), deep, 1) is None


def test_a_query_that_is_settled_costs_no_pass() -> None:
    """With the whole schedule in 700 queries most squares are single pixels, which are tried again and again."""
    (x, y), ids = digits_test(16), torch.arange(500, 516)
    sizes: list[int] = []
    model = trained_small_cnn().double()
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    attack = fastadv.Square(model, 0.05, 700, rescale_schedule=True, seed=3)
    ahead = attack(x.double(), y, sample_ids=ids)
    looked = sum(sizes)
    sizes.clear()
    # A callable may count its queries, so it gets one after the other.
    attack = fastadv.Square(lambda images: model(images), 0.05, 700, rescale_schedule=True, seed=3)
    plain = attack(x.double(), y, sample_ids=ids)
    assert 4 < int((model(plain).argmax(1) == y).sum()) < 16
    torch.testing.assert_close(ahead, plain, rtol=0, atol=1e-12)
    assert looked < 0.7 * sum(sizes)


def test_a_model_that_nothing_moves_is_asked_about_each_point_once() -> None:
    sizes: list[int] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.zeros_(model[1].weight)
    model[1].bias.data.copy_(torch.tensor([1.0, 0.0]))
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    x = torch.full((2, 1, 2, 2), 0.5)
    fastadv.Square(model, 0.1, 5000, seed=0)(x, torch.zeros(2, dtype=torch.int64))
    assert sum(sizes) < 600  # most of them until it begins to look ahead


def test_a_tiny_share_of_accepted_queries_looks_far_ahead() -> None:
    share = AcceptedShare()
    for _ in range(20):
        share.see(0, 3000)
        assert share.expected(64) == pytest.approx(64, rel=1e-3)
    share.value = 0.0
    assert share.expected(8) == 8
    share.value = 1.0
    assert share.expected(8) == 1
    share.value = 0.25
    assert share.expected(2) == pytest.approx(1.75)


def test_the_next_smaller_square() -> None:
    assert _next_changes([3, 3, 2, 1, 1]) == [0, 3, 3, 4, 6, 6]
    assert _next_changes([2]) == [0, 2]


def test_passes_have_few_sizes() -> None:
    sizes = {_pass_size(rows) for rows in range(1, 1000)}
    assert len(sizes) < 45
    assert all(rows <= _pass_size(rows) <= 1.26 * rows for rows in range(1, 1000))
