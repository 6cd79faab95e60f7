"""State dicts as others publish them: wrappings, copies, companions, suffixes."""

from __future__ import annotations

import argparse
import collections
import gzip
import os
import pathlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from training_helpers import make_model, states_equal

from fastadv.models import (
    StateFileError,
    load_published_state_dict,
    read_state_file,
)
from fastadv.trainers import CheckpointError, load_teacher

State = dict[str, Tensor]


def under(state: State, *prefixes: str) -> State:
    return {prefix + name: value for prefix in prefixes for name, value in state.items()}


def optimizer_state() -> dict[str, Any]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


WRAPPINGS: dict[str, Callable[[State], dict[str, Any]]] = {
    "the model and the attacker's": lambda s: {
        "model": under(s, "module.model.", "module.attacker.model.")
    },
    "under no prefix and one": lambda s: under(s, "", "ema."),
    "an average": lambda s: {"n_averaged": torch.tensor(7), **under(s, "module.")},
    "an average in a container": lambda s: {
        "swa_state_dict": {"n_averaged": torch.tensor(7), **under(s, "module.")}
    },
    "ema_state_dict": lambda s: {"ema_state_dict": s},
    "a key of one's own": lambda s: {"my_best_net": under(s, "module.")},
    "deep inside": lambda s: {"checkpoint": {"last": {"weights": s}}, "epoch": 3},
    "twice, equal": lambda s: {"state_dict": s, "ema_state_dict": under(s, "module.")},
    "counted by thop": lambda s: {
        **s,
        "total_ops": torch.zeros(1),
        "conv1.total_params": torch.zeros(1),
    },
    "MAIR's": lambda s: {
        "rmodel": {
            **{"n_classes": torch.tensor(10), "mean": torch.zeros(3), "std": torch.ones(3)},
            **under(s, "model."),
        }
    },
    "ema_pytorch's": lambda s: {
        **{"initted": torch.tensor(True), "step": torch.tensor([7])},
        **under(s, "online_model.", "ema_model."),
    },
    "with an optimiser": lambda s: {"net": s, "optimizer": optimizer_state()},
    "with numbers": lambda s: {"state_dict": s, "best": np.float64(93.2), "n": np.int64(3)},
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_wrappings_load_completely(name: str) -> None:
    source = make_model(1)
    target = make_model(2)
    report = load_published_state_dict(target, WRAPPINGS[name](source.state_dict()))
    assert report.complete
    assert states_equal(target.state_dict(), source.state_dict())


def test_averaged_models_of_torch_load() -> None:
    average = AveragedModel(make_model(1))
    average.update_parameters(make_model(2))
    target = make_model(3)
    report = load_published_state_dict(target, average.state_dict())
    assert report.ignored == ["n_averaged"]
    assert states_equal(target.state_dict(), average.module.state_dict())


@pytest.mark.parametrize(
    "state",
    [
        {"state_dict": make_model(1).state_dict(), "ema_state_dict": make_model(2).state_dict()},
        under(make_model(1).state_dict(), "model.") | under(make_model(2).state_dict(), "ema."),
        {
            "state_dict": make_model(1).state_dict(),
            "ema": {name: value for name, value in make_model(2).named_parameters()},
        },
    ],
    ids=["containers", "prefixes", "parameters alone"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_sets_of_weights_that_differ_are_refused(state: dict[str, Any], strict: bool) -> None:
    target = make_model(3)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"several sets .* differ, state.* and state.* such as (state\['|the entries behind ')",
    ):
        load_published_state_dict(target, state, strict=strict)
    assert states_equal(target.state_dict(), before)


def test_sets_that_differ_are_named_by_their_keys() -> None:
    """As in files of DM-AT, where both sets have DataParallel's prefix."""
    averaged, last = (under(make_model(seed).state_dict(), "module.0.") for seed in (1, 2))
    state = {"model_state_dict": averaged, "unaveraged_model_state_dict": last}
    with pytest.raises(ValueError, match=r"such as state\['(unaveraged_)?model_state_dict'\]"):
        load_published_state_dict(make_model(3), state)


def test_a_set_for_another_network_does_not_matter() -> None:
    source = make_model(1)
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).state_dict()
    target = make_model(2)
    load_published_state_dict(target, {"discriminator": other, "classifier": source.state_dict()})
    assert states_equal(target.state_dict(), source.state_dict())


# Files


@pytest.mark.parametrize(
    "name", ["w.pt", "w.t7", "w.pt.best", "w.pth.tar", "w.ckpt", "w.bin", "w", "w.2024-01-01"]
)
@pytest.mark.parametrize("form", ["new", "old", "safetensors"])
def test_a_file_of_any_suffix_is_read(name: str, form: str, tmp_path: Path) -> None:
    source, path = make_model(1), tmp_path / name
    if form == "safetensors":
        save_file(source.state_dict(), path)
    else:
        state = {"net": under(source.state_dict(), "module.")}
        torch.save(state, path, _use_new_zipfile_serialization=form == "new")
    assert states_equal(load_teacher(path, make_model(2)).state_dict(), source.state_dict())
    target = make_model(2)
    load_published_state_dict(target, path)
    assert states_equal(target.state_dict(), source.state_dict())


COMPANIONS: dict[str, Any] = {
    "numbers of numpy": [np.float64(93.2), np.int32(7), np.bool_(True)],
    "an array": np.zeros((3, 4)),
    "an array of objects": np.array([{}, None], object),
    "options": argparse.Namespace(lr=0.1, depth=28),
    "a path": pathlib.PurePosixPath("runs/a"),
    "a set": {1, 2},
    "a generator's state": np.random.RandomState(0).get_state(),
    "a pickled module": nn.Linear(2, 2),
    "a function": argparse.ArgumentParser,
}


@pytest.mark.parametrize("name", COMPANIONS)
def test_what_lies_beside_the_weights_does_not_matter(name: str, tmp_path: Path) -> None:
    source = make_model(1)
    torch.save({"state_dict": source.state_dict(), "beside": COMPANIONS[name]}, tmp_path / "a.pt")
    teacher = load_teacher(tmp_path / "a.pt", make_model(2))
    assert states_equal(teacher.state_dict(), source.state_dict())
    # Nothing is left for others to load by.
    with pytest.raises(pickle.UnpicklingError):
        torch.save(argparse.Namespace(), tmp_path / "b.pt")
        torch.load(tmp_path / "b.pt", weights_only=True)


def test_weights_in_a_dict_with_defaults_are_found(tmp_path: Path) -> None:
    state = collections.defaultdict(list, make_model(1).state_dict())
    for new in (True, False):
        torch.save({"model": state}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        teacher = load_teacher(tmp_path / "a.pt", make_model(2))
        assert states_equal(teacher.state_dict(), state)


class Trap:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def raise_alarm(path: str) -> None:
    Path(path).touch()


@pytest.mark.parametrize("new", [True, False])
def test_nothing_in_a_file_is_run(new: bool, tmp_path: Path) -> None:
    mark, state = str(tmp_path / "it ran"), make_model(1).state_dict()
    for trap in (
        Trap(raise_alarm, mark),
        Trap(exec, f"open({mark!r}, 'w')"),
        Trap(np.ndarray, (4,), "O", b"AAAAAAA\0" * 4),
    ):
        torch.save(
            {"state_dict": state, "beside": trap},
            tmp_path / "a.pt",
            _use_new_zipfile_serialization=new,
        )
        load_teacher(tmp_path / "a.pt", make_model(2))
    torch.save(
        {"state_dict": state, "beside": Trap(os.system, f"touch '{mark}'")},
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=new,
    )
    with pytest.raises(CheckpointError, match=r"a\.pt: cannot be read .*posix\.system"):
        load_teacher(tmp_path / "a.pt", make_model(2))
    assert not (tmp_path / "it ran").exists()


def test_a_pickled_module_is_named(tmp_path: Path) -> None:
    for content, words in (
        (make_model(1), r"an object of fastadv\.models\.small_cnn\.SmallCNN; open it where"),
        ({"net": make_model(1)}, r"'net' is an object of fastadv\.models\.small_cnn\.SmallCNN"),
        ({"epoch": 3}, r"got a mapping with \['epoch'\]"),
        ([1, 2], "got list"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"a\.pt: state must map names to tensors, got"):
            load_teacher(tmp_path / "a.pt", make_model(2))
        with pytest.raises(TypeError, match=words):
            load_published_state_dict(make_model(2), tmp_path / "a.pt")


@pytest.mark.parametrize(
    "content", [b"", b"text", b"PK\x03\x04", b"\x80\x02}", b"\x05\0\0\0\0\0\0\0{", bytes(1000)]
)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.t7"])
def test_files_of_another_kind_are_named(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StateFileError, match=f"{name}: cannot be read as a file of weights"):
        read_state_file(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read"):
        load_teacher(tmp_path / name, make_model(2))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>", "a web page"),
    ],
)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_files_that_downloads_leave_are_named(
    content: bytes, kind: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StateFileError, match=f"{name}: cannot be read .*it is {kind}"):
        read_state_file(tmp_path / name)


def test_parameters_in_a_file_are_read_without_a_warning(tmp_path: Path) -> None:
    state = {
        name: nn.Parameter(value) if value.is_floating_point() else value
        for name, value in make_model(1).state_dict().items()
    }
    torch.save(state, tmp_path / "a.pt")
    loaded = load_teacher(tmp_path / "a.pt", make_model(2))
    assert states_equal(loaded.state_dict(), make_model(1).state_dict())


@pytest.mark.compiles
def test_a_script_of_torch_is_named(tmp_path: Path) -> None:
    traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    torch.jit.save(traced, tmp_path / "a.pt")
    with pytest.raises(StateFileError, match=r"a\.pt: .*torchscript"):
        read_state_file(tmp_path / "a.pt")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("a.pt", "run"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
            load_teacher(tmp_path / name, make_model(2))
    with pytest.raises(FileNotFoundError, match=r"a\.pt: no such file"):
        load_published_state_dict(make_model(2), tmp_path / "a.pt")


def test_a_file_whose_weights_do_not_fit_is_named(tmp_path: Path) -> None:
    weights = make_model(1).state_dict()
    broken = {**weights, "conv1.weight": torch.full_like(weights["conv1.weight"], torch.nan)}
    for content, words in (
        ({**weights, "more": torch.ones(2)}, "1 unexpected: more"),
        (broken, "must hold finite numbers"),
        ({"epoch": 3}, "must map names to tensors"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises((TypeError, ValueError), match=words) as caught:
            load_published_state_dict(make_model(2), tmp_path / "a.pt")
        assert str(caught.value).startswith(str(tmp_path / "a.pt"))


@pytest.mark.parametrize("with_checksums", [True, False])
def test_a_file_with_one_other_bit_is_refused(with_checksums: bool, tmp_path: Path) -> None:
    """`torch.load` returns other weights without a word."""
    state, file = make_model(0).state_dict(), tmp_path / "weights.pt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(with_checksums)
    try:
        torch.save(state, file)
    finally:
        torch.serialization.set_crc32_options(before)
    assert states_equal(read_state_file(file), state)
    content = bytearray(file.read_bytes())
    place = content.index(state["conv2.weight"].numpy().tobytes()[:64])
    content[place + 3] ^= 1
    file.write_bytes(content)
    if with_checksums:
        with pytest.raises(StateFileError, match=r"weights\.pt: .*'weights/data/\d+' is damaged"):
            read_state_file(file)
        with pytest.raises((StateFileError, CheckpointError), match=r"weights\.pt: .*is damaged"):
            load_teacher(file, make_model(1))
    else:  # nobody can tell
        assert not states_equal(read_state_file(file), state)


def test_a_path_that_is_no_file_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.pt").touch()
    (tmp_path / "link.pt").symlink_to(tmp_path / "nothing")
    for name, words in (
        ("empty", "a folder; it must be a state dict"),
        ("full", "a folder; name a file in it, such as a.pt; it must be a state dict"),
        ("link.pt", "a link to a file that does not exist; it must be a state dict"),
        ("none.pt", "no such file; it must be a state dict"),
    ):
        with pytest.raises(FileNotFoundError, match=rf"{name}: {words}"):
            read_state_file(tmp_path / name)


def test_files_that_cannot_hold_weights_are_called_what_they_are(tmp_path: Path) -> None:
    for content, words in (
        (b"", "it is empty"),
        (gzip.compress(b"weights"), "it is compressed by gzip; decompress it"),
        (b'{"weight_map": {}}', "it is JSON, such as the index of several files"),
    ):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(StateFileError, match=rf"a\.pt: cannot be read .* \({words}"):
            read_state_file(tmp_path / "a.pt")
