"""The handwritten digits in scikit-learn: 1,797 real 8x8 scans, without a download."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastadv.data.images import ImageData, Splits
from fastadv.data.selection import balanced_choice

TEST_IMAGES = 500
_SPLIT_SEED = 0  # part of the data set's definition: results are comparable only on one split
_LEVELS = 16  # pixels are counts of set bits in 4x4 cells, 0..16


def load_digits() -> Splits:
    """Load the optical digits (Alpaydin and Kaynak, 1998) as [N, 1, 8, 8].

    Pixels 0..16 become round(value * 255 / 16). The split is fixed: 500 test images, 50 of each
    class, and 1,297 for training.

    Returns:
        Training and test images, uint8 [N, 1, 8, 8], and their labels.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load_bunch
    except ImportError as error:
        raise ImportError(
            "data set 'digits' is read from scikit-learn, which cannot be imported "
            f"({error}); install it with `pip install scikit-learn`"
        ) from error
    images, labels = _read(load_bunch)
    test = balanced_choice(labels, TEST_IMAGES, _SPLIT_SEED)
    is_train = torch.ones(len(labels), dtype=torch.bool, device="cpu")
    is_train[test] = False
    everything = ImageData(images, labels, 10, "digits")
    return Splits(
        train=everything.select(is_train.nonzero().flatten(), "digits train"),
        test=everything.select(test, "digits test"),
    )


@functools.cache  # the file is text, which takes longer to read than what is made of it
def _read(load_bunch: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """The images [1797, 1, 8, 8] and labels; every user gets copies."""
    bunch = load_bunch()
    counts = torch.from_numpy(bunch.images).to(torch.float64)  # [1797, 8, 8]
    images = (counts * 255 / _LEVELS).round().to(torch.uint8)[:, None]
    return images, torch.from_numpy(bunch.target).to(torch.int64)
