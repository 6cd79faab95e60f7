"""The recorder of CUDA graphs, on a pretended device whose allocator has the rules of CUDA's."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import count
from typing import Any

import pytest
import torch

from fastadv.engine.cuda_graph import CudaRecorder


class Device:
    """Streams, graphs and the pools of their memory.

    As in torch, a pool is made by its first recording, and lost with its last one while tensors use its memory.
    """

    def __init__(self) -> None:
        self.users: dict[Any, int] = {}
        self.waits: list[tuple[str, str]] = []
        self.recording = False
        self.handles = count(1)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Stream:
            def __init__(self, name: Any = "own") -> None:
                self.name = "own" if isinstance(name, torch.device) else name

            def wait_stream(self, other: Stream) -> None:
                device.waits.append((self.name, other.name))

        class Graph:
            pool: Any = None

            def __del__(self) -> None:
                if self.pool is not None:
                    device.users[self.pool] -= 1

        class Recording:
            def __init__(self, graph: Graph, pool: Any, stream: Stream, **_: Any) -> None:
                self.graph, self.pool = graph, device.new_pool() if pool is None else pool

            def __enter__(self) -> None:
                if device.users.get(self.pool) == 0:
                    raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
                device.users[self.pool] = device.users.get(self.pool, 0) + 1
                device.recording = True

            def __exit__(self, *_: object) -> None:
                self.graph.pool, device.recording = self.pool, False

        def does_not_record(*_: object) -> None:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

        fakes = {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": Recording,
            "graph_pool_handle": self.new_pool,
            "current_stream": lambda: Stream("current"),
            "device": lambda device: nullcontext(),
            "stream": lambda stream: nullcontext(),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", does_not_record, raising=False)

    def new_pool(self) -> tuple[int, int]:
        return next(self.handles), 0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    made.install(monkeypatch)
    return made


def test_recordings_share_a_pool(device: Device) -> None:
    recorder = CudaRecorder(torch.device("cpu", 0))
    kept: list[Any] = [recorder.record(lambda: None) for _ in range(3)]
    assert len({graph.pool for graph in kept}) == 1
    assert device.users[kept[0].pool] == 3


def test_an_error_while_recording_is_told_and_the_next_recording_succeeds(device: Device) -> None:
    """Such as a lack of memory. The recording ends in order, and takes its pool with it."""

    def fails() -> None:
        if device.recording:
            device.recording = False  # the recording by which the recorder recovers succeeds
            raise torch.OutOfMemoryError("no memory")

    recorder = CudaRecorder(torch.device("cpu", 0))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            recorder.record(fails)
    kept: Any = recorder.record(lambda: None)
    assert device.users[kept.pool] == 1


def test_the_caller_waits_for_a_warm_up_that_fails(device: Device) -> None:
    """Else its next tensors would lie in memory that the kernels of the warm-up still write."""

    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        CudaRecorder(torch.device("cpu", 0)).record(fails)
    assert device.waits == [("own", "current"), ("current", "own")]
