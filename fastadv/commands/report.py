"""The command `fastadv report`. The parameters are the options; the docstring is their help."""

from __future__ import annotations

import json as json_text
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastadv.evaluation import Subject, load_results
from fastadv.evaluation.analyses.records import analyses_folder, load_records
from fastadv.evaluation.comparison import Comparison, EvaluatedRun, distinct_names, distinct_paths
from fastadv.evaluation.reporting import Summary, aligned, to_json, verdicts, write_report
from fastadv.evaluation.results import EVAL_FILE
from fastadv.evaluation.sanity_file import load_sanity_results, sanity_file_of
from fastadv.trainers.number import Number
from fastadv.trainers.run_directory import Description, RunDirectory, place_in_run


def run_report(
    runs: Sequence[str],
    out: str | None = None,
    robust: str | None = None,
    eps: Number | None = None,
    norm: Literal["linf", "l2", "l1"] | None = None,
    json: bool = False,
) -> str:
    """The report.

    Args:
        runs: run directories that `fastadv eval` has judged, or files of results (.json) that it has written. A
            run stands for all its networks that were judged, RUN/eval.json for the robust one alone. Runs without
            results beside others are left out, with a warning.
        out: folder that the report is written to: a page (report.html), Markdown, CSV, LaTeX, JSON, the plots as
            PNG, the findings of `fastadv analyse`, and one model card per model and threat. By default nothing is
            written.
        robust: with --out, the attack whose accuracy is on the vertical axis of the trade-off plot; by default the
            last attack that all runs have.
        eps: with --out, the radius of the trade-off plot. By default the radius that all runs have; where they
            have several in common, 8/255 in linf.
        norm: with --out, the norm of this radius, where the runs have several norms in common.
        json: print all results as JSON in place of the table.

    Returns:
        The table as text, or JSON. Each line has one radius, one checkpoint, one set of images and one seed.
    """
    paths = distinct_paths(runs)
    judged, unjudged = [], []
    for path, name in zip(paths, distinct_names(paths), strict=True):
        beside = [
            file for file in _files_of_other_networks(Path(path)) if not _is_named(file, paths)
        ]
        if (Path(path) / EVAL_FILE).is_file() or not (beside or RunDirectory(path).exists):
            judged.append(judged_run(path, name))
        elif not beside:
            unjudged.append(path)
        judged += [judged_run(str(file), f"{name}/{file.name}") for file in beside]
    if unjudged and not judged:
        judged_run(unjudged[0], unjudged[0])  # which says what is missing
    if unjudged:
        warnings.warn(
            f"not in the report: {', '.join(unjudged)}; there are no results, which `fastadv eval RUN` finds",
            stacklevel=2,
        )
    if out is None:
        for name, value in (("robust", robust), ("eps", eps), ("norm", norm)):
            if value is not None:
                raise ValueError(
                    f"{name} must come with out, as it is about the plot, got {value!r}"
                )
    summary = Summary(Comparison(judged), robust, eps, norm)
    if out is not None:
        write_report(summary, out)
    if json:
        return to_json(summary).rstrip("\n")
    parts = []
    if summary.comparison.white_box:
        parts.append(aligned(summary.comparison.cells(intervals=True)))
    over_seeds = summary.over_seeds()
    for table in [*([over_seeds] if over_seeds.rows else []), *summary.other_threat_models]:
        body = aligned([table.heading, *table.rows])
        parts.append("\n".join([f"{table.title}:", "", body, "", *table.notes]))
    checked = verdicts(summary.comparison)
    if checked:
        parts.append("\n".join(checked))
    if out is not None and summary.no_plot:
        parts.append(summary.no_plot)
    return "\n\n".join(parts)


def _files_of_other_networks(run: Path) -> list[Path]:
    """The files with the results of a run's natural network and of parts of its stack."""
    if not run.is_dir():
        return []
    return [*run.glob(f"natural.{EVAL_FILE}"), *sorted(run.glob(f"extractors_*.{EVAL_FILE}"))]


def _is_named(file: Path, paths: Sequence[str]) -> bool:
    return file.resolve() in [Path(path).resolve() for path in paths]


def judged_run(path: str, name: str) -> EvaluatedRun:
    """Read the results of a run directory, or of a file.

    Raises:
        FileNotFoundError: if there is no file of results.
        ValueError: if the file holds no results.
    """
    source = Path(path)
    file = source if source.is_file() else source / EVAL_FILE
    if not file.is_file():
        around = place_in_run(source)
        run = path if around is None else around[0]
        raise FileNotFoundError(
            f"{file}: no such file; "
            + (f"the results of all checkpoints are in {run}; " if around else "")
            + f"run `fastadv eval {shlex.quote(str(run))}` first"
        )
    results = load_results(file)
    if not results:
        raise ValueError(f"{file}: holds no results; run `fastadv eval` first")
    subject, series, seed = results[-1].subject, "", None
    checks_file = sanity_file_of(file)
    if file != source:
        recorded = RunDirectory(path).read()
        network = recorded.model.get("name") or recorded.model.get("class", "")
        subject = Subject(method=recorded.method, network=str(network))
        series, seed = _series(recorded)
    return EvaluatedRun(
        name,
        subject.method or "-",
        subject.network or "-",
        tuple(results),
        folder=file.parent,
        checks=tuple(load_sanity_results(checks_file)) if checks_file.is_file() else (),
        analyses=tuple(load_records(analyses_folder(file))),
        series=series,
        seed=seed,
    )


def _series(recorded: Description) -> tuple[str, int | None]:
    """The facts that a run shares with runs of other seeds, and its seed.

    Frozen models are left out, as the frozen model of each run may have been trained with the run's seed.
    """
    seed = recorded.recipe.get("seed")
    recipe = {key: value for key, value in recorded.recipe.items() if key != "seed"}
    common = [recorded.method, recipe, recorded.model, recorded.data]
    return json_text.dumps(common, sort_keys=True), seed if isinstance(seed, int) else None
