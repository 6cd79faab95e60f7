"""What this installation is and can do: versions, devices, SIMD level, engines and op owners."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "jsonargparse",
    "pyautoattack",
    "matplotlib",
)


def collect() -> dict[str, Any]:
    """Gather the facts; nothing is computed on a device.

    Returns:
        A dictionary that ``json.dumps`` takes: ``fastadv``, ``python``, ``platform``, ``packages``,
        ``native``, ``cpu``, ``gpus``, ``precision`` and ``ops`` (backend by op and device type).
    """
    from fastadv import _C, __version__
    from fastadv.attacks import convolution
    from fastadv.attacks.engines import fast_bf16
    from fastadv.ops import REGISTRY

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ["cpu", "cuda"] if gpus else ["cpu"]
    return {
        "fastadv": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "native": dict(_C.build_info()),
        "cpu": {
            "name": _cpu_name(),
            "threads": torch.get_num_threads(),
            "winograd convolution": convolution.supported(64, 64),
        },
        "gpus": gpus,
        "precision": {
            name: "bf16" if fast_bf16(torch.device(name)) else "fp32" for name in devices
        },
        "ops": {
            op.name: {
                "owner": {name: op.owner(name) for name in ("cpu", "cuda")},
                "native": [name for name in ("cpu", "cuda") if op.has_native(name)],
                "triton": op.triton is not None,
            }
            for op in REGISTRY.values()
        },
    }


def render(facts: dict[str, Any], ops: bool = False) -> str:
    """Lay the facts of `collect` out for reading.

    Args:
        facts: from `collect`.
        ops: add the table of ops by backend.
    """
    native, cpu = facts["native"], facts["cpu"]
    rows = [
        ("fastadv", facts["fastadv"]),
        ("python", f"{facts['python']} on {facts['platform']}"),
        *((name, version or "not installed") for name, version in facts["packages"].items()),
        ("processor", f"{cpu['name']}, {cpu['threads']} threads"),
        ("SIMD level", native["simd"]),
        ("own convolution", "yes" if cpu["winograd convolution"] else "no (needs AVX512-BF16)"),
        ("GPUs", ", ".join(facts["gpus"]) or "none"),
        ("attack precision", ", ".join(f"{d}: {p}" for d, p in facts["precision"].items())),
        ("native part", f"built with {native['compiler']} against torch {native['torch']}"),
        ("CUDA kernels", "built" if native["cuda"] else "not built"),
        ("op owners", _owners(facts["ops"])),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join([*lines, "", *_op_table(facts["ops"])] if ops else lines)


def _owners(ops: dict[str, Any]) -> str:
    """Which backend owns how many ops, by device."""
    parts = []
    for device in ("cpu", "cuda"):
        owners = [entry["owner"][device] for entry in ops.values()]
        counts = ", ".join(f"{owners.count(name)} {name}" for name in sorted(set(owners)))
        parts.append(f"{device}: {counts}")
    return "; ".join(parts)


def _op_table(ops: dict[str, Any]) -> list[str]:
    """One line per op: its backends and who owns it where."""
    width = max(map(len, ops))
    lines = [f"{'op':<{width}}  reference  C++  CUDA C++  Triton  owner on CPU  owner on CUDA"]
    for name, entry in ops.items():
        cells = ("cpu" in entry["native"], "cuda" in entry["native"], entry["triton"])
        cpp, cuda, triton = ("yes" if cell else "-" for cell in cells)
        owner = entry["owner"]
        lines.append(
            f"{name:<{width}}  {'yes':<9}  {cpp:<3}  {cuda:<8}  {triton:<6}  "
            f"{owner['cpu']:<12}  {owner['cuda']}"
        )
    lines.append(
        "CUDA C++ is '-' where this build has no CUDA part; Triton then owns the op on CUDA."
    )
    return lines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
