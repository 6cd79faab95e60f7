"""Tables in LaTeX, ruled by booktabs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastadv.evaluation.reporting.tables import Table
from fastadv.plain_text import one_line

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
}  # fmt: skip


def latex(tables: Sequence[Table]) -> str:
    r"""One table environment for each table, to be read by \input; the preamble needs \usepackage{booktabs}."""
    return (
        "% Needs \\usepackage[T1]{fontenc} and \\usepackage{booktabs}.\n\n"
        + "\n\n".join(map(_environment, tables))
        + "\n"
    )


def escape(text: str) -> str:
    """Text in one line, with LaTeX's special characters escaped."""
    plain = "".join(_SPECIAL.get(character, character) for character in one_line(text))
    return plain.replace("--", "-{}-")  # LaTeX would print "--" as one dash


def _environment(table: Table) -> str:
    columns = "".join("l" if table.is_text(i) else "r" for i in range(len(table.heading)))
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{escape(' '.join([table.title + '.', *table.notes]))}}}",
        rf"  \begin{{tabular}}{{{columns}}}",
        r"    \toprule",
        _row(table.heading),
        r"    \midrule",
        *map(_row, table.rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    # Intervals are set in a small size, in braces because LaTeX takes a bracket after \\ for its argument.
    intervals = (re.sub(r"\[[-0-9., ]+\]$", r"{\\scriptsize \g<0>}", escape(c)) for c in cells)
    text = " & ".join(intervals)
    # The \\ of the row before would take either character for an argument of its own.
    shield = "{}" if text.startswith(("[", "*")) else ""
    return rf"    {shield}{text} \\"
