"""The command `fastadv data`. The parameters are the options; the docstring is their help."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastadv.commands.documents import as_json
from fastadv.data.cifar_check import SourceState, inspect_cifar
from fastadv.data.cifar_download import download_cifar
from fastadv.data.cifar_layout import CifarLayout
from fastadv.data.datasets import check_source, layout_of

_DIGITS = "digits"


@dataclass(frozen=True)
class DataResult:
    """The state of a data set's files.

    Attributes:
        text: the text to print: sentences, or one JSON document.
        is_good: whether the data set can be used.
    """

    text: str
    is_good: bool


def run_data(
    name: str,
    *,
    root: str | None = None,
    download: bool = False,
    url: str | None = None,
    json: bool = False,
    quiet: bool = False,
) -> DataResult:
    """The data set.

    Args:
        name: digits, cifar10 or cifar100.
        root: folder with the official files, or in which the official archive was unpacked. All files are read.
            Their sizes, numbers of records, labels and digests are checked.
        download: where there are no files, download the official archive of the binary layout, check its MD5, and
            unpack it.
        url: with download, address of the same archive elsewhere; it may begin with file:.
        json: print one JSON document.
        quiet: show no progress.

    Returns:
        The files that are there, and their faults.
    """
    check_source(name, root)
    if url is not None and not download:
        raise ValueError(f"url must come with download, got {url!r}")
    if name == _DIGITS:
        if download:
            raise ValueError("download must be left out with digits, which need no files")
        return _digits(json)
    layout = layout_of(name)
    if root is None:
        if download:
            raise ValueError("root must be given with download, and is a folder for the files")
        return DataResult(_document(layout, None) if json else layout.origin + ".\n", False)
    folder = Path(root).expanduser()
    if download and inspect_cifar(layout, folder).folder is None:
        with _bar(layout.archive, not quiet) as on_bytes:
            download_cifar(layout, folder, url, on_bytes)
    state = inspect_cifar(layout, folder)
    return DataResult(
        _document(layout, state) if json else _as_text(layout, state, root), state.is_good
    )


def _digits(json: bool) -> DataResult:
    is_there = importlib.util.find_spec("sklearn") is not None
    text = (
        "digits come with scikit-learn, which is installed: --data digits"
        if is_there
        else "digits come with scikit-learn, which is not installed: pip install 'fastadv[data]'"
    )
    if json:
        problems = [] if is_there else [text]
        return DataResult(
            as_json({"name": _DIGITS, "good": is_there, "problems": problems}), is_there
        )
    return DataResult(f"{text}\n", is_there)


def _document(layout: CifarLayout, state: SourceState | None) -> str:
    content: dict[str, Any] = {"name": layout.name, "url": layout.archive_url}
    if state is None:
        return as_json({**content, "good": False, "problems": ["root was not given"]})
    folder = None if state.folder is None else str(state.folder)
    files = [asdict(file) for file in state.files]
    found = {"folder": folder, "files": files, "problems": list(state.problems)}
    return as_json({**content, "good": state.is_good, **found})


def _as_text(layout: CifarLayout, state: SourceState, root: str) -> str:
    """The findings, one per line."""
    if state.folder is None:
        return "\n".join([*state.problems, _how_to_download(layout, root)]) + "\n"
    width = max(len(file.name) for file in state.files)
    lines = [f"{layout.name} in {state.folder}:"]
    for file in state.files:
        size = "missing" if file.size is None else f"{file.size:,} bytes"
        lines.append(f"  {file.name:<{width}}  {size:>18}  {'wrong' if file.problem else 'good'}")
    lines += [file.problem for file in state.files if file.problem]
    lines += state.problems
    if state.is_good:
        lines.append(f"All is as it should be: --data {layout.name} --root {root}")
    else:
        lines.append(f"Move {state.folder} away. {_how_to_download(layout, root)}")
    return "\n".join(lines) + "\n"


def _how_to_download(layout: CifarLayout, root: str) -> str:
    return f"`fastadv data {layout.name} --root {root} --download` fetches it where there is a network."


@contextmanager
def _bar(label: str, enabled: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar of bytes, if standard error is a terminal; it is advanced by the function that is yielded."""
    if not enabled or not sys.stderr.isatty():
        yield None
        return
    from fastadv.bars import Bar

    with Bar([label], unit="B", unit_scale=True, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)

        yield advance
