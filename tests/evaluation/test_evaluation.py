"""Accuracy under attack: against closed forms, what is checked and what is restored."""

from __future__ import annotations

import pytest
import torch
from linear_model import linear_problem
from torch import nn

from fastadv.data import ImageData
from fastadv.evaluation import evaluate
from fastadv.evaluation.context import full_float32
from fastadv.evaluation.verify import Audit

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = {"progress": False}


def test_two_classes_agree_with_the_closed_form():
    # With two classes one sign step from anywhere ends, after projection, at the worst image of the ball.
    model, x, y = linear_problem(classes=2, n=300, wrong=20)
    eps = 0.01
    report = evaluate(model, (x, y), ("clean", "fgsm", "pgd-20"), eps=eps, **QUIET)
    exact = int((model.exactly_robust(x, y, eps)).sum())
    assert 0 < exact < 280
    assert report["clean"].correct == 280
    assert report["fgsm"].correct == exact
    assert report["pgd-20"].correct == exact
    assert all(row.n == 300 and row.status == "ok" and row.seed == 0 for row in report.rows)


def test_more_classes_are_between_the_closed_form_and_clean():
    model, x, y = linear_problem(classes=6, n=200)
    report = evaluate(model, (x, y), ("fgsm", "pgd-40"), eps=0.02, **QUIET)
    exact = int(model.exactly_robust(x, y, 0.02).sum())
    assert exact <= report["pgd-40"].correct <= exact + 20 < 200
    assert "clean" not in report


def test_results_do_not_depend_on_the_batch_size():
    model, x, y = linear_problem(classes=5, n=120, wrong=7)
    one, other = (
        evaluate(model, (x, y), "pgd-3", eps=0.02, seed=5, batch_size=size, **QUIET)
        for size in (17, 120)
    )
    assert one["pgd-3"].correct == other["pgd-3"].correct
    again = evaluate(model, (x, y), "pgd-3", eps=0.02, seed=5, batch_size=17, **QUIET)
    assert again["pgd-3"].correct == one["pgd-3"].correct


def test_uint8_data_equals_its_floats():
    model, x, y = linear_problem(classes=4, n=60)
    images = (x * 255).round().to(torch.uint8)
    data = ImageData(images, y, 4, "pictures")
    names = ("clean", "pgd-5")
    first = evaluate(model, data, names, eps=0.02, **QUIET)
    second = evaluate(model, (images.float() / 255, y), names, eps=0.02, **QUIET)
    assert first.data == "pictures"
    assert [row.correct for row in first.rows] == [row.correct for row in second.rows]


def test_other_bounds():
    model, x, y = linear_problem(classes=2, n=100)
    shifted = nn.Sequential(_Affine(0.5, 0.5), model)
    wide = evaluate(shifted, (2 * x - 1, y), "pgd-10", eps=0.02, bounds=(-1, 1), **QUIET)
    unit = evaluate(model, (x, y), "pgd-10", eps=0.01, **QUIET)
    assert wide["pgd-10"].correct == unit["pgd-10"].correct < 100


def test_max_examples_takes_the_first():
    model, x, y = linear_problem(classes=4, n=50, wrong=10)
    row = evaluate(model, (x, y), "clean", max_examples=20, **QUIET)["clean"]
    assert (row.correct, row.n) == (10, 20)


def test_only_correct_images_are_attacked():
    model, x, y = linear_problem(classes=4, n=40, wrong=15)
    seen = []

    def attack(model, images, labels):
        seen.append(images)
        return images

    row = evaluate(model, (x, y), [("nothing", attack)], batch_size=10, **QUIET)["nothing"]
    assert torch.equal(torch.cat(seen), x[15:])
    assert row.correct == 25 and row.status == "ok"


def test_a_callable_that_leaves_the_ball_is_invalid():
    model, x, y = linear_problem(classes=4, n=40)

    def cheat(model, images, labels):
        images[: len(images) // 2] = 1 - images[: len(images) // 2]
        return images

    row = evaluate(model, (x, y), [("cheat", cheat)], eps=0.03, batch_size=20, **QUIET)["cheat"]
    assert row.status == "invalid"
    assert row.correct == 40, "inadmissible images must not count as successes"
    assert "20 images outside the linf ball of radius 0.03" in row.notes[0]


def test_a_callable_that_leaves_the_bounds_or_returns_nan_is_invalid():
    model, x, _ = linear_problem(classes=4, n=20)

    def out(model, images, labels):
        adv = torch.full_like(images, -0.01).where(images < 0.005, images)
        adv[3] = torch.nan
        return adv

    images = x.clone()
    images[0, 0, 0, 0] = 0.0
    row = evaluate(model, (images, model(images).argmax(1)), [("out", out)], eps=0.03, **QUIET)[
        "out"
    ]
    assert row.status == "invalid"
    text = " ".join(row.notes)
    assert (
        "not finite" in text
        and "outside the bounds" in text
        and "outside the linf ball" not in text
    )


def test_a_callable_in_the_ball_is_believed_after_checking():
    model, x, y = linear_problem(classes=2, n=100)

    def step(model, images, labels):
        images.requires_grad_()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        return (images.detach() + 0.01 * images.grad.sign()).clamp(0, 1).double()

    report = evaluate(model, (x, y), ["fgsm", ("mine", step)], eps=0.01, **QUIET)
    assert report["mine"].correct == report["fgsm"].correct
    assert all(parameter.grad is None for parameter in model.parameters())


def test_callables_are_seeded_and_generators_restored():
    model, x, y = linear_problem(classes=4, n=60)

    def noise(model, images, labels):
        return (images + 0.05 * (2 * torch.rand_like(images) - 1)).clamp(0, 1)

    def run(seed):
        return evaluate(model, (x, y), [("noise", noise)], eps=0.05, seed=seed, **QUIET)[
            "noise"
        ].correct

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    counts = [run(seed) for seed in (1, 1, 2, 3, 4)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert counts[0] == counts[1] and len(set(counts)) > 1


def test_a_callable_that_changes_the_model_is_refused():
    model, x, y = linear_problem(classes=4, n=10)

    def spoil(model, images, labels):
        with torch.no_grad():
            model.linear.bias += 1
        return images

    with pytest.raises(RuntimeError, match="'spoil' changed the model"):
        evaluate(model, (x, y), [("spoil", spoil)], **QUIET)


def test_modes_and_gradients_are_restored_per_module():
    model, x, y = linear_problem(classes=4, n=10)
    model.train()
    model.flatten.eval()
    model.linear.bias.requires_grad_(False)
    seen = []

    def look(model, images, labels):
        seen.append((model.training, model.dropout.training, model.linear.weight.requires_grad))
        model.train()
        return images

    evaluate(model, (x, y), ["pgd-2", ("look", look)], batch_size=5, **QUIET)
    assert seen == [(False, False, True)] * 2
    assert model.training and model.dropout.training and not model.flatten.training
    assert model.linear.weight.requires_grad and not model.linear.bias.requires_grad


def test_modes_are_restored_after_an_error():
    model, x, y = linear_problem(classes=4, n=10)
    model.train()

    def fail(model, images, labels):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, (x, y), [("fail", fail)], **QUIET)
    assert model.training and model.linear.weight.requires_grad


def _precision():
    backends = torch.backends
    return (
        backends.cuda.matmul.allow_tf32,
        backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        backends.mkldnn.matmul.fp32_precision,
    )


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("cudnn", [False, True])
def test_reduced_precision_is_off_and_restored(precision, cudnn):
    original = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn
        before = _precision()
        with full_float32():
            matmul, convolution, name, *newer = _precision()
            assert not matmul and not convolution and name == "highest"
            assert set(newer) <= {"ieee", "none"}
        assert _precision() == before
    finally:
        torch.set_float32_matmul_precision(original[0])
        torch.backends.cudnn.allow_tf32 = original[1]


def test_reduced_precision_set_by_the_newer_names_is_restored():
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.conv
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32"
        with full_float32():
            assert {setting.fp32_precision for setting in settings} <= {"ieee", "none"}
        assert [setting.fp32_precision for setting in settings] == ["tf32", "tf32"]
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def test_autocast_and_inference_mode_of_the_caller_do_not_matter():
    model, x, y = linear_problem(classes=2, n=80)
    dtypes = set()

    def look(model, images, labels):
        dtypes.add(model(images).dtype)
        return images

    plain = evaluate(model, (x, y), "pgd-5", eps=0.01, **QUIET)["pgd-5"].correct
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        report = evaluate(model, (x, y), ["pgd-5", ("look", look)], eps=0.01, **QUIET)
    assert report["pgd-5"].correct == plain
    assert dtypes == {torch.float32}


def test_only_float32_models():
    model, x, y = linear_problem(classes=4, n=10)
    model.linear.to(torch.bfloat16)
    with pytest.raises(
        TypeError, match=r"linear.weight is torch.bfloat16; convert it with model.float\(\)"
    ):
        evaluate(model, (x, y), "clean", **QUIET)


def test_any_callable_is_a_model():
    model, x, y = linear_problem(classes=2, n=50)
    report = evaluate(lambda images: model(images), (x, y), "pgd-10", eps=0.01, **QUIET)
    assert report["pgd-10"].correct == int(model.exactly_robust(x, y, 0.01).sum())


def test_logits_that_are_not_finite_are_an_error():
    model, x, y = linear_problem(classes=4, n=10)
    with torch.no_grad():
        model.linear.bias[1] = torch.nan
    with pytest.raises(RuntimeError, match="logits that are not finite"):
        evaluate(model, (x, y), "clean", **QUIET)


@pytest.mark.parametrize(
    "name",
    ["pgd", "pgd-0", "pgd-01", "pgd--1", "pgd-5-0", "mim-5-2", "apgd-kl", "aa-rand", "PGD-20", ""],
)
def test_unknown_names_list_the_known(name):
    model, x, y = linear_problem(classes=4, n=4)
    with pytest.raises(ValueError, match=r"clean, fgsm, fgsm-rs, pgd-K, .*autoattack"):
        evaluate(model, (x, y), ["clean", name], **QUIET)


def _same(model, images, labels):
    return images


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attacks": []}, ValueError, "must not be empty"),
        ({"attacks": ["clean", "clean"]}, ValueError, "appears twice"),
        ({"attacks": [("fgsm", _same)]}, ValueError, "built-in"),
        ({"attacks": [3]}, TypeError, "names or pairs"),
        ({"eps": -0.1}, ValueError, "eps must be .* got -0.1"),
        ({"eps": float("nan")}, ValueError, "eps must"),
        ({"alpha": -1.0}, ValueError, "alpha must"),
        ({"norm": "l3"}, ValueError, "norm must be one of linf, l2, l1"),
        ({"batch_size": 0}, ValueError, "batch_size must"),
        ({"max_examples": 0}, ValueError, "max_examples must"),
        ({"bounds": (0.0, 0.5), "eps": 0.1}, ValueError, "images must lie within"),
        ({"data": torch.rand(3)}, TypeError, "data must be"),
        ({"data": (torch.rand(3, 1, 8, 8), torch.rand(3))}, TypeError, "labels must be integers"),
        (
            {"data": (torch.rand(3, 1, 8, 8), torch.tensor([0, 1]))},
            ValueError,
            r"labels must be \[N\]",
        ),
        ({"data": (torch.ones(2, 64), torch.tensor([0, -1]))}, ValueError, "labels must be >= 0"),
        (
            {"data": (torch.ones(2, 64) * torch.nan, torch.tensor([0, 1]))},
            ValueError,
            "images must lie",
        ),
    ],
)
def test_wrong_arguments(arguments, error, message):
    model, x, y = linear_problem(classes=4, n=4)
    with pytest.raises(error, match=message):
        evaluate(model, **{"data": (x, y), "attacks": "clean", **QUIET, **arguments})


def test_an_attack_must_return_images_of_the_same_shape():
    model, x, y = linear_problem(classes=4, n=4)
    with pytest.raises(ValueError, match="must return images of shape"):
        evaluate(model, (x, y), [("short", lambda model, images, labels: images[:1])], **QUIET)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        evaluate(model, (x, y), [("whole", lambda model, images, labels: images.long())], **QUIET)


@pytest.mark.parametrize(("norm", "size"), [("linf", 0.1), ("l2", 0.1 * 8), ("l1", 0.1 * 64)])
def test_the_audit_measures_in_the_norm(norm, size):
    x = torch.full((1, 1, 8, 8), 0.5)
    adv = x + 0.1
    assert Audit(size, norm, (0, 1)).check(x, adv).all()
    audit = Audit(size * 0.999, norm, (0, 1))
    assert not audit.check(x, adv).any()
    assert audit.found.outside_ball == 1 and audit.found.largest == pytest.approx(size, rel=1e-5)


def test_one_line_per_attack_where_there_is_no_terminal(capsys):
    model, x, y = linear_problem(classes=2, n=20)
    evaluate(model, (x, y), ("clean", "pgd-2"), eps=0.01)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(":")[0] for line in captured.err.splitlines()] == ["clean", "pgd-2"]
    evaluate(model, (x, y), "clean", progress=False)
    assert capsys.readouterr().err == ""


def test_generators_are_left_alone():
    model, x, y = linear_problem(classes=2, n=10)
    state = torch.random.get_rng_state()
    evaluate(model, (x, y), ("fgsm", "pgd-3"), eps=0.01, **QUIET)
    assert torch.equal(state, torch.random.get_rng_state())


class _Affine(nn.Module):
    def __init__(self, scale, shift):
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x):
        return x * self.scale + self.shift
