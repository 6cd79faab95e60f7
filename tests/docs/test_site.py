"""The Python of the site's pages runs, their commands have the options that they name, and all pages are found."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastadv.cli import main, training_parser
from fastadv.trainers import find_method, method_names

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# test_docs.py and test_readme.py
ELSEWHERE = ("attacks", "evaluation", "ops_images", "ops_features", "losses", "training")
PAGES = sorted(page.stem for page in DOCS.glob("*.md"))
WITH_CODE = [
    name
    for name in PAGES
    if name not in ELSEWHERE and "```python\n" in (DOCS / f"{name}.md").read_text()
]
COMMANDS = ("train", "eval", "transfer", "report", "info", "demo")
LOOPS = (DOCS / "faster_loops.md").read_text()

pytestmark = pytest.mark.usefixtures("one_thread")


def _blocks(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore:.*by guessing:UserWarning")  # the networks are not trained
@pytest.mark.parametrize("name", WITH_CODE)
def test_the_blocks_of_a_page_run_in_turn(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = ModuleType(f"docs_{name}")
    monkeypatch.setitem(
        sys.modules, module.__name__, module
    )  # where dataclasses look for their hints
    names = vars(module)
    for number, code in enumerate(_blocks((DOCS / f"{name}.md").read_text())):
        exec(compile(code, f"docs/{name}.md, python block {number}", "exec"), names)


def _pairs() -> Iterator[tuple[str, str, str]]:
    """The heading, the block before and the block after of each published loop."""
    for section in LOOPS.split("\n## ")[2:]:
        heading, blocks = section.splitlines()[0], _blocks(section)
        if "Before" in section:
            yield heading, blocks[0], blocks[1]


@pytest.mark.slow
def test_a_loop_made_fast_attacks_as_before() -> None:
    """In full precision it gives the same images where both begin at the same ones."""
    names: dict[str, Any] = {}
    exec(_blocks(LOOPS)[0], names)
    for network in ("model", "natural_model"):  # in float64, so that rounding turns no sign
        names[network].double().train()
    names["normalised"].double()
    names["x"] = names["x"].double()
    compared = []
    for heading, before, after in _pairs():
        found = []
        state = {key: value.clone() for key, value in names["model"].state_dict().items()}
        in_full = re.sub(r"(fastadv\.\w+\((?:[^()]|\(.*?\))*)\)", r'\1, precision="fp32")', after)
        assert in_full != after, heading
        for code in (before, in_full):
            names["model"].load_state_dict(state)  # the losses move BatchNorm's statistics
            torch.manual_seed(1)
            exec(code, names)
            found.append(names["x_adv"].detach())
        assert (found[1] - names["x"]).abs().max() <= names["eps"] + 1e-9, heading
        assert names["model"].training, heading
        if "start=" in after:
            compared.append(heading)
            torch.testing.assert_close(*found, rtol=0, atol=1e-9)
        else:  # from another point of the ball
            assert not torch.equal(found[1], names["x"]), heading
    assert compared == ["TRADES", "MART", "LBGAT", "HAT"]


@cache
def _known(command: str) -> str:
    """The help of a command that takes its own options and no others."""
    words = command.split()
    if words[0] == "train":
        return training_parser(find_method(words[1])).format_help()
    with redirect_stdout(StringIO()) as said, pytest.raises(SystemExit):
        main([*words, "--help"])
    return said.getvalue()


def _commands(text: str) -> Iterator[list[str]]:
    """The words after `fastadv` of each command in blocks of shell."""
    for block in _blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|-m )fastadv (\w+.*)$", line.partition(" # ")[0].strip())
            if found:
                yield shlex.split(found[1].replace("$(", ""))


@pytest.mark.parametrize("name", ["README", "CONTRIBUTING", *PAGES])
def test_the_commands_of_a_page_have_the_options_that_it_names(name: str) -> None:
    path = ROOT / f"{name}.md" if name.isupper() else DOCS / f"{name}.md"
    for words in _commands(path.read_text()):
        if words[0] not in COMMANDS or (words[0] == "train" and words[1] not in method_names()):
            continue
        key = " ".join(words[:2]) if words[0] == "train" else words[0]
        help_text = _known(key)
        for word in words:
            if word.startswith("--"):
                option = word[2:].partition("=")[0].replace("-", "_")
                option = "run" if option == "run_dir" else option
                assert f"--{option}" in help_text, (name, words, word)


def test_there_are_commands_to_check() -> None:
    assert len(list(_commands((DOCS / "clusters.md").read_text()))) >= 4
    assert len(list(_commands((ROOT / "README.md").read_text()))) >= 5


def test_the_benchmark_of_the_loops_takes_them_from_the_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    loops = importlib.import_module("loops")
    assert list(loops.LOSSES) == [heading for heading, _, _ in loops.pairs_of(LOOPS)]
    monkeypatch.setattr(loops, "pairs_of", lambda text: [next(iter(_pairs()))])
    out = tmp_path / "loops.json"
    words = ["loops.py", "--model", "small_cnn", "--batch", "2", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    loops.main()
    times = json.loads(out.read_text())["loops"]["TRADES"]
    assert times["before"]["median"] > 0 and times["after"]["median"] > 0
    assert "TRADES" in capsys.readouterr().out


def test_every_loop_that_the_page_promises_has_a_pair() -> None:
    assert [heading for heading, _, _ in _pairs()] == [
        "TRADES",
        "MART",
        "AWP",
        "robust_overfitting",
        "fast_adversarial",
        "LBGAT",
        "HAT",
        "MAIR",
    ]


@pytest.mark.parametrize(
    "package", ["ops", "losses", "attacks", "evaluation", "models", "data", "trainers"]
)
def test_every_public_package_has_a_page(package: str) -> None:
    page = (DOCS / "api" / f"{package}.md").read_text()
    assert f".. automodule:: fastadv.{package}\n" in page
    assert re.search(rf"^{package}$", (DOCS / "api" / "index.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", [*PAGES, "README", "CONTRIBUTING", "SECURITY"])
def test_links_between_files_lead_somewhere(name: str) -> None:
    path = ROOT / f"{name}.md" if name.isupper() else DOCS / f"{name}.md"
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_the_documents_and_examples_import_from_public_packages_alone() -> None:
    pages = [*DOCS.glob("*.md"), ROOT / "README.md", *(ROOT / "examples").glob("*.py")]
    found = {
        (page.name, module)
        for page in pages
        for module in re.findall(
            r"^\s*(?:from|import) (fastadv\.[\w.]+)", page.read_text(), re.MULTILINE
        )
    }
    assert ("write_a_method.md", "fastadv.trainers") in found
    assert not [(page, module) for page, module in found if module.count(".") > 1]
