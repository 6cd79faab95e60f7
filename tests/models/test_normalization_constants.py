"""Normalisations of inputs whose mean and std a file of weights holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_lost_normalization import written
from test_published_files import under
from torch import Tensor
from training_helpers import make_model, states_equal

from fastadv.commands.judged import recorded_accuracy
from fastadv.models import Normalized, load_published_state_dict, read_state_file, small_cnn
from fastadv.trainers import load_teacher

State = dict[str, Tensor]
MEAN, STD = (0.4,), (0.2,)


def normalised() -> Normalized:
    return Normalized(make_model(1), MEAN, STD)


@pytest.mark.parametrize(
    "names",
    [
        ("mean", "std"),
        ("normalize.mean", "normalize.std"),
        ("module.normalizer.new_mean", "module.normalizer.new_std"),
        ("mu", "sigma"),
    ],
)
def test_a_teacher_normalises_as_its_file_says(names: tuple[str, str], tmp_path: Path) -> None:
    source = normalised().eval()
    constants = dict(zip(names, (source.mean, source.std), strict=True))
    torch.save({"net": under(source.model.state_dict(), "model.") | constants}, tmp_path / "a.pt")
    teacher = load_teacher(tmp_path / "a.pt", make_model(2))
    assert isinstance(teacher, Normalized)
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(teacher(x), source(x))
    assert torch.equal(load_teacher(tmp_path / "a.pt", Normalized(make_model(2)))(x), source(x))
    # What a run keeps of its teacher is read back the same.
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    assert torch.equal(load_teacher(tmp_path / "teacher.safetensors", make_model(2))(x), source(x))


def test_a_normalisation_that_changes_nothing_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    state = {**make_model(1).state_dict(), "mean": torch.zeros(1), "std": torch.ones(1)}
    torch.save(state, tmp_path / "a.pt")
    assert type(load_teacher(tmp_path / "a.pt", make_model(2))) is type(make_model(2))


@pytest.mark.parametrize(
    "constants", [{"mean": list(MEAN), "std": STD}, {"mu": torch.tensor(MEAN), "sigma": [STD[0]]}]
)
def test_constants_beside_the_weights_count(constants: dict[str, Any], tmp_path: Path) -> None:
    source = normalised().eval()
    torch.save({"state_dict": source.model.state_dict(), **constants}, tmp_path / "a.pt")
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(load_teacher(tmp_path / "a.pt", make_model(2))(x), source(x))
    with pytest.raises(ValueError, match="normalises its inputs"):
        load_published_state_dict(make_model(2), tmp_path / "a.pt")


@pytest.mark.parametrize("scores", [{"mean": 0.87, "std": 0.01}, {"mean": torch.tensor(0.87)}])
def test_scores_are_no_normalisation(scores: dict[str, Any]) -> None:
    state = {"state_dict": make_model(1).state_dict(), **scores}
    assert load_published_state_dict(make_model(2), state).mean is None


def test_one_number_for_all_channels_and_one_for_each_go_together() -> None:
    network = small_cnn()
    state = {
        **network.state_dict(),
        "mean": torch.tensor([0.4, 0.5, 0.6]),
        "std": torch.tensor(0.5),
    }
    target = Normalized(small_cnn())
    load_published_state_dict(target, state)
    assert target.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert target.std.flatten().tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("constants", "words"),
    [
        ({"mean": torch.tensor(125.3), "std": torch.tensor(63.0)}, "images in 0..255"),
        ({"mean": torch.tensor(0.5), "std": torch.tensor(0.0)}, "std must be > 0"),
        ({"mean": torch.tensor(float("nan"))}, "mean must be one finite number"),
        ({"a.mean": torch.tensor(0.5), "b.mean": torch.tensor(0.4)}, "normalises with two means"),
        ({"mean": torch.zeros(512)}, "1 unexpected: mean"),
    ],
)
def test_a_normalisation_that_cannot_be_is_refused(constants: State, words: str) -> None:
    target = Normalized(make_model(2))
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        load_published_state_dict(target, {**make_model(1).state_dict(), **constants})
    assert states_equal(target.state_dict(), before)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    "constants",
    [
        {"mean": np.array(MEAN), "std": np.array(STD, np.float32)},
        {"mean": np.array(MEAN, ">f8").reshape(1, 1, 1), "std": list(np.array(STD))},
        {"mu": tuple(MEAN), "sigma": [np.float32(0.2)]},
    ],
)
def test_constants_of_numpy_count(constants: dict[str, Any], new: bool, tmp_path: Path) -> None:
    teacher = load_teacher(written(tmp_path, new, **constants), make_model(2))
    assert isinstance(teacher, Normalized)
    assert (float(teacher.mean), float(teacher.std)) == pytest.approx((0.4, 0.2))


def test_numbers_and_objects_of_numpy_are_no_constants(tmp_path: Path) -> None:
    beside = {"mean": np.float64(0.9), "std": np.array([None, {}], object), "acc": np.float64(94.5)}
    file = written(tmp_path, **beside)
    assert load_published_state_dict(make_model(2), file).mean is None
    assert recorded_accuracy(read_state_file(file)) == 0.945
