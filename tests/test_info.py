"""What `fastadv info` says of the ops is so, and leaves no gap unexplained."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from fastadv import info
from fastadv.ops import REGISTRY, registry
from fastadv.ops.registry import SOURCES, Op

ROOT = Path(__file__).resolve().parents[1]
OPS = [pytest.param(op, id=op.name) for op in REGISTRY.values()]


def _op(**changes: object) -> Op:
    """The record of an op, changed."""
    return dataclasses.replace(REGISTRY["pgd_step"], **changes)


def _implemented(folder: str) -> set[str]:
    """The ops for which the C++ files of a folder register a kernel."""
    texts = (path.read_text() for path in (ROOT / folder).glob("*.cpp"))
    return {name for text in texts for name in re.findall(r'm\.impl\(\s*"(\w+)"', text)}


@pytest.mark.parametrize("op", OPS)
def test_the_source_has_what_the_record_says(op: Op) -> None:
    assert set(op.without) <= set(SOURCES)
    assert (op.name in _implemented("csrc/cpu")) == ("C++" not in op.without)
    assert (op.name in _implemented("csrc/cuda")) == ("CUDA C++" not in op.without)
    assert (op.triton is not None) == ("Triton" not in op.without)
    if op.triton is not None:
        module, _, function = op.triton.partition(":")
        assert f"def {function}(" in (ROOT / "kernels" / f"{module}.py").read_text()


@pytest.mark.parametrize("op", [p for p in OPS if p.values[0].without])
def test_the_files_that_reasons_name_exist(op: Op) -> None:
    for why in op.without.values():
        assert all(
            (ROOT / path).is_file() for path in re.findall(r"[\w/]+\.(?:py|cpp|cu|h)\b", why)
        )


def test_what_a_build_lacks_is_told_from_what_the_source_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "has_kernel", lambda name, device: False)
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    assert _op(without={"CUDA C++": "not worth it"}).missing() == {
        "C++": "in the source (csrc/cpu), but not in this build",
        "CUDA C++": "not worth it",
        "Triton": "in the source (kernels), but the package triton is not installed",
    }
    monkeypatch.setattr(registry, "has_kernel", lambda name, device: True)
    monkeypatch.setattr(registry, "_TRITON_OWNED", set())
    assert set(_op().missing()) == {"Triton"}


def test_every_gap_in_the_table_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    op = _op(triton=None, without={"Triton": "a reason of its own", "C++": "another"})
    monkeypatch.setitem(REGISTRY, op.name, op)
    lines = info.render(info.collect(), ops=True).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("op  "))
    header, *rows = lines[start : start + len(REGISTRY) + 1]
    reasons = dict(
        re.fullmatch(r"(\[\d+\]) (.+)", line).groups() for line in lines[start + 1 + len(rows) :]
    )
    for row in rows:
        name, *cells = re.split(r" {2,}", row)
        gaps = {s: cell[2:] for s, cell in zip(SOURCES, cells[1:], strict=False) if cell != "yes"}
        assert {s: reasons[number] for s, number in gaps.items()} == REGISTRY[name].missing()
    assert header.split("  ")[0] == "op"
    assert {"a reason of its own", "another"} <= set(reasons.values())


def test_triton_counts_where_it_is_installed() -> None:
    installed = importlib.util.find_spec("triton") is not None
    assert all(("Triton" in op.missing()) != installed for op in REGISTRY.values() if op.triton)


def test_only_what_is_there_is_said_to_own_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info.torch.cuda, "device_count", lambda: 0)
    facts = info.collect()
    assert all(set(entry["owner"]) == {"cpu"} for entry in facts["ops"].values())
    text = info.render(facts, ops=True)
    assert "cuda:" not in text and "owner on CUDA" not in text
    assert re.search("GPUs +none that torch can use", text)
    facts["native"]["cuda"] = True  # as a build for GPUs says of itself on a machine without one
    assert "built, without a GPU to run on" in info.render(facts)


def test_extras_are_told_by_whether_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package in ("wandb", "timm", "triton"):
            raise info.importlib.metadata.PackageNotFoundError(package)
        return "9.8.7"

    monkeypatch.setattr(info.importlib.metadata, "version", version)
    lines = dict(
        re.split(" {2,}", line, maxsplit=1) for line in info.render(info.collect()).splitlines()
    )
    assert "matplotlib 9.8.7" in lines["extras"] and "wandb" not in lines["extras"]
    assert lines["not installed"] == "timm (timm: models), wandb (train --log wandb)"
    assert lines["triton"] == "not installed" and lines["numpy"] == "9.8.7"


@pytest.mark.parametrize(("number", "words"), [(1, "1 thread"), (2, "2 threads")])
def test_the_threads_are_counted_in_english(number: int, words: str) -> None:
    facts = info.collect()
    facts["cpu"]["threads"] = number
    assert re.search(rf"^processor .*, {words}$", info.render(facts), re.MULTILINE)
