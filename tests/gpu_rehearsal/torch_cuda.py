"""Makes ``torch.cuda`` mean the pretended GPU, for the rest of the process."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

NAME = "pretended GPU"
_MEMORY = 80 << 30
_HERE = str(Path(__file__).resolve().parent)
_library: Any = None


def start(library: ctypes.CDLL) -> None:
    """Let ``torch.cuda`` refer to the pretended GPU; before its first use."""
    global _library
    _library = library
    for name in ("begin", "end", "replay", "synchronize", "fault"):
        getattr(_library, f"rehearsal_{name}").restype = ctypes.c_char_p
    for name in ("new_graph", "kernels", "waits", "allocated", "peak"):
        getattr(_library, f"rehearsal_{name}").restype = ctypes.c_int64
    _library.rehearsal_start()
    torch._C._host_emptyCache = lambda: None  # type: ignore[attr-defined]
    torch._C._cuda_endAllocateToPool = _not_recording  # type: ignore[attr-defined]
    for name, value in _functions().items():
        setattr(torch.cuda, name, value)
        for module in (torch.cuda.random, torch.cuda.memory, torch.cuda.streams, torch.cuda.graphs):
            if hasattr(module, name):
                setattr(module, name, value)
    torch.UntypedStorage.__new__ = _new_storage  # type: ignore[assignment]
    torch.compile = _not_compiled  # type: ignore[assignment]


def own_kernels(names: set[str]) -> None:
    """Have ops of fastadv count as those with a kernel in CUDA C++; before fastadv is imported."""
    for name in sorted(names):
        _library.rehearsal_own_kernel(b"fastadv", name.encode())


def faults() -> list[str]:
    """What was done that a GPU does not notice, such as the use of freed memory; each is told once."""
    return list(iter(lambda: (_library.rehearsal_fault() or b"").decode(), ""))


class HostWaits:
    """The waits of the host for the device in a block, with the lines that asked for them."""

    def __init__(self) -> None:
        self.count = 0
        self.places: Counter[str] = Counter()

    def note(self, what: bytes) -> None:
        self.count += 1
        frames = [f for f in traceback.extract_stack() if not f.filename.startswith(_HERE)]
        ours = [f for f in frames if "/torch/" not in f.filename]
        place = ours[-1] if ours else frames[-1]
        self.places[
            f"{Path(place.filename).name}:{place.lineno} {place.line} [{what.decode()}]"
        ] += 1


@contextlib.contextmanager
def host_waits() -> Iterator[HostWaits]:
    """Count the waits of a block."""
    found = HostWaits()
    call = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(found.note)
    _library.rehearsal_on_wait(call)
    try:
        yield found
    finally:
        _library.rehearsal_on_wait(None)


class Stream(torch.Stream):
    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Stream:
        kwargs = kwargs or {"device": "cuda", "priority": priority}
        return super().__new__(cls, **kwargs)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def wait_event(self, event: Any) -> None:
        event.wait(self)

    def record_event(self, event: Any = None) -> Any:
        event = Event() if event is None else event
        event.record(self)
        return event


class Event:
    """A ``torch.Event`` of the device, which itself takes no subclass in its functions."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._event = torch.Event(device="cuda", enable_timing=enable_timing)

    def record(self, stream: torch.Stream | None = None) -> None:
        self._event.record(stream or _current_stream())

    def wait(self, stream: torch.Stream | None = None) -> None:
        self._event.wait(stream or _current_stream())

    def synchronize(self) -> None:
        self._event.synchronize()

    def query(self) -> bool:
        return self._event.query()

    def elapsed_time(self, end: Event) -> float:
        return self._event.elapsed_time(end._event)


class CUDAGraph:
    """A recording; the rules of recordings are in memory.cpp."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._number = _library.rehearsal_new_graph()
        self._pool: tuple[int, int] | None = None
        self._library = _library  # which is still there when the interpreter ends

    def capture_begin(self, pool: Any = None, **_: Any) -> None:
        self._pool = pool or graph_pool_handle()
        _raised(
            _library.rehearsal_begin(ctypes.c_int64(self._number), ctypes.c_int64(self._pool[0]))
        )

    def capture_end(self) -> None:
        _raised(_library.rehearsal_end(ctypes.c_int64(self._number)))

    def replay(self) -> None:
        _raised(_library.rehearsal_replay(ctypes.c_int64(self._number)))

    def pool(self) -> tuple[int, int]:
        assert self._pool is not None
        return self._pool

    def kernels(self) -> int:
        return _library.rehearsal_kernels(ctypes.c_int64(self._number))

    def __del__(self) -> None:
        self._library.rehearsal_drop(ctypes.c_int64(self._number))


_pools = itertools.count(1)


def graph_pool_handle() -> tuple[int, int]:
    return next(_pools), 0


def _raised(text: bytes) -> None:
    if text:
        raise RuntimeError(text.decode())


def _not_recording(device: int, pool: Any) -> None:
    """A failed recording has ended in order, as with torch 2.12 and later."""
    raise RuntimeError(f"endAllocatePool: not currently recording to {pool}")


def _new_storage(kind: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
    """A storage; without CUDA torch itself makes none of the device."""
    if device is None or torch.device(device).type != "cuda":
        return torch._C.StorageBase.__new__(kind, *args, device=device, **kwargs)
    return torch.empty(args[0] if args else 0, dtype=torch.uint8, device="cuda").untyped_storage()


def _not_compiled(model: Any = None, **options: Any) -> Any:
    """``torch.compile`` without a compiler, which would make kernels that are not here."""
    return model if model is not None else lambda given: given


def _synchronize(device: Any = None) -> None:
    _raised(_library.rehearsal_synchronize())


class _StreamContext:
    """As ``torch.cuda.StreamContext``, which does not put a stream back where it is not left."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before = torch.accelerator.current_stream()
        if self._stream is not None:
            torch.accelerator.set_stream(self._stream)

    def __exit__(self, *_: object) -> None:
        torch.accelerator.set_stream(self._before)


def _current_stream(device: Any = None) -> torch.Stream:
    found = torch.accelerator.current_stream()
    return Stream(stream_id=found.stream_id, device_index=0, device_type=found.device_type)


def _set_sync_debug_mode(mode: int | str) -> None:
    numbers = {"default": 0, "warn": 1, "error": 2}
    _library.rehearsal_sync_mode(numbers[mode] if isinstance(mode, str) else mode)


def _functions() -> dict[str, Callable[..., Any] | Any]:
    """What of ``torch.cuda`` means the pretended GPU."""
    facts = {
        "name": NAME,
        "major": 9,
        "minor": 0,
        "total_memory": _MEMORY,
        "multi_processor_count": 132,
    }
    generator = torch.Generator(device="cuda")  # the first of the process is the default one
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **_: call(),
        "_initialized": True,
        "default_generators": (generator,),
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(**facts),
        "get_arch_list": lambda: ["sm_90"],
        "is_bf16_supported": lambda including_emulation=True: True,
        "Stream": Stream,
        "Event": Event,
        "stream": _StreamContext,
        "StreamContext": _StreamContext,
        "current_stream": _current_stream,
        "default_stream": lambda device=None: Stream(stream_id=0, device_index=0, device_type=1),
        "set_stream": torch.accelerator.set_stream,
        "synchronize": _synchronize,
        "CUDAGraph": CUDAGraph,
        "graph_pool_handle": graph_pool_handle,
        "is_current_stream_capturing": lambda: torch.accelerator.current_stream().is_capturing(),
        "set_sync_debug_mode": _set_sync_debug_mode,
        "_sleep": lambda cycles: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (_MEMORY - _library.rehearsal_allocated(), _MEMORY),
        "memory_allocated": lambda device=None: _library.rehearsal_allocated(),
        "memory_reserved": lambda device=None: _library.rehearsal_allocated(),
        "max_memory_allocated": lambda device=None: _library.rehearsal_peak(),
        "max_memory_reserved": lambda device=None: _library.rehearsal_peak(),
        "reset_peak_memory_stats": lambda device=None: _library.rehearsal_reset_peak(),
    }
