"""The facts about this installation: versions, devices, SIMD level, engines and op owners."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from fastadv.ops.registry import SOURCES

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "jsonargparse")
# The purpose of each package that can be left out.
_EXTRAS = {
    "matplotlib": "plots",
    "scikit-learn": "digits, t-SNE",
    "pyautoattack": "eval --engine reference",
    "pillow": "folders of pictures",
    "datasets": "hf: data",
    "timm": "timm: models",
    "umap-learn": "UMAP",
    "tensorboard": "train --log tensorboard",
    "wandb": "train --log wandb",
    "mlflow": "train --log mlflow",
    "ray": "sweep --launcher ray",
    "argcomplete": "completion on Tab",
}


def collect() -> dict[str, Any]:
    """Gather the facts; nothing is computed on a device.

    Returns:
        A dictionary that ``json.dumps`` takes: ``fastadv``, ``python``, ``platform``, ``packages``,
        ``extras`` (None for a missing package), ``native``, ``cpu``, ``gpus``, ``precision`` and ``ops``: for
        each op its ``owner`` by the type of device, of devices that are there, and ``missing``, why it lacks an
        implementation, for those it lacks here.
    """
    from fastadv import __version__
    from fastadv.engine import cpu_convolution as convolution
    from fastadv.engine.precision import fast_bf16
    from fastadv.ops import NATIVE, REGISTRY

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ["cpu", "cuda"] if gpus else ["cpu"]
    return {
        "fastadv": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "extras": {name: _version(name) for name in _EXTRAS},
        "native": {**NATIVE.build_info(), "problem": NATIVE.problem},
        "cpu": {
            "name": _cpu_name(),
            "threads": torch.get_num_threads(),
            "winograd convolution": convolution.supported(64, 64),
            "winograd convolution in float32": convolution.float_lanes() > 0,
        },
        "gpus": gpus,
        "precision": {
            name: "bf16" if fast_bf16(torch.device(name)) else "fp32" for name in devices
        },
        "ops": {
            op.name: {
                "owner": {name: op.owner(name) for name in devices},
                "missing": op.missing(),
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
    native, cpu, gpus = facts["native"], facts["cpu"], facts["gpus"]
    versions = {name: version or "not installed" for name, version in facts["packages"].items()}
    if facts["packages"]["triton"] and not gpus:
        versions["triton"] += ", without a GPU to work on"
    there = [f"{name} {version}" for name, version in facts["extras"].items() if version]
    lacking = [
        f"{name} ({_EXTRAS[name]})" for name, version in facts["extras"].items() if not version
    ]
    built = ""
    if not native["problem"]:
        built = f"built with {native['compiler']} against torch {native['torch']}"
    rows = [
        ("fastadv", facts["fastadv"]),
        ("python", f"{facts['python']} on {facts['platform']}"),
        *versions.items(),
        ("extras", ", ".join(there) or "none installed"),
        *([("not installed", ", ".join(lacking))] if lacking else []),
        ("processor", f"{cpu['name']}, {_threads(cpu['threads'])}"),
        *([("SIMD level", native["simd"])] if built else []),
        ("own convolution", _own_convolution(cpu)),
        ("GPUs", ", ".join(gpus) or "none that torch can use"),
        ("attack precision", ", ".join(f"{d}: {p}" for d, p in facts["precision"].items())),
        ("native part", built or f"not in use: {native['problem']}"),
        ("CUDA kernels", _cuda_kernels(bool(native.get("cuda")), bool(gpus))),
        ("op owners", _owners(facts["ops"])),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join([*lines, "", *_op_table(facts["ops"])] if ops else lines)


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def _own_convolution(cpu: dict[str, Any]) -> str:
    if cpu["winograd convolution"]:
        return "yes"
    if cpu["winograd convolution in float32"]:
        return "in float32 (bfloat16 needs AVX512-BF16)"
    return "no (needs AVX2)"


def _cuda_kernels(built: bool, has_gpu: bool) -> str:
    if not built:
        return "not built"
    return "built" if has_gpu else "built, without a GPU to run on"


def _owners(ops: dict[str, Any]) -> str:
    """Which backend owns how many ops, by device."""
    parts = []
    for device in next(iter(ops.values()))["owner"]:
        owners = [entry["owner"][device] for entry in ops.values()]
        counts = ", ".join(f"{owners.count(name)} {name}" for name in sorted(set(owners)))
        parts.append(f"{device}: {counts}")
    return "; ".join(parts)


def _op_table(ops: dict[str, Any]) -> list[str]:
    """One line per op: its backends and who owns it where; below, why one is not there."""
    reasons: list[str] = []
    rows = []
    for name, entry in ops.items():
        cells = [_cell(entry["missing"].get(source), reasons) for source in SOURCES]
        rows.append([name, "yes", *cells, *entry["owner"].values()])
    devices = next(iter(ops.values()))["owner"]
    header = ["op", "reference", *SOURCES, *(f"owner on {name.upper()}" for name in devices)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return [*lines, *(f"[{number}] {why}" for number, why in enumerate(reasons, 1))]


def _cell(why_missing: str | None, reasons: list[str]) -> str:
    """The text of a backend's cell: yes, or the number of the reason why it is not there."""
    if why_missing is None:
        return "yes"
    if why_missing not in reasons:
        reasons.append(why_missing)
    return f"- [{reasons.index(why_missing) + 1}]"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The processor's name, with the family and model, which tell processors of one name apart."""
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = fields.get("model name") or platform.processor() or platform.machine()
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{name} (family {family}, model {model})" if family and model else name
