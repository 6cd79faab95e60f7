"""The options of `fastadv sweep`: its own, and the options for `fastadv train` and `fastadv eval`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from fastadv.cli.completion import is_completing, offer, offer_options
from fastadv.cli.evaluate import evaluation_options, evaluation_parser
from fastadv.cli.flags import FALSE, spellings, turned_off
from fastadv.cli.parsing import FAILED, Parser, closest_option, complain, given_options
from fastadv.cli.train import check_training, training_parser
from fastadv.commands.documents import as_json
from fastadv.commands.evaluation import checked_attacks
from fastadv.commands.sweep import Launch, run_sweep
from fastadv.interruption import stopped_by_signals
from fastadv.sweeps import Plan, parse_grid
from fastadv.trainers import find_method, method_names
from fastadv.trainers.methods import command_name

_EVAL = "--eval_"
# Options of `fastadv eval` that need no prefix, as `fastadv train` has none of this name.
_NOT_PREFIXED = ("attacks", "max_examples")
_SWEEP_OPTIONS = ("grid", "out", "beside", "dry_run", "json", *(f.name for f in fields(Launch)))
# Options of `fastadv train` that the sweep itself sets for each run.
_SET_BY_SWEEP = ("run", "resume", "overwrite", "allow_changes", "from_checkpoint")
_OWN_FILE = (
    "its results have a file of their own, which no sweep reads; run `fastadv eval` after it"
)
# Options of `fastadv eval` that only some attacks take.
_OF_ATTACKS = ("alpha", "eot", "engine", "worst_case", "cw_c", "cw_lr", "surrogate", "sanity")
# Options of `fastadv eval` that a sweep refuses, and why.
_NOT_JUDGED = {
    "out": "a sweep keeps the results in its runs' directories",
    "network": _OWN_FILE,
    "extractors": _OWN_FILE,
    "weights": "a sweep judges its own runs",
    "normalise": "a sweep judges its own runs",
}


def sweep(words: list[str]) -> int:
    """Train, judge and compare a method over a grid, and return the exit status."""
    if is_completing() and not words:
        offer("fastadv sweep", method_names())
    if not words or words[0].startswith("-"):
        if words[:1] in (["-h"], ["--help"]):
            _parser("METHOD").print_help()
            return 0
        before = f" before {words[0]}" if words else ""
        return complain(f"sweep needs a method{before}: {', '.join(method_names())}")
    method = find_method(words[0])
    own, training, evaluation = _sorted(words[1:])
    own_parser = _parser(command_name(method))
    if is_completing():
        _offer(own_parser, training_parser(method))
    _check_names(training, own_parser, training_parser(method))
    options = own_parser.parse_args(own)
    set_by_sweep = given_options(training, _SET_BY_SWEEP)
    for word in training[:1]:
        if not word.startswith("--"):
            raise ValueError(f"sweep takes options after the method, got {word!r}")
    grid = parse_grid(options.grid)
    axes = {axis.name: ",".join(axis.values) for axis in grid.axes}
    set_by_sweep |= {name: values for name, values in axes.items() if name in _SET_BY_SWEEP}
    for name, value in set_by_sweep.items():
        raise ValueError(
            f"{name} must be left out, as a sweep names its runs' directories and resumes them, got {value!r}"
        )
    given = given_options(training, ("seed", *(axis.name for axis in grid.axes)))
    for name, value in given.items():
        if name != "seed" or grid.seeds:
            raise ValueError(f"{name} must be in the grid or an option, not both, got {value!r}")
    plan = Plan(Path(options.out), command_name(method), tuple(training), tuple(evaluation), grid)
    plan = _checked(plan, given)
    launching = {field.name: getattr(options, field.name) for field in fields(Launch)}
    launch = Launch(**{**launching, "slurm": tuple(options.slurm)})
    quiet = given_options(training, ("quiet",)).get("quiet", "false").lower() not in FALSE
    with stopped_by_signals("stopped; the same command goes on"):
        result = run_sweep(
            plan, launch, beside=options.beside, dry_run=options.dry_run, quiet=quiet
        )
    print(as_json(result.content) if options.json else f"{result.text}\n", end="")
    if result.unsaved:
        return complain(result.unsaved)
    return FAILED if result.failures else 0


def _parser(method: str) -> Parser:
    parser = Parser(
        prog=f"fastadv sweep {method}",
        usage=f"fastadv sweep {method} --grid NAME=VALUES ... --out DIR [options]",
        description="Train a method at every point of a grid of its options, judge every run, and print a "
        "table with mean and standard deviation over the seeds. Runs that are finished stay as they are, and "
        "interrupted ones go on: the same command resumes a sweep.\n\n"
        "Any other option is one of `fastadv train`, such as --data or --epochs, and holds for all runs. In its "
        "value {seed}, or the name of an option of the grid in braces, stands for the run's value. "
        "--attacks and --max_examples are options of `fastadv eval`, and --eval_NAME is its option --NAME.",
        needs={
            "grid": "the options that differ",
            "out": "a directory for everything the sweep leaves",
        },
    )
    parser.add_argument(
        "--grid",
        nargs="+",
        required=True,
        metavar="NAME=VALUES",
        help="Options of `fastadv train` and their values: numbers, fractions or words between commas, or a range "
        "FIRST:LAST:STEP with both ends, such as lr=.1,.05 eps=2/255:8/255:2/255. seeds=3 is for the seeds 0, 1 "
        "and 2, seed=4,7 for the seeds 4 and 7.",
    )
    parser.add_argument("--out", required=True, help="Directory of the sweep.")
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        help="Directories of further sweeps, whose points come into the same table and plot.",
    )
    parser.add_class_arguments(Launch, skip={"slurm"})
    parser.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        help="With slurm, further options of sbatch without their dashes, such as partition=gpu time=12:00:00.",
    )
    parser.add_flag(
        "dry_run",
        "Do nothing but write the script, with slurm, or else print the trainings that are left.",
    )
    parser.add_flag("json", "Print the table as one JSON document in place of the text.")
    return parser


def _sorted(words: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The words for the sweep itself, for `fastadv train` and for `fastadv eval`."""
    own: list[str] = []
    training: list[str] = []
    evaluation: list[str] = []
    target = training
    for word in words:
        if word.startswith("-") and not _is_negative(word):
            name = word.lstrip("-").partition("=")[0]
            if name in _SWEEP_OPTIONS or name in ("h", "help"):
                target = own
            elif name in _NOT_PREFIXED:
                target = evaluation
            elif word.startswith(_EVAL):
                target, word = evaluation, f"--{word.removeprefix(_EVAL)}"
            else:
                target = training
        target.append(word)
    return own, training, evaluation


def _offer(own: Parser, training: Parser) -> None:
    """Complete a word by the options of the sweep, of `fastadv train` and of `fastadv eval`."""
    judging = []
    for action in evaluation_parser()._actions:
        if action.option_strings and action.dest not in ("help", "config", "print_config"):
            shown = copy.copy(action)
            shown.option_strings = [_EVAL + name[2:] for name in spellings(action)]
            if action.dest in _NOT_PREFIXED:
                shown.option_strings = [f"--{action.dest}"]
            judging.append(shown)
    offer_options(own.prog, [*own._actions, *training._actions, *judging])


def _check_names(words: Sequence[str], own: Parser, training: Parser) -> None:
    """Refuse an option that neither the sweep nor `fastadv train` has.

    This comes first: a misspelled option is often the reason why a required one is missing.
    """
    known = [option for parser in (own, training) for option in parser.options()]
    for word in words:
        option = word.partition("=")[0]
        named = option.startswith("--") and turned_off(option) not in known
        if named and option not in known and not option.startswith("--schedule."):
            own.error(f"there is no option {option}{closest_option(option, known)}")


def _is_negative(word: str) -> bool:
    return word[1:2].isdigit() or word[1:2] == "."


def _checked(plan: Plan, given: Mapping[str, str]) -> Plan:
    """Check the options of every run and of the evaluation, and return the plan with its seeds."""
    method = find_method(plan.method)
    _check_evaluation(plan.evaluation)
    if not plan.grid.seeds:
        default = str(method.recipe_class().seed)
        seeds = parse_grid([f"seed={given.get('seed', default)}"]).seeds
        training = tuple(_without_seed(plan.training))
        plan = replace(plan, training=training, grid=replace(plan.grid, seeds=seeds))
    for run in plan.runs:
        if run.seed == plan.grid.seeds[0]:  # the others have the same options
            check_training(method, [*plan.training_words(run), f"--run={run.folder}"])
    return plan


def _check_evaluation(words: Sequence[str]) -> None:
    """Refuse options of the evaluation that are wrong, or whose results the sweep would not find."""
    usual, chosen = evaluation_options(["RUN"]), evaluation_options(["RUN", *words])
    settings = {name: chosen[name] for name in _OF_ATTACKS}
    checked_attacks(chosen["attacks"], 8 / 255, **settings)  # any radius will do here
    for name, reason in _NOT_JUDGED.items():
        if chosen[name] != usual[name]:
            raise ValueError(f"eval_{name} must be left out, as {reason}, got {chosen[name]!r}")


def _without_seed(words: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in words:
        if word.startswith("--"):
            skip = word.partition("=")[0] == "--seed"
        if not skip:
            kept.append(word)
    return kept
