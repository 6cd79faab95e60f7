"""What only a CUDA device can show: the backends against each other, graphs, streams, large tensors.

The op tests of test_ops.py run on CUDA tensors too; there every backend is held to the bits or the budget of the
reference.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from op_cases import CASES
from op_cases.budget import check_same_bits
from op_cases.case import Arguments, OpCase, Shape, mapped, requiring_grad, tensors_of
from op_cases.draw import Spec
from op_cases.running import backends_of, run, written_arguments
from torch import Tensor

import fastadv
from fastadv import ops
from fastadv.ops import REGISTRY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]

COMPILED = ("native", "triton")
SHAPES = ((16, 3, 32, 32), (3, 3, 7, 9))
LOGIT_SHAPES = ((16, 1024), (3, 10))
LAYOUTS = ("contiguous", "channels_last", "mixed")


def _cases(cases: list[OpCase]) -> list[object]:
    return [pytest.param(case, id=case.name) for case in cases]


ALL = list(CASES.values())
PUBLIC = [case for case in ALL if case.function is not None]


def _shapes(case: OpCase) -> tuple[Shape, Shape]:
    """An even shape and an odd one: of images or features, or of logits."""
    return SHAPES if len(case.shapes[0]) == 4 else LOGIT_SHAPES


def _sample(
    case: OpCase,
    shape: Shape | None = None,
    layout: str = "contiguous",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    shape = _shapes(case)[0] if shape is None else shape
    return case.arguments(Spec(shape, dtype, layout, seed=seed, device="cuda"))


def _require(case: OpCase, name: str) -> None:
    if name not in backends_of(case.registered, "cuda"):
        pytest.skip(f"{case.op} has no {name} kernel for CUDA here")


@pytest.fixture
def sync_debug_mode() -> Iterator[None]:
    """Put torch's check for waits of the host back after the test."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_who_owns_the_op(name: str) -> None:
    from fastadv.ops import NATIVE

    op = REGISTRY[name]
    in_cuda = "CUDA C++" not in op.without
    expected = "native" if NATIVE.build_info()["cuda"] and in_cuda else "triton"
    assert op.owner("cuda") == (expected if op.triton or expected == "native" else "reference")


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("case", _cases([case for case in ALL if torch.float32 in case.bit_equal]))
def test_same_bits_as_the_cpu(case: OpCase, name: str) -> None:
    _require(case, name)
    for shape in _shapes(case):
        for layout in LAYOUTS:
            arguments = _sample(case, shape, layout)
            on_cpu = mapped(arguments, Tensor.cpu)
            results = run(case, arguments, name)
            for result, expected in zip(results, run(case, on_cpu, "native"), strict=True):
                check_same_bits(result.cpu(), expected, f"{case.name}, {name}, {shape} {layout}")


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("case", _cases(ALL))
@pytest.mark.usefixtures("sync_debug_mode")
def test_without_waiting_for_the_device(case: OpCase, name: str) -> None:
    _require(case, name)
    arguments = _sample(case, layout="mixed")
    run(case, arguments, name)  # compiling a Triton kernel may wait
    torch.cuda.set_sync_debug_mode("error")
    run(case, arguments, name)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("case", _cases(ALL))
def test_graph_capture(case: OpCase, name: str) -> None:
    """A captured call, replayed on other values, gives what an eager call gives on them."""
    _require(case, name)
    for layout in LAYOUTS:
        static, other = _sample(case, layout=layout), _sample(case, layout=layout, seed=1)
        run(case, static, name)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run(case, static, name)
        for to, value in zip(tensors_of(static), tensors_of(other), strict=True):
            to.copy_(value)
        expected = run(case, static, name)
        for _ in range(2):
            graph.replay()
            for result, wanted in zip(results, expected, strict=True):
                check_same_bits(result, wanted, f"{case.name}, {name}, {layout}")


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("case", _cases(ALL))
def test_on_the_current_stream(case: OpCase, name: str) -> None:
    """Work that the current stream still has before it is waited for."""
    _require(case, name)
    arguments = _sample(case)
    expected = run(case, arguments, name)
    late = mapped(arguments, torch.zeros_like)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        for to, value in zip(tensors_of(late), tensors_of(arguments), strict=True):
            to.copy_(value)
        results = run(case, late, name)
    torch.cuda.synchronize()
    for result, wanted in zip(results, expected, strict=True):
        check_same_bits(result, wanted, f"{case.name}, {name}")


@pytest.mark.compiles
@pytest.mark.parametrize("case", _cases(ALL))
def test_opcheck(case: OpCase) -> None:
    names = [a.name for a in case.registered.overload._schema.arguments]
    for layout in ("contiguous", "channels_last"):
        arguments = _sample(case, _shapes(case)[1], layout)
        torch.library.opcheck(case.registered.overload, tuple(arguments[name] for name in names))


def _check_compiled(case: OpCase, compiler: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(case.call_public, fullgraph=True, backend=compiler)
    arguments = _sample(case)
    eager, traced = requiring_grad(case, arguments), requiring_grad(case, arguments)
    expected, results = case.call_public(eager), compiled(traced)
    for result, wanted in zip(results, expected, strict=True):
        check_same_bits(result, wanted, case.name)
    if case.differentiable:
        expected[0].sum().backward()
        results[0].sum().backward()
    leaves = (tensors_of(given, case.differentiable) for given in (traced, eager))
    for leaf, wanted in zip(*leaves, strict=True):
        check_same_bits(leaf.grad, wanted.grad, case.name)
    for argument in written_arguments(case.registered):
        if eager[argument] is not None:
            check_same_bits(traced[argument], eager[argument], case.name)


@pytest.mark.compiles
@pytest.mark.parametrize("case", _cases(PUBLIC))
def test_compiles_to_one_graph(case: OpCase) -> None:
    _check_compiled(case, "aot_eager")


@pytest.mark.compiles
@pytest.mark.parametrize(
    "case", _cases([CASES["angular_distance/same-dtype"], CASES["pgd_step_/linf"]])
)
def test_inductor_runs_it(case: OpCase) -> None:
    _check_compiled(case, "inductor")


def test_an_index_out_of_range_is_no_memory_fault() -> None:
    """A GPU cannot raise in time: the Triton kernel answers with NaN, and reads nothing outside."""
    images = torch.full((4, 3, 8, 8), 255, dtype=torch.uint8, device="cuda")
    indices = torch.tensor([1, 4, -1, 3, 2**62], device="cuda")
    with fastadv.backend("triton"):
        out = ops.crop_flip(images, indices, pad=0, flip=False, seed=0)
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, True, False, True]
    assert (out[[0, 3]] == 1).all()


@pytest.mark.parametrize("name", COMPILED)
def test_more_elements_than_an_int32_counts(name: str) -> None:
    needed = 30 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    _require(CASES["pgd_step/linf"], name)
    shape, tail = (2, 2**30 + 40), 4096
    x = torch.full(shape, 0.5, dtype=torch.bfloat16, device="cuda")
    grad = torch.zeros_like(x)
    grad[:, -tail:] = torch.randn(2, tail, device="cuda")
    with fastadv.backend(name):
        stepped = ops.pgd_step(x, grad, x, 0.1, 0.05)
        started = ops.random_start(x, 0.1, seed=3)
    wanted = ops.pgd_step(x[:, -tail:].cpu(), grad[:, -tail:].cpu(), x[:, -tail:].cpu(), 0.1, 0.05)
    check_same_bits(stepped[:, -tail:].cpu(), wanted, name)
    assert (stepped[:, :-tail] == x[:, :-tail]).all(), "the rest has no gradient"
    # Far from the start the numbers are still those of the other backends, and no two samples share them.
    other = "native" if name == "triton" else "triton"
    if other in backends_of(REGISTRY["random_start"], "cuda"):
        with fastadv.backend(other):
            rival = ops.random_start(x, 0.1, seed=3)
        assert torch.equal(started, rival)
    assert not torch.equal(started[0, -tail:], started[1, -tail:])
