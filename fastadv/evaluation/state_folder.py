"""The folder in which a run of an evaluation keeps its state, and the identity of the run to which it belongs."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.evaluation.context import Model
from fastadv.evaluation.logit_probe import are_alike, probe_logits
from fastadv.evaluation.samples import Samples
from fastadv.files import write_atomically

_FORMAT = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a run: everything that its results depend on.

    Attributes:
        model: SHA-256 of the structure, parameters and buffers.
        data: SHA-256 of images and labels.
        settings: everything else that the result depends on.
        answers: the result of `probe_logits` for the model, [B][classes]; None where it is unknown.
    """

    model: str
    data: str
    settings: dict[str, Any]
    answers: list[list[float]] | None = None


def fingerprint(model: Model, samples: Samples, settings: dict[str, Any]) -> Fingerprint:
    """Identify a run.

    Raises:
        TypeError: when the model is not a module: another callable cannot be identified.
    """
    answers = probe_logits(model, samples)
    listed = None if answers is None else answers.tolist()
    return Fingerprint(hash_model(model), samples.fingerprint(), settings, listed)


class StateFolder:
    """A folder for the state of one run.

    Args:
        directory: the folder, made if missing.
        identity: the identity of the run.

    Raises:
        ValueError: when the folder belongs to another run, or holds .pt files without a manifest.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: Fingerprint) -> None:
        self.directory = Path(directory)
        self._is_lost = False
        manifest = self.directory / _MANIFEST
        if manifest.exists():
            _check_same_run(manifest, identity)
        elif self.directory.is_dir() and any(self.directory.glob("*.pt")):
            raise ValueError(
                f"{self.directory} holds .pt files but no {_MANIFEST}; choose another state_dir"
            )
        else:
            write_atomically(
                manifest, json.dumps({"format": _FORMAT, **asdict(identity)}, indent=2) + "\n"
            )

    def keep(self, write: Callable[[], object]) -> None:
        """Write a file of the state. If that fails, a warning says so, and nothing more is written.

        The figures do not need the state, and hours of work would be lost with an error. Later files would be of
        no use: those of an attack are read in their order, and a batch needs the file of its worst images.

        Args:
            write: writes the file; an OSError that it raises has the file's name.
        """
        if self._is_lost:
            return
        try:
            write()
        except OSError as error:
            self._is_lost = True
            warnings.warn(
                "the evaluation goes on, but keeps no more of its finished work, which is done again after an "
                f"interruption: {error}",
                stacklevel=2,
            )


def _check_same_run(manifest: Path, identity: Fingerprint) -> None:
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        # Earlier versions recorded no answers.
        kept = Fingerprint(found["model"], found["data"], found["settings"], found.get("answers"))
        there = (
            None
            if kept.answers is None
            else torch.tensor(kept.answers, dtype=torch.float32, device="cpu")
        )
        version = found["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest} cannot be read ({error!r}); use a new state_dir") from error
    if version != _FORMAT:
        raise ValueError(
            f"{manifest} has format {version}, this version reads {_FORMAT}; use a new state_dir"
        )
    wanted = json.loads(json.dumps(identity.settings))  # tuples are lists in JSON
    differences = [
        f"other {part}"
        for part in ("model", "data")
        if getattr(kept, part) != getattr(identity, part)
    ]
    known = there is not None and identity.answers is not None
    if (
        not differences
        and known
        and not are_alike(there, torch.tensor(identity.answers, device="cpu"))
    ):
        differences.append("the model has the same weights and computes something else")
    differences += [
        f"{name} was {kept.settings.get(name)!r} and is {wanted.get(name)!r}"
        for name in sorted(kept.settings.keys() | wanted.keys())
        if kept.settings.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError(
            f"state_dir {manifest.parent} belongs to another run: {'; '.join(differences)}. "
            "Use one folder per run."
        )


def hash_model(model: Model) -> str:
    """SHA-256 of a model's structure, settings, parameters and buffers.

    Raises:
        TypeError: when the model is not a module: another callable cannot be identified.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"state_dir needs a torch module as model, got {type(model).__name__}")
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        kind = type(module)
        digest.update(
            f"{name}:{kind.__module__}.{kind.__qualname__}({module.extra_repr()})\n".encode()
        )
        digest.update(f"{_settings_of(module)}\n".encode())
    # Buffers that are not in the state dict count as well, because they change the outputs.
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name}\n".encode())
        _update(digest, tensor)
    return digest.hexdigest()


def _settings_of(module: nn.Module) -> list[tuple[str, str]]:
    """Attributes of a module that its code may use: numbers, text and flags, such as a temperature."""
    return sorted(
        (name, repr(value))
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in ("training", "call_super_init", "dump_patches")
        and _is_plain(value)
    )


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))


def hash_tensors(*tensors: Tensor) -> str:
    """SHA-256 of some tensors' dtypes, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        _update(digest, tensor)
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    # As bytes, because numpy has no bfloat16.
    flat = tensor.detach().cpu().contiguous().flatten()
    digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
