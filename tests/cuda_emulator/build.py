"""Compiles csrc/cuda against the emulator into a library that registers its ops for CPU tensors."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from compiled import kept, version_of

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
KERNELS = ("*.cu", "*.cuh")
HOSTS = "host_sides.cpp"
COMPILERS = 2  # that run at once

# The only forms of what is not C++ that csrc/cuda may have; another is an error here, not a kernel left out.
_LAUNCH = re.compile(
    r"(?P<kernel>\b(?P<name>\w+)(?:<[^<>;]*>)?)\s*"
    r"<<<(?P<blocks>[^<>;]*),\s*(?P<threads>\w+), 0, stream>>>\s*\(",
)
_STORE = re.compile(
    r'asm volatile\("st\.global\.v4\.b32 \[%0\], \{%1, %2, %3, %4\};"[^;]*"memory"\);'
)
_REGISTRATION = re.compile(r"TORCH_LIBRARY_IMPL\(fastadv, CUDA, m\) \{")
_IMPLEMENTATION = re.compile(r'\bm\.impl\("(\w+)"')


def missing() -> str | None:
    """What the emulator needs and this machine does not have."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return "Linux on x86-64"
    if shutil.which("g++") is None:
        return "g++"
    return None if _cuda_headers() else "CUDA's headers, of nvcc or of the package triton"


def _cuda_headers() -> Path | None:
    """The folder of CUDA's headers: nvcc's, else those that Triton brings along."""
    nvcc, triton = shutil.which("nvcc"), importlib.util.find_spec("triton")
    folders = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    return next((folder for folder in folders if (folder / "cuda_bf16.h").is_file()), None)


def ops(csrc: Path = CSRC) -> set[str]:
    """The ops that csrc/cuda implements."""
    text = "".join(path.read_text() for path in (csrc / "cuda").glob("*.cpp"))
    return set(_IMPLEMENTATION.findall(text))


def launches(csrc: Path = CSRC) -> set[str]:
    """The kernels that csrc/cuda launches, as "file: kernel"."""
    paths = [path for pattern in KERNELS for path in (csrc / "cuda").glob(pattern)]
    return {f"{p.name}: {m['name']}" for p in paths for m in _LAUNCH.finditer(p.read_text())}


def build(folder: Path, results: Path, csrc: Path = CSRC) -> Path:
    """Compile the library, or take what an earlier call compiled from the same sources.

    Args:
        folder: where sources in plain C++ go.
        results: where objects and the library go.
        csrc: the sources.

    Raises:
        ValueError: a source has a form that the emulator does not know.
        RuntimeError: g++ fails.
    """
    sources = folder / "csrc"
    (sources / "cuda").mkdir(parents=True, exist_ok=True)
    for name, text in _rewritten(csrc):
        (sources / name).write_text(text)
    units = [sources / "cuda" / HOSTS, *sorted((sources / "cuda").glob("*.cu"))]
    units += sorted(HERE.glob("*.cpp"))
    header = _precompiled_header(results)
    with ThreadPoolExecutor(COMPILERS) as pool:
        objects = list(pool.map(lambda unit: _compiled(unit, folder, results, header), units))
    where = Path(torch.__file__).parent / "lib"
    inputs: list[str | Path] = [*objects, f"-L{where}", "-ltorch_cpu", "-lc10"]
    return kept(
        results / "cuda_emulator.so",
        [str(inputs), version_of("g++")],
        lambda library: _run(["g++", "-shared", "-o", library, *inputs]),
    )


def _rewritten(csrc: Path) -> Iterator[tuple[str, str]]:
    """Names in csrc and texts of the sources in plain C++."""
    for path in csrc.glob("*.h"):
        yield path.name, path.read_text()
    for path in (csrc / "cuda").glob("*.h"):
        text = re.sub(r"#include <c10/cuda/\w+\.h>", '#include "torch_cuda.h"', path.read_text())
        yield f"cuda/{path.name}", text
    for pattern in KERNELS:
        for path in (csrc / "cuda").glob(pattern):
            yield f"cuda/{path.name}", _without_cuda(path.read_text(), path.name)
    hosts = sorted((csrc / "cuda").glob("*.cpp"))
    yield f"cuda/{HOSTS}", "".join(_host_side(path) for path in hosts)


def _without_cuda(text: str, file: str) -> str:
    def call(launch: re.Match[str]) -> str:
        # A captured constant is none to g++ before its version 14; its type's is.
        kernel = re.sub(r"\b(\w+)\.value\b", r"decltype(\1)::value", launch["kernel"])
        return (
            f'cuda_emulator::launcher("{file}: {launch["name"]}", {launch["blocks"]}, '
            f"{launch['threads']}, [&](auto... arguments) {{ {kernel}(arguments...); }})("
        )

    plain = _LAUNCH.sub(call, text)
    plain = _STORE.sub("*static_cast<uint4*>(to) = v;", plain)
    for rest in (r"<<<", r">>>", r"\basm\b"):
        if found := re.search(rf".*{rest}.*", plain):
            raise ValueError(f"{file}: the emulator does not know this form: {found[0].strip()}")
    return plain


def _host_side(path: Path) -> str:
    """A host side with its helpers in a namespace of its own, as all are compiled as one file."""
    text, count = _REGISTRATION.subn(
        f"TORCH_LIBRARY_IMPL(fastadv, CPU, m) {{ using namespace of_{path.stem};", path.read_text()
    )
    if count != 1 or "CUDA, m" in text:
        raise ValueError(f"{path.name}: the emulator knows one registration for CUDA in a file")
    return text.replace("namespace {", f"namespace of_{path.stem} {{")


def _precompiled_header(results: Path) -> Path:
    """The emulator's header and CUDA's, which take as long to read as the kernels of a file to compile.

    The file is the returned path with ".gch" behind it, where g++ looks for it.
    """
    source = HERE / "emulator.h"
    command = [*_compiler("c++-header"), f"-I{HERE}"]
    texts = [path.read_text() for path in sorted(HERE.glob("*.h"))]
    made = kept(
        results / "emulator.h.gch",
        [str(command), version_of("g++"), *texts],
        lambda made: _run([*command, "-o", made, source]),
    )
    return made.with_suffix("")


def _compiled(unit: Path, folder: Path, results: Path, header: Path) -> Path:
    command = _compiler("c++")
    if unit.suffix == ".cu":
        command += ["-include", header]
    headers = [path for pattern in ("*.h", "*.cuh") for path in folder.rglob(pattern)]
    ours = [path.read_text() for path in sorted([*HERE.glob("*.h"), *headers, unit])]
    return kept(
        results / f"{unit.stem}.o",
        [str(command), version_of("g++"), torch.__version__, *ours],
        lambda made: _run([*command, f"-I{HERE}", f"-I{folder / 'csrc'}", "-c", "-o", made, unit]),
    )


def _compiler(language: str) -> list[str | Path]:
    """g++ and its options, which must be the same for a header and for the units that include it."""
    torch_headers = Path(torch.__file__).parent / "include"
    command: list[str | Path] = ["g++", "-x", language, "-std=c++20", "-O1", "-fPIC", "-w"]
    command += ["-fvisibility=hidden", "-ffp-contract=off"]  # as nvcc is called with -fmad=false
    command += ["-U_FORTIFY_SOURCE"]  # its longjmp does not leave a stack
    command += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    for place in (torch_headers, torch_headers / "torch/csrc/api/include", _cuda_headers()):
        command += ["-isystem", str(place)]
    return command


def _run(command: list[str | Path]) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-8000:]}")
