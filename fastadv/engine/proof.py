"""The proof that an engine agrees with the live model: it compares logits and gradients of a few images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastadv.engine.engines import Engine, InputGradient, ValueOfLogits
from fastadv.engine.errors import Unrecordable
from fastadv.engine.hidden_draws import hides_draws, watched_for_draws
from fastadv.engine.recording import Recording
from fastadv.engine.recording_mode import recording_mode

# The largest distance of an image's centred logits from the live ones, in parts of their size, and the smallest
# cosine of its gradient.
LOGITS = {"fp32": 0.01, "bf16": 0.2, "fp16": 0.1}
COSINES = {"fp32": 0.99, "bf16": 0.8, "fp16": 0.9}

seconds: Callable[[], float] = time.perf_counter


def objectives(logits: Tensor, in_turn: bool = False) -> tuple[ValueOfLogits, ...]:
    """Values of logits, one per image, whose gradients are compared: of all classes, and of the likeliest two.

    Attacks follow the second. It tells more of networks in which each class has a maximum of its own, since
    over many classes wrong maxima average out.

    Args:
        logits: of the live model [B, C]; they say which two classes.
        in_turn: the images take turns, so that one pass serves both values.
    """
    if logits.shape[1] < 2:
        return (weighted_sum,)
    first, second = logits.detach().topk(2, dim=1).indices.split(1, dim=1)

    def margin(z: Tensor) -> Tensor:
        return (z.gather(1, first) - z.gather(1, second)).squeeze(1)

    if not in_turn:
        return weighted_sum, margin
    is_odd = torch.arange(len(logits), device=logits.device) % 2 == 1
    return (lambda z: torch.where(is_odd, margin(z), weighted_sum(z)),)


def weighted_sum(logits: Tensor) -> Tensor:
    """A value of logits [B, C] with a gradient in each of them, [B]."""
    weights = torch.linspace(-1, 1, logits.shape[1], device=logits.device, dtype=logits.dtype)
    return logits @ weights


@dataclass(frozen=True)
class Evidence:
    """The live model's results for a few images.

    Attributes:
        images: [B, ...].
        values: the differentiated values.
        gradients: of each value, with the logits.
        in_turn: as in `objectives`.
        seconds: of the backward pass of one value; None if it is not known.
    """

    images: Tensor
    values: tuple[ValueOfLogits, ...]
    gradients: tuple[InputGradient, ...]
    in_turn: bool
    seconds: float | None = None

    def is_conclusive(self) -> bool:
        """Whether these gradients can tell a right copy from a wrong one."""
        sizes = self.gradients[0].grad.flatten(1).abs().sum(1)
        return bool((sizes.isfinite() & (sizes > 0)).any())

    def first(self, count: int) -> Evidence:
        """The evidence of the first images alone."""
        gradients = tuple(
            InputGradient(g.value[:count], g.logits[:count], g.grad[:count]) for g in self.gradients
        )
        values = objectives(gradients[0].logits, self.in_turn)
        return Evidence(self.images[:count], values, gradients, self.in_turn)

    def against(self, engine: Engine, spent: dict[int, float] | None = None) -> str | None:
        """In words, how an engine differs from this; None where it does not.

        Args:
            engine: the engine.
            spent: gets the seconds of its last gradient pass, by the number of images.
        """
        images = engine.images(self.images)
        for value, wanted in zip(self.values, self.gradients, strict=True):
            began = seconds()
            found = probe(engine, images, value)
            if spent is not None:
                spent[len(images)] = seconds() - began
            fault = difference(found, wanted, engine.precision)
            if fault is not None:
                return fault
        return None


def evidence_of(recording: Recording, model: nn.Module, precision: str) -> Evidence:
    """The live model's logits and gradients, from a recording's own graph.

    Args:
        recording: of a few images.
        model: the recorded model. Gradient checkpointing runs parts of it again, in the mode that it then has.
        precision: the narrowest precision of the engines to be proven. In a narrow one the gradient of every image
            is a matter of degree, so that each image shows both values. In float32 a copy computes another
            function or the same, and several images that take turns show that at half the cost.

    Raises:
        Unrecordable: there are no gradients, or random numbers are drawn for them.
    """
    if not hides_draws(recording):
        return _evidence_of(recording, model, precision)
    found, drawn = watched_for_draws(
        lambda: _evidence_of(recording, model, precision), recording.images.device
    )
    if drawn:
        raise Unrecordable("its backward draws random numbers")
    return found


def _evidence_of(recording: Recording, model: nn.Module, precision: str) -> Evidence:
    logits = recording.logits
    if logits.dim() != 2 or logits.is_complex() or not logits.requires_grad:
        raise Unrecordable(
            "its logits have another shape than [B, C], or no gradient, or are complex"
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    in_turn = precision == "fp32" and len(wide) > 1
    values, gradients = objectives(wide, in_turn), []
    with recording_mode(model):
        for value_of in values:
            value, began = value_of(wide), seconds()
            (grad,) = torch.autograd.grad(
                value.sum(), recording.images, retain_graph=True, allow_unused=True
            )
            if grad is None:
                raise Unrecordable("its logits have no gradient in the images")
            spent = seconds() - began
            gradients.append(InputGradient(value.detach(), wide.detach(), grad))
    return Evidence(recording.images.detach(), values, tuple(gradients), in_turn, spent)


def probe(engine: Engine, images: Tensor, value_of: ValueOfLogits) -> InputGradient:
    """An engine's logits and gradient."""
    return engine.gradient(images, value_of)


def difference(found: InputGradient, wanted: InputGradient, precision: str) -> str | None:
    """In words, how logits or gradients of a few images differ from the live ones; None where they do not."""
    fault = _other_shape(found.logits, wanted.logits, "logits")
    if fault is not None:
        return fault
    a, b = (g.grad.double().flatten(1) for g in (found, wanted))
    length = b.norm(dim=1)
    cosines = (a * b).sum(1) / (a.norm(dim=1) * length).clamp(min=1e-300)
    # Images whose own gradient tells nothing count as alike.
    alike = torch.where((length > 0) & length.isfinite(), cosines.nan_to_num(-1.0), 1.0)
    differences = _differences(found.logits, wanted.logits)
    # One read for all numbers: on a GPU the host waits for each.
    parted, distance, cosine = torch.stack((*differences, alike.min())).tolist()
    fault = _in_words(parted, distance, precision, "logits")
    if fault is None and cosine < COSINES[precision]:
        return f"the gradient's cosine with the live model's is {cosine:.2f}"
    return fault


def difference_of_logits(found: Tensor, wanted: Tensor, precision: str) -> str | None:
    """As `difference`, of logits [B, C] alone."""
    return difference_of_results(found, wanted, precision, "logits")


def difference_of_results(
    found: Tensor, wanted: Tensor, precision: str, name: str = "features"
) -> str | None:
    """As `difference`, of any results [B, ...] alone, which the words call ``name``."""
    fault = _other_shape(found, wanted, name)
    if fault is not None:
        return fault
    parted, distance = torch.stack(_differences(found, wanted)).tolist()
    return _in_words(parted, distance, precision, name)


def _other_shape(found: Tensor, wanted: Tensor, name: str) -> str | None:
    if found.shape == wanted.shape:
        return None
    return f"its copy's {name} have shape {tuple(found.shape)}, not {tuple(wanted.shape)}"


def _differences(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers: whether other images have finite results, and the largest distance."""
    a, b = found.double().flatten(1), wanted.double().flatten(1)
    parted = (a.isfinite().all(1) != b.isfinite().all(1)).any()
    a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    # Logits of an image next to a decision boundary have hardly any differences.
    level = 0.1 * b.norm(dim=1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    spread = b.norm(dim=1)
    size = torch.maximum(torch.maximum(spread, level.clamp(min=1e-12)), spread.mean())
    return parted.double(), ((a - b).norm(dim=1) / size).max()


def _in_words(parted: float, distance: float, precision: str, name: str) -> str | None:
    if parted:
        return f"its copy's {name} are not finite where the live model's are, or the reverse"
    if not distance <= LOGITS[precision]:
        return f"its copy computes other {name}, {100 * distance:.3g} % off"
    return None


def agrees(
    engine: Engine, recording: Recording, model: nn.Module, with_gradient: bool, plain_pass: bool
) -> bool:
    """Whether an engine's logits are the live model's; where the recording has a graph, also the gradients.

    Args:
        engine: the engine, in a session.
        recording: of now.
        model: the recorded model.
        with_gradient: whether to compare gradients.
        plain_pass: whether to compare the logits of a pass without gradients as well.
    """
    images = recording.images.detach()
    try:
        logits = engine.logits(engine.images(images))
        if with_gradient and recording.gradients:
            fault = evidence_of(recording, model, engine.precision).against(engine)
            if fault is not None:
                return False
        if plain_pass and not agrees_without_gradients(engine, model, images, logits):
            return False
    except Exception:  # as when building
        return False
    return difference_of_logits(logits, recording.logits.detach(), engine.precision) is None


def agrees_without_gradients(
    engine: Engine, model: nn.Module, images: Tensor, logits: Tensor | None = None
) -> bool:
    """Whether an engine's logits of a few images are those of the live model where no gradients are computed.

    Args:
        engine: the engine.
        model: the live model, whose weights the engine has.
        images: the images [B, ...].
        logits: the engine's logits, if they are known.
    """
    with recording_mode(model), torch.no_grad():
        wanted = model(images.clone())
    if logits is None:
        with engine.session(model, 0, current=True):
            logits = engine.logits(engine.images(images))
    return difference_of_logits(logits, wanted, engine.precision) is None
