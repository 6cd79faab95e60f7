"""The model that a command judges: the model of a run, or anybody's weights in a network by name."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fastadv.commands.images import Images
from fastadv.evaluation import Subject
from fastadv.evaluation.results import EVAL_FILE
from fastadv.models import (
    Normalized,
    Stack,
    create_model,
    form_of,
    forms_of,
    load_published_state_dict,
    names_code,
)
from fastadv.models.lost_normalization import trust_normalization
from fastadv.models.own_normalization import refuse_second_normalization
from fastadv.models.state_files import Foreign
from fastadv.trainers import load_model
from fastadv.trainers.checkpoint import find_checkpoint
from fastadv.trainers.run_directory import RunDirectory
from fastadv.trainers.weights import ROBUST, published_state

# Names under which published checkpoints record the accuracy on clean images, as a fraction or in percent.
_ACCURACIES = (
    "clean_acc", "clean_accuracy", "test_clean_acc", "natural_acc", "nat_acc", "test_standard_acc",
    "best_acc", "test_acc", "val_acc", "acc1", "prec1", "acc", "accuracy",
)  # fmt: skip


@dataclass(frozen=True)
class JudgedModel:
    """A model, and the facts about it.

    Attributes:
        model: in evaluation mode, on the CPU, from images in 0..1 to logits.
        name: name of the run or the file.
        method: the training method; empty if it is unknown.
        network: the model's name.
        checkpoint: name of the checkpoint or the file.
        results: the file to which results are added by default.
        clean: the accuracy on clean images that the file records, 0..1; None if it records no accuracy.
        others: names of further networks that these weights fit, but that compute something else.
    """

    model: nn.Module
    name: str
    method: str
    network: str
    checkpoint: str
    results: Path
    clean: float | None = None
    others: tuple[str, ...] = ()

    def subject(
        self, weights: str, data: str = "", images: str = "", multiply_adds: int = 0
    ) -> Subject:
        """The model and its images, as results and analyses record them.

        Args:
            weights: SHA-256 of the weights.
            data: name of the images; empty without images.
            images: SHA-256 of the images and labels.
            multiply_adds: the multiply-adds of one image; 0 if they are not counted.
        """
        return Subject(
            run=self.name,
            method=self.method,
            network=self.network,
            checkpoint=self.checkpoint,
            weights=weights,
            data=data,
            images=images,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            multiply_adds=multiply_adds,
        )

    def warn(self) -> None:
        """Say on standard error that the weights fit further networks that compute something else, if any."""
        if self.others:
            print(
                f"note: these weights also fit {', '.join(self.others)}, which computes something else; judged "
                f"is {self.network}",
                file=sys.stderr,
            )


def model_of_run(
    run: str,
    checkpoint: str,
    model: str | None,
    network: str = ROBUST,
    extractors: str | None = None,
) -> JudgedModel:
    """Return the model of a run of `fastadv train`.

    Args:
        run: the run directory.
        checkpoint: the checkpoint's name; "latest" or "best" are allowed.
        model: the network, if it is a function of the user's own.
        network: which of the networks that were trained together, as for `load_model`. A network other than the
            robust one has its own file of results, and its name stands beside the run's and the method's names.
        extractors: the numbers of some extractors of a stack, counted from 1, with commas between them. They are
            judged with their part of the merger in place of the stack, and have their own file of results, too.

    Raises:
        ValueError: if extractors are given, and the model is no stack or has no extractors with these numbers.
    """
    directory = RunDirectory(run)
    path = find_checkpoint(directory.path, checkpoint)
    recorded = directory.read()
    name = directory.path.resolve().name
    kind = str(recorded.model.get("name") or recorded.model.get("class", ""))
    if network == ROBUST:
        found = load_model(path, model)
        results = directory.path / EVAL_FILE
        judged = JudgedModel(found, name, recorded.method, kind, path.name, results)
    else:
        judged = JudgedModel(
            load_model(path, model, network=network),
            f"{name} {network}",
            f"{recorded.method} {network}",
            str(recorded.recipe.get(network) or kind),
            path.name,
            directory.path / f"{network}.{EVAL_FILE}",
        )
    return judged if extractors is None else _with_extractors(judged, extractors)


def model_of_file(
    model: str, weights: str | None, normalise: Sequence[str] | None, images: Images
) -> JudgedModel:
    """Return a network by name, with the weights of a file.

    Args:
        model: the network's name, as for `fastadv.models.create_model`.
        weights: a file with a state dict in any of the published wrappings; None for a function of the user's own
            that returns a trained model.
        normalise: mean and standard deviation of the inputs, each one number or one per channel with commas
            between them; None for a model that takes images in 0..1, or whose file says how it normalises.
        images: the images, which have the number of classes and of channels.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the network is unknown, if the weights do not fit it, or if the normalisation is wrong or
            differs from the file's normalisation.
    """
    try:
        network = create_model(model, images.num_classes, images.in_channels)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    given = None if normalise is None else _normalisation(normalise, images.in_channels)
    if given is not None:
        refuse_second_normalization(network, *given)
    if weights is None:
        if not names_code(model):
            raise ValueError(
                f"weights must be given with model {model!r}, whose own are random: --weights FILE"
            )
        judged = network if given is None else Normalized(network, *given)
        return JudgedModel(judged.eval(), model, "", model, "", Path(EVAL_FILE))
    file = Path(weights)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; weights must be a file with a state dict")
    state = published_state(file)
    wrapped = network if isinstance(network, Normalized) else Normalized(network, *(given or ()))
    try:
        report = load_published_state_dict(wrapped, state, form=form_of(network))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    judged = wrapped if report.normalizes or network is wrapped else network
    if given is not None:
        trust_normalization(network)
        mean, std = given
        agrees = _is_close(mean, report.mean or []) and _is_close(std, report.std or [])
        if report.normalizes and not agrees:
            raise ValueError(
                f"normalise must be left out or be what {file} says, mean {report.mean} and std {report.std}, "
                f"got {' '.join(normalise or ())}"
            )
        judged = judged if report.normalizes else Normalized(network, *given)
    return JudgedModel(
        judged.eval(),
        file.stem,
        "",
        model,
        file.name,
        file.with_name(f"{file.name}.{EVAL_FILE}"),
        recorded_accuracy(state),
        tuple(name for name in forms_of(network) if name != form_of(network)),
    )


def _with_extractors(judged: JudgedModel, numbers: str) -> JudgedModel:
    """Some of a stack's extractors with their part of its merger, as `model_of_run` has them."""
    stack = judged.model
    if not isinstance(stack, Stack):
        raise ValueError(
            f"extractors must be left out with {judged.network}, which is no stack, got {numbers!r}"
        )
    try:
        chosen = [int(number) for number in numbers.split(",")]
        some = stack.subset(chosen)
    except ValueError as error:
        raise ValueError(
            f"extractors must be numbers from 1 to {len(stack.extractors)} in ascending order with commas between "
            f"them, got {numbers!r}"
        ) from error
    name = f"extractors {'+'.join(map(str, chosen))}"
    file = judged.results.with_name(f"{name.replace(' ', '_')}.{judged.results.name}")
    return replace(
        judged,
        model=some,
        name=f"{judged.name} {name}",
        method=f"{judged.method} {name}",
        network=f"{judged.network}, {name}",
        results=file,
    )


def _normalisation(words: Sequence[str], channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel."""
    if len(words) != 2:
        raise ValueError(
            "normalise must be a mean and a standard deviation, such as 0.4914,0.4822,0.4465 "
            f"0.2470,0.2435,0.2616, got {' '.join(words)!r}"
        )
    found = []
    for word in words:
        try:
            values = [float(part) for part in word.split(",")]
        except ValueError:
            raise ValueError(f"normalise must be numbers with commas, got {word!r}") from None
        if len(values) not in (1, channels) or not all(map(math.isfinite, values)):
            raise ValueError(
                f"normalise must have one number or {channels}, one per channel, got {word!r}"
            )
        found.append(values * (channels // len(values)))
    mean, std = found
    if min(std) <= 0:
        raise ValueError(f"normalise must have a standard deviation > 0, got {words[1]!r}")
    return mean, std


def _is_close(given: Sequence[float], of_file: Sequence[float]) -> bool:
    return len(given) == len(of_file) and all(
        math.isclose(x, y, abs_tol=1e-3) for x, y in zip(given, of_file, strict=True)
    )


def recorded_accuracy(state: Any) -> float | None:
    """Return the accuracy on clean images, 0..1, that a saved object records beside its weights, or None."""
    if not isinstance(state, Mapping):
        return None
    numbers = {str(key).lower(): _number(value) for key, value in state.items()}
    for name in _ACCURACIES:
        value = numbers.get(name)
        if value is not None and 0 < value <= 100:
            return value if value <= 1 else value / 100
    return None


def _number(value: object) -> float | None:
    """A number of Python's or numpy's; None for anything else."""
    if isinstance(value, Foreign) and not value.is_array:
        return next(iter(value.numbers), None)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None  # type: ignore[arg-type]
