"""The options of `fastadv analyse`."""

from __future__ import annotations

import shlex

from fastadv.cli.parsing import Parser, with_lists
from fastadv.commands.analysis import run_analysis
from fastadv.evaluation.analyses import ANALYSES
from fastadv.interruption import stopped_by_signals


def analyse(words: list[str]) -> int:
    """Analyse models, and return the exit status."""
    parser = Parser(
        prog="fastadv analyse",
        description="Look into one or more models: their features, weights, entropies, and how their robustness "
        "changes. Numbers (CSV, JSON) and pictures (PNG) are kept in the folder analyses of each run, and "
        "`fastadv report --out` shows them.",
        needs={
            "models": "one or more run directories, files of weights (with --model), or module:function",
            "what": f"one or more of {', '.join(ANALYSES)}",
        },
    )
    parser.add_argument(
        "models",
        nargs="+",
        help="Run directories, files of weights (with --model), or module:function.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_argument(
        "--what",
        nargs="+",
        required=True,
        help="Names of analyses: "
        + "; ".join(f"{name} ({one.title})" for name, one in ANALYSES.items())
        + ".",
    )
    parser.add_flag("anew", "Compute also the analyses that are there already.")
    parser.add_flag("quiet", "Show no progress.")
    parser.add_function_arguments(run_analysis, skip={"models", "what", "anew", "quiet", "command"})
    spelled = words
    for option in ("--radii", "--step_counts", "--extractor_eps"):
        spelled = with_lists(spelled, option)
    options = vars(parser.parse_args(spelled))
    options.pop("config")
    with stopped_by_signals("stopped; the same command goes on after the last analysis that ended"):
        text = run_analysis(**options, command=shlex.join(["fastadv", "analyse", *words]))
    print(text, end="")
    return 0
