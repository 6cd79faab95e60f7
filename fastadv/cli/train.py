"""The options of `fastadv train`, whose defaults follow from the method and the preset."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, get_type_hints

import yaml
from jsonargparse import Namespace

from fastadv.cli.completion import is_completing, offer
from fastadv.cli.flags import FALSE, TRUE
from fastadv.cli.help_format import as_typed, table_line
from fastadv.cli.parsing import FAILED, Parser, complain, given_options, schedule_classes
from fastadv.cli.saved_options import (
    CONFIG_FILE,
    as_config,
    check_method_known,
    check_model_known,
    saved_options,
    saved_teachers,
)
from fastadv.cli.yaml_values import load_yaml
from fastadv.commands import Flags, run_training
from fastadv.data.datasets import dataset_names
from fastadv.data.training_folders import FOLDER
from fastadv.files import write_atomically
from fastadv.interruption import Interrupted
from fastadv.ranks import is_first, launch
from fastadv.trainers import Afs, Recipe, Settings, find_method, method_names
from fastadv.trainers.methods import MethodClass, command_name
from fastadv.trainers.run_directory import RunDirectory
from fastadv.trainers.unused import check_all_used

_TRAINING_OPTIONS = (
    "data",
    "run",
    "root",
    "model",
    "extra",
    "teacher",
    "teacher_model",
    "device",
    "from_checkpoint",
    "resize",
    "crop",
    "interpolation",
    "workers",
)


def train(words: list[str]) -> int:
    """Train a model, and return the exit status."""
    if is_completing() and not words:
        offer("fastadv train", method_names())
    if not words or words[0].startswith("-"):
        if words and words[0] not in ("-h", "--help"):
            return complain(f"train needs a method before {words[0]}: {', '.join(method_names())}")
        print(_methods_overview())
        return 0 if words else FAILED
    method, words = _method(words[0], words[1:]), words[1:]
    if _asks_for_schedules(words):
        print(_schedules_overview())
        return 0
    saved = _saved(method, words)
    words = [*saved, *words]
    parser = training_parser(method, _deciding(method, words))
    options = parser.parse_args(words)
    config = _config_text(parser, options, saved_teachers(options.run) if saved else None)
    chosen = parser.instantiate(options)
    recipe = method.recipe_class(**_fields_of(method.recipe_class, chosen))
    if not saved:
        check_all_used(method, recipe, chosen.preset)
        parser.check_given(options)
    try:
        result = run_training(
            method,
            recipe,
            Settings(**_fields_of(Settings, chosen)),
            Flags(**_fields_of(Flags, chosen)),
            on_start=lambda path: _write_config(path, config),
            **{name: getattr(chosen, name) for name in _TRAINING_OPTIONS},
        )
    except Interrupted as stop:
        if is_first():
            command = _resuming_command(method, chosen.run)
            print(f"fastadv: {stop}\ngo on: {command}", file=sys.stderr)
        return stop.code
    if is_first():
        print(f"trained: {result.checkpoint}")
        print(f"next: fastadv eval {shlex.quote(chosen.run)}")
    return 0


def check_training(method: MethodClass, words: Sequence[str]) -> Recipe:
    """Check the options of a new run, before anything is trained.

    Args:
        method: the method.
        words: the options, as on the command line.

    Returns:
        The recipe that they make.

    Raises:
        ValueError: if a number is out of range, or would have no effect.
        SystemExit: if the parser refuses the options.
    """
    parser = training_parser(method, _deciding(method, words))
    chosen = parser.instantiate(parser.parse_args(words))
    recipe = method.recipe_class(**_fields_of(method.recipe_class, chosen))
    check_all_used(method, recipe, chosen.preset)
    return recipe


def _method(name: str, words: Sequence[str]) -> MethodClass:
    """The method with this name. If the run was begun by a user's own method, an error says how to name it."""
    if ":" not in name and name.lower().replace("-", "_") not in method_names():
        run = given_options(words, ("run",)).get("run")
        if run is not None:
            check_method_known(str(run), name)
    return find_method(name)


def _resuming_command(method: MethodClass, run: str) -> str:
    """The command that goes on with a run."""
    alone = launch() is None
    program, option = ("fastadv", "run") if alone else ("torchrun ... -m fastadv", "run-dir")
    return f"{program} train {command_name(method)} --{option} {shlex.quote(run)} --resume"


def training_parser(
    method: MethodClass, settings: Mapping[str, Any] = MappingProxyType({})
) -> Parser:
    """Build the parser of `fastadv train METHOD`.

    Args:
        method: the method.
        settings: the user's values of the preset and of the recipe's deciding fields, from which the defaults of
            the other options follow.
    """
    given = {k: v for k, v in settings.items() if k not in ("preset", "data")}
    preset = str(settings.get("preset", "paper"))
    recipe_class = method.recipe_class
    recipe_class.preset(preset)  # raises for an unknown preset
    defaults = recipe_class.defaults_for(preset, given)
    if str(settings.get("data")).startswith(FOLDER):
        defaults = {**defaults, "pad": 0}  # a folder's data set makes its own random crops
    parser = Parser(
        prog=f"fastadv train {command_name(method)}",
        description=inspect.getdoc(method),
        needs=_needs(method, _known_so_far(recipe_class, {**defaults, **given})),
    )
    for schedule in schedule_classes().values():
        for field in fields(cast(Any, schedule)):
            parser.explain(f"--{field.name}", f"of a schedule it is --schedule.{field.name}")
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    skipped: set[str | int] = {"method", "recipe", "settings", "flags", "on_start"}
    skipped |= {"teacher", "teacher_model"}
    parser.add_function_arguments(run_training, skip=skipped)
    parser.add_argument(
        "--teacher",
        nargs="+",
        metavar="MODEL",
        help="Trained models for methods that need them, in their order: runs, checkpoints, or state "
        "dicts in .safetensors or .pt files.",
    )
    parser.add_argument(
        "--teacher_model",
        nargs="+",
        metavar="NETWORK",
        help="Networks of these models, names as for --model, in their order or one for all. Needed for a state "
        "dict that several networks take, such as resnet18 and resnet18_layer2_stride1.",
    )
    flags = parser.add_argument_group("Switches")
    for name, text in _attribute_docs(Flags).items():
        parser.add_flag(name, text, flags)
    parser.add_argument(
        "--preset",
        default=preset,
        help=f"Numbers that options and configs then change: {' or '.join(recipe_class.presets)}.",
    )
    _resolve_types(recipe_class)
    parser.add_class_arguments(recipe_class, skip={"replaces"})
    parser.set_defaults(defaults)
    parser.add_class_arguments(Settings)
    return parser


def _resolve_types(recipe_class: type[Recipe]) -> None:
    """Replace the names of types in the signature of a recipe by the types.

    jsonargparse looks names up in the modules of the first base classes, and only as far as these are dataclasses.
    Beyond another base class, such as a mixin, it finds no types. Then it reads no schedules and checks no values.
    """
    try:
        types = get_type_hints(recipe_class)
    except Exception:  # an own recipe can name types that its module does not have when it runs
        return
    stated = recipe_class.__init__.__annotations__
    stated.update({f.name: types[f.name] for f in fields(recipe_class) if f.name in stated})


def _deciding(method: MethodClass, words: Sequence[str]) -> dict[str, Any]:
    """The given values of the options from which the defaults of other options follow.

    These are the preset, the data, the epochs, the recipe's flags and its deciding fields.
    """
    recipe_class = method.recipe_class
    flags = {f.name for f in fields(recipe_class) if isinstance(f.default, bool)}
    names = ("preset", "data", "epochs", *recipe_class.deciders(), *flags)
    found: dict[str, Any] = {
        name: str(value).lower() in TRUE if name in flags else str(value)
        for name, value in given_options(words, names).items()
    }
    if "epochs" in found:
        found["epochs"] = _number(found["epochs"])
    return found


def _number(text: str) -> Any:
    """The parser's value of a number, which may be written +40, 4_0 or 0x28; any other word unchanged."""
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text


def _known_so_far(recipe_class: type[Recipe], numbers: Mapping[str, Any]) -> Recipe:
    """The recipe as far as it is known; the default recipe if a number is wrong, which the parser reports."""
    known = {f.name for f in fields(recipe_class)} - {"epochs", "schedule"}
    try:
        return recipe_class(**{name: value for name, value in numbers.items() if name in known})
    except (TypeError, ValueError):
        return recipe_class()


def _needs(method: MethodClass, recipe: Recipe) -> dict[str, str]:
    """The description of each argument that cannot be left out, also if only the training itself needs it."""
    needs = {
        "data": f"one of {', '.join(dataset_names())}, or folder:PATH",
        "run": "a directory for everything the run leaves",
    }
    trained = method.teachers_needed(recipe)
    if trained or method is Afs:
        several = len(trained) > 1 or method is Afs
        needs["teacher"] = "trained networks" if several else "a trained network"
    return needs


def _saved(method: MethodClass, words: Sequence[str]) -> list[str]:
    """The saved options of the run that goes on, as words that come before the words of the command line."""
    given = given_options(words, ("run", "resume", "from_checkpoint", "model", "data"))
    run = given.get("run")
    if run is None or {"-h", "--help"} & set(words):
        return []
    resumes = str(given.get("resume", False)).lower() not in FALSE
    if not RunDirectory(str(run)).exists:
        if resumes and "data" not in given:
            raise ValueError(
                f"resume: there is no run in {run} that could go on; a new run needs --data"
            )
        return []
    if not resumes and "from_checkpoint" not in given:
        return []
    options = saved_options(str(run), method)
    if "model" not in options and "model" not in given:
        check_model_known(str(run))
    return ["--config", as_config(options)]


def _methods_overview() -> str:
    width = max(map(len, method_names()))
    lines = [
        table_line(name, (inspect.getdoc(find_method(name)) or "").splitlines()[0], width)
        for name in method_names()
    ]
    head = ["usage: fastadv train METHOD --data DATA --run RUN ...", "", "methods:"]
    own = "A method of your own is package.module:Class, a subclass of\nfastadv.trainers.Method."
    return "\n".join([*head, *lines, "", own, "`fastadv train METHOD --help` lists the options."])


def _asks_for_schedules(words: Sequence[str]) -> bool:
    """Whether `--schedule.help` stands without the name of a schedule."""
    if "--schedule.help" not in words:
        return False
    following = words[words.index("--schedule.help") + 1 :][:1]
    return not following or following[0].startswith("-")


def _schedules_overview() -> str:
    """The schedules as text, each with its options and their defaults."""
    kinds = schedule_classes()
    width = max(map(len, kinds))
    lines = []
    for name, kind in kinds.items():
        lines.append(table_line(name, (inspect.getdoc(kind) or "").splitlines()[0], width))
        lines += [
            f"  {'':<{width}}    --schedule.{field.name} {as_typed(field.default)}"
            for field in fields(cast(Any, kind))
        ]
    return "\n".join(
        [
            "--schedule NAME is how the learning rate changes over the run; NAME is one of",
            "",
            *lines,
            "",
            "The numbers are those of a schedule by itself. A method begins with its own",
            "schedule, which `fastadv train METHOD --help` shows. `--schedule.help NAME`",
            "explains the options of one.",
        ]
    )


def _fields_of(kind: type[Any], options: Namespace) -> dict[str, Any]:
    """The options that are fields of a dataclass."""
    return {f.name: getattr(options, f.name) for f in fields(kind)}


def _attribute_docs(kind: type[Any]) -> dict[str, str]:
    """The description of each field in a dataclass's docstring."""
    from docstring_parser import parse

    docs = {p.arg_name: p.description or "" for p in parse(inspect.getdoc(kind) or "").params}
    return {f.name: docs.get(f.name, "") for f in fields(kind)}


def _config_text(parser: Parser, options: Namespace, teachers: list[str] | None) -> str:
    """All options as a config, except the preset, which is resolved, and options that hold for one call only."""
    kept = options.clone()
    # Whole paths, because the config may be used in another folder.
    kept.teacher = [
        str(Path(one).expanduser().absolute()) for one in kept.teacher or teachers or ()
    ]
    kept.teacher = kept.teacher or None
    for name in ("root", "extra"):
        if kept[name] is not None:
            kept[name] = str(Path(kept[name]).resolve())
    if str(kept.data).startswith(FOLDER):
        place = Path(kept.data.removeprefix(FOLDER)).expanduser()
        kept.data = f"{FOLDER}{place.resolve()}"
    for name in ("config", "preset", "from_checkpoint", *(f.name for f in fields(Flags))):
        kept.pop(name, None)
    return parser.dump(kept, skip_validation=True)


def _write_config(run_dir: Path, text: str) -> None:
    write_atomically(run_dir / CONFIG_FILE, text)
