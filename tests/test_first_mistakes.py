"""The first mistakes of a newcomer are told in words that name the argument, whichever part gets them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn
from torch import Tensor, nn

import fastadv
from fastadv import compat, data, models, ops
from fastadv.evaluation import autoattack, masking_checks, transfer_matrix
from fastadv.trainers.hardware import choose_device

pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> nn.Module:
    return models.small_cnn(10, 1).eval()


def batch(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(n)


X, Y = batch()


@pytest.mark.parametrize("name", ["eps", "alpha"])
@pytest.mark.parametrize("shape", [(4,), (1, 1, 1), (4, 1, 1, 1)])
def test_a_radius_is_no_flag(name: str, shape: tuple[int, ...]) -> None:
    flags = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(TypeError, match=f"{name} must hold real numbers, got torch.bool"):
        fastadv.PGD(net())(X, Y, **{name: flags})
    numbers = {"eps": 0.1, "alpha": 0.1, name: flags}
    with pytest.raises(TypeError, match=f"{name} must hold real numbers, got torch.bool"):
        ops.pgd_step(X, X, X, **numbers)


@pytest.mark.parametrize("values", [[0.1] * 4, (0.1,) * 4, np.full(4, 0.1)])
def test_radii_in_a_list_are_to_be_a_tensor(values: Any) -> None:
    with pytest.raises(TypeError, match="eps must be a number or a tensor of numbers, got"):
        fastadv.PGD(net())(X, Y, eps=values)


@pytest.mark.parametrize("shape", [(4, 1), (1, 4)])
def test_labels_in_a_column_are_not_told_to_take_the_argmax_which_is_class_0(
    shape: tuple[int, int],
) -> None:
    column = Y.reshape(shape)
    images = (255 * X).byte()
    for call in (
        lambda: fastadv.PGD(net())(X, column),
        lambda: fastadv.losses.dlr(torch.rand(4, 10), column),
        lambda: fastadv.evaluate(net(), (X, column), progress=False),
        lambda: data.from_tensors(images, column),
    ):
        with pytest.raises(ValueError, match=r"pass (y|labels)\.flatten\(\)$"):
            call()


def test_an_evaluation_says_what_to_do_with_one_hot_labels() -> None:
    with pytest.raises(ValueError, match=r"of one-hot labels pass labels\.argmax\(1\)"):
        fastadv.evaluate(net(), (X, nn.functional.one_hot(Y, 10)), progress=False)


@pytest.mark.parametrize(
    "bounds", [(None, None), ("0", "1"), torch.tensor([0.0, 1.0]), (torch.tensor(0.0), 1)]
)
def test_bounds_are_a_pair_of_numbers(bounds: Any) -> None:
    with pytest.raises(TypeError, match=r"bounds must be a pair( of numbers)? \(low, high\), got"):
        fastadv.PGD(net(), bounds=bounds)


@pytest.mark.parametrize("word", ["L∞", "l_∞", " Linf ", "Infinity", np.inf])
def test_the_largest_norm_has_many_names(word: Any) -> None:
    assert fastadv.PGD(net(), norm=word).norm == "linf"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_points_to_start_from_may_have_another_dtype(dtype: torch.dtype) -> None:
    attack = fastadv.PGD(net(), steps=1, random_start=False, precision="fp32")
    start = (X + 0.01).clamp(0, 1)
    expected = attack(X, Y, start=start.to(dtype).to(X.dtype))
    assert torch.equal(attack(X, Y, start=start.to(dtype)), expected)


# Settings that are changed after the attack was made.


def told(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in found if one.filename == __file__]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": "l2"}, "eps is 8/255, the default for linf"),
        ({"bounds": (0.0, 255.0)}, "eps is 8/255, the default for linf"),
        ({"alpha": 1e-5}, r"alpha * steps is 0.0001, less than a tenth of eps"),
        ({"eps": 0.9}, r"alpha * steps is 0.0784, less than a tenth of eps"),
    ],
)
def test_what_a_new_attack_warns_of_is_told_of_a_changed_one_too(
    changes: dict[str, Any], words: str
) -> None:
    attack = fastadv.PGD(trained_small_cnn())
    x, y = digits_test(4)
    for name, value in changes.items():
        setattr(attack, name, value)
    assert [words in message for message in told(lambda: attack(x, y))] == [True]
    assert told(lambda: attack(x, y)) == []  # once for each change


def test_few_steps_of_adam_are_told_of() -> None:
    model = trained_small_cnn()
    (message,) = told(lambda: fastadv.CWL2(model, 0.01, 0.0, 10, 0.01, 10))  # ART's defaults
    assert "lr * steps is 0.1: a pixel can move by about 0.05 of the range" in message
    assert told(lambda: fastadv.CWL2(model)) == []
    assert told(lambda: fastadv.CWL2(model, 1.0, 0.0, 50, 0.01, 1)) == []  # torchattacks' defaults
    attack = fastadv.CWL2(model, steps=40)
    attack.lr = 0.001
    assert "lr * steps is 0.04" in told(lambda: attack(*digits_test(2)))[0]


def test_nothing_is_told_of_a_norm_whose_radius_follows() -> None:
    attack = fastadv.PGD(trained_small_cnn(), alpha=0.1)
    attack.norm = "l2"
    attack.eps = 0.5
    assert told(lambda: attack(*digits_test(4))) == []


def test_autoattack_tells_of_the_radius_of_another_norm() -> None:
    attack = fastadv.AutoAttack(trained_small_cnn(), version=["apgd-ce"])
    attack.norm = "l2"
    assert "the default for linf" in told(lambda: attack(*digits_test(4)))[0]


# Evaluation.


def test_steps_that_lead_nowhere_make_a_figure_suspect() -> None:
    report = fastadv.evaluate(
        trained_small_cnn(), digits_test(8), attacks=("pgd-2", "fgsm"), alpha=1e-6, progress=False
    )
    rows = {row.name: row for row in report.rows}
    assert rows["pgd-2"].status == "suspect" and "alpha * steps" in rows["pgd-2"].notes[0]
    assert rows["fgsm"].status == "ok"


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (fastadv.PGD, r"of an attack pass \(name, lambda model, x, y: attack\(x, y\)\)"),
        (lambda x, y: x, "attacks must be a callable of 3 arguments, model, x and y, got <lambda>"),
        (nn.Identity, r"attacks must be a callable of model, x and y, got the class Identity"),
    ],
)
def test_an_attack_of_ones_own_takes_model_images_and_labels(attack: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        fastadv.evaluate(net(), (X, Y), attacks=[("mine", attack)], progress=False)


def test_images_and_labels_of_an_evaluation_are_one_argument() -> None:
    for run in (fastadv.evaluate, fastadv.evaluation.autoattack):
        with pytest.raises(
            TypeError, match=r"(one pair, \(images, labels\)|takes 2 without a name)"
        ):
            run(net(), X, Y)
    with pytest.raises(TypeError, match="images of data must be a tensor, got ndarray; pass"):
        fastadv.evaluate(net(), (X.numpy(), Y.numpy()))
    with pytest.raises(TypeError, match=r"load_dataset\(name\)\.test"):
        fastadv.evaluate(net(), "digits")
    with pytest.raises(ValueError, match="no axis of length 0"):
        fastadv.evaluate(net(), (X[:, :, :0], Y))


@pytest.mark.parametrize("function", [autoattack, masking_checks, transfer_matrix])
def test_the_argument_that_was_meant_is_named(function: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match=rf"{function.__name__} has no argument 'epsilon'.*'eps'"):
        function(net(), (X, Y), epsilon=0.1)


def test_a_function_that_makes_a_model_is_no_model() -> None:
    for call in (
        lambda: fastadv.PGD(models.resnet18),
        lambda: fastadv.evaluate(models.small_cnn, (X, Y), progress=False),
    ):
        with pytest.raises(
            TypeError, match=r"a function that makes a module; call it first: \w+\("
        ):
            call()
    assert fastadv.PGD(lambda x: x.flatten(1)).eps == 8 / 255


# Models, data and the attacks of compat.


def test_images_have_as_many_channels_as_their_normalisation() -> None:
    model = models.Normalized(models.small_cnn(4, 3), [0.5] * 3, [0.5] * 3).eval()
    for channels in (1, 2, 4):
        with pytest.raises(ValueError, match=f"x must have 3 channels.*, got {channels} in shape"):
            model(torch.rand(2, channels, 8, 8))
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 4)
    assert models.Normalized(net(), 0.5, 0.5)(X).shape == (4, 10)


def test_a_message_shows_no_weights() -> None:
    with pytest.raises(TypeError, match=r"got an OrderedDict of \d+ with tensors or modules$"):
        models.copy_weights(net(), net().state_dict())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"inputs must be a tensor.*, got a list of 4 with tensors"):
        compat.PGD(net())(list(X), Y)
    with pytest.raises(ValueError, match="two or more in a dict, by name, got a list of 1 with"):
        transfer_matrix([net()], (X, Y))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="data must be an ImageData, got None"):
        data.subset(None, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ((X[:2], Y[:2]), "data_loader must be a DataLoader or a list of batches"),
        (X, "data_loader must be a DataLoader or a list of batches"),
        (None, "data_loader must be a DataLoader or a list of batches"),
        ([X], r"data_loader must give batches \(images, labels\), got a tensor"),
        ([(X, Y, Y)], r"data_loader must give batches \(images, labels\), got a tuple of 3"),
        ([{"image": X}], r"data_loader must give batches \(images, labels\), got a dict of 1"),
    ],
)
def test_compat_saves_batches_of_images_and_labels(loader: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        compat.PGD(net(), steps=1).save(loader, verbose=False)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("train", "fastadv.trainers.train"),
        ("resnet18", "fastadv.models.resnet18"),
        ("TRADES", "fastadv.trainers.Trades"),
        ("load_dataset", "fastadv.data.load_dataset"),
        ("BIM", "'PGD'"),
        ("LinfPGDAttack", "'PGD'"),
        ("fast_gradient_method", "'FGSM'"),
        ("CarliniL2Method", "'CWL2'"),
    ],
)
def test_names_that_lie_elsewhere_are_found(name: str, meant: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute {name!r}; did you mean {meant}"):
        getattr(fastadv, name)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("perturb", r"attack\(x, y\)"),
        ("run_standard_evaluation", r"attack\(x, y\)"),
        ("set_mode_targeted_by_label", "fastadv.compat"),
        ("to", r"model\.to\(device\)"),
    ],
)
@pytest.mark.parametrize("kind", [fastadv.PGD, fastadv.AutoAttack])
def test_methods_of_other_libraries_say_what_to_do_instead(
    kind: Any, name: str, instead: str
) -> None:
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'; .*{instead}"):
        getattr(kind(net()), name)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_command_names_a_device_as_evaluate_does(device: str) -> None:
    messages = []
    for call in (
        lambda: choose_device(device),
        lambda: fastadv.evaluate(net(), (X, Y), device=device, progress=False),
    ):
        with pytest.raises(ValueError, match="device must be one") as found:
            call()
        messages.append(str(found.value))
    assert messages[0] == messages[1]
