"""The command `fastadv analyse`. The parameters are the options; the docstring is their help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastadv.commands.analyser import Analyser
from fastadv.commands.documents import as_json
from fastadv.commands.images import Images, Reading, images_named, images_of_models
from fastadv.commands.judged import JudgedModel, model_of_run
from fastadv.commands.result_keeper import UnsavedResultsError
from fastadv.commands.surrogates import model_by_word
from fastadv.data.datasets import dataset_names, load_dataset
from fastadv.evaluation import AnalysisSettings, Measured
from fastadv.evaluation.analyses.analyse import settings_of
from fastadv.evaluation.analyses.analysis import Analysis, Need
from fastadv.evaluation.analyses.groups import AnalysisGroup, grouped, number_text
from fastadv.evaluation.analyses.pictures import images_of, picture_of
from fastadv.evaluation.analyses.records import AnalysisRecord, analyses_folder
from fastadv.evaluation.analyses.registry import check_needs, find_analyses
from fastadv.evaluation.comparison import distinct_names, distinct_paths
from fastadv.evaluation.reporting import aligned
from fastadv.evaluation.samples import as_samples
from fastadv.files import write_atomically
from fastadv.trainers.checkpoint import LATEST, find_checkpoint
from fastadv.trainers.hardware import choose_device
from fastadv.trainers.number import Number
from fastadv.trainers.run_directory import RunDirectory

_SHORT = 25  # a table with at most this number of rows is printed whole
_LISTS = frozenset(("radii", "step_counts", "extractor_eps"))


def run_analysis(
    models: Sequence[str],
    what: Sequence[str],
    *,
    teacher: str | None = None,
    teacher_model: str | None = None,
    checkpoint: str = LATEST,
    model: str | None = None,
    data: str | None = None,
    train_data: str | None = None,
    root: str | None = None,
    resize: int | None = None,
    crop: int | None = None,
    interpolation: Literal["bilinear", "bicubic"] | None = None,
    workers: int | None = None,
    max_examples: int | None = None,
    train_examples: int | None = None,
    eps: Number | None = None,
    alpha: Number | None = None,
    steps: int | None = None,
    radii: Number | list[Number] | None = None,
    step_counts: int | list[int] | None = None,
    max_eps: Number | None = None,
    pictures: int | None = None,
    epochs: int | None = None,
    points: int | None = None,
    extractor_eps: Number | list[Number] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str | None = None,
    out: str | None = None,
    anew: bool = False,
    json: bool = False,
    quiet: bool = False,
    command: str = "",
) -> str:
    """The analyses.

    Args:
        models: one or more models: run directories, files of weights, or module:function.
        what: names of analyses.
        teacher: the standard model, for cosine: a run directory, a file of weights, or module:function.
        teacher_model: the network of a teacher that is a file of weights.
        checkpoint: which checkpoint of the runs to analyse: latest, best, or a name such as step_000391.
        model: the network of all models that are files of weights: a name such as resnet18, timm:NAME, or
            module:function, whose code then runs.
        data: the images; `fastadv eval` takes the same names. By default the data set of the runs.
        train_data: the training set, for entropy and random-labels: digits, cifar10 or cifar100, a .npz file,
            folder:PATH or hf:NAME:SPLIT. By default the training images of the data set by name.
        root: folder that holds the files of cifar10 or cifar100; by default the folder of the first run.
        resize: with folder: or hf: data, the number of pixels that the shorter side of each picture is resized to;
            by default pictures are not resized.
        crop: with folder: or hf: data, the number of pixels of each side of the square that is cut out of the
            middle; by default nothing is cut off.
        interpolation: with resize, how pixels are interpolated: bilinear (the default) or bicubic.
        workers: with folder: or hf: data, the number of processes that decode pictures; by default one per core,
            at most 8.
        max_examples: use only this many images, as for `fastadv eval`. By default all are used.
        train_examples: use only this many images of the training set. By default all are used.
        eps: radius of the attack in linf, for steps-curve, tsne, umap and delta-z; by default 8/255.
        alpha: step size of PGD, for eps-curve, steps-curve, tsne and umap; by default a quarter of the radius.
        steps: steps of PGD, for eps-curve, tsne, umap, minimum and delta-z; by default 20.
        radii: radii of eps-curve, ascending; by default 13 radii from 1/255 to 100/255.
        step_counts: numbers of steps of steps-curve, ascending; by default 1 2 5 10 20 50 100.
        max_eps: largest radius that minimum tries; by default .5.
        pictures: images that minimum shows; by default 8.
        epochs: epochs of the network that random-labels trains; by default 30.
        points: images that tsne and umap show, each of them clean, noisy and adversarial; by default 300.
        extractor_eps: with delta-z, the radius for which each extractor of the merger was trained, in their order;
            by default 3/255 to 8/255, the radii of AFS, where there are six.
        batch_size: images per pass; by default 256.
        seed: seed of all random numbers.
        device: device to run on, e.g. cpu or cuda:0; by default a GPU if there is one.
        out: folder for numbers and pictures of all models together. Each model's own lie in the folder analyses
            of its run in any case.
        anew: compute also the analyses that are there already.
        json: print the numbers of all models as one JSON document in place of the text.
        quiet: show no progress.
        command: the command line, for the record.

    Returns:
        The numbers that matter most, and the folders with all numbers; or JSON.

    Raises:
        UnsavedResultsError: if numbers could not be written; the error holds the text.
    """
    chosen = find_analyses(what)
    settings = _settings(chosen, dict(locals()), seed)
    needed = {need for analysis in chosen for need in analysis.needs}
    _check_options(needed, chosen, teacher, teacher_model, train_data, train_examples)
    where, reading = choose_device(device), Reading(resize, crop, interpolation, workers)
    paths = distinct_paths(models)
    names = distinct_names(paths)
    every_path = paths if teacher is None else [*paths, teacher]
    not_runs = [path for path in every_path if not Path(path).is_dir()]
    given = {"max_examples": max_examples, "checkpoint": checkpoint, "data": data, "root": root}
    reads_data = bool(needed & {"images", "train"} or not_runs)
    _check_used({**given, **reading.given()}, chosen, needed, paths, reads_data)
    for path in paths:
        if Path(path).is_dir():  # a folder without a run gets its own error message here
            find_checkpoint(RunDirectory(path).path, checkpoint)
    images: Images | None = None
    if "images" in needed or not_runs:
        images = images_of_models(paths, data, root, reading)
    train = _training_set(paths, data, root, train_data, reading) if "train" in needed else None
    standard: nn.Module | None = None
    if teacher is not None:
        assert images is not None
        named = model_by_word(teacher, teacher_model, images, "teacher", "teacher_model")
        standard = named.model.to(where)
    samples = as_samples(images, (0.0, 1.0), max_examples) if "images" in needed else None
    train_samples = None if train is None else as_samples(train, (0.0, 1.0), train_examples)
    of_runs = None if any(Path(path).is_file() for path in paths) else model
    loaded = [_load(path, checkpoint, of_runs, model, images) for path in paths]
    for one in loaded:
        for analysis in chosen:
            check_needs(analysis, one.model, standard is not None, train is not None)
    common = Analyser(chosen, settings, samples, train_samples, standard, command, anew, quiet)
    folders = [analyses_folder(one.results) for one in loaded]
    records = {
        name: _analysed(common, name, one, folder, where)
        for name, one, folder in zip(names, loaded, folders, strict=True)
    }
    groups = grouped(records)
    unsaved, together = common.unsaved, []
    if out is not None:
        try:
            together = [_write_together(group, Path(out)) for group in groups]
        except OSError as error:
            unsaved = unsaved or str(error)
    obstacles = list(dict.fromkeys(filter(None, [common.missing, *together])))
    if json:
        text = as_json(_document(records, folders, out, obstacles))
    else:
        text = _as_text(groups, folders, out, obstacles)
    if unsaved:
        raise UnsavedResultsError(unsaved, text)
    return text


def _analysed(
    common: Analyser, name: str, judged: JudgedModel, folder: Path, where: torch.device
) -> list[AnalysisRecord]:
    """The analyses of one model, which is on the device for their time alone."""
    found = common.analyse(name, replace(judged, model=judged.model.to(where)), folder)
    judged.model.cpu()  # frees the memory of the device for the next model
    return found


def _as_text(
    groups: Sequence[AnalysisGroup],
    folders: Sequence[Path],
    out: str | None,
    obstacles: Sequence[str],
) -> str:
    """The numbers that matter most, the folders with all numbers, and why pictures are missing."""
    text = "\n\n".join(_group_text(group) for group in groups)
    text += "\n\nnumbers and pictures: " + ", ".join(map(str, dict.fromkeys(folders)))
    if out is not None:
        text += f"\nof all models together: {out}"
    for obstacle in obstacles:
        text += f"\nno picture was drawn: {obstacle}"
    return text + "\n"


def _document(
    records: Mapping[str, list[AnalysisRecord]],
    folders: Sequence[Path],
    out: str | None,
    obstacles: list[str],
) -> dict[str, Any]:
    """All numbers and the facts that they depend on as JSON types."""
    found = [
        {"model": name, "file": str(record.path(folder)), **record.to_dict()}
        for (name, of_model), folder in zip(records.items(), folders, strict=True)
        for record in of_model
    ]
    return {"analyses": found, "together": out, "no_picture": obstacles}


def _settings(chosen: Sequence[Analysis], options: dict[str, Any], seed: int) -> AnalysisSettings:
    """The given settings. The seed, which has a default, is among them if an analysis uses it."""
    names = AnalysisSettings.__dataclass_fields__
    given = {n: options[n] for n in names if n != "seed" and options[n] is not None}
    for name in _LISTS & given.keys():
        given[name] = given[name] if isinstance(given[name], list) else [given[name]]
    if any("seed" in analysis.uses for analysis in chosen):
        given["seed"] = seed
    return settings_of(chosen, given)


def _check_options(
    needed: set[Need],
    chosen: Sequence[Analysis],
    teacher: str | None,
    teacher_model: str | None,
    train_data: str | None,
    train_examples: int | None,
) -> None:
    """Refuse options that no chosen analysis takes, and missing options, before anything is loaded."""
    names = ", ".join(analysis.name for analysis in chosen)
    if "teacher" in needed and teacher is None:
        raise ValueError(
            "teacher must be given with cosine: --teacher STD, the standard model, with whose features the "
            "features of the model are compared"
        )
    if teacher is None and teacher_model is not None:
        raise ValueError(f"teacher_model must come with teacher, got {teacher_model!r}")
    unused: list[tuple[str, object, str]] = []
    if "teacher" not in needed:
        unused.append(("teacher", teacher, "cosine"))
    if "train" not in needed:
        unused += [
            (name, value, "entropy and random-labels")
            for name, value in (("train_data", train_data), ("train_examples", train_examples))
        ]
    for name, value, users in unused:
        if value is not None:
            raise ValueError(
                f"{name} must be left out with {names}, got {value!r}; it is for {users}"
            )


def _check_used(
    given: Mapping[str, object],
    chosen: Sequence[Analysis],
    needed: set[Need],
    paths: Sequence[str],
    reads_data: bool,
) -> None:
    """Refuse options that would have no effect on these models and analyses.

    Args:
        given: the options' values by name; None, or the default of the checkpoint, is not given.
        chosen: the analyses.
        needed: the needs of the analyses.
        paths: the models.
        reads_data: whether any data are read, for an analysis or to build a network.
    """
    used = dict.fromkeys(given, reads_data)
    used["max_examples"] = "images" in needed
    used["checkpoint"] = given["checkpoint"] == LATEST or any(Path(path).is_dir() for path in paths)
    names = ", ".join(analysis.name for analysis in chosen)
    for name, value in given.items():
        if value is not None and not used[name]:
            why = "no model is a run" if name == "checkpoint" else f"{names} would not look at it"
            raise ValueError(f"{name} must be left out, as {why}, got {value!r}")


def _load(
    path: str, checkpoint: str, of_runs: str | None, of_files: str | None, images: Images | None
) -> JudgedModel:
    if Path(path).is_dir():
        return model_of_run(path, checkpoint, of_runs)
    assert images is not None
    network = of_files if Path(path).is_file() else None
    return model_by_word(path, network, images, "models", "model")


def _training_set(
    paths: Sequence[str],
    data: str | None,
    root: str | None,
    train_data: str | None,
    reading: Reading,
) -> Any:
    """The training images: `train_data` if it is given, else the training images of the data set by name."""
    if train_data is not None and train_data not in dataset_names():
        return images_named(train_data, None, reading)
    runs = [RunDirectory(path) for path in paths if Path(path).is_dir()]
    recorded, folder = runs[0].source() if runs else (None, None)
    name = train_data or data or recorded
    if name not in dataset_names():
        raise ValueError(
            f"train_data must be given: {name or 'the data'} has no training images by name"
        )
    return load_dataset(name, root or (folder if name == recorded else None)).train


def _group_text(group: AnalysisGroup) -> str:
    """An analysis as text: its summary, all its numbers if they are few, and its notes."""
    lines = [line for line in (group.title, group.settings) if line]
    rows, notes = group.rows(), group.notes()
    parts = ["\n".join(lines), aligned(group.summary())]
    if len(rows) <= _SHORT:
        parts.append(aligned([[number_text(cell) for cell in row] for row in rows]))
    if notes:
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def _picture_title(found: Mapping[str, Measured]) -> str:
    """The model's name, if the picture shows one model; else empty, as the legend has the names."""
    return next(iter(found)) if len(found) == 1 else ""


def _write_together(group: AnalysisGroup, folder: Path) -> str:
    """Write the numbers and the pictures of all models of a group.

    Returns:
        Why no picture could be drawn; empty if nothing prevented it.
    """
    write_atomically(folder / f"{group.stem}.csv", group.to_csv())
    try:
        for number, found in enumerate(group.pictured, 1):
            last = f"_{number}" if len(group.pictured) > 1 else ""
            write_atomically(
                folder / f"{group.stem}{last}.png", picture_of(found, title=_picture_title(found))
            )
        for number, one in enumerate(group.found.values(), 1):
            if (picture := images_of(one)) is not None:
                write_atomically(folder / f"{group.stem}_images_{number}.png", picture)
    except ImportError as error:
        return str(error)
    return ""
