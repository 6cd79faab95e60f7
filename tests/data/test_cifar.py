"""The readers of CIFAR-10 and CIFAR-100, and what they say of damaged files."""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import pickle

import numpy as np
import pytest
import torch

from fastadv.data import (
    DataFormatError,
    load_cifar10,
    load_cifar100,
    load_dataset,
)
from fastadv.data.cifar import read_cifar, read_cifar_test
from fastadv.data.cifar_content import content_digest
from fastadv.data.cifar_layout import CIFAR10, CIFAR100, PIXEL_BYTES, CifarLayout, Records
from fastadv.data.datasets import load_test_images

RECORDS = 20  # per file of the small layouts below


def digest_of(labels, pixels):
    return content_digest(Records(labels.astype(np.uint8), None, pixels))


@pytest.fixture
def records():
    """Labels [6, 20] and pixels [6, 20, 3072]: five training files and a test file."""
    random = np.random.default_rng(0)
    labels = np.stack([random.permutation(RECORDS) % 10 for _ in range(6)]).astype(np.uint8)
    return labels, random.integers(0, 256, (6, RECORDS, PIXEL_BYTES), dtype=np.uint8)


@pytest.fixture
def layout(records) -> CifarLayout:
    """CIFAR-10's layout with 20 records a file, and the digests of these records."""
    labels, pixels = records
    train = digest_of(labels[:5].reshape(-1), pixels[:5].reshape(-1, PIXEL_BYTES))
    return dataclasses.replace(
        CIFAR10,
        train=dataclasses.replace(CIFAR10.train, records=RECORDS, digest=train),
        test=dataclasses.replace(
            CIFAR10.test, records=RECORDS, digest=digest_of(labels[5], pixels[5])
        ),
    )


@pytest.fixture
def binary_root(tmp_path, records):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    names = CIFAR10.train.binary_files + CIFAR10.test.binary_files
    for name, labels, pixels in zip(names, *records, strict=True):
        np.concatenate([labels[:, None], pixels], axis=1).tofile(folder / name)
    return tmp_path


@pytest.fixture
def python_root(tmp_path, records):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = CIFAR10.train.python_files + CIFAR10.test.python_files
    for name, labels, pixels in zip(names, *records, strict=True):
        write_python(folder / name, {b"labels": labels.tolist(), b"data": pixels})
    return tmp_path


def write_python(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))


class TestBinaryLayout:
    def test_reads_records(self, layout, binary_root, records):
        labels, pixels = records
        splits = read_cifar(layout, binary_root)
        assert splits.train.images.shape == (5 * RECORDS, 3, 32, 32)
        assert splits.train.images.is_contiguous()
        assert splits.train.labels.tolist() == labels[:5].reshape(-1).tolist()
        assert splits.test.labels.tolist() == labels[5].tolist()
        # Pixel bytes are the red plane row by row, then green, then blue.
        expected = pixels[5, 7].reshape(3, 32, 32)[1, 30, 2]
        assert splits.test.images[7, 1, 30, 2] == expected
        assert splits.train.name == "cifar10 train"
        assert splits.train.num_classes == 10

    def test_root_is_the_folder_or_its_parent(self, layout, binary_root):
        inner = read_cifar(layout, str(binary_root / "cifar-10-batches-bin"))
        outer = read_cifar(layout, binary_root)
        assert torch.equal(inner.train.images, outer.train.images)

    def test_order_of_records_does_not_matter(self, layout, binary_root):
        folder = binary_root / "cifar-10-batches-bin"
        first, second = folder / "data_batch_1.bin", folder / "data_batch_2.bin"
        read_first = read_cifar(layout, binary_root).train.images[:RECORDS]
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
        found = read_cifar(layout, binary_root).train.images
        assert torch.equal(found[RECORDS : 2 * RECORDS], read_first)

    def test_content_is_verified_unless_told_otherwise(self, layout, binary_root):
        path = binary_root / "cifar-10-batches-bin" / "data_batch_3.bin"
        content = bytearray(path.read_bytes())
        content[1000] ^= 1
        path.write_bytes(content)
        with pytest.raises(DataFormatError, match="train records are not those of cifar10"):
            read_cifar(layout, binary_root)
        assert len(read_cifar(layout, binary_root, verify=False).train) == 5 * RECORDS

    def test_one_record_twice_is_found(self, layout, binary_root):
        path = binary_root / "cifar-10-batches-bin" / "test_batch.bin"
        content = bytearray(path.read_bytes())
        content[:3073] = content[3073 : 2 * 3073]
        path.write_bytes(content)
        with pytest.raises(DataFormatError, match="test records"):
            read_cifar(layout, binary_root)

    def test_truncated_file(self, layout, binary_root):
        path = binary_root / "cifar-10-batches-bin" / "data_batch_4.bin"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(DataFormatError) as caught:
            read_cifar(layout, binary_root, verify=False)
        message = str(caught.value)
        assert "data_batch_4.bin has 61,459 bytes" in message
        assert "20 records of 1 label byte and 3,072 pixel bytes, 61,460 bytes in all" in message

    def test_official_size_is_asked_for(self, binary_root):
        with pytest.raises(DataFormatError, match="30,730,000 bytes in all"):
            load_cifar10(binary_root)

    def test_label_out_of_range(self, layout, binary_root):
        path = binary_root / "cifar-10-batches-bin" / "data_batch_5.bin"
        content = bytearray(path.read_bytes())
        content[2 * 3073] = 10
        path.write_bytes(content)
        with pytest.raises(DataFormatError, match=r"label of record 2 is 10, must be in 0 \.\. 9"):
            read_cifar(layout, binary_root, verify=False)

    def test_missing_file(self, layout, binary_root):
        (binary_root / "cifar-10-batches-bin" / "data_batch_2.bin").unlink()
        with pytest.raises(FileNotFoundError, match=r"data_batch_2\.bin is missing"):
            read_cifar(layout, binary_root)


class TestPythonLayout:
    def test_equals_binary_layout(self, layout, python_root, records):
        labels, pixels = records
        splits = read_cifar(layout, python_root)
        assert splits.train.labels.tolist() == labels[:5].reshape(-1).tolist()
        assert np.array_equal(splits.test.images.numpy().reshape(RECORDS, -1), pixels[5])

    @pytest.mark.parametrize("protocol", range(6))
    def test_every_pickle_protocol(self, layout, python_root, records, protocol):
        labels, pixels = records
        content = {"labels": labels[5], "data": pixels[5], "filenames": ["a.png"]}
        path = python_root / "cifar-10-batches-py" / "test_batch"
        write_python(path, content, protocol)
        assert read_cifar(layout, python_root).test.labels.tolist() == labels[5].tolist()

    @pytest.mark.parametrize("protocol", [0, 2, 4])
    def test_pickle_that_runs_code_is_refused(self, layout, python_root, tmp_path, protocol):
        trace = tmp_path / "executed"

        class Malicious:
            def __reduce__(self):
                return builtins.exec, (f"open({str(trace)!r}, 'w').close()",)

        path = python_root / "cifar-10-batches-py" / "data_batch_1"
        write_python(path, {b"labels": [], b"data": Malicious()}, protocol)
        with pytest.raises(DataFormatError, match=r"data_batch_1 .* refers to .*builtin\w*\.exec"):
            read_cifar(layout, python_root, verify=False)
        assert not trace.exists()
        pickle.loads(path.read_bytes())
        assert trace.exists()  # it would have run

    @pytest.mark.parametrize("name", ["getattr", "eval", "__import__", "print"])
    def test_builtins_are_refused(self, layout, python_root, name):
        path = python_root / "cifar-10-batches-py" / "data_batch_1"
        write_python(path, getattr(builtins, name))
        with pytest.raises(DataFormatError, match=name):
            read_cifar(layout, python_root)

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            ([1, 2], "holds a list"),
            ({b"data": np.zeros((RECORDS, PIXEL_BYTES), np.uint8)}, "has no 'labels'"),
            ({b"labels": [0] * RECORDS}, "has no 'data'"),
            (
                {b"labels": [0] * RECORDS, b"data": np.zeros((RECORDS, 5), np.uint8)},
                r"'data' is an array of uint8 \[20, 5\]",
            ),
            (
                {b"labels": [0] * RECORDS, b"data": np.zeros((RECORDS, PIXEL_BYTES))},
                "'data' is an array of float64",
            ),
            ({b"labels": [0] * RECORDS, b"data": [1, 2]}, "'data' is a list of length 2"),
            (
                {b"labels": [0], b"data": np.zeros((RECORDS, PIXEL_BYTES), np.uint8)},
                r"'labels' is an array of object \[1\]",
            ),
            (
                {b"labels": [300] * RECORDS, b"data": np.zeros((RECORDS, PIXEL_BYTES), np.uint8)},
                "'labels' has 300",
            ),
            (
                {b"labels": ["cat"] * RECORDS, b"data": np.zeros((RECORDS, PIXEL_BYTES), np.uint8)},
                "'labels' is a list of length 20",
            ),
        ],
    )
    def test_contents_of_another_kind(self, layout, python_root, content, complaint):
        write_python(python_root / "cifar-10-batches-py" / "data_batch_2", content)
        with pytest.raises(DataFormatError, match=f"data_batch_2.*{complaint}"):
            read_cifar(layout, python_root, verify=False)

    @pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x05"])
    def test_damaged_pickle(self, layout, python_root, content):
        (python_root / "cifar-10-batches-py" / "test_batch").write_bytes(content)
        with pytest.raises(DataFormatError, match="test_batch cannot be read as a pickle"):
            read_cifar(layout, python_root)

    def test_truncated_pickle(self, layout, python_root):
        path = python_root / "cifar-10-batches-py" / "test_batch"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DataFormatError, match="test_batch cannot be read as a pickle"):
            read_cifar(layout, python_root)

    def test_missing_file(self, layout, python_root):
        (python_root / "cifar-10-batches-py" / "test_batch").unlink()
        with pytest.raises(FileNotFoundError, match="test_batch is missing"):
            read_cifar(layout, python_root)


class TestRoot:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            load_cifar10(tmp_path)
        message = str(caught.value)
        assert str(tmp_path) in message
        assert "cifar-10-batches-bin" in message
        assert "30,730,000 bytes" in message

    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no such folder"):
            load_cifar100(tmp_path / "absent")

    def test_a_file(self, tmp_path):
        (tmp_path / "cifar").write_text("")
        with pytest.raises(FileNotFoundError, match="it is a file, not a folder"):
            load_cifar10(tmp_path / "cifar")

    def test_archive_not_unpacked(self, tmp_path):
        (tmp_path / "cifar-10-binary.tar.gz").write_text("")
        with pytest.raises(FileNotFoundError, match="unpack it first"):
            load_cifar10(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"(?s)^(?!.*unpack it first)"):
            load_cifar100(tmp_path)


class TestCifar100:
    """Two coarse classes of two classes each, five images of each class a file."""

    layout = dataclasses.replace(
        CIFAR100,
        num_classes=4,
        num_coarse=2,
        train=dataclasses.replace(CIFAR100.train, records=RECORDS, python_md5=None),
        test=dataclasses.replace(CIFAR100.test, records=RECORDS, python_md5=None),
    )
    fine = np.arange(RECORDS, dtype=np.uint8) % 4
    pixels = np.random.default_rng(0).integers(0, 256, (RECORDS, PIXEL_BYTES), dtype=np.uint8)

    def write_binary(self, folder, fine, coarse):
        folder.mkdir(exist_ok=True)
        rows = np.concatenate([coarse[:, None], fine[:, None], self.pixels], axis=1)
        for name in ("train.bin", "test.bin"):
            rows.astype(np.uint8).tofile(folder / name)

    def test_binary_layout_uses_the_fine_label(self, tmp_path):
        self.write_binary(tmp_path / "cifar-100-binary", self.fine, self.fine // 2)
        splits = read_cifar(self.layout, tmp_path)
        assert splits.test.labels.tolist() == self.fine.tolist()
        assert np.array_equal(splits.test.images.numpy().reshape(RECORDS, -1), self.pixels)

    def test_binary_labels_must_be_a_hierarchy(self, tmp_path):
        folder = tmp_path / "cifar-100-binary"
        coarse = self.fine // 2
        coarse[3] = 0  # class 3 in two coarse classes
        self.write_binary(folder, self.fine, coarse)
        with pytest.raises(DataFormatError, match="each of the 2 coarse classes must hold 2"):
            read_cifar(self.layout, tmp_path)
        assert len(read_cifar(self.layout, tmp_path, verify=False).train) == RECORDS

    def test_binary_classes_must_be_balanced(self, tmp_path):
        fine = self.fine.copy()
        fine[0] = 1
        self.write_binary(tmp_path / "cifar-100-binary", fine, fine // 2)
        with pytest.raises(DataFormatError, match="4 images of class 0, expected 5"):
            read_cifar(self.layout, tmp_path)

    def test_binary_coarse_label_out_of_range(self, tmp_path):
        coarse = self.fine // 2
        coarse[4] = 2
        self.write_binary(tmp_path / "cifar-100-binary", self.fine, coarse)
        with pytest.raises(DataFormatError, match="coarse label of record 4 is 2"):
            read_cifar(self.layout, tmp_path)

    def write_python(self, folder):
        folder.mkdir()
        content = {
            b"data": self.pixels,
            b"fine_labels": self.fine.tolist(),
            b"coarse_labels": (self.fine // 2).tolist(),
        }
        for name in ("train", "test"):
            write_python(folder / name, content)

    def test_python_layout(self, tmp_path):
        self.write_python(tmp_path / "cifar-100-python")
        splits = read_cifar(self.layout, tmp_path)
        assert splits.train.labels.tolist() == self.fine.tolist()

    def test_python_files_are_compared_with_the_official_ones(self, tmp_path):
        folder = tmp_path / "cifar-100-python"
        self.write_python(folder)
        md5 = hashlib.md5((folder / "train").read_bytes()).hexdigest()
        layout = dataclasses.replace(
            self.layout, train=dataclasses.replace(self.layout.train, python_md5=md5)
        )
        read_cifar(layout, tmp_path)
        with pytest.raises(DataFormatError, match="train is not the official file: MD5"):
            load_cifar100(tmp_path)

    def test_official_binary_size(self, tmp_path):
        self.write_binary(tmp_path / "cifar-100-binary", self.fine, self.fine // 2)
        with pytest.raises(DataFormatError, match="153,700,000 bytes in all"):
            load_cifar100(tmp_path)


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_the_test_images_need_no_training_files(layout, records, kind, request):
    root = request.getfixturevalue(f"{kind}_root")
    for path in root.glob("*/data_batch_*"):
        path.unlink()
    images = read_cifar_test(layout, root)
    assert images.labels.tolist() == records[0][5].tolist() and images.name == "cifar10 test"
    with pytest.raises(FileNotFoundError, match=r"data_batch_1.* is missing"):
        read_cifar(layout, root)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_where_there_is_nothing_the_origin_is_told(name, tmp_path):
    stem = name.replace("cifar", "cifar-")
    told = rf"{name} is available at https://www.cs.toronto.edu/~kriz/cifar.html as {stem}-binary.tar.gz"
    with pytest.raises(FileNotFoundError, match=told):
        load_dataset(name, tmp_path)
    with pytest.raises(
        ValueError, match=rf"--root DATA on the command line. .*--download` fetches them. {told}"
    ):
        load_dataset(name)
    (tmp_path / f"{stem}-python.tar.gz").touch()
    with pytest.raises(FileNotFoundError, match="unpack it first"):
        load_test_images(name, tmp_path)


@pytest.mark.slow
@pytest.mark.processes
def test_real_cifar10(cifar10_root):
    splits = load_dataset("cifar10", cifar10_root)
    assert splits.train.images.shape == (50_000, 3, 32, 32)
    assert splits.test.images.shape == (10_000, 3, 32, 32)
    assert splits.train.labels.bincount().tolist() == [5000] * 10
    mean = splits.train.images.float().mean(dim=(0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4, rtol=0)


def test_content_digest_separates_label_and_pixel_changes(records):
    labels, pixels = (part[0] for part in records)
    digest = digest_of(labels, pixels)
    order = np.random.default_rng(1).permutation(RECORDS)
    assert digest_of(labels[order], pixels[order]) == digest
    assert digest_of(labels[order], pixels) != digest
    # Duplicates do not cancel, as they would with exclusive or.
    twice = np.repeat(pixels[:1], 2, axis=0)
    assert digest_of(labels[:2] * 0, twice) != digest_of(labels[:2] * 0, twice ^ 1)
