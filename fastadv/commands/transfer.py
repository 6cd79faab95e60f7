"""The command `fastadv transfer`. The parameters are the options; the docstring is their help."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastadv.commands.images import Reading, images_of_models
from fastadv.commands.result_keeper import UnsavedResultsError
from fastadv.commands.surrogates import model_by_word
from fastadv.evaluation import transfer_matrix
from fastadv.evaluation.comparison import distinct_names, distinct_paths
from fastadv.evaluation.samples import radius_or_default
from fastadv.evaluation.transfer import check_transferable
from fastadv.evaluation.transfer_table import check_matrix_file
from fastadv.trainers.hardware import choose_device
from fastadv.trainers.number import Number


def run_transfer(
    models: Sequence[str],
    attack: str = "pgd-20",
    *,
    model: str | None = None,
    data: str | None = None,
    root: str | None = None,
    resize: int | None = None,
    crop: int | None = None,
    interpolation: Literal["bilinear", "bicubic"] | None = None,
    workers: int | None = None,
    eps: Number | None = None,
    norm: Literal["linf", "l2", "l1"] = "linf",
    alpha: Number | None = None,
    batch_size: int = 256,
    max_examples: int | None = None,
    device: str | None = None,
    seed: int = 0,
    out: str | None = None,
    json: bool = False,
    quiet: bool = False,
) -> str:
    """The matrix.

    Args:
        models: two or more models: run directories, files of weights, or module:function.
        attack: one attack in a ball, such as pgd-20 or apgd-ce. It makes the adversarial images on each model.
        model: the network of all models that are files of weights: a name such as resnet18, timm:NAME, or
            module:function, whose code then runs.
        data: the images; `fastadv eval` takes the same names. By default the data set of the runs.
        root: folder that holds the files of cifar10 or cifar100; by default the folder of the first run.
        resize: with folder: or hf: data, the number of pixels that the shorter side of each picture is resized to;
            by default pictures are not resized.
        crop: with folder: or hf: data, the number of pixels of each side of the square that is cut out of the
            middle; by default nothing is cut off.
        interpolation: with resize, how pixels are interpolated: bilinear (the default) or bicubic.
        workers: with folder: or hf: data, the number of processes that decode pictures; by default one per core,
            at most 8.
        eps: radius of the ball, such as 8/255, in the units of the images. By default 8/255 in linf. With norm l2
            or l1 it must be given.
        norm: norm of the ball.
        alpha: step size of PGD, C&W and MIM; by default eps / 4.
        batch_size: images per pass.
        max_examples: use only this many test images: the first ones, or evenly spread ones where the images lie
            class by class. By default all are used.
        device: device to run on, e.g. cpu or cuda:0; by default a GPU if there is one.
        seed: seed of all random numbers.
        out: file that the table is also written to; its name ends in .json, .csv or .md.
        json: print the table as one JSON document.
        quiet: show no progress.

    Returns:
        The matrix as text, or JSON.

    Raises:
        UnsavedResultsError: if ``out`` could not be written; the error holds the text.
    """
    paths = distinct_paths(models)
    if len(paths) < 2:
        raise ValueError(f"models must be two or more that differ, got {' '.join(models)!r}")
    radius = radius_or_default(eps, norm, (0.0, 1.0))
    check_transferable(attack, radius, alpha)
    if out is not None:
        check_matrix_file(out)
    where = choose_device(device)
    images = images_of_models(paths, data, root, Reading(resize, crop, interpolation, workers))
    if model is not None and not any(Path(path).is_file() for path in paths):
        raise ValueError(f"model must come with a file of weights, got {model!r}")
    judged = [
        model_by_word(path, model if Path(path).is_file() else None, images, "models", "model")
        for path in paths
    ]
    names = distinct_names(paths)
    matrix = transfer_matrix(
        {name: one.model.to(where) for name, one in zip(names, judged, strict=True)},
        images,
        attack,
        eps=radius,
        norm=norm,
        alpha=alpha,
        batch_size=batch_size,
        device=where,
        seed=seed,
        max_examples=max_examples,
        progress=not quiet,
    )
    text = matrix.to_json() if json else matrix.table()
    if out is not None:
        try:
            matrix.save(out)
        except OSError as error:
            raise UnsavedResultsError(str(error), text) from error
    return text
