"""The loader: exact permutations, shards, resumption, augmentation."""

from __future__ import annotations

import pytest
import torch

from fastadv.data import ImageData, Loader, Splits
from fastadv.ops import crop_flip
from fastadv.seeding import derive_seed


def toy(n: int = 50) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageData(images, torch.arange(n) % 7, 7, "toy")


def ids_of(loader, epoch):
    return torch.cat([batch.ids for batch in loader.epoch(epoch)]).tolist()


def assert_same_batches(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_epoch_is_the_seeded_permutation():
    generator = torch.Generator().manual_seed(derive_seed(5, "shuffle", 3))
    expected = torch.randperm(50, generator=generator).tolist()
    ids = ids_of(Loader(toy(), 10, seed=5, train=True), epoch=3)
    assert ids == expected


def test_every_image_once_and_epochs_differ():
    loader = Loader(toy(), 10, seed=1, train=True)
    first, second = ids_of(loader, 0), ids_of(loader, 1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != ids_of(Loader(toy(), 10, seed=2, train=True), 0)


def test_batches_fit_together():
    data = toy()
    loader = Loader(data, 16, seed=0, train=True)
    for x, y, ids in loader.epoch(0):
        assert x.shape == (16, 3, 8, 8)
        assert x.dtype == torch.float32
        assert ids.dtype == torch.int64
        assert x.min() >= 0 and x.max() <= 1
        assert torch.equal(y, data.labels[ids])


def test_lengths():
    for n, batch_size, full, with_rest in [(50, 16, 3, 4), (48, 16, 3, 3), (16, 16, 1, 1)]:
        train = Loader(toy(n), batch_size, seed=0, train=True)
        evaluation = Loader(toy(n), batch_size, train=False)
        kept = Loader(toy(n), batch_size, seed=0, train=True, drop_last=False)
        assert len(train) == len(list(train.epoch(0))) == full
        assert len(evaluation) == len(list(evaluation.epoch(0))) == with_rest
        assert len(kept) == len(list(kept.epoch(0))) == with_rest


def test_evaluation_is_plain_and_in_order():
    data = toy()
    batches = list(Loader(data, 16, seed=3, train=False).epoch(0))
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(50))
    x = torch.cat([batch.x for batch in batches])
    torch.testing.assert_close(x, data.images.float() / 255, rtol=0, atol=1e-7)


def test_augmentation_is_that_of_crop_flip():
    data = toy()
    loader = Loader(data, 10, seed=4, train=True, pad=2, mode="reflect", flip=True)
    seed = derive_seed(4, "augment", 6)
    for x, _, ids in loader.epoch(6):
        expected = crop_flip(data.images, ids, pad=2, mode="reflect", flip=True, seed=seed)
        assert torch.equal(x, expected)


def test_augmentation_can_be_turned_off():
    data = toy()
    for x, _, ids in Loader(data, 10, seed=0, train=True, pad=0, flip=False).epoch(0):
        torch.testing.assert_close(x, data.images[ids].float() / 255, rtol=0, atol=1e-7)


def test_augmentation_changes_with_the_epoch_alone():
    """An image looks the same in any batch of an epoch, and different in another epoch."""

    def by_id(loader, epoch):
        batches = list(loader.epoch(epoch))
        ids = torch.cat([batch.ids for batch in batches])
        return torch.cat([batch.x for batch in batches])[ids.argsort()]

    small, large = Loader(toy(), 5, seed=0, train=True), Loader(toy(), 25, seed=0, train=True)
    assert torch.equal(by_id(small, 2), by_id(large, 2))
    assert not torch.equal(by_id(small, 2), by_id(small, 3))


@pytest.mark.parametrize("train", [True, False])
def test_resumption_in_the_middle_is_exact(train):
    loader = Loader(toy(), 8, seed=9, train=train)
    whole = list(loader.epoch(2))
    for start in range(len(loader) + 1):
        again = Loader(toy(), 8, seed=9, train=train)
        assert_same_batches(again.epoch(2, start_step=start), whole[start:])


def test_global_state_is_neither_read_nor_changed():
    loader = Loader(toy(), 10, seed=0, train=True)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = list(loader.epoch(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert_same_batches(loader.epoch(0), first)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_are_contiguous_slices_of_the_global_batch(world_size):
    whole = list(Loader(toy(), 12, seed=7, train=True).epoch(1))
    shards = [
        list(Loader(toy(), 12, seed=7, train=True, rank=rank, world_size=world_size).epoch(1))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [shard[step] for shard in shards]
        assert all(len(part.ids) == 12 // world_size for part in parts)
        assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)
        assert torch.equal(torch.cat([part.x for part in parts]), batch.x)
        assert torch.equal(torch.cat([part.y for part in parts]), batch.y)


@pytest.mark.parametrize(("n", "batch_size", "world_size"), [(50, 16, 3), (17, 16, 4), (3, 2, 8)])
def test_evaluation_shards_cover_everything_once(n, batch_size, world_size):
    ids = []
    for rank in range(world_size):
        loader = Loader(toy(n), batch_size, train=False, rank=rank, world_size=world_size)
        batches = list(loader.epoch(0))
        assert all(len(batch.ids) > 0 for batch in batches)
        ids += [index for batch in batches for index in batch.ids.tolist()]
    assert sorted(ids) == list(range(n))


def test_memory_format():
    loader = Loader(toy(), 10, seed=0, train=True, channels_last=True)
    plain = Loader(toy(), 10, seed=0, train=True)
    for left, right in zip(loader.epoch(0), plain.epoch(0), strict=True):
        assert left.x.is_contiguous(memory_format=torch.channels_last)
        assert right.x.is_contiguous()
        assert torch.equal(left.x, right.x)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="data must have at least one image, got none in 'toy'"):
        Loader(toy(0), 1, train=False)
    for batch_size in (0, -3):
        with pytest.raises(ValueError, match=f"batch_size must be >= 1, got {batch_size}"):
            Loader(toy(), batch_size, train=False)
    with pytest.raises(ValueError, match=r"batch_size must be <= 50 .* got 51"):
        Loader(toy(), 51, seed=0, train=True)
    assert len(Loader(toy(), 51, train=False)) == 1
    with pytest.raises(ValueError, match="pad must be >= 0, got -1"):
        Loader(toy(), 10, seed=0, train=True, pad=-1)
    with pytest.raises(ValueError, match=r"pad must be < 8 .* got 8"):
        Loader(toy(), 10, seed=0, train=True, pad=8, mode="reflect")
    with pytest.raises(ValueError, match="mode must be 'constant' or 'reflect', got 'wrap'"):
        Loader(toy(), 10, seed=0, train=True, mode="wrap")
    with pytest.raises(ValueError, match=r"rank must be in 0 \.\. 1, got 2"):
        Loader(toy(), 10, train=False, rank=2, world_size=2)
    with pytest.raises(ValueError, match="world_size must be >= 1, got 0"):
        Loader(toy(), 10, train=False, world_size=0)
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of world_size \(3\)"):
        Loader(toy(), 10, seed=0, train=True, world_size=3)


def test_position_is_checked_at_the_call():
    loader = Loader(toy(), 10, seed=0, train=True)
    with pytest.raises(ValueError, match=r"start_step must be in 0 \.\. 5, got 6"):
        loader.epoch(0, start_step=6)
    with pytest.raises(ValueError, match="epoch must be >= 0, got -1"):
        loader.epoch(-1)


def test_a_loader_and_its_data_show_what_they_hold():
    assert repr(toy()) == "ImageData('toy', 50 images of 3x8x8, 7 classes)"
    assert "tensor" not in repr(Splits(toy(), toy(20)))
    assert repr(Loader(toy(), 10, train=True)) == (
        "Loader('toy', 50 images, batch_size=10, train=True)"
    )
    extra = Loader(toy(), 10, train=True, extra=toy(20), extra_fraction=0.5)
    assert "50 images and 20 extra" in repr(extra)
