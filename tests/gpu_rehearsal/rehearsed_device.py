"""The pretended GPU has the rules of a GPU."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_rehearsal import torch_cuda


def ones(count: int = 3) -> Tensor:
    return torch.ones(count, device="cuda")


def recorded(work: Callable[[], object], pool: object = None) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool, torch.cuda.Stream()):
        work()
    return graph


def told(count: int) -> list[str]:
    """The faults, which then do not fail the test."""
    found = torch_cuda.faults()
    assert len(found) == count, found
    return found


def test_a_network_computes_what_it_computes_on_the_cpu() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(36, 5)),
    )
    x, y, found = torch.randn(4, 3, 8, 8), torch.arange(4), []
    for device in ("cpu", "cuda"):
        net.to(device).zero_grad()
        leaf = x.to(device).detach().requires_grad_()
        F.cross_entropy(net(leaf), y.to(device)).backward()
        found.append([t.grad.clone() for t in (leaf, *net.parameters())])
    assert {p.device for p in net.parameters()} == {torch.device("cuda", 0)}
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu())
    with torch.autocast("cuda", torch.bfloat16):
        assert net(leaf).dtype == torch.bfloat16
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    assert torch.equal(torch.load(file)["0.weight"], net[0].weight)


def test_two_devices_do_not_go_together() -> None:
    for work in (lambda: ones() + torch.ones(3), lambda: torch.ones(3).add_(ones())):
        with pytest.raises(RuntimeError, match="two devices"):
            work()
    assert (ones() + torch.tensor(2.0)).tolist() == [3, 3, 3]


def test_random_numbers_have_a_generator_of_their_own() -> None:
    before = torch.get_rng_state()
    torch.cuda.manual_seed(3)
    first = torch.rand(4, device="cuda")
    state = torch.cuda.get_rng_state()
    second = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4, device="cuda"), second) and not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.rand(4, device="cuda", generator=torch.Generator())


def test_waits_are_counted() -> None:
    x = ones()
    for work, count in (
        (lambda: x.sum().item(), 1),
        (lambda: x[x > 0], 1),
        (lambda: x.cpu(), 1),
        (lambda: torch.equal(x, x), 1),
        (lambda: torch.tensor([1.0], device="cuda"), 1),
        (lambda: x[torch.tensor([0, 1])], 1),
        (lambda: x.masked_fill(x > 0, 0.0) + 1, 0),
        (lambda: torch.ones(2, pin_memory=True).to("cuda", non_blocking=True), 0),
    ):
        with torch_cuda.host_waits() as waits:
            work()
        assert waits.count == count, waits.places
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_replay_repeats_kernels_in_their_memory() -> None:
    x, factor, total = ones(), torch.tensor(2.0), ones() * 0
    results = []

    def work() -> None:
        results[:] = [x * factor + 1]
        total.add_(x)

    graph = recorded(work)
    assert results[0].isnan().all() and total.tolist() == [0, 0, 0]
    x.fill_(5)
    factor.fill_(7)  # too late: a number was passed
    for count in (1, 2):
        graph.replay()
        assert results[0].tolist() == [11, 11, 11] and total.tolist() == [5 * count] * 3


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda _: torch.cuda.synchronize(),
    ],
    ids=["item", "copy", "mask", "synchronize"],
)
def test_a_wait_ends_a_recording(wait: Callable[[Tensor], object]) -> None:
    x = ones()

    def waits_and_goes_on() -> None:
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            wait(x * 2)

    with pytest.raises(RuntimeError, match="previous error during capture"):
        recorded(waits_and_goes_on)
    recorded(lambda: x * 2).replay()


def test_a_kernel_on_the_default_stream_ends_a_recording() -> None:
    x = ones()

    def leaves() -> None:
        with torch.cuda.stream(torch.cuda.default_stream()):
            x.mul(2)

    with pytest.raises(RuntimeError, match="previous error during capture"):
        recorded(leaves)


def test_a_replay_does_not_use_freed_memory() -> None:
    images = [ones()]
    graph = recorded(lambda: images[0] + 1)
    images.clear()
    with pytest.raises(RuntimeError, match="uses memory that was freed"):
        graph.replay()
    assert "aten::add" in told(1)[0]


def test_recordings_of_a_pool_overwrite_what_is_free_there() -> None:
    x, pool, kept = ones(), torch.cuda.graph_pool_handle(), []
    first = recorded(lambda: kept.append(x + 1), pool)
    first.replay()
    assert kept[0].tolist() == [2, 2, 2]
    second = recorded(lambda: kept.append(x + 2), pool)
    second.replay()
    assert [t.tolist() for t in kept] == [[2, 2, 2], [3, 3, 3]]
    third = recorded(lambda: kept[0] * 2, pool)
    third.replay()
    del kept[0]
    with pytest.raises(RuntimeError, match="uses memory that was freed"):
        third.replay()
    told(1)


def test_streams_wait_for_one_another() -> None:
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        made = ones() * 2
    with pytest.raises(RuntimeError, match="has not waited"):
        made + 1
    told(1)
    current.wait_stream(stream)
    assert (made + 1).tolist() == [3, 3, 3]
    other = ones()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        other.mul_(2)
    del other
    with pytest.raises(RuntimeError, match="handed out again"):
        ones()
    told(1)
    used = ones()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        used.mul_(2)
        used.record_stream(stream)
    del used
    ones()


def test_an_op_without_a_kernel_for_gpus_is_refused() -> None:
    import fastadv.engine.cpu_channels  # noqa: F401  defines ops for CPUs

    with pytest.raises(NotImplementedError, match="'CUDA' backend"):
        torch.ops.fastadv.activation_(ones(), ones(), 0)
