"""Bad arguments are refused early, by the right type, in words that name the argument and say what it must be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attack_helpers import digits_test, images, trained_small_cnn
from torch import Tensor, nn

import fastadv

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INF = float("nan"), float("inf")
ZEROS = torch.zeros(4, dtype=torch.int64)


def linear_model(classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, classes))


def batch() -> tuple[Tensor, Tensor]:
    return images(4), torch.arange(4)


# What is passed, the error, and the words that its message must have.
SETTINGS: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"eps": -0.1}, ValueError, ["eps must be", ">= 0", "-0.1"]),
    ({"eps": NAN}, ValueError, ["eps must be finite", "nan"]),
    ({"eps": INF}, ValueError, ["eps must be finite", "inf"]),
    ({"eps": "8/255"}, TypeError, ["eps must be a number", "'8/255'"]),
    ({"eps": None}, TypeError, ["eps must be a number", "None"]),
    ({"eps": torch.rand(4)}, TypeError, ["eps must be a number", "tensor of shape (4,)"]),
    ({"alpha": -1}, ValueError, ["alpha must be", ">= 0", "-1"]),
    ({"alpha": NAN}, ValueError, ["alpha must be finite", "nan"]),
    ({"alpha": [0.1]}, TypeError, ["alpha must be a number", "[0.1]"]),
    ({"alpha": 0}, ValueError, ["alpha must be > 0", "got 0"]),
    ({"steps": 0}, ValueError, ["steps must be >= 1", "0"]),
    ({"steps": -3}, ValueError, ["steps must be >= 1", "-3"]),
    ({"steps": 2.0}, TypeError, ["steps must be an integer", "2.0"]),
    ({"steps": "10"}, TypeError, ["steps must be an integer", "'10'"]),
    ({"steps": True}, TypeError, ["steps must be an integer", "True"]),
    ({"restarts": 0}, ValueError, ["restarts must be >= 1", "0"]),
    ({"restarts": 1.5}, TypeError, ["restarts must be an integer", "1.5"]),
    (
        {"restarts": 2, "random_start": False},
        ValueError,
        ["restarts must be 1", "random_start", "2"],
    ),
    ({"norm": "l3"}, ValueError, ["norm must be one of linf, l2, l1", "'l3'"]),
    ({"keep": "first"}, ValueError, ["keep must be one of last, best", "'first'"]),
    ({"norm": None}, ValueError, ["norm must be one of linf, l2, l1", "None"]),
    ({"bounds": (1, 0)}, ValueError, ["bounds must be", "low <= high", "(1.0, 0.0)"]),
    ({"bounds": (0, INF)}, ValueError, ["bounds must be finite", "inf"]),
    ({"bounds": (0, NAN)}, ValueError, ["bounds must be finite", "nan"]),
    ({"bounds": 1.0}, TypeError, ["bounds must be a pair (low, high)", "1.0"]),
    ({"bounds": (0, 1, 2)}, TypeError, ["bounds must be a pair (low, high)", "(0, 1, 2)"]),
    ({"bounds": ("0", 1)}, TypeError, ["bounds must be", "number", "'0'"]),
    ({"loss": "mse"}, ValueError, ["loss must be one of ce, cw, dlr, kl or a callable", "'mse'"]),
    ({"loss": None}, TypeError, ["loss must be a name or a callable", "None"]),
    ({"loss": "kl", "targeted": True}, ValueError, ["'kl'", "targeted must be False"]),
    ({"loss": "kl", "random_start": False}, ValueError, ["random_start must be True", "'kl'"]),
    (
        {"engine": "fast"},
        ValueError,
        ["engine must be one of auto, fixed, eager, compiled", "'fast'"],
    ),
    ({"sparsity": 1.0}, ValueError, ["sparsity must be in [0, 1)", "1.0"]),
    ({"sparsity": -0.1}, ValueError, ["sparsity must be in [0, 1)", "-0.1"]),
    ({"sparsity": "most"}, TypeError, ["sparsity must be a number", "'most'"]),
    ({"precision": "int8"}, ValueError, ["precision must be one of auto, fp32, bf16", "'int8'"]),
    ({"precision": torch.float16}, ValueError, ["precision must be one of auto", "torch.float16"]),
]
PER_CALL: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"seed": 1.5}, TypeError, ["seed must be an integer", "1.5"]),
    ({"seed": "a"}, TypeError, ["seed must be an integer", "'a'"]),
    ({"seed": 2**64}, ValueError, ["seed must be in -2**63", "18446744073709551616"]),
    ({"sample_ids": [0, 1, 2, 3]}, TypeError, ["sample_ids must be an int64 tensor", "list"]),
    ({"sample_ids": torch.arange(3)}, ValueError, ["sample_ids must be", "(4,)", "(3,)"]),
    ({"sample_ids": torch.rand(4)}, ValueError, ["sample_ids must be int64", "torch.float32"]),
    ({"x": torch.rand(4)}, ValueError, ["x must have shape [B, ...]", "(4,)"]),
    ({"x": torch.tensor(1.0)}, ValueError, ["x must have", "batch axis"]),
    ({"x": images(4).mul(255).byte()}, TypeError, ["x must be float32", "torch.uint8"]),
    ({"x": images(4).to(torch.complex64)}, TypeError, ["x must be float32", "torch.complex64"]),
    ({"x": images(4).numpy()}, TypeError, ["x must be a tensor", "ndarray"]),
    (
        {"x": images(4) * 255},
        ValueError,
        ["x must be finite and within bounds (0.0, 1.0)", "254.", "must be divided by 255"],
    ),
    (
        {"x": images(4) * 4 - 2},
        ValueError,
        ["got values from -", "normalisation belongs inside the model"],
    ),
    ({"x": torch.full((4, 3, 8, 8), 1 + 1e-6)}, ValueError, ["within bounds", "1.0000"]),
    (
        {"x": images(4).index_fill(0, torch.tensor([1]), NAN)},
        ValueError,
        ["x must be finite", "nan"],
    ),
    (
        {"x": images(4).index_fill(0, torch.tensor([1]), INF)},
        ValueError,
        ["x must be finite", "inf"],
    ),
    ({"y": torch.arange(3)}, ValueError, ["y must have shape (4,)", "(3,)"]),
    ({"y": torch.eye(4).long()}, ValueError, ["y must have shape (4,)", "(4, 4)", "argmax"]),
    ({"y": torch.arange(4).float()}, TypeError, ["y must be an int64 tensor", "torch.float32"]),
    ({"y": torch.arange(4) > 1}, TypeError, ["y must be an int64 tensor", "torch.bool"]),
    ({"y": [0, 1, 2, 3]}, TypeError, ["y must be an int64 tensor", "list"]),
    ({"y": torch.arange(4) + 1}, ValueError, ["y must be in 0 .. 3", "4 classes", "1 to 4"]),
    ({"y": torch.arange(4) - 1}, ValueError, ["y must be in 0 .. 3", "-1 to 2"]),
    ({"x": images(4).to("meta")}, ValueError, ["y must be on the device of x, meta", "cpu"]),
    ({"y": torch.arange(4).to("meta")}, ValueError, ["y must be on the device of x, cpu", "meta"]),
    ({"model": linear_model().to("meta")}, ValueError, ["model must be on", "cpu", "meta"]),
    ({"model": "resnet18"}, TypeError, ["model must be a module or a callable", "str"]),
    (
        {"model": nn.Flatten(0)},
        ValueError,
        ["model must return logits of shape (4, classes)", "(768,)"],
    ),
    ({"model": nn.Conv2d(3, 4, 1)}, ValueError, ["model must return logits", "(4, 4, 8, 8)"]),
    ({"model": lambda x: x.flatten(1)[:2]}, ValueError, ["model must return logits", "(2, 192)"]),
    ({"model": lambda x: x.flatten(1)[:, :1]}, ValueError, ["at least 2 classes", "(4, 1)"]),
    ({"model": lambda x: [x]}, TypeError, ["model must return a tensor of logits", "list"]),
    (
        {"model": lambda x: {"logits": x}},
        TypeError,
        ["model must return a tensor of logits", "dict"],
    ),
    ({"model": linear_model(2), "loss": "dlr", "y": ZEROS}, ValueError, ["'dlr'", "3 classes"]),
    ({"loss": lambda z, y: 1.0}, TypeError, ["loss must return a tensor", "float"]),
    ({"loss": lambda z, y: z}, ValueError, ["loss must return a scalar or", "(4,)", "(4, 4)"]),
    ({"loss": lambda z, y: z.detach().sum()}, ValueError, ["loss must return", "gradient"]),
    (
        {"loss": lambda z, y: z.sum(), "restarts": 2},
        ValueError,
        ["loss must return one value per sample", "restarts > 1"],
    ),
    (
        {"loss": lambda z, y: z.sum(), "keep": "best"},
        ValueError,
        ["loss must return one value per sample", "keep='best'"],
    ),
]


def check_message(error: pytest.ExceptionInfo[Exception], words: list[str]) -> None:
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{error.value} lacks {missing}"


def named(table: list[tuple[dict[str, Any], type[Exception], list[str]]]) -> list[str]:
    return [f"{' '.join(case)} {number}" for number, (case, _, _) in enumerate(table)]


@pytest.mark.parametrize(("case", "error", "words"), SETTINGS, ids=named(SETTINGS))
def test_a_bad_setting_is_refused_when_the_attack_is_made(
    case: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as found:
        fastadv.PGD(linear_model(), **case)
    assert type(found.value) is error
    check_message(found, words)


@pytest.mark.parametrize("engine", ["eager", "auto"])
@pytest.mark.parametrize(("case", "error", "words"), PER_CALL, ids=named(PER_CALL))
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_a_bad_call_is_refused(
    case: dict[str, Any], error: type[Exception], words: list[str], engine: str
) -> None:
    x, y = batch()
    arguments = {"model": linear_model(), "x": x, "y": y, "steps": 2, "engine": engine, **case}
    with pytest.raises(error) as found:
        fastadv.pgd_fused(**arguments)
    assert type(found.value) is error
    check_message(found, words)


@pytest.mark.parametrize("case", [{"seed": 1.5}, {"sample_ids": torch.arange(3)}])
def test_arguments_that_no_random_start_needs_are_checked_all_the_same(
    case: dict[str, Any],
) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(case))):
        fastadv.pgd_fused(linear_model(), *batch(), random_start=False, **case)


@pytest.mark.parametrize(
    "attack",
    [
        *(fastadv.PGD, fastadv.FGSM, fastadv.FGSMRS, fastadv.MIM, fastadv.CW, fastadv.APGD),
        *(fastadv.CWL2, fastadv.FAB, fastadv.FriendlyPGD, fastadv.Square),
    ],
)
def test_an_unknown_setting_is_named(attack: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match="'momentum'"):
        attack(linear_model(), momentum=0.9)


@pytest.mark.parametrize("transform", ["vmap", "grad", "grad of weights"])
def test_an_attack_inside_a_transform_of_torch_func_is_refused_in_words(transform: str) -> None:
    x, y = batch()
    attack = fastadv.PGD(linear_model(), 0.1, 0.02, 2)
    with pytest.raises(RuntimeError, match=r"outside the transforms of torch\.func"):
        if transform == "vmap":
            torch.func.vmap(lambda x, y: attack(x[None], y[None]))(x, y)
        elif transform == "grad":
            torch.func.grad(lambda x: attack(x, y).sum())(x)
        else:
            torch.func.grad(lambda w: F.linear(attack(x, y).flatten(1), w).sum())(
                torch.rand(4, 192)
            )


def test_the_seed_of_an_object_is_checked_when_it_is_made() -> None:
    with pytest.raises(TypeError, match=r"seed must be an integer, got 0\.5"):
        fastadv.PGD(linear_model(), seed=0.5)  # type: ignore[arg-type]


def no_gradient(kind: str) -> Callable[[Tensor], Tensor]:
    """A model whose logits do not depend on the images as far as autograd knows."""
    weight = nn.Parameter(torch.ones(4, 4))
    return {
        "no_grad": torch.no_grad()(linear_model()),
        "detached": lambda x: x.detach().flatten(1)[:, :4],
        "constant": lambda x: 2 * weight,
    }[kind]


@pytest.mark.parametrize("kind", ["no_grad", "detached", "constant"])
@pytest.mark.filterwarnings("ignore:fastadv attacks this model with the eager engine")
def test_a_model_without_gradient_in_x_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="model must return logits with a gradient in x"):
        fastadv.pgd_fused(no_gradient(kind), *batch(), steps=1)


@pytest.mark.parametrize(
    ("model_dtype", "image_dtype"),
    [(torch.float32, torch.float64), (torch.float64, torch.float32)],
)
def test_images_and_model_of_different_width_are_refused(
    model_dtype: torch.dtype, image_dtype: torch.dtype
) -> None:
    x, y = batch()
    with pytest.raises((TypeError, ValueError), match=r"x must .*float"):
        fastadv.pgd_fused(linear_model().to(model_dtype), x.to(image_dtype), y, precision="fp32")


@pytest.mark.parametrize("engine", ["eager", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch_comes_back_empty(dtype: torch.dtype, engine: str) -> None:
    x, y = torch.empty(0, 3, 8, 8, dtype=dtype), torch.empty(0, dtype=torch.int64)
    adv = fastadv.pgd_fused(linear_model(), x, y, engine=engine)
    assert adv.shape == x.shape and adv.dtype == dtype


def test_a_batch_of_one_is_attacked() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(1)
    adv = fastadv.pgd_fused(model, x, y, eps=0.1, steps=2)
    assert adv.shape == x.shape and not torch.equal(adv, x)


@pytest.mark.parametrize("number", [np.float32(0.1), np.float64(0.1), 1, 0])
def test_any_number_is_a_radius(number: float) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(4)
    adv = fastadv.pgd_fused(
        model, x, y, eps=number, alpha=number, steps=np.int64(2), seed=np.int64(3)
    )
    assert (adv - x).abs().max() <= float(number) + 1e-6
    assert torch.equal(adv, x) == (number == 0)


def test_images_at_bounds_that_their_dtype_cannot_hold_are_accepted() -> None:
    """Normalised images are, in float32, a rounding error outside bounds computed in Python."""
    mean, std = 0.4914, 0.2471
    low, high = (0 - mean) / std, (1 - mean) / std
    x = ((torch.tensor([0.0, 1.0]) - mean) / std).expand(4, 1, 8, 2).repeat(1, 1, 1, 4)
    assert float(x.min()) < low or float(x.max()) > high  # the case exists
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        images_at_bounds = (
            torch.tensor([low, high], dtype=dtype).expand(4, 1, 8, 2).repeat(1, 1, 1, 4)
        )
        fastadv.pgd_fused(
            trained_small_cnn(), images_at_bounds, torch.arange(4), steps=1, bounds=(low, high)
        )


def test_the_check_of_values_can_be_turned_off() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(4)
    fastadv.PGD(model, steps=1, check_inputs=False)(x * 1.5, y)
    with pytest.raises(ValueError, match="x must be finite and within bounds"):
        fastadv.PGD(model, steps=1)(x * 1.5, y)


def test_values_are_checked_before_a_loss_of_the_callers_sees_them() -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        assert int(y.max()) < 10
        return F.cross_entropy(logits, y)

    with pytest.raises(ValueError, match=r"y must be in 0 \.\. 9"):
        fastadv.pgd_fused(trained_small_cnn(), *digits_test(4)[:1], torch.full((4,), 10), loss=loss)


def test_images_without_elements_are_refused() -> None:
    model = nn.Flatten()
    with pytest.raises(
        ValueError, match=r"x must have images with elements, got shape \(2, 3, 0, 4\)"
    ):
        fastadv.PGD(model)(torch.zeros(2, 3, 0, 4), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("name", ["steps", "restarts"])
@pytest.mark.parametrize("attack", [fastadv.PGD, fastadv.APGD])
def test_a_count_that_no_machine_knows_is_refused(attack: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must fit into 64 bits"):
        attack(nn.Flatten(), **{name: 2**70})


CONVOLUTION = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
ATTACKS = [fastadv.PGD, fastadv.FGSM, fastadv.APGD, fastadv.CWL2, fastadv.FAB, fastadv.Square]


@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("options", [{}, {"precision": "fp32"}, {"engine": "compiled"}])
def test_images_with_the_channels_last_are_refused_in_words(
    kind: type[Any], options: dict[str, Any]
) -> None:
    x = images(4).permute(0, 2, 3, 1)
    words = (
        r"x must be images \[B, C, H, W\], got shape \(4, 8, 8, 3\).*pass x.permute\(0, 3, 1, 2\)"
    )
    with pytest.raises(ValueError, match=words):
        kind(CONVOLUTION, **options)(x, ZEROS)


def test_evaluation_and_plain_callables_say_so_as_well() -> None:
    data = (images(4).permute(0, 2, 3, 1), ZEROS)
    for run in (fastadv.evaluation.evaluate, fastadv.evaluation.autoattack):
        with pytest.raises(ValueError, match=r"images must be images \[B, C, H, W\].*permute"):
            run(CONVOLUTION, data, progress=False)
    with pytest.raises(ValueError, match=r"pass x.permute\(0, 3, 1, 2\)"):
        fastadv.pgd_fused(lambda x: CONVOLUTION(x), *data)


def test_a_model_that_takes_the_channels_last_is_attacked() -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return CONVOLUTION(x.permute(0, 3, 1, 2))

    x, options = images(4), {"steps": 2, "precision": "fp32", "random_start": False}
    expected = fastadv.pgd_fused(CONVOLUTION, x, ZEROS, **options)
    found = fastadv.pgd_fused(Last(), x.permute(0, 2, 3, 1).contiguous(), ZEROS, **options)
    assert torch.equal(found.permute(0, 3, 1, 2), expected)


def test_other_errors_keep_their_words_whatever_the_layout() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))  # takes both layouts
    last = images(4).permute(0, 2, 3, 1)
    with pytest.raises(ValueError, match=r"y must be in 0 \.\. 3"):
        fastadv.pgd_fused(flat, last, ZEROS + 7)
    with pytest.raises(ValueError, match="x must be finite"):
        fastadv.pgd_fused(CONVOLUTION, images(4) * 255, ZEROS)
    with pytest.raises(RuntimeError, match="channels"):  # no permutation helps: it has 5 of them
        fastadv.pgd_fused(CONVOLUTION, torch.rand(4, 5, 8, 4), ZEROS)


@pytest.mark.parametrize("attack", [fastadv.PGD, fastadv.MIM])
def test_a_step_of_0_in_a_call_is_refused_as_in_the_constructor(attack: Callable[..., Any]) -> None:
    made, (x, y) = attack(linear_model(), eps=0.1, alpha=0.1, steps=2), batch()
    with pytest.raises(ValueError, match="alpha must be > 0, got 0; the attack would stay"):
        made(x, y, alpha=0)
    assert torch.equal(made(x, y, alpha=0, eps=0), x)
    each = made(x, y, alpha=torch.tensor([0.1, 0.0, 0.1, 0.1]), seed=1)
    assert not torch.equal(each[0], x[0])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["eps", "alpha"])
@pytest.mark.parametrize("number", [NAN, INF, -0.1, 8.0])
def test_numbers_in_tensors_are_checked_with_the_images(
    name: str, number: float, norm: str
) -> None:
    model, (x, y) = linear_model(), batch()
    few = torch.tensor([0.1, 0.0, number, 0.1])
    attack = fastadv.PGD(model, eps=0.1, alpha=0.1, steps=1, norm=norm)
    largest = 1 if norm == "linf" else 192**0.5  # as far as images can be apart
    if number == 8.0 and norm == "l2":
        assert number <= largest
        attack(x, y, **{name: few})
        return
    words = "below 2" if (name, number) == ("alpha", 8.0) else "finite and >= 0.*got values from"
    with pytest.raises(ValueError, match=f"^{name} must be {words}"):
        attack(x, y, **{name: few})
    attack.check_inputs = False
    attack(x, y, **{name: few})


@pytest.mark.parametrize("other", [{"norm": "l2"}, {"norm": "l1"}, {"bounds": (0.0, 255.0)}])
@pytest.mark.parametrize("attack", [fastadv.PGD, fastadv.FGSM, fastadv.Square, fastadv.APGD])
def test_the_default_radius_is_for_linf_and_images_in_0_1(
    attack: Callable[..., object], other: dict[str, Any]
) -> None:
    if attack is fastadv.FGSM and other.get("norm") == "l1":
        other = {"norm": "l2"}
    with pytest.warns(UserWarning, match="eps is 8/255, the default for linf") as told:
        attack(linear_model(), **other)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(linear_model(), eps=0.5, **other)
        attack(linear_model())
