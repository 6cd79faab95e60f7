"""`fastadv eval`."""

from __future__ import annotations

import shlex

from fastadv.cli.parsing import Parser, with_lists
from fastadv.commands import DEFAULT_ATTACKS, run_evaluation
from fastadv.interruption import stopped_by_signals
from fastadv.ranks import is_first
from fastadv.trainers.number import Number


def evaluate(words: list[str]) -> int:
    """Judge a model; the exit status."""
    parser = Parser(
        prog="fastadv eval",
        description="Measure a model's accuracy, clean and under attack, on test images: of a run, or of "
        "--model with --weights.",
    )
    parser.add_argument(
        "run", nargs="?", help="Run directory; left out where --model and --weights are given."
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_argument(
        "--attacks",
        nargs="+",
        default=list(DEFAULT_ATTACKS),
        help="clean, fgsm, fgsm-rs, pgd-K for any K, pgd-K-R with R restarts, pgd-K-Rruns with R whole runs of "
        "which the lowest counts, cw-K, mim-K, apgd-ce, apgd-dlr, apgd-t, fab-t, fab, square, square-N with N "
        "queries, autoattack; without a ball cwl2-K, min-fgsm, min-pgd-K; quick (clean fgsm pgd-20), standard "
        "(clean autoattack), strong (clean pgd-100-10 cw-100-10 apgd-ce apgd-t fab-t square).",
    )
    parser.add_argument(
        "--normalise",
        nargs=2,
        metavar=("MEAN", "STD"),
        help="With --weights, mean and standard deviation of the inputs, each one number or one per channel with "
        "commas between them, unless the model takes images in 0..1 or the file says how.",
    )
    parser.add_argument(
        "--bounds",
        nargs=2,
        type=Number,
        default=[0.0, 1.0],
        metavar=("LOW", "HIGH"),
        help="Smallest and largest value of an image as the model takes it; the data are scaled to them. eps has "
        "these units.",
    )
    parser.add_flag("quiet", "Show no progress.")
    parser.add_function_arguments(
        run_evaluation, skip={"run", "attacks", "normalise", "bounds", "quiet", "command"}
    )
    options = vars(parser.parse_args(with_lists(words, "--eps")))
    options.pop("config")
    with stopped_by_signals("stopped before the first attack"):
        text = run_evaluation(**options, command=shlex.join(["fastadv", "eval", *words]))
    if is_first():
        print(text, end="")
    return 0
