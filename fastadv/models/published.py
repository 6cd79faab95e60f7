"""Loading published state dicts, with their containers, name prefixes and normalisation buffers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastadv.models.forms import check_form_named
from fastadv.models.lost_normalization import warn_of_lost_normalization
from fastadv.models.normalization_constants import note_normalization, set_normalization
from fastadv.models.own_normalization import leave_to_network, without_own_constants
from fastadv.models.split import Normalized, without_normalization
from fastadv.models.state_files import StateFileError, read_state_file
from fastadv.models.weight_search import find_weights, require_dense
from fastadv.ops.checks import FLOAT_DTYPES
from fastadv.ops.values import check_bool, shown

_MISMATCH = "{}: {} in the file, {} in the model"
# TRADES' WideResNet holds a copy of its first stage that no forward pass reaches.
_UNUSED = ("sub_block1.",)
# Single numbers that AveragedModel, the package thop, MAIR's RobModel and ema_pytorch store beside the weights.
_COUNTERS = (
    *("n_averaged", "total_ops", "total_params"),
    *("n_classes", "num_labels", "initted", "step"),
)


@dataclass
class LoadReport:
    """Which entries of a published state dict were loaded, and why the others were not.

    Attributes:
        loaded: names of the model's entries that were filled.
        missing: names of the model's entries that the file does not have.
        unexpected: names in the file that the model does not have.
        mismatched: "name: shape in the file, shape in the model" for tensors of another shape; dtypes where whole
            numbers stand for weights.
        ignored: names in the file that are known to have no effect.
        prefix: the text before every name of the network in the file, e.g. "module.".
        mean: per-channel mean that the file normalises with, if it says so.
        std: per-channel standard deviation, likewise.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    prefix: str = ""
    mean: list[float] | None = None
    std: list[float] | None = None

    @property
    def complete(self) -> bool:
        """Whether the entries of the file and of the model are the same."""
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def normalizes(self) -> bool:
        """Whether the file holds a normalisation that changes its inputs."""
        mean, std = self.mean or [], self.std or []
        return any(value != 0 for value in mean) or any(value != 1 for value in std)

    @property
    def misfits(self) -> list[str]:
        """One line per kind of misfit, each with its first few names."""
        lines = []
        for kind in ("missing", "unexpected", "mismatched", "ignored"):
            names = getattr(self, kind)
            if names:
                more = ", ..." if len(names) > 5 else ""
                lines.append(f"{len(names)} {kind}: {', '.join(names[:5])}{more}")
        return lines

    def __str__(self) -> str:
        """The number of loaded entries, and one line per kind of misfit."""
        return "\n".join([f"{len(self.loaded)} entries loaded", *self.misfits])


def load_published_state_dict(
    model: nn.Module,
    state: Mapping[str, Any] | str | os.PathLike[str],
    strict: bool = True,
    *,
    form: str | None = None,
) -> LoadReport:
    """Load published weights into a model, in any of the usual forms.

    The state dict may be plain, or an entry of nested dicts under any key ("state_dict", "model",
    "ema_state_dict"). All its names may have a prefix ("module." of DataParallel and AveragedModel, "model." of
    RobustBench, "_orig_mod." of torch.compile, or several). The same weights may occur several times. Accepted are
    also files without `num_batches_tracked`, the unused `sub_block1` of TRADES' WideResNet, counters of
    AveragedModel, thop and ema_pytorch, and MAIR's number of classes. Normalisation buffers (mean/std or mu/sigma)
    are loaded into the buffers of a `Normalized` model, unless the network normalises by the same numbers itself.
    A network keeps the constants that its own code has set where the file has none. A warning tells of a
    normalisation at which the file only hints: constants among the options of its training, or a module before the
    network that has no weights.

    Args:
        model: the model to fill, e.g. `resnet18()` or `Normalized(resnet18())`.
        state: a file with any suffix, of which no code is run; or the object that
            `torch.load(path, map_location="cpu", weights_only=True)` returned.
        strict: raise, and change nothing, unless everything fits. If False, load the entries that fit.
        form: name of the network that the file belongs to, where several fit it: "preact_resnet18" or
            "preact_resnet18_raw_shortcut", "resnet18" or "resnet18_layer2_stride1"; see `forms_of`. The model must
            be of that form.

    Returns:
        The entries that were loaded, and the entries that did not fit.

    Raises:
        FileNotFoundError: if there is no such file.
        StateFileError: if the file is damaged or of another kind; a ValueError.
        TypeError: if `state` holds no tensors by name.
        ValueError: if no name fits; if there are several sets of weights that differ; with `strict`, if anything
            does not fit or is not finite, or if the file normalises and the model does not; if file and network
            normalise by different numbers; if several networks take the file and `form` does not name one (only a
            warning for a plain ResNet-18).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {shown(model)}")
    check_bool("strict", strict)
    with _naming(state):
        if isinstance(state, str | os.PathLike):
            state = read_state_file(state)
        network = without_normalization(model)
        targets = network.state_dict()
        tensors, prefix, copies = find_weights(state, network, targets)
        report = LoadReport(prefix=prefix)
        fitting = _sort_entries(tensors, targets, report, copies)
        if not fitting:
            raise ValueError(
                f"state has no entry that fits {type(network).__name__}; it has "
                f"{', '.join(list(tensors)[:5])}, the model has {', '.join(list(targets)[:5])}"
            )
        leave_to_network(network, fitting, report)
        report.missing = without_own_constants(network, report.missing)
        if strict:
            _require_fit(model, network, report)
            _require_finite(fitting)
        check_form_named(network, form, built_by_caller=True)
        if isinstance(model, Normalized):
            set_normalization(model, report)
        network.load_state_dict(fitting, strict=False)
        report.loaded = list(fitting)
        warn_of_lost_normalization(model, state, report)
        return report


@contextmanager
def _naming(source: object) -> Iterator[None]:
    """Let errors about the content of a file name the file."""
    try:
        yield
    except StateFileError:  # its message names the file already
        raise
    except (TypeError, ValueError) as error:
        if not isinstance(source, str | os.PathLike):
            raise
        raise type(error)(f"{os.fspath(source)}: {error}") from error


def _sort_entries(
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    report: LoadReport,
    copies: set[str],
) -> dict[str, Tensor]:
    """Fill the report, apart from `loaded`, and return the entries that fit by their own names."""
    fitting: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(report.prefix)
        if full_name.startswith(report.prefix) and name in targets:
            ours = targets[name]
            require_dense(full_name, tensor)
            if tensor.shape != ours.shape:
                shapes = tuple(tensor.shape), tuple(ours.shape)
                report.mismatched.append(_MISMATCH.format(name, *shapes))
            elif ours.is_floating_point() and tensor.dtype not in FLOAT_DTYPES:
                # Numbers of a quantised model, without their scale.
                report.mismatched.append(_MISMATCH.format(name, tensor.dtype, ours.dtype))
            else:
                fitting[name] = tensor
        elif not note_normalization(full_name, tensor, report):
            unused = name.startswith(_UNUSED) or full_name in copies or _is_counter(name, tensor)
            (report.ignored if unused else report.unexpected).append(full_name)
    seen = {entry.partition(":")[0] for entry in report.mismatched} | set(fitting)
    report.missing = [
        name for name in targets if name not in seen and not name.endswith("num_batches_tracked")
    ]
    return fitting


def _is_counter(name: str, tensor: Tensor) -> bool:
    return name.rpartition(".")[2] in _COUNTERS and tensor.numel() == 1


def _require_fit(model: nn.Module, network: nn.Module, report: LoadReport) -> None:
    if not report.complete:
        misfits = ";\n".join(report.misfits)  # the command line joins the lines
        raise ValueError(f"state does not fit {type(network).__name__}, nothing loaded:\n{misfits}")
    if report.normalizes and not isinstance(model, Normalized):
        raise ValueError(
            f"state normalises its inputs with mean={report.mean}, std={report.std}, but the "
            "model does not; load it into Normalized(model), which takes these numbers over"
        )


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"state must hold finite numbers, got NaN or infinity in {name!r}; its training has failed"
            )
        if name.endswith("running_var") and tensor.numel() and float(tensor.detach().min()) < 0:
            raise ValueError(
                f"state must hold variances >= 0, got {tensor.detach().min():g} in {name!r}; the file is damaged"
            )
