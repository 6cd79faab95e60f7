"""Whether fastadv's default attack follows the right gradient on other people's architectures.

    python bench/architectures.py                          all that can be imported; over an hour on one core
    python bench/architectures.py --zoo timm --only mixer  names that contain "mixer" (a regular expression)

Every architecture of RobustBench's zoo, a choice of timm's and fastadv's own get random weights and one step of
an attack, whose direction is held against the gradient of a plain float32 loop, image by image. A row is

    right     the smallest cosine is at least 0.8, or 0.99 where float32 ran (the budgets of docs/engine.md)
    warned    the same, and a warning said why another engine than the wanted one ran
    WRONG     anything else that fastadv made of a network that the plain loop runs
    not run   the network itself could not be built or run here, or was stopped at a limit

"bf16" is the cosine of the plain loop under autocast to bfloat16: networks with random weights can be so rough
that bfloat16 itself loses the gradient, whoever computes it.

Each architecture has a process of its own, with a limit of time and one of memory. Its row is in
architectures_DEVICE.json in --out at once; finished networks are not run again unless --again is given, or their
kind is named by --retry. The table is architectures_DEVICE.md. Packages: timm, torchvision, robustbench.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from architecture_check import NOT_RUN, RIGHT, WARNED, WRONG, Row, examine
from architecture_list import OURS, TIMM, ZOOS, robustbench_architectures, zoo_of
from measure import machine, machine_line, text_table, write_json

from fastadv.files import write_atomically

RESULTS = Path(__file__).parent / "results"
VERDICTS = (RIGHT, WARNED, WRONG, NOT_RUN)
HEADER = [
    "architecture",
    "verdict",
    "engine",
    "precision",
    "cosine",
    "bf16",
    "logits' error",
    "seconds",
]
Tell = Callable[[str], None]
_START_SECONDS = 120.0  # for a process to import its packages


class Stopped(Exception):
    """A process did not come to its end; `stage` is the stage that it was at."""

    def __init__(self, why: str, stage: str, own_doing: bool) -> None:
        super().__init__(why)
        self.stage, self.own_doing = stage, own_doing


def apart(work: Callable[[Tell], Any], seconds: float, memory: int) -> Any:
    """The result of work, run in a process of its own.

    Args:
        work: called with a function that takes the name of the next stage; it must be picklable.
        seconds: the longest it may take once it has begun.
        memory: the most resident bytes it may have.

    Raises:
        Stopped: it was stopped at a limit, or died.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work_and_send, args=(work, theirs))
    process.start()
    theirs.close()
    stage, limit = "starting", _START_SECONDS
    end = time.monotonic() + limit
    try:
        while True:
            if ours.poll(0.2):
                try:
                    kind, content = ours.recv()
                except EOFError:
                    process.join()
                    why = f"the process died with code {process.exitcode}"
                    killed = process.exitcode == -signal.SIGKILL  # by a system out of memory
                    raise Stopped(why, stage, own_doing=not killed) from None
                if kind == "result":
                    return content
                if stage == "starting":
                    limit, end = seconds, time.monotonic() + seconds
                stage = content
            elif time.monotonic() > end:
                raise Stopped(f"it took over {limit:g} s", stage, own_doing=False)
            elif _resident_bytes(process.pid) > memory:
                raise Stopped(f"it needs over {memory / 2**30:g} GiB", stage, own_doing=False)
    finally:
        process.kill()
        process.join()


def _work_and_send(work: Callable[[Tell], Any], pipe: Connection) -> None:
    # Some packages print while they build.
    with contextlib.redirect_stdout(io.StringIO()):
        result = work(lambda stage: pipe.send(("stage", stage)))
    pipe.send(("result", result))


def _resident_bytes(pid: int | None) -> int:
    """Resident memory of a process; 0 where the system does not tell."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def examine_with_threads(
    threads: int, name: str, batch: int, device: torch.device, initial: bool, tell: Tell
) -> Row:
    torch.set_num_threads(threads)
    return examine(name, batch, device, initial, tell)


def distinct_architectures(tell: Tell) -> dict[str, list[str]] | str:
    """The result of `robustbench_architectures`; the reason as text if the package cannot be imported."""
    tell("listing")
    try:
        return robustbench_architectures()
    except ImportError as error:
        return f"robustbench cannot be imported: {error}"


def chosen(zoos: list[str], only: str | None, memory: int) -> dict[str, list[str]]:
    """The architectures to run and, by name, their equals."""
    names: dict[str, list[str]] = {}
    if "ours" in zoos:
        names |= {name: [] for name in OURS}
    if "timm" in zoos:
        names |= {f"timm:{name}": [] for name in TIMM}
    if "robustbench" in zoos:
        found = apart(distinct_architectures, 600, memory)
        if isinstance(found, str):
            print(found)
        else:
            names |= found
    pattern = re.compile(only or "")
    return {name: same for name, same in names.items() if pattern.search(name)}


def row_of(name: str, options: argparse.Namespace) -> Row:
    """One architecture's row, whatever happens to its process."""
    device, memory = torch.device(options.device), int(options.memory * 2**30)
    work = partial(
        examine_with_threads, options.threads, name, options.batch, device, options.initial
    )
    try:
        return apart(work, options.seconds, memory)
    except Stopped as stopped:
        # A network that the plain loop runs must not take the process down.
        wrong = stopped.own_doing and stopped.stage == "the attack"
        note = f"{stopped}, at: {stopped.stage}"
        return {"verdict": WRONG if wrong else NOT_RUN, "note": note}


def machine_facts(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    facts = machine(torch.device(options.device))
    for package in ("torchvision", "timm", "robustbench"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts["packages"][package] = importlib.metadata.version(package)
    return facts


def counts_line(rows: Mapping[str, Row]) -> str:
    """The number of rows of each verdict, for each zoo."""
    parts = []
    for zoo in ZOOS:
        found = collections.Counter(r["verdict"] for n, r in rows.items() if zoo_of(n) == zoo)
        if found:
            counts = ", ".join(f"{found[v]} {v}" for v in VERDICTS if found[v])
            parts.append(f"{zoo}: {counts}")
    return "; ".join(parts)


def cells_of(name: str, row: Row) -> list[str]:
    """A row's cells, as under `HEADER`."""
    more = f" (+{len(row['same'])})" if row.get("same") else ""
    numbers = [
        "-" if row.get(key) is None else f"{row[key]:{form}}"
        for key, form in (
            ("cosine", ".4f"),
            ("bf16_cosine", ".4f"),
            ("logits_error", ".1e"),
            ("seconds", ".1f"),
        )
    ]
    return [
        name + more,
        row["verdict"],
        row.get("engine", "-"),
        row.get("precision", "-"),
        *numbers,
    ]


def remark_of(row: Row) -> str:
    """The note of a row: a failure, else warnings, else why the engine ran."""
    return row.get("note") or "; ".join(row.get("warnings", [])) or row.get("reason", "")


def markdown(rows: Mapping[str, Row], facts: Mapping[str, Any], batch: int) -> str:
    """The table, zoo by zoo."""
    packages = [
        f"{name} {facts['packages'][name]}"
        for name in ("torchvision", "timm", "robustbench")
        if name in facts["packages"]
    ]
    lines = [
        f"One attack step on {batch} images, default precision, random weights; bf16: cosine of the plain loop "
        "under autocast to bfloat16; "
        f"{', '.join([machine_line(facts), *packages])}. {counts_line(rows)}. (+N): so many entries of the zoo "
        "that are the same but for their weights.",
        "",
        f"| {' | '.join([*HEADER, 'remark'])} |",
        f"|---|---|---|---|{'---:|' * 4}---|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: ZOOS.index(zoo_of(item[0]))):
        remark = " ".join(remark_of(row).replace("|", "\\|").split())
        lines.append(f"| {' | '.join([*cells_of(name, row), remark])} |")
    return "\n".join(lines) + "\n"


def run(options: argparse.Namespace) -> dict[str, Row]:
    """Run the chosen networks that are not there yet; all rows, old and new."""
    facts = machine_facts(options)
    suffix = "_initial" if options.initial else ""
    path = options.out / f"architectures_{facts['device']}{suffix}.json"
    rows: dict[str, Row] = json.loads(path.read_text())["rows"] if path.exists() else {}
    names = chosen(options.zoo, options.only, int(options.memory * 2**30))
    due = [
        name
        for name in names
        if options.again or name not in rows or rows[name]["verdict"] in options.retry
    ]
    print(f"{len(names)} architectures, {len(due)} of them to be run; {machine_line(facts)}")
    for number, name in enumerate(due, 1):
        began = time.perf_counter()
        row = row_of(name, options)
        row |= {"same": names[name], "date": facts["date"], "batch": options.batch}
        rows[name] = row | {"whole_seconds": time.perf_counter() - began}
        write_json(path, {"machine": facts, "rows": rows})
        print(
            f"{number}/{len(due)}  {'  '.join(cells_of(name, row))}  {remark_of(row)}", flush=True
        )
    if rows:
        text = markdown(rows, facts, options.batch)
        write_atomically(path.with_suffix(".md"), text)
    return {name: rows[name] for name in names if name in rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", nargs="+", choices=ZOOS, default=list(ZOOS))
    parser.add_argument("--only", metavar="PATTERN", help="names in which this is found")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--initial",
        action="store_true",
        help="leave parameters that a package sets to a constant; results get files of their own",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=300, help="for one architecture")
    parser.add_argument("--memory", type=float, default=16, help="GiB for one architecture")
    parser.add_argument("--again", action="store_true", help="run also networks that have been run")
    parser.add_argument(
        "--retry", nargs="+", choices=VERDICTS, default=[], help="run rows of these verdicts again"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = run(options)
    print(text_table(HEADER, [cells_of(name, row) for name, row in rows.items()]))
    print(counts_line(rows))


if __name__ == "__main__":
    main()
