"""Every public name is in the reference: `__all__` of each package, against the pages in docs/api."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import fastadv
from fastadv.trainers import Callback, Schedule

API = Path(__file__).resolve().parents[2] / "docs" / "api"
COMMAND_LINE = {"cli", "commands"}  # their options are public, and their names are not
PAGES = {page.stem for page in API.glob("*.md")} - {"index"}
INDEX = (API / "index.md").read_text()


def _packages() -> dict[str, list[str]]:
    """The public names of each package that has a list of them."""
    found = {}
    for one in sorted((API.parents[1] / "fastadv").glob("*/__init__.py")):
        package = one.parent.name
        if package not in COMMAND_LINE:
            names = getattr(importlib.import_module(f"fastadv.{package}"), "__all__", None)
            if names is not None:
                found[package] = list(names)
    return found


PACKAGES = _packages()


def test_every_public_package_has_a_page_in_the_contents() -> None:
    assert set(PACKAGES) == PAGES
    contents = re.search(r"```\{toctree\}\n(.*?)```", INDEX, re.DOTALL)
    assert contents is not None and set(contents[1].split()) == PAGES


def _has_docstring(value: Any) -> bool:
    """Whether autodoc finds words for it; a constant has only the words of its class."""
    named = hasattr(value, "__name__") and value.__module__.startswith("fastadv.")
    return named and bool(value.__doc__)


def _public(package: str) -> dict[str, Any]:
    module = importlib.import_module(f"fastadv.{package}")
    return {name: getattr(module, name) for name in PACKAGES[package]}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_argument_of_a_public_function_is_described(package: str) -> None:
    missing = [
        f"{name}: {argument}"
        for name, value in _public(package).items()
        if inspect.isfunction(value)
        for argument in inspect.signature(value).parameters
        if not re.search(rf"^ *\*{{0,2}}(\w+, )*{argument}\b.*:", value.__doc__ or "", re.MULTILINE)
    ]
    assert missing == []


def test_the_help_of_pgd_describes_its_arguments_itself() -> None:
    """The attack of the first pages: its help may not send the reader on to another name."""
    words = inspect.getdoc(fastadv.PGD) or ""
    described = re.findall(r"^    (\w+): \S", words.split("Args:")[1], re.MULTILINE)
    assert set(inspect.signature(fastadv.PGD).parameters) <= set(described)
    assert "as in `" not in words


@pytest.mark.parametrize("package", PACKAGES)
def test_the_result_of_a_public_function_is_described(package: str) -> None:
    """Under Returns, or by a first sentence that says what is returned or yielded."""
    missing = [
        name
        for name, value in _public(package).items()
        if inspect.isfunction(value)
        and inspect.signature(value).return_annotation not in (None, "None")
        and "contextmanager" not in inspect.getsource(value).partition("def ")[0]
        and not re.search(
            r"^Return |^ *(Returns|Yields):", inspect.getdoc(value) or "", re.MULTILINE
        )
    ]
    assert missing == []


every_attack = pytest.mark.parametrize(
    "name", [name for name in fastadv._ATTACKS if inspect.isclass(getattr(fastadv, name))]
)


@every_attack
def test_the_page_of_attacks_has_a_row_with_the_signature_of_every_attack(name: str) -> None:
    row = re.search(
        rf"^\| `{name}(\(.*?\))` \|", (API.parent / "attacks.md").read_text(), re.MULTILINE
    )
    assert row is not None
    names: dict[str, Any] = {}
    exec(f"def written{row[1]}: ...", names)
    real = inspect.signature(getattr(fastadv, name)).parameters
    for argument in inspect.signature(names["written"]).parameters.values():
        known = real[argument.name]
        assert (argument.kind, argument.default) == (known.kind, known.default), argument.name


@every_attack
def test_every_attack_names_its_source(name: str) -> None:
    assert re.search(r"\bSources?\b.*:", inspect.getdoc(getattr(fastadv, name)) or ""), name


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_class_shows_what_its_instances_hold(package: str) -> None:
    bases = {Callback, Schedule}  # without anything of their own to show
    plain = [
        name
        for name, value in _public(package).items()
        if inspect.isclass(value)
        and value not in bases
        and not getattr(value, "_is_protocol", False)
        if value.__repr__ is object.__repr__
    ]
    assert plain == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_described(package: str) -> None:
    """By its docstring, without which autodoc leaves it out, or in words on the page."""
    page = (API / f"{package}.md").read_text()
    module = importlib.import_module(f"fastadv.{package}")
    assert f".. automodule:: fastadv.{package}\n" in page
    in_words = set(re.findall(r"py:data:: (\w+)\n\n   \S", page))
    names = set(PACKAGES[package])
    assert {name for name in names - in_words if not _has_docstring(getattr(module, name))} == set()


def test_every_attribute_of_fastadv_is_in_the_table() -> None:
    listed = re.findall(r"^\| (`.*?) \|", INDEX, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(listed))) == set(fastadv.__all__)
