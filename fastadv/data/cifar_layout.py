"""The layout of the official files of CIFAR-10 and CIFAR-100 (Krizhevsky, 2009)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

OFFICIAL_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
SIDE = 32  # pixels
PIXEL_BYTES = 3 * SIDE * SIDE  # red plane, green plane, blue plane, each row by row


@dataclass(frozen=True)
class SplitLayout:
    """The files of one split.

    Attributes:
        binary_files: names in the binary layout.
        python_files: names in the python layout.
        records: images in each of these files.
        digest: `content_digest` of the genuine records, None where it is not known.
        python_md5: MD5 of the genuine python file, None where the digest serves instead.
    """

    binary_files: tuple[str, ...]
    python_files: tuple[str, ...]
    records: int
    digest: str | None = None
    python_md5: str | None = None


@dataclass(frozen=True)
class CifarLayout:
    """The files of one data set.

    Attributes:
        name: the data set's name, e.g. "cifar10".
        num_classes: classes of the label that is used (CIFAR-100: the fine one).
        num_coarse: coarse classes, whose label byte comes first in a record; 0 where records have no such byte.
        label_key: key of the labels in the python layout.
        binary_folder: folder of the binary layout inside its archive.
        python_folder: folder of the python layout inside its archive.
        train: files of the training split.
        test: files of the test split.
        archive_md5: MD5 of the official archive of the binary layout, as its page has it.
    """

    name: str
    num_classes: int
    num_coarse: int
    label_key: str
    binary_folder: str
    python_folder: str
    train: SplitLayout
    test: SplitLayout
    archive_md5: str = ""

    @property
    def archive(self) -> str:
        """Name of the official archive of the binary layout."""
        return f"{self.stem}-binary.tar.gz"

    @property
    def archive_url(self) -> str:
        """Address of the official archive of the binary layout."""
        return f"{OFFICIAL_PAGE.rpartition('/')[0]}/{self.archive}"

    @property
    def stem(self) -> str:
        """The beginning of the names of the official archives."""
        return "-".join(self.binary_folder.split("-")[:2])

    @property
    def origin(self) -> str:
        """For a message: the page with the files, and how to unpack them."""
        return (
            f"{self.name} is available at {OFFICIAL_PAGE} as {self.stem}-binary.tar.gz or "
            f"{self.stem}-python.tar.gz; unpack the archive with tar -xzf, and give the folder in which it was "
            "unpacked as root"
        )

    @property
    def label_bytes(self) -> int:
        """Bytes before the pixels of a binary record."""
        return 2 if self.num_coarse else 1

    @property
    def record_bytes(self) -> int:
        """Bytes of a binary record."""
        return self.label_bytes + PIXEL_BYTES

    def binary_size(self, split: SplitLayout) -> int:
        """Bytes of each binary file of a split."""
        return split.records * self.record_bytes

    def describe_binary(self, split: SplitLayout) -> str:
        """Describe the content of each binary file of a split, for a message."""
        labels = "1 coarse label byte, 1 fine label byte" if self.num_coarse else "1 label byte"
        return (
            f"{split.records:,} records of {labels} and {PIXEL_BYTES:,} pixel bytes, "
            f"{self.binary_size(split):,} bytes in all"
        )

    def describe_python(self, split: SplitLayout) -> str:
        """Describe the content of each python file of a split, for a message."""
        return (
            f"a pickled dict with 'data', uint8 [{split.records}, {PIXEL_BYTES}], and "
            f"{self.label_key!r}, {split.records} labels in 0 .. {self.num_classes - 1}"
        )


@dataclass(frozen=True, eq=False)
class Records:
    """Records as read.

    Attributes:
        labels: uint8 [N].
        coarse: coarse labels, uint8 [N], where the data set has them.
        pixels: uint8 [N, 3072].
    """

    labels: NDArray[np.uint8]
    coarse: NDArray[np.uint8] | None
    pixels: NDArray[np.uint8]


def concatenate(parts: list[Records]) -> Records:
    """Join the records of several files."""
    coarse = [part.coarse for part in parts if part.coarse is not None]
    return Records(
        labels=np.concatenate([part.labels for part in parts]),
        coarse=np.concatenate(coarse) if len(coarse) == len(parts) else None,
        pixels=np.concatenate([part.pixels for part in parts]),
    )


def require_file(path: Path, expected: str) -> None:
    """Raise FileNotFoundError, naming the files that belong there, unless path is a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected there: {expected}")


# The digests belong to the genuine sets. They do not depend on the order of the records.
CIFAR10 = CifarLayout(
    name="cifar10",
    num_classes=10,
    num_coarse=0,
    label_key="labels",
    binary_folder="cifar-10-batches-bin",
    python_folder="cifar-10-batches-py",
    train=SplitLayout(
        binary_files=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        python_files=tuple(f"data_batch_{i}" for i in range(1, 6)),
        records=10_000,
        digest="e4e277e468d4a0824585ced5a57a208c",
    ),
    test=SplitLayout(
        binary_files=("test_batch.bin",),
        python_files=("test_batch",),
        records=10_000,
        digest="8a4044811e1cf6e86667d733fa84d212",
    ),
    archive_md5="c32a1d4ab5d03f1284b67883e8d87530",
)

CIFAR100 = CifarLayout(
    name="cifar100",
    num_classes=100,
    num_coarse=20,
    label_key="fine_labels",
    binary_folder="cifar-100-binary",
    python_folder="cifar-100-python",
    train=SplitLayout(
        binary_files=("train.bin",),
        python_files=("train",),
        records=50_000,
        python_md5="16019d7e3df5f24257cddd939b257f8d",
    ),
    test=SplitLayout(
        binary_files=("test.bin",),
        python_files=("test",),
        records=10_000,
        python_md5="f0ef6b0ae62326f3e7ffdfab6717acfc",
    ),
    archive_md5="03b5dce01913d631647c71ecec9e9cb8",
)
