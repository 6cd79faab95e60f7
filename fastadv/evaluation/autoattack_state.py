"""State of an AutoAttack run on disk: one file per batch, so that an interrupted run can continue.

A folder holds ``manifest.json``, which identifies the run, and files such as ``apgd-ce-00003.pt``, one per attack
and batch. Each is written atomically when its batch is finished. The files alone determine the batches that are
still to do: reading them in order rebuilds everything else.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.evaluation.context import Model
from fastadv.evaluation.logit_probe import are_alike, probe_logits
from fastadv.evaluation.samples import Samples
from fastadv.files import check_archive, write_atomically

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


@dataclass(frozen=True)
class BatchRecord:
    """The result of one attack on one batch.

    Attributes:
        indices: [B] int64, the images attacked.
        fooled: [M] int64, the images among them that are now classified wrongly.
        adversarial: [M, ...] float32, their adversarial images.
        violations: counts of the faults of the returned images, fields of ``Violations``.
        warnings: the warnings of the attack.
        seconds: wall-clock time.
        refined: number of images among ``fooled`` that were broken by float32 steps after the search.
        unconfirmed: number of points that the engine misclassified and the plain model did not.
        refinement_seconds: wall-clock time of these float32 steps, a part of ``seconds``.
    """

    indices: Tensor
    fooled: Tensor
    adversarial: Tensor
    violations: dict[str, Any]
    warnings: list[str]
    seconds: float
    refined: int = 0
    unconfirmed: int = 0
    refinement_seconds: float = 0.0


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


class AutoAttackState(StateFolder):
    """The batches of an AutoAttack finished so far, in a folder of its own; arguments as in `StateFolder`."""

    def load(self, attack: str, batch: int, indices: Tensor) -> BatchRecord | None:
        """Return the record of a batch, or None when it is not finished.

        Raises:
            ValueError: when the file is damaged or about other images; the message names the file.
        """
        record = self._read(attack, batch)
        if record is not None and not torch.equal(record.indices, indices):
            raise ValueError(self._about_others(attack, batch))
        return record

    def load_all(self, attack: str, images: Tensor) -> list[BatchRecord]:
        """Return the records of an attack whose batches hold images in the order in which they were finished.

        Args:
            attack: the attack.
            images: the indices [N] of all images for this attack.

        Raises:
            ValueError: as in `load`.
        """
        records: list[BatchRecord] = []
        known = set(images.tolist())
        while (record := self._read(attack, len(records))) is not None:
            if not known.issuperset(record.indices.tolist()):
                raise ValueError(self._about_others(attack, len(records)))
            known.difference_update(record.indices.tolist())
            records.append(record)
        return records

    def _read(self, attack: str, batch: int) -> BatchRecord | None:
        path = self._path(attack, batch)
        if not path.exists():
            return None
        try:
            record = BatchRecord(**torch.load(path, map_location="cpu", weights_only=True))
            check_archive(path)
            return record
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read ({error!r}); delete it to redo the batch"
            ) from error

    def _about_others(self, attack: str, batch: int) -> str:
        path = self._path(attack, batch)
        return f"{path} is about other images than this run attacks; use a new state_dir"

    def save(self, attack: str, batch: int, record: BatchRecord) -> None:
        """Write the record of a finished batch."""
        content = io.BytesIO()
        torch.save({name: getattr(record, name) for name in record.__dataclass_fields__}, content)
        write_atomically(self._path(attack, batch), content.getvalue())

    def _path(self, attack: str, batch: int) -> Path:
        return self.directory / f"{attack}-{batch:05d}.pt"


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
