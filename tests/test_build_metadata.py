"""What the build says about a wheel: its version, and the torch that it needs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastadv

HOOKS = Path(__file__).resolve().parent.parent / "build_hooks"
MINOR = ".".join(torch.__version__.split(".")[:2])


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The provider's module, imported as the build does."""
    monkeypatch.syspath_prepend(str(HOOKS))
    monkeypatch.delenv("FASTADV_LOCAL_VERSION", raising=False)
    yield importlib.import_module("metadata")
    for name in ("metadata", "installed_torch"):
        del sys.modules[name]


def _fields(metadata: ModuleType, state: str) -> dict[str, object]:
    provider = metadata.Provider()
    provider.build_state(state)
    return provider.dynamic_metadata({}, {})


def test_the_source_names_no_torch_of_its_own(metadata: ModuleType) -> None:
    assert _fields(metadata, "sdist") == {"version": fastadv.__version__}
    assert metadata.Provider().dynamic_wheel({}) == {"dependencies": True}


@pytest.mark.parametrize("state", ["wheel", "editable", "metadata_wheel", "metadata_editable"])
def test_a_wheel_needs_the_torch_of_its_build(metadata: ModuleType, state: str) -> None:
    expected = {"version": fastadv.__version__, "dependencies": [f"torch=={MINOR}.*"]}
    assert _fields(metadata, state) == expected


def test_a_local_version_on_demand(metadata: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTADV_LOCAL_VERSION", "1")
    assert _fields(metadata, "wheel")["version"] == f"{fastadv.__version__}+torch{MINOR}"
    assert _fields(metadata, "sdist")["version"] == fastadv.__version__


def test_without_torch_nothing_is_pinned(
    metadata: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "installed_version", lambda: None)
    assert _fields(metadata, "metadata_wheel") == {"version": fastadv.__version__}


@pytest.mark.parametrize(
    ("version", "minor"), [("2.13.0+cpu", "2.13"), ("2.9.1", "2.9"), ("2.15.0a0+git1", "2.15")]
)
def test_minor_versions(metadata: ModuleType, version: str, minor: str) -> None:
    assert sys.modules["installed_torch"].minor(version) == minor
    with pytest.raises(ValueError, match=r"two numbers, got 'unknown'"):
        sys.modules["installed_torch"].minor("unknown")
