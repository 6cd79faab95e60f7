"""A report as one HTML page without external files."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastadv.evaluation.reporting.gallery import Gallery, Pictures
from fastadv.evaluation.reporting.tables import Table
from fastadv.evaluation.wording import format_eps
from fastadv.plain_text import one_line

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1e22; --soft: #5c646d; --line: #d5d9de;
  --band: #f3f5f7; --accent: #0b5fa5; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16191d; --ink: #e4e6e8; --soft: #9aa2ab; --line: #363c44; --band: #1f242a; --accent: #6db3f2; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.25rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p, ul { margin: .5rem 0; color: var(--soft); font-size: .9rem; max-width: 60rem; }
ul { padding-left: 1.2rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
tbody tr:nth-child(even) td { background: var(--band); }
tbody tr:nth-child(odd) td { background: var(--paper); }
th { background: var(--band); font-weight: 600; }
th.text, td.text { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; z-index: 1; border-right: 1px solid var(--line); }
td small { display: block; color: var(--soft); font-size: .78rem; }
td.words { white-space: normal; min-width: 20rem; }
td.long { white-space: normal; min-width: 20rem; overflow-wrap: anywhere;
  font: .8rem/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }
figure { margin: 1rem 0; }
figure.plot img { width: 100%; max-width: 46rem; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .85rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(15.5rem, 1fr)); gap: .9rem; }
.gallery figure { margin: 0; }
.gallery .three { display: grid; grid-template-columns: repeat(3, 1fr); gap: .25rem; }
.gallery img { width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; display: block;
  border: 1px solid var(--line); }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 40rem) { body { padding: .9rem; } th, td { padding: .35rem .5rem; }
  th:first-child, td:first-child { min-width: 5rem; max-width: 9rem; overflow-wrap: break-word;
    white-space: normal; } }
@media print { .scroll { overflow: visible; } details { display: block; } }
"""


@dataclass(frozen=True)
class Plot:
    """A picture for a light page and for a dark one.

    Attributes:
        title: heading of its section.
        light: PNG.
        dark: PNG.
        caption: a description, which also replaces the picture where pictures are not shown.
    """

    title: str
    light: bytes
    dark: bytes
    caption: str


def page(
    title: str,
    subtitle: str,
    *,
    tables: Sequence[Table],
    plots: Sequence[Plot],
    galleries: Sequence[Gallery],
    notes: Sequence[str] = (),
    analyses: Sequence[Plot | Table] = (),
) -> str:
    """The page: the first table, the pictures, the worst images, the analyses, then the other tables.

    Args:
        title: heading.
        subtitle: one line below it.
        tables: the tables, the most important one first.
        plots: the pictures in their order.
        galleries: worst images of attacks.
        notes: further notes.
        analyses: pictures and tables of the findings of analyses.
    """
    body = [f"<h1>{_text(title)}</h1>", f"<p>{_text(subtitle)}</p>"]
    body += [_notes(notes), *map(_table, tables[:1]), *map(_plot, plots), *map(_table, tables[1:3])]
    body += [_galleries(galleries)]
    body += [_plot(part) if isinstance(part, Plot) else _table(part) for part in analyses]
    body += [*map(_table, tables[3:])]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            *(part for part in body if part),
            "</body>",
            "</html>\n",
        ]
    )


def _text(text: str) -> str:
    return html.escape(one_line(text), quote=True)


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(note)}</li>" for note in notes)
    return f"<ul>{items}</ul>" if items else ""


def _table(table: Table) -> str:
    classes = [_class(table, column) for column in range(len(table.heading))]
    cells = "".join(
        f'<th scope="col"{kind}>{_text(name)}</th>'
        for name, kind in zip(table.heading, classes, strict=True)
    )
    rows = (
        "<tr>"
        + "".join(f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(row, classes, strict=True))
        + "</tr>"
        for row in table.rows
    )
    body = "\n".join(rows)
    return (
        f'<section><h2>{_text(table.title)}</h2>\n<div class="scroll"><table>\n'
        f"<thead><tr>{cells}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n"
        f"{_notes(table.notes)}</section>"
    )


def _class(table: Table, column: int) -> str:
    if table.heading[column] in ("command", "finding"):
        return f' class="text {"long" if table.heading[column] == "command" else "words"}"'
    return ' class="text"' if table.is_text(column) else ""


def _cell(cell: str) -> str:
    """A cell; an interval is set in a small size below its number."""
    parts = re.fullmatch(r"(.+) (\[.+\])", cell)
    return f"{_text(parts[1])} <small>{_text(parts[2])}</small>" if parts else _text(cell)


def _plot(plot: Plot) -> str:
    return (
        f'<section><h2>{_text(plot.title)}</h2>\n<figure class="plot"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{_uri(plot.dark)}">'
        f'<img src="{_uri(plot.light)}" alt="{_text(plot.caption)}"></picture>\n'
        f"<figcaption>{_text(plot.caption)}</figcaption></figure></section>"
    )


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _galleries(galleries: Sequence[Gallery]) -> str:
    if not galleries:
        return ""
    parts = [
        "<section><h2>Worst adversarial images</h2>",
        "<p>Images that an attack broke and of whose wrong class the model is most sure: the original, the "
        "adversarial image, and their difference, magnified around grey.</p>",
    ]
    for number, gallery in enumerate(galleries):
        items = "\n".join(map(_item, gallery.pictures))
        reach = "no ball" if gallery.eps is None else format_eps(gallery.eps)
        radius = f"{gallery.norm} {reach}"
        parts.append(
            f"<details{'' if number else ' open'}><summary>{_text(gallery.run)}: {_text(gallery.attack)}, "
            f'{_text(radius)}</summary>\n<div class="gallery">\n{items}\n</div></details>'
        )
    return "\n".join([*parts, "</section>"])


def _item(pictures: Pictures) -> str:
    three = (
        (pictures.original, f"image {pictures.index}"),
        (pictures.adversarial, f"image {pictures.index}, adversarial"),
        (pictures.difference, f"image {pictures.index}, difference"),
    )
    images = "".join(f'<img src="{_uri(png)}" alt="{_text(name)}">' for png, name in three)
    caption = (
        f"No. {pictures.index}: class {pictures.label} ({100 * pictures.label_confidence:.1f} %) taken for "
        f"{pictures.prediction} ({100 * pictures.confidence:.1f} %); difference x {pictures.magnified:g}"
    )
    return f'<figure><div class="three">{images}</div><figcaption>{_text(caption)}</figcaption></figure>'
