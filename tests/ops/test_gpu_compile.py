"""What can be known about the GPU kernels without a GPU: that they compile, and into what.

Every Triton kernel is compiled for sm_90 on every path through its source that the ops take, every CUDA C++ file
to PTX for sm_80 and from there for sm_90; none may spill registers, and those that move images must do it 16 bytes
at a time.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import pkgutil
import re
import shutil
import subprocess
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import FOLDER, kept, version_of
from covering import Facts, covering
from op_cases import CASES
from op_cases.case import OpCase, Shape
from op_cases.draw import Spec

from fastadv import kernels

pytestmark = [pytest.mark.slow, pytest.mark.longest]

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
CUDA_FILES = sorted(path.name for path in (SOURCES / "cuda").glob("*.cu"))
TRITON_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Straight into registers, or by way of shared memory.
WIDE_LOAD = re.compile(
    r"ld\.global\.(v4\.[buf]32|v2\.[buf]64)|cp\.async\.cg\.shared\.global .*, 0x10,"
)
WIDE_STORE = re.compile(r"st\.global\.(v4\.[buf]32|v2\.[buf]64)")

# Triton kernels that read images or features, and those that write them.
TRITON_READERS = {
    "_step_linf",
    "_step_per_channel",
    "_step_l2",
    "_step_l1",
    "_update_samples",
    "_norms_of_parts",
    "_update_parts",
    "_largest_parts",
    "_sum_parts",
    "_write_parts",
    "_start",
    "_replay",
    "_distance",
    "_moments_of_parts",
    "_backward",
    "_rows",
    "_scale_rows",
    "_norms",
    "_squares_of_parts",
    "_gradients",
    "_maps",
    "_map_gradient",
}
TRITON_READERS |= {"_merge", "_features_backward", "_weight_backward"}
TRITON_WRITERS = {"_step_linf", "_step_l2", "_write_parts", "_start", "_replay", "_backward"}
TRITON_WRITERS |= {"_crop_flip", "_rows", "_scale_rows", "_gradients", "_map_gradient"}
TRITON_WRITERS |= {"_step_per_channel", "_step_l1", "_update_samples", "_update_parts"}
# Three interleaved channels in a tile of four: Triton goes element by element.
TRITON_NARROW = {("_start", "channels_last"), ("_replay", "channels_last")}
TRITON_NARROW |= {("_maps", "channels_last"), ("_map_gradient", "channels_last")}

CUDA_READERS = ("step_linf", "step_l2", "step_l1", "largest_parts", "sum_parts", "write_parts")
CUDA_READERS += ("update_samples", "norms_of_parts", "update_parts")
CUDA_READERS += ("start", "replay", "sums_of_samples", "sums_of_parts", "backward")
CUDA_READERS += ("difference_gradients",)
CUDA_WRITERS = ("step_linf", "step_l2", "step_l1", "write_parts", "start", "replay", "backward")
CUDA_WRITERS += ("update_samples", "update_parts", "difference_gradients")
# The same bits as every other backend.
CUDA_EXACT = ("step_linf", "step_l2", "step_l1", "write_parts", "start", "replay")
CUDA_EXACT += ("update_samples", "update_parts")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
not_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="triton runs its interpreter"
)


class Launches:
    """The launches of the Triton kernels, kept instead of carried out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        for found in pkgutil.iter_modules(kernels.__path__):
            module = importlib.import_module(f"fastadv.kernels.{found.name}")
            if found.name != "launch" and hasattr(module, "launch"):
                monkeypatch.setattr(module, "launch", self._keep)

    def _keep(
        self, kernel: Any, programs: int, like: Any, *arguments: Any, **settings: Any
    ) -> None:
        assert programs > 0
        self.found.append((kernel, arguments, settings))


def _source(kernel: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    """The kernel with the types, constants and alignments that Triton derives from the arguments."""
    from triton.compiler import ASTSource

    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values |= {name: value for name, value in settings.items() if name in kernel.arg_names}
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[name] = _pointer(value)
            aligned[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, tuple) and not parameter.is_constexpr:
            signature[name] = tuple(_pointer(t) for t in value)
            aligned |= {(index, i): [["tt.divisibility", 16]] for i in range(len(value))}
        elif parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif parameter.do_not_specialize or value != 1:
            signature[name] = parameter.annotation_type or ("i32" if value < 2**31 else "i64")
            if not parameter.do_not_specialize and value % 16 == 0:
                aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name], constants[name] = "constexpr", 1
    return ASTSource(kernel, signature, constants, aligned)


def _pointer(t: torch.Tensor) -> str:
    from triton._utils import canonicalize_dtype

    return "*" + ("i1" if t.dtype == torch.bool else canonicalize_dtype(t.dtype))


def _compiled(source: Any, settings: dict[str, Any]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": settings.get("num_warps", 4), "enable_fp_fusion": False}
    options["maxnreg"] = settings.get("maxnreg")
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def _stack_bytes(cubin: bytes, folder: Path) -> int:
    """Bytes of local memory per thread, which is where registers are spilled to."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [str(tool), "--dump-resource-usage", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.findall(r"(?:STACK|LOCAL):(\d+)", done.stdout)
    assert found, f"cuobjdump reports no resources: {done.stdout}"
    return sum(map(int, found))


def _samples(case: OpCase) -> list[tuple[Shape, str]]:
    """Shapes and layouts in which an op's Triton kernels are compiled: of images or features, or of logits."""
    if case.registered.triton is None:
        return []
    found = [((8, 1024), "contiguous")]
    if len(case.shapes[0]) == 4:
        found = [((8, 3, 32, 32), "contiguous"), ((8, 3, 32, 32), "channels_last")]
    return found if case.large is None else [*found, (case.large, "contiguous")]


@dataclass(frozen=True)
class Specialised:
    """A Triton kernel as one call of an op launches it."""

    source: Any
    settings: dict[str, Any]
    case: OpCase
    dtype: torch.dtype
    layout: str
    last_axis: int

    @property
    def name(self) -> str:
        return str(self.source.fn.__name__)

    def __str__(self) -> str:
        return f"{self.name} of {self.case.name} in {self.dtype}, {self.layout}"

    def facts(self) -> Facts:
        """What its machine code depends on: a path through its source, sizes, types, alignments, registers."""
        constants = self.source.constants.items()
        sizes = [(key, value) for key, value in constants if type(value) is int]
        path = [(key, str(value)) for key, value in constants if type(value) is not int]
        settings = [(key, self.settings.get(key)) for key in ("num_warps", "maxnreg")]
        found: dict[str, Hashable] = {
            **{"path": tuple(part for part in path if part[1] not in ("fp32", "fp64"))},
            **{"sizes": (*sizes, *settings), "dtype": self.dtype, "layout": self.layout},
            "aligned": len(self.source.attrs),
        }
        return {(self.name, key, value) for key, value in found.items()}


def _specialised(launches: Launches) -> list[Specialised]:
    """Every Triton kernel in all ways in which the cases launch it."""
    found: dict[str, Specialised] = {}
    for dtype, case in itertools.product(TRITON_DTYPES, CASES.values()):
        for shape, layout in _samples(case) if dtype in case.dtypes else ():
            launches.found.clear()
            case.registered.triton_function()(*case.arguments(Spec(shape, dtype, layout)).values())
            assert launches.found, f"{case.name} launched nothing"
            for kernel, arguments, settings in launches.found:
                source = _source(kernel, arguments, settings)
                one = Specialised(source, settings, case, dtype, layout, shape[-1])
                found.setdefault(source.hash(), one)
    return list(found.values())


@pytest.mark.processes
@needs_triton
@not_interpreted
def test_triton_kernels_for_hopper(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Each path through a kernel's source once, and each dtype, layout and size once; all with --thorough."""
    everything = _specialised(Launches(monkeypatch))
    chosen = everything
    if not pytestconfig.option.thorough:
        places = covering([one.facts() for one in everything])
        chosen = [everything[place] for place in places]
    looked_at = set()
    for one in chosen:
        binary = _compiled(one.source, one.settings).asm
        assert _stack_bytes(binary["cubin"], tmp_path) == 0, f"{one} spills registers"
        if one.last_axis % 16 == 0:  # odd rows cannot be read in 16 bytes
            looked_at.add(one.name)
            _check_widths(binary["ptx"], one.name, one.layout, str(one))
    missing = (TRITON_READERS | TRITON_WRITERS) - looked_at
    assert not missing, "kernels were renamed: correct the lists above"


@needs_triton
@not_interpreted
@pytest.mark.parametrize("kind", ["cross_entropy", "alp"])
def test_logits_of_one_class(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a kernel an integer that is 1 is a constant, which lacks the methods of other integers."""
    launches = Launches(monkeypatch)
    case = CASES[f"softmax_losses/{kind}"]
    case.registered.triton_function()(*case.arguments(Spec((8, 1))).values())
    for kernel, arguments, settings in launches.found:
        _compiled(_source(kernel, arguments, settings), settings)


def _check_widths(ptx: str, name: str, layout: str, label: str) -> None:
    if (name, layout) in TRITON_NARROW:
        return
    assert name not in TRITON_READERS or WIDE_LOAD.search(ptx), f"{label}: no 16-byte load"
    assert name not in TRITON_WRITERS or WIDE_STORE.search(ptx), f"{label}: no 16-byte store"


def _cuda_sources(folder: Path, thorough: bool) -> Path:
    """The sources, in which float16 has the code of bfloat16 unless all is to be compiled.

    Both have two bytes and are computed in float32. With one of them a pair of dtypes has nine combinations in
    place of 16. The emulator's tests compile and run the code of both.
    """
    sources = folder / "csrc"
    shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("cpu"))
    if not thorough:
        dispatch = sources / "cuda" / "launch.cuh"
        half, text = "Type<__half>", dispatch.read_text()
        assert text.count(half) == 1
        dispatch.write_text(text.replace(half, "Type<__nv_bfloat16>"))
    return sources


def _nvcc(file: str, sources: Path, folder: Path) -> tuple[str, str]:
    """PTX of one file, compiled as CMakeLists.txt has it compiled, and ptxas's report on it.

    No source has code for one architecture alone, and both have as many registers. So the PTX is the older one's
    and the report is on the newer one.
    """
    command = ["nvcc", "-ptx", "-O3", "-std=c++20", "-fmad=false", "-arch=compute_80"]
    assemble = ["ptxas", "-v", "-O3", "-arch=sm_90"]
    source = sources / "cuda" / file

    def compile_it(made: Path) -> None:
        ptx = folder / f"{file}.ptx"
        _run([*command, "-I", str(sources), str(source), "-o", str(ptx)])
        report = _run([*assemble, str(ptx), "-o", str(folder / f"{file}.cubin")])
        made.write_text(json.dumps([ptx.read_text(), report]))

    headers = [path for pattern in ("*.h", "*.cuh") for path in sources.rglob(pattern)]
    texts = [path.read_text() for path in sorted([*headers, source])]
    described = [str(command), str(assemble), version_of("nvcc"), *texts]
    made = kept(FOLDER / "nvcc" / f"{Path(file).stem}.json", described, compile_it)
    ptx, report = json.loads(made.read_text())
    return ptx, report


def _run(words: list[str]) -> str:
    """What a compiler reports."""
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr}"
    return done.stderr


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_cuda_files_for_ampere_and_hopper(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    sources = _cuda_sources(tmp_path, pytestconfig.option.thorough)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        outputs = list(pool.map(lambda file: _nvcc(file, sources, tmp_path), CUDA_FILES))
    seen: set[str] = set()
    for file, (ptx, report) in zip(CUDA_FILES, outputs, strict=True):
        spilled = [int(size) for size in re.findall(r"(\d+) bytes spill", report)]
        assert spilled and not any(spilled), f"{file} spills registers:\n{report}"
        for entry in re.split(r"\.entry ", ptx)[1:]:
            seen.add(_check_cuda_kernel(entry, file))
    assert seen >= set(CUDA_READERS), "kernels were renamed: correct the lists above"


def _check_cuda_kernel(entry: str, label: str) -> str:
    """Check one kernel's PTX, which begins with its mangled name; return its name."""
    mangled = re.match(r"\w+", entry)
    names = "|".join(CUDA_READERS)
    template = re.search(rf"\d({names})I(\w+)", mangled[0]) if mangled else None
    if template is None:
        return "none of the listed"
    name, arguments = template[1], template[2]
    label = f"{label}: {name}<{arguments}>"
    exact = name in CUDA_EXACT
    assert not exact or "fma.rn.f32" not in entry, f"{label} contracts products and sums"
    if "Li0E" not in arguments:  # the template for any layout goes element by element
        assert WIDE_LOAD.search(entry), f"{label}: no 16-byte load"
        assert name not in CUDA_WRITERS or WIDE_STORE.search(entry), f"{label}: no 16-byte store"
    return name
