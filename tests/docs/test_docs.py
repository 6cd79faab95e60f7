"""The Python of the documents runs; pages on ops leave out no op, docs/evaluation.md names real options."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastadv import losses, ops
from fastadv.cli import main
from fastadv.evaluation.analyses import ANALYSES

ROOT = Path(__file__).resolve().parents[2]
OPS = (ROOT / "docs" / "ops.md").read_text()
OF_OPS = ("ops_images", "ops_features", "losses")  # with an entry for each op
ENTRIES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in OF_OPS}
DOCUMENT = "\n".join(ENTRIES.values())
PUBLIC = sorted(set(ops.__all__) - {"REGISTRY", "backend"})

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def _assigned(code: str, names: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Copies of the tensors to which a block gives a name."""
    stored = {
        node.id
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    return {name: names[name].clone() for name in stored if isinstance(names[name], torch.Tensor)}


def _blocks(document: str) -> list[tuple[str, str]]:
    """The word before each block, if it is one of a pair, and the code."""
    return re.findall(
        r"(?:^(Before|After):\n\n)?^```python\n(.*?)```", document, re.DOTALL | re.MULTILINE
    )


@pytest.mark.parametrize(
    ("page", "wanted"),
    [
        ("ops_images", {"stepped", "point", "masked", "training_images"}),
        ("ops_features", {"distance", "drift", "replayed", "loss"}),
        ("losses", {"loss"}),
    ],
)
def test_the_blocks_run_in_turn_and_pairs_agree(page: str, wanted: set[str]) -> None:
    """A tensor that both blocks of a pair assign must have the same values in the two."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    before: dict[str, torch.Tensor] = {}
    compared = set()
    for number, (word, code) in enumerate(_blocks(ENTRIES[page])):
        exec(compile(code, f"docs/{page}.md, python block {number}", "exec"), names)
        assigned = _assigned(code, names)
        if word == "Before":
            before = assigned
        elif word == "After":
            for name in before.keys() & assigned.keys():
                torch.testing.assert_close(assigned[name], before[name], rtol=1e-4, atol=1e-5)
                compared.add(name)
    assert wanted <= compared


@pytest.mark.parametrize("page", OF_OPS)
def test_there_is_a_pair_for_every_entry(page: str) -> None:
    words = [word for word, _ in _blocks(ENTRIES[page]) if word]
    assert words and words == ["Before", "After"] * (len(words) // 2)
    assert len(words) // 2 >= len(re.findall(r"^### ", ENTRIES[page], re.MULTILINE))


def test_a_signature_on_the_page_of_losses_is_the_function_s() -> None:
    """`reduction`, which all of them take, is told of in words."""
    named = set()
    for name, told in re.findall(r"^losses\.(\w+)\(([^()]*)\)", ENTRIES["losses"], re.MULTILINE):
        names: dict[str, Any] = {}
        exec(f"def stated({told}, **rest): pass", names)
        stated = list(inspect.signature(names["stated"]).parameters.values())[:-1]
        actual = inspect.signature(getattr(losses, name)).parameters
        expected = [value for key, value in actual.items() if key != "reduction"]
        assert [(p.name, p.kind, p.default) for p in stated] == [
            (p.name, p.kind, p.default) for p in expected
        ], name
        named.add(name)
    of_features = {"vfd", "feature_distance"}
    types = {"ActLosses", "FeatureDistance"}
    assert named == set(losses.__all__) - of_features - types


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_op_has_a_line_and_an_entry(name: str) -> None:
    table = [line for line in OPS.splitlines() if line.startswith("| `")]
    headings = re.findall(r"^### .*", DOCUMENT, re.MULTILINE)
    assert any(f"`{name}`" in line.split("|")[1] for line in table)
    (page,) = re.findall(rf"^\| \[.*?\]\((\w+)\.md\) \|.*`{name}`", OPS, re.MULTILINE)
    assert any(re.search(rf"\b{name}\b", heading) for heading in headings) == (page != "losses")


@pytest.mark.parametrize("name", PUBLIC)
def test_a_signature_in_a_heading_is_the_function_s(name: str) -> None:
    found = re.search(rf"^### `{name}\((.*)\)`$", DOCUMENT, re.MULTILINE)
    if found is None:
        pytest.skip("its entry is headed by a name alone")
    told = [
        part.partition("=")[0].strip() for part in re.sub(r"\([^)]*\)", "", found[1]).split(",")
    ]
    expected = list(inspect.signature(getattr(ops, name)).parameters)
    assert [part for part in told if part != "*"] == expected


@pytest.mark.filterwarnings("ignore:.*by guessing:UserWarning")  # the networks are not trained
@pytest.mark.parametrize("name", ["analyses", "attacks", "evaluation"])
def test_the_blocks_on_attacks_and_evaluation_run_in_turn(name: str) -> None:
    blocks = re.findall(
        r"^```python\n(.*?)```",
        (ROOT / "docs" / f"{name}.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    names: dict[str, Any] = {}
    for number, code in enumerate(blocks):
        exec(compile(code, f"docs/{name}.md, python block {number}", "exec"), names)
    assert names.keys() & {"report", "adv", "found"}


def test_the_document_on_analyses_names_all_of_them_and_options_that_exist(
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = (ROOT / "docs" / "analyses.md").read_text()
    lines = [line.split("|") for line in document.splitlines() if line.startswith("| `")]
    cells = [line[1] for line in lines if len(line) == 6]
    assert [name for cell in cells for name in re.findall(r"`(.*?)`", cell)] == list(ANALYSES)
    for command in ("analyse", "report", "train standard"):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
    known = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    named = set(re.findall(r"--([a-z][a-z_]+)", document))
    assert named and named <= known, named - known


def test_the_blocks_on_own_methods_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a module would have them, so that the classes have the names that a run records."""
    document = (ROOT / "docs" / "write_a_method.md").read_text()
    module = ModuleType("write_a_method_document")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = vars(module)
    for number, code in enumerate(re.findall(r"^```python\n(.*?)```", document, re.DOTALL | re.M)):
        exec(compile(code, f"docs/write_a_method.md, python block {number}", "exec"), names)
    assert names["result"].progress.step == 8 and names["callback"].last_loss > 0


def test_the_options_and_sections_of_the_document_on_evaluation_exist(
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = (ROOT / "docs" / "evaluation.md").read_text()
    for command in ("eval", "report", "transfer"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
    known = set(re.findall(r"--(\w+)", capsys.readouterr().out)) | {"nproc_per_node"}
    named = {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z_-]+)", document)}
    assert named and named <= known, named - known
    headings = re.findall(r"^## (.*)$", document, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    contents = re.findall(r"^\| \[.*?\]\(#(.*?)\)", document, re.MULTILINE)
    assert contents == [heading.lower().replace(" ", "-") for heading in headings]
    assert set(re.findall(r"\]\(#(.*?)\)", document)) <= anchors
