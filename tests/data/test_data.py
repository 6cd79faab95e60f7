"""Data: the digits, data sets by name, selections, and in-memory sources."""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fastadv.data import (
    ImageData,
    dataset_names,
    from_dataset,
    from_tensors,
    load_dataset,
    load_digits,
    split_validation,
    subset,
)


class TestDigits:
    def test_shapes_and_levels(self):
        splits = load_digits()
        assert splits.train.images.shape == (1297, 1, 8, 8)
        assert splits.test.images.shape == (500, 1, 8, 8)
        assert splits.test.labels.bincount().tolist() == [50] * 10
        levels = {round(value * 255 / 16) for value in range(17)}
        assert set(splits.train.images.unique().tolist()) == levels

    def test_split_is_fixed_and_covers(self):
        from sklearn.datasets import load_digits as reference

        splits = load_digits()
        images = torch.cat([splits.train.images, splits.test.images])
        counts = (images.double() * 16 / 255).round().flatten(1)
        expected = torch.from_numpy(reference().data)
        assert sorted(counts.tolist()) == sorted(expected.tolist())
        # Written down, so that no change of the library moves the split.
        digest = hashlib.sha256(splits.test.images.numpy().tobytes()).hexdigest()
        assert digest[:16] == "4a30997e572f38c6"

    def test_missing_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match="pip install scikit-learn"):
            load_digits()


def test_load_dataset_by_name(tmp_path):
    assert load_dataset("digits").test.name == "digits test"
    assert set(dataset_names()) == {"digits", "cifar10", "cifar100"}
    with pytest.raises(ValueError, match="name must be one of digits, cifar10, cifar100, got 'x'"):
        load_dataset("x")
    with pytest.raises(ValueError, match=r"root must be the folder .* got None"):
        load_dataset("cifar10")
    with pytest.raises(FileNotFoundError):
        load_dataset("cifar100", tmp_path)


class TestSelection:
    data = ImageData(
        torch.arange(100, dtype=torch.uint8).reshape(100, 1, 1, 1),
        torch.tensor([0] * 70 + [1] * 25 + [2] * 5),
        3,
        "toy",
    )

    def test_subset_is_balanced_seeded_and_ordered(self):
        chosen = subset(self.data, 12, seed=1)
        assert chosen.labels.bincount().tolist() == [4, 4, 4]
        values = chosen.images.flatten().tolist()
        assert values == sorted(values)
        assert values == subset(self.data, 12, seed=1).images.flatten().tolist()
        assert values != subset(self.data, 12, seed=2).images.flatten().tolist()
        assert torch.equal(self.data.labels[chosen.images.flatten().long()], chosen.labels)

    def test_small_classes_are_used_up(self):
        assert subset(self.data, 50).labels.bincount().tolist() == [23, 22, 5]
        assert subset(self.data, 100).labels.bincount().tolist() == [70, 25, 5]

    def test_subsets_are_nested(self):
        small = set(subset(self.data, 10).images.flatten().tolist())
        assert small < set(subset(self.data, 30).images.flatten().tolist())

    def test_split_validation_partitions(self):
        rest, held_out = split_validation(self.data, 9, seed=3)
        assert len(held_out) == 9
        assert held_out.labels.bincount().tolist() == [3, 3, 3]
        both = rest.images.flatten().tolist() + held_out.images.flatten().tolist()
        assert sorted(both) == list(range(100))
        assert "held out" in held_out.name

    @pytest.mark.parametrize("n", [-1, 101])
    def test_size_out_of_range(self, n):
        with pytest.raises(ValueError, match=rf"n must be in 0 \.\. 100 .* got {n}"):
            subset(self.data, n)
        with pytest.raises(ValueError, match=r"n must be in 0 \.\. 100"):
            split_validation(self.data, n)


class TestTensors:
    labels = torch.tensor([0, 2], dtype=torch.int32)

    def test_uint8_is_kept(self):
        images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
        data = from_tensors(images, self.labels)
        assert data.images.data_ptr() == images.data_ptr()
        assert data.labels.dtype == torch.int64
        assert (data.num_classes, data.in_channels, data.image_size) == (3, 3, (4, 4))
        assert from_tensors(images, self.labels, 10).num_classes == 10

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
    def test_every_level_survives_floats(self, dtype):
        levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
        images = (levels.double() / 255).to(dtype)
        data = from_tensors(images, torch.tensor([0]))
        assert torch.equal(data.images, levels)

    def test_numpy_arrays(self):
        data = from_tensors(np.zeros((2, 1, 4, 4), np.uint8), np.array([0, 1]))
        assert len(data) == 2

    @pytest.mark.parametrize("wrong", [1.5, -0.1, float("nan"), float("inf")])
    def test_pixels_out_of_range(self, wrong):
        images = torch.full((2, 1, 4, 4), 0.5)
        images[1, 0, 2, 2] = wrong
        with pytest.raises(ValueError, match=r"floating-point images must be in 0\.\.1"):
            from_tensors(images, self.labels)

    def test_wrong_kinds(self):
        images = torch.zeros(2, 1, 4, 4)
        with pytest.raises(TypeError, match=r"images must be uint8 or floating point, got torch.i"):
            from_tensors(images.long(), self.labels)
        with pytest.raises(TypeError, match="labels must be integers"):
            from_tensors(images, torch.zeros(2))
        with pytest.raises(ValueError, match=r"images must be \[N, C, H, W\]"):
            from_tensors(images[:, 0], self.labels)
        with pytest.raises(ValueError, match=r"labels must be \[N\] with N = 2"):
            from_tensors(images, torch.zeros(3, dtype=torch.long))
        with pytest.raises(ValueError, match=r"labels must be in 0 \.\. 1, got 0 \.\. 2"):
            from_tensors(images, self.labels, num_classes=2)
        with pytest.raises(ValueError, match=r"labels must be in 0 \.\. 9, got -1 \.\. 0"):
            from_tensors(images, torch.tensor([0, -1]), num_classes=10)
        with pytest.raises(ValueError, match="num_classes must be given for empty labels"):
            from_tensors(images[:0], self.labels[:0])
        with pytest.raises(TypeError, match="see from_tensors"):
            ImageData(images, self.labels.long(), 3, "x")


class TestDatasets:
    def test_tensor_dataset(self):
        images, labels = torch.rand(5, 3, 4, 4), torch.tensor([0, 1, 2, 1, 0])
        data = from_dataset(TensorDataset(images, labels))
        assert torch.equal(data.images, (images * 255).round().byte())
        assert data.labels.tolist() == labels.tolist()
        assert data.name == "TensorDataset"

    def test_pictures(self):
        colour = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        data = from_dataset([(colour, 3)], num_classes=10, name="one picture")
        assert np.array_equal(data.images[0].numpy(), colour.transpose(2, 0, 1))
        grey = from_dataset([(colour[:, :, 0], 0)])
        assert grey.images.shape == (1, 1, 4, 5)

    def test_wrong_items(self):
        with pytest.raises(ValueError, match="at least one item"):
            from_dataset([])
        with pytest.raises(ValueError, match="must have one shape"):
            from_dataset([(torch.rand(1, 4, 4), 0), (torch.rand(1, 5, 5), 0)])
        with pytest.raises(TypeError, match="an image of dataset must be a tensor"):
            from_dataset([([0.5, 0.5], 0)])
