"""The options of a run that goes on. They are read from its directory, as it was begun with them."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from fastadv.cli.parsing import schedule_classes
from fastadv.cli.yaml_values import load_yaml
from fastadv.models.registry import names_code
from fastadv.trainers import CheckpointError, Settings
from fastadv.trainers.methods import MethodClass, command_name
from fastadv.trainers.run_directory import RunDirectory
from fastadv.trainers.weights import check_no_code

CONFIG_FILE = "config.yaml"


def saved_options(run_dir: str, method: MethodClass) -> dict[str, Any]:
    """Return the content of a config that begins the run anew.

    The recipe, the model and the data are read from `run.json`. The settings of saving and printing, and the names
    of the frozen models' networks, are read from `config.yaml`. No code that the directory names is imported. The
    frozen models themselves are not named, as the run has copies of them.

    Args:
        run_dir: the run's directory.
        method: the method by which it goes on.

    Raises:
        CheckpointError: if `run.json` is damaged.
        ValueError: if the run was begun by another method, or in a way for which the command line has no options.
    """
    run = RunDirectory(run_dir)
    recorded = run.read()
    if recorded.method != method.name:
        code = run.method_code()
        trust = ", if you trust that code" if code else ""
        raise ValueError(
            f"run {run_dir} was trained by {recorded.method}: resume it by "
            f"`fastadv train {code or recorded.method} --run {shlex.quote(run_dir)} --resume`{trust}, "
            f"got {command_name(method)}"
        )
    dataset, root = run.source()
    if dataset is None:
        raise ValueError(
            f"run {run_dir} was begun in Python, with data of its own; resume it there"
        )
    known = {f.name for f in fields(method.recipe_class)}
    recipe = {
        name: _as_option(value)
        for name, value in recorded.recipe.items()
        if name in known and _is_known(value)
    }
    options = {**_settings(run.path / CONFIG_FILE), **recipe, **run.reading(), "data": dataset}
    if root is not None and dataset != "digits":
        options["root"] = root
    name = recorded.model.get("name")
    if name is not None and not names_code(name):
        options["model"] = name
    return options


def check_method_known(run_dir: str, name: str) -> None:
    """Check that the run in a directory was not begun by a user's own method with this name.

    Raises:
        ValueError: if it was. The message says how to name the method: its code runs only if the user names it.
    """
    run = RunDirectory(run_dir)
    if run.exists and run.read().method == name:
        code = run.method_code() or "package.module:Class"
        raise ValueError(
            f"run {run_dir} was trained by {name}, a method that is not fastadv's, whose code runs only when "
            f"you name it yourself: `fastadv train {code} --run {shlex.quote(run_dir)} --resume`, if you trust "
            "that code"
        )


def check_model_known(run_dir: str) -> None:
    """Check that a run can go on without its model being named again.

    Raises:
        ValueError: if the model was not made by name, or its name stands for code.
    """
    run = RunDirectory(run_dir)
    recorded = run.read().model
    name = recorded.get("name")
    if name is None:
        kind = recorded.get("class", "a module")
        raise ValueError(f"run {run_dir} was begun in Python, with a {kind}; resume it there")
    check_no_code(name, run.path)


def as_config(options: dict[str, Any]) -> str:
    """Write options as a config that can stand on a command line."""
    return json.dumps(options)  # JSON is YAML, too, and keeps every number


def _as_option(value: Any) -> Any:
    """Write a value of a recorded recipe as configs have it: a schedule by the name of its class."""
    if isinstance(value, dict) and "class" in value:
        arguments = {name: item for name, item in value.items() if name != "class"}
        return {"class_path": f"fastadv.trainers.{value['class']}", "init_args": arguments}
    return value


def _is_known(value: Any) -> bool:
    """Whether a recorded value can be an option.

    A class must be one of this package's schedules. A network must not be named by code.
    """
    if isinstance(value, str):
        return not names_code(value)
    return not isinstance(value, dict) or value.get("class") in schedule_classes()


def saved_teachers(run_dir: str | Path) -> list[str] | None:
    """Return the sources of a run's frozen models, for its record; the run itself has copies of the models."""
    given = _read_config(Path(run_dir) / CONFIG_FILE).get("teacher")
    return given if isinstance(given, list) and all(isinstance(one, str) for one in given) else None


def _settings(file: Path) -> dict[str, Any]:
    """The settings of saving and printing in a config; empty if there is no file, as for a run begun in Python."""
    content = _read_config(file)
    names = {*(f.name for f in fields(Settings)), "device", "extra", "workers"}
    networks = content.get("teacher_model")
    if isinstance(networks, list) and not any(names_code(name) for name in networks):
        names.add("teacher_model")
    return {name: value for name, value in content.items() if name in names}


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = load_yaml(file.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{file}: not a config; delete it, and give its options again ({error})"
        ) from error
    return content if isinstance(content, dict) else {}
