"""The options of `fastadv eval`."""

from __future__ import annotations

import shlex
from typing import Any

from fastadv.cli.parsing import Parser, with_lists
from fastadv.commands import DEFAULT_ATTACKS, run_evaluation
from fastadv.evaluation.attack_list import NAMES
from fastadv.interruption import stopped_by_signals
from fastadv.ranks import is_first
from fastadv.trainers.number import Number


def evaluation_parser() -> Parser:
    """Build the parser of `fastadv eval`."""
    parser = Parser(
        prog="fastadv eval",
        description="Measure the accuracy of a model on test images, without an attack and under attacks. The "
        "model is the one of a run directory, or --model with --weights. The results are printed and kept in a "
        "file.",
    )
    parser.add_argument(
        "run", nargs="?", help="Run directory. Leave it out where --model and --weights are given."
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_argument(
        "--attacks",
        nargs="+",
        default=list(DEFAULT_ATTACKS),
        help="Attacks to run, in this order. K is a number of steps, R of restarts or runs, N of queries, S of "
        f"constants. {'. '.join(f'{names}: {what}' for names, what in NAMES.items())}.",
    )
    parser.add_argument(
        "--normalise",
        nargs=2,
        metavar=("MEAN", "STD"),
        help="With --weights, the mean and the standard deviation by which the inputs are normalised, each one "
        "number or one per channel with commas between them. Leave it out where the model takes images in 0..1, "
        "or where the file of weights says how it normalises.",
    )
    parser.add_argument(
        "--bounds",
        nargs=2,
        type=Number,
        default=[0.0, 1.0],
        metavar=("LOW", "HIGH"),
        help="Smallest and largest value of an image as the model takes it. The images are scaled to this range, "
        "and --eps is in its units.",
    )
    parser.add_flag("quiet", "Show no progress.")
    parser.add_function_arguments(
        run_evaluation, skip={"run", "attacks", "normalise", "bounds", "quiet", "command"}
    )
    parser.explain("--run", "the run stands alone, fastadv eval RUN")
    for option in ("--steps", "--num_steps"):
        parser.explain(option, "the steps are part of the name of an attack, --attacks pgd-20")
    return parser


def evaluation_options(words: list[str]) -> dict[str, Any]:
    """Read the options of `fastadv eval`.

    Args:
        words: the command line.
    """
    options = vars(evaluation_parser().parse_args(with_lists(words, "--eps")))
    options.pop("config")
    return options


def evaluate(words: list[str]) -> int:
    """Judge a model, and return the exit status."""
    options = evaluation_options(words)
    with stopped_by_signals("stopped before the first attack"):
        text = run_evaluation(**options, command=shlex.join(["fastadv", "eval", *words]))
    if is_first():
        print(text, end="")
    return 0
