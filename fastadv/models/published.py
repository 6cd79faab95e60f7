"""Loading state dicts as others publish them: containers, name prefixes, normalisation buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.models.forms import check_form_named
from fastadv.models.split import Normalized

# Where training scripts put the weights in what they save, most specific first.
_CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "weights")
_MEAN_NAMES = ("mean", "mu", "new_mean")
_STD_NAMES = ("std", "sigma", "new_std")
# TRADES' WideResNet holds a copy of its first stage that no forward pass reaches.
_UNUSED = ("sub_block1.",)


@dataclass
class LoadReport:
    """What became of each entry of a published state dict.

    Attributes:
        loaded: names of the model's entries that were filled.
        missing: names of the model's entries that the file does not have.
        unexpected: names in the file that the model does not have.
        mismatched: "name: shape in the file, shape in the model" for what has another shape.
        ignored: names in the file that are known to have no effect.
        prefix: what stood before every name of the network in the file, e.g. "module.".
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
        """Whether every entry found its place."""
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def normalizes(self) -> bool:
        """Whether the file holds a normalisation that changes its inputs."""
        mean, std = self.mean or [], self.std or []
        return any(value != 0 for value in mean) or any(value != 1 for value in std)

    def __str__(self) -> str:
        """One line per kind of misfit, each with its first few names."""
        lines = [f"{len(self.loaded)} entries loaded"]
        for kind in ("missing", "unexpected", "mismatched", "ignored"):
            names = getattr(self, kind)
            if names:
                more = ", ..." if len(names) > 5 else ""
                lines.append(f"{len(names)} {kind}: {', '.join(names[:5])}{more}")
        return "\n".join(lines)


def load_published_state_dict(
    model: nn.Module, state: Mapping[str, Any], strict: bool = True, *, form: str | None = None
) -> LoadReport:
    """Load weights in any of the usual published wrappings into a model.

    Accepted are: a plain state dict; a container that holds one under "state_dict", "model" or
    the like; any prefix before all names ("module." of DataParallel, "model." of RobustBench,
    "_orig_mod." of torch.compile, or several); files from before `num_batches_tracked`; the
    unused `sub_block1` of TRADES' WideResNet. Normalisation buffers (mean/std or mu/sigma) are
    loaded into the buffers of a `Normalized` model.

    Args:
        model: the model to fill, e.g. `resnet18()` or `Normalized(resnet18())`.
        state: what `torch.load(path, map_location="cpu", weights_only=True)` returned.
        strict: refuse, and change nothing, unless everything fits. Otherwise load what fits.
        form: name of the network that the file is of, where several take it: "preact_resnet18" or
            "preact_resnet18_raw_shortcut", "resnet18" or "resnet18_layer2_stride1"; see `forms_of`. The model must
            be of that form.

    Returns:
        What was loaded and what did not fit.

    Raises:
        TypeError: if `state` holds no tensors by name.
        ValueError: if no name fits; with `strict`, if anything does not fit, or if the file
            normalises its inputs while the model is not `Normalized`; if several networks take the file and
            `form` does not name one.
    """
    tensors = _find_tensors(state)
    network = model.model if isinstance(model, Normalized) else model
    targets = network.state_dict()
    report = LoadReport(prefix=_find_prefix(tensors, targets))
    fitting = _sort_entries(tensors, targets, report)
    if not fitting:
        raise ValueError(
            f"state has no entry that fits {type(network).__name__}; it has "
            f"{', '.join(list(tensors)[:5])}, the model has {', '.join(list(targets)[:5])}"
        )
    if strict:
        _require_fit(model, network, report)
    check_form_named(network, form)
    if isinstance(model, Normalized):
        _set_normalization(model, report)
    network.load_state_dict(fitting, strict=False)
    report.loaded = list(fitting)
    return report


def _find_tensors(state: object) -> dict[str, Tensor]:
    """The mapping from names to tensors inside a saved object."""
    while isinstance(state, Mapping):
        inner = next((state[k] for k in _CONTAINERS if isinstance(state.get(k), Mapping)), None)
        if inner is None:
            tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
            if tensors:
                return tensors
            raise TypeError(
                f"state must map names to tensors, got a mapping with {list(state)[:5]}"
            )
        state = inner
    raise TypeError(
        "state must be the mapping that torch.load(path, weights_only=True) returns, "
        f"got {type(state).__name__}"
    )


def _find_prefix(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> str:
    """The prefix under which most of the model's names occur; the shortest among equals."""
    anchor = next(iter(targets))
    candidates = {name[: -len(anchor)] for name in tensors if name.endswith(anchor)}
    # Names that merely end in the anchor, such as layer1.0.conv1.weight, match little else.
    candidates = {prefix for prefix in candidates if prefix == "" or prefix.endswith(".")} | {""}
    return max(
        sorted(candidates, key=len),
        key=lambda prefix: sum(prefix + name in tensors for name in targets),
    )


def _sort_entries(
    tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor], report: LoadReport
) -> dict[str, Tensor]:
    """Fill the report, apart from `loaded`, and return the entries that fit by their own names."""
    fitting: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(report.prefix)
        if full_name.startswith(report.prefix) and name in targets:
            if tensor.shape == targets[name].shape:
                fitting[name] = tensor
            else:
                ours = tuple(targets[name].shape)
                report.mismatched.append(f"{name}: {tuple(tensor.shape)}, {ours}")
        elif not _note_normalization(full_name, tensor, report):
            unused = name.startswith(_UNUSED)
            (report.ignored if unused else report.unexpected).append(full_name)
    seen = {entry.partition(":")[0] for entry in report.mismatched} | set(fitting)
    report.missing = [
        name for name in targets if name not in seen and not name.endswith("num_batches_tracked")
    ]
    return fitting


def _note_normalization(name: str, tensor: Tensor, report: LoadReport) -> bool:
    """Whether the entry is a normalisation constant, which is then put in the report."""
    last = name.rpartition(".")[2]
    if last in _MEAN_NAMES:
        report.mean = tensor.flatten().tolist()
    elif last in _STD_NAMES:
        report.std = tensor.flatten().tolist()
    else:
        return False
    return True


def _require_fit(model: nn.Module, network: nn.Module, report: LoadReport) -> None:
    if not report.complete:
        raise ValueError(f"state does not fit {type(network).__name__}, nothing loaded:\n{report}")
    if report.normalizes and not isinstance(model, Normalized):
        raise ValueError(
            f"state normalises its inputs with mean={report.mean}, std={report.std}, but the "
            "model does not; load it into Normalized(model), which takes these numbers over"
        )


def _set_normalization(model: Normalized, report: LoadReport) -> None:
    """Take over mean and std from the file, where it has them."""
    for name in ("mean", "std"):
        values = getattr(report, name)
        if values is not None:
            old: Tensor = getattr(model, name)
            new = torch.tensor(values, dtype=old.dtype, device=old.device)
            setattr(model, name, new.reshape(1, -1, 1, 1))
