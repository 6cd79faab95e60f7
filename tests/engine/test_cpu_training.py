"""The native operations of training passes: the gradient in a convolution's weights, and BatchNorm."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.engine import cpu_training
from fastadv.engine.training_convolution import TrainingConvolutions
from fastadv.engine.training_norm import fast_batch_norm

BF16, LAST = torch.bfloat16, torch.channels_last
OPS = torch.ops.fastadv
# Images, channels, filters, kernel, stride, padding, dilation, height, width.
SHAPES = [
    (5, 32, 64, 3, 1, 1, 1, 9, 10),
    (3, 64, 32, 3, 2, 1, 1, 7, 5),
    (4, 32, 32, 1, 2, 0, 1, 8, 6),
    (5, 64, 32, 3, 1, 0, 1, 9, 7),
    (5, 32, 32, 5, 3, 2, 1, 17, 11),
    (2, 32, 32, 3, 1, 2, 2, 9, 9),
    (70, 32, 32, 3, 1, 1, 1, 4, 4),  # many images in a chunk
    (3, 32, 32, 3, 1, 1, 1, 40, 40),  # one image in a chunk
    (6, 32, 32, 5, 1, 1, 1, 8, 8),  # rows below the image are real
]
needs_native = pytest.mark.skipif(not cpu_training.available(), reason="the compiled part alone")


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def images(*shape: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(shape).to(BF16).contiguous(memory_format=LAST)


@pytest.mark.skipif(not cpu_training.serves_weight_gradient(32, 32), reason="needs AMX")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_in_the_weights_is_the_exact_one_of_the_images(
    shape: tuple[int, ...], threads: int, request: pytest.FixtureRequest
) -> None:
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    b, c, k, kernel, stride, padding, dilation, height, width = shape
    x = images(b, c, height, width)
    sizes = [(n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in (height, width)]
    gradient = images(b, k, *sizes, seed=1)
    out = torch.full((k, c, kernel, kernel), float("nan")).contiguous(memory_format=LAST)
    steps: Any = [[n, n] for n in (stride, padding, dilation)]
    OPS.conv_weight_gradient_(out, gradient, x, *steps)
    exact = torch.nn.grad.conv2d_weight(
        x.double(), list(out.shape), gradient.double(), stride, padding, dilation
    )
    assert relative(out, exact) < 1e-6


@pytest.mark.skipif(not cpu_training.serves_weight_gradient(32, 32), reason="needs AMX")
def test_the_gradient_in_the_weights_says_what_it_cannot_take() -> None:
    x, gradient = images(2, 32, 8, 8), images(2, 32, 8, 8)
    out = torch.empty(32, 32, 3, 3).contiguous(memory_format=LAST)
    ones = [1, 1]
    for wrong, message in [
        ((out, gradient, images(2, 48, 8, 8), ones, ones, ones), "multiples of 32"),
        ((out, gradient, x.contiguous(), ones, ones, ones), "x must be channels-last"),
        ((out, gradient, x, ones, [0, 0], ones), "gradient must be channels-last"),
        ((out.to(BF16), gradient, x, ones, ones, ones), "out must be channels-last float32"),
        ((out, gradient, x, [0, 1], ones, ones), "must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            OPS.conv_weight_gradient_(*wrong)
    empty = torch.empty_like(out)
    OPS.conv_weight_gradient_(empty, gradient[:0], x[:0], ones, ones, ones)
    assert not empty.any()


@needs_native
@pytest.mark.parametrize("shape", [(4, 20, 5, 5), (3, 64, 32, 32), (2, 8, 1, 1), (64, 512, 2, 3)])
@pytest.mark.parametrize("bare", [False, True])
def test_batch_norm_is_that_of_float64(shape: tuple[int, ...], bare: bool) -> None:
    x = (images(*shape) * 0.5 + 30).contiguous(
        memory_format=LAST
    )  # far from 0, where squares cancel
    gradient = images(*shape, seed=1)
    norm = nn.BatchNorm2d(shape[1], affine=not bare, track_running_stats=not bare, momentum=0.3)
    if not bare:
        nn.init.uniform_(norm.weight, -1, 2)
        nn.init.normal_(norm.bias)
    exact = nn.BatchNorm2d(shape[1], affine=not bare, track_running_stats=not bare, momentum=0.3)
    exact.load_state_dict(norm.state_dict())
    exact.double()
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    found = fast_batch_norm(
        leaf, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.3, norm.eps
    )
    assert found is not None
    wanted = exact(wide)
    assert found.dtype == BF16 and relative(found, wanted) < 4e-3
    found.backward(gradient)
    wanted.backward(gradient.double())
    assert leaf.grad is not None and wide.grad is not None
    if shape[0] * shape[2] * shape[3] > 2:  # of two values the exact gradient is all but 0
        assert relative(leaf.grad, wide.grad) < 4e-3
    for mine, theirs in zip(norm.parameters(), exact.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert relative(mine.grad, theirs.grad) < 1e-4
    for mine, theirs in zip(norm.buffers(), exact.buffers(), strict=True):
        if mine.is_floating_point():
            assert relative(mine, theirs) < 1e-5


@needs_native
def test_batch_norm_gives_the_same_on_more_threads(request: pytest.FixtureRequest) -> None:
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    x, found = images(9, 48, 17, 16), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        out = fast_batch_norm(leaf, None, None, None, None, True)
        assert out is not None
        out.backward(images(9, 48, 17, 16, seed=1))
        found.append((out.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_native
def test_a_context_trains_batch_norm_as_torch_and_leaves_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    native = torch.ops.fastadv.batch_norm_train_
    monkeypatch.setattr(
        torch.ops.fastadv, "batch_norm_train_", lambda *a: calls.append(1) or native(*a)
    )
    norm, x = nn.BatchNorm2d(16), images(4, 16, 6, 6)

    def passed(mode: AbstractContextManager[Any]) -> tuple[Tensor, ...]:
        norm.reset_running_stats()
        norm.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", BF16), mode:
            out = norm(leaf)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), leaf, create_graph=True)
        gradient.square().sum().backward()  # differentiated twice
        assert leaf.grad is not None and norm.weight.grad is not None
        return out, gradient, leaf.grad, norm.weight.grad, norm.running_mean, norm.running_var  # type: ignore[return-value]

    plain = [t.detach().clone() for t in passed(nullcontext())]
    for found, wanted in zip(passed(TrainingConvolutions()), plain, strict=True):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=0.03, atol=0.02)
    assert len(calls) == 1 and int(norm.num_batches_tracked) == 1  # type: ignore[arg-type]
    with TrainingConvolutions(), torch.autocast("cpu", BF16):
        norm(x)  # nothing to differentiate but the weights: torch's
        norm(x.float().requires_grad_())
        norm(x.contiguous().requires_grad_())
        norm.eval()(x.clone().requires_grad_())
        with pytest.raises(ValueError, match="more than 1 value"):
            F.batch_norm(x[:1, :, :1, :1].requires_grad_(), None, None, training=True)
    assert len(calls) == 1


@needs_native
def test_networks_with_relu_in_place_train() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
    model = nn.Sequential(*layers, nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32))
    model.to(memory_format=LAST)  # type: ignore[call-overload]
    x = torch.rand(8, 3, 12, 12).contiguous(memory_format=LAST)
    weights = torch.randn(8, 32, 12, 12, generator=torch.Generator().manual_seed(3))
    found = []
    for mode in (nullcontext(), TrainingConvolutions()):
        model.zero_grad()
        with torch.autocast("cpu", BF16), mode:
            out = model(x)
        (out * weights).sum().backward()
        found.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))  # type: ignore[union-attr]
    assert float(F.cosine_similarity(*found, 0)) > 0.99


@needs_native
def test_batch_norm_within_a_functional_transform_is_left_to_torch() -> None:
    norm, x = nn.BatchNorm2d(16, track_running_stats=False), images(4, 16, 6, 6)

    def loss(x: Tensor) -> Tensor:
        return norm(x).float().pow(3).sum()

    wanted = torch.func.grad(loss)(x)
    with TrainingConvolutions():
        assert torch.equal(torch.func.grad(loss)(x), wanted)
