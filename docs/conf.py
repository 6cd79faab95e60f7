"""How the documentation site is built: `make docs`."""

from __future__ import annotations

import re

import fastadv

project = "fastadv"
author = "the fastadv authors"
copyright = author
release = version = fastadv.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

# Links such as attacks.md#autoattack go to headings, as on GitHub.
myst_heading_anchors = 3

html_theme = "furo"
html_title = "fastadv"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]

default_role = "py:obj"  # `fastadv.pgd_fused` in a docstring becomes a link where it can
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # 8 / 255, not .03137
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
# Signatures name other packages' types, whose sites are not asked; `text` in a docstring may be no name at all.
nitpick_ignore_regex = [("py:obj", ".*"), ("py:class", ".*")]


def _escaped(text: str) -> str:
    """Prose with the marks escaped that reStructuredText would take for its own: |x|, x*, pgd_step_, x`."""
    text = re.sub(r"(?<!\*)\*(?=\S)|(?<=\S)\*(?!\*)", r"\\*", text)
    return re.sub(r"(?<=\w)_(?!\w)", r"\\_", text.replace("|", r"\|"))


def _linked(literal: str) -> str:
    """`fastadv.PGD` as a link to where PGD is described, `fastadv.attacks.PGD`."""
    name = re.fullmatch(r"`fastadv\.(\w+)`", literal)
    home = fastadv._HOMES.get(name[1]) if name else None
    return f"`fastadv.{name[1]} <fastadv.{home}.{name[1]}>`" if home else literal


def _escape_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Escape the prose of a docstring; what is between backticks, and headings of sections, stay."""
    literal = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)
    text = "\n".join(lines)
    parts = literal.split(text)
    parts[::2] = [_escaped(part) for part in parts[::2]]
    parts[1::2] = [_linked(part) for part in parts[1::2]]
    lines[:] = "".join(parts).split("\n")


def _fraction(number: str) -> str:
    """8 / 255 for .03137..., and any other number as it is."""
    count = float(number) * 255
    return f"{round(count)} / 255" if abs(count - round(count)) < 1e-9 else number


def _short_signature(app, what, name, obj, options, signature, returns) -> tuple[str, str] | None:
    """The fractions of settings, which autodoc finds in a dataclass as numbers."""
    if signature is None:
        return None
    return re.sub(r"\b0\.\d{10,}\b", lambda found: _fraction(found[0]), signature), returns


def setup(app) -> None:
    """Escape docstrings before napoleon reads them, and shorten numbers in signatures."""
    app.connect("autodoc-process-docstring", _escape_docstring, priority=100)
    app.connect("autodoc-process-signature", _short_signature)
