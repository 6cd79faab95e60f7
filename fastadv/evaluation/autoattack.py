"""AutoAttack, by its reference implementation, with a seed, a status and a state that can be resumed.

Source: F. Croce and M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastadv.evaluation.autoattack_library import (
    FEWEST_CLASSES,
    STANDARD,
    ReferenceAttacks,
    check_classes,
)
from fastadv.evaluation.autoattack_state import AutoAttackState, BatchRecord, fingerprint
from fastadv.evaluation.context import Model, evaluation_mode
from fastadv.evaluation.progress import Progress
from fastadv.evaluation.report import Stage, Status, library_versions
from fastadv.evaluation.runner import Runner, admissible_or_clean
from fastadv.evaluation.samples import as_samples, check_batch_size, check_eps
from fastadv.evaluation.verify import Audit, Violations, predict
from fastadv.ops.values import check_choice, integer, norm_name

_MAX_SEED = 2**63


@dataclass(frozen=True)
class AutoAttackResult:
    """What AutoAttack found.

    Attributes:
        robust: [N] bool, images classified correctly without and under every attack.
        fooled: [M] int64, indices of the images for which an adversarial one was found.
        adversarial: [M, C, H, W] float32 on the CPU, these adversarial images.
        stages: what was left after each attack.
        status: ``"ok"``, ``"suspect"`` after a warning of the library, ``"invalid"`` after a violation.
        notes: the warnings and violations.
        seed: used for every batch, as the library does.
        batch_size: on which the result depends.
        seconds: time spent attacking, in this call and, for resumed batches, before.
    """

    robust: Tensor
    fooled: Tensor
    adversarial: Tensor
    stages: tuple[Stage, ...]
    status: Status
    notes: tuple[str, ...]
    seed: int
    batch_size: int
    seconds: float


def autoattack(
    model: Model,
    data: Any,
    *,
    eps: float = 8 / 255,
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    version: str | Sequence[str] = "standard",
    batch_size: int = 256,
    device: torch.device | str | None = None,
    seed: int = 0,
    max_examples: int | None = None,
    progress: bool = False,
    state_dir: str | os.PathLike[str] | None = None,
) -> AutoAttackResult:
    """Run AutoAttack: each attack on the images that all before it left.

    Args:
        model: a float32 module, or any callable from images [B, C, H, W] to logits [B, classes].
        data: an ``ImageData`` or a pair (images, labels), as for ``evaluate``.
        eps: radius of the ball, in the units of the images.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        bounds: range of image values.
        version: ``"standard"``, or a list of ``apgd-ce``, ``apgd-dlr``, ``apgd-t``, ``fab``, ``fab-t`` and
            ``square``, run in that order with the settings of the standard version.
        batch_size: images per batch.
        device: where to run; by default where the model is.
        seed: 0 to 2**63 - 1.
        max_examples: use only the first so many images.
        progress: a bar per attack on a terminal.
        state_dir: folder for the state of this run; the same call continues from it. It belongs to one
            model, one data set and one choice of settings.

    Returns:
        The flags, the adversarial images and a status.

    Raises:
        ImportError: when ``pyautoattack`` is not installed.
        ValueError: for an argument out of range, an attack that the number of classes does not allow, or a
            ``state_dir`` of another run.
        TypeError: for a ``state_dir`` with a model that is no module.
    """
    norm, seed = norm_name(norm), integer("seed", seed)
    attacks = _check_version(version)
    if not 0 <= seed < _MAX_SEED:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
    samples = as_samples(data, bounds, max_examples)
    eps = check_eps(eps, norm, samples)
    if samples.images.dim() != 4:
        raise ValueError(f"AutoAttack needs images [N, C, H, W], got {tuple(samples.images.shape)}")
    with evaluation_mode(model, device) as where:
        runner = Runner(
            model, samples, norm, check_batch_size(batch_size), where, seed, Progress(progress)
        )
        state = None
        if state_dir is not None:
            settings = _settings(runner, attacks, eps)
            state = AutoAttackState(state_dir, fingerprint(model, samples, settings))
        return _run(runner, attacks, eps, state)


def _check_version(version: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(version, str):
        if version != "standard":
            raise ValueError(f"version must be 'standard' or a list of attacks, got {version!r}")
        return STANDARD
    attacks = tuple(version)
    for attack in attacks:
        check_choice("version", attack, tuple(FEWEST_CLASSES))
    if not attacks or len(set(attacks)) < len(attacks):
        raise ValueError(f"version must name at least one attack and none twice, got {attacks}")
    return attacks


def _settings(runner: Runner, attacks: tuple[str, ...], eps: float) -> dict[str, Any]:
    """What the result depends on beside model and data."""
    return {
        "attacks": attacks,
        "eps": eps,
        "norm": runner.norm,
        "bounds": runner.samples.bounds,
        "batch_size": runner.batch_size,
        "seed": runner.seed,
        "pyautoattack": library_versions().get("pyautoattack", "unknown"),
    }


def _run(
    runner: Runner, attacks: tuple[str, ...], eps: float, state: AutoAttackState | None
) -> AutoAttackResult:
    """Go through the attacks, taking finished batches from the state."""
    samples = runner.samples
    check_classes(attacks, runner.check_labels())
    library = ReferenceAttacks(
        runner.model,
        eps=eps,
        norm=runner.norm,
        bounds=samples.bounds,
        device=runner.device,
        seed=runner.seed,
    )
    clean = runner.clean()
    first = samples.batches(runner.batch_size)[0]
    warnings = library.check_model(*samples.take(first, runner.device))
    robust, records, stages = clean.robust.clone(), [], []
    for attack in attacks:
        for record in _stage(runner, library, attack, eps, robust.nonzero().flatten(), state):
            robust[record.fooled] = False
            records.append(record)
        stages.append(Stage(attack, int(robust.sum())))
    warnings += library.check_square(int(clean.robust.sum()), stages, len(samples))
    warnings += [text for record in records for text in record.warnings]
    audit = Audit(eps, runner.norm, samples.bounds)
    for record in records:
        audit.found += Violations(**record.violations)
    problems = audit.problems()
    no_image = torch.empty(0, *samples.images.shape[1:])
    return AutoAttackResult(
        robust=robust,
        fooled=torch.cat([torch.empty(0, dtype=torch.int64), *(r.fooled for r in records)]),
        adversarial=torch.cat([no_image, *(r.adversarial for r in records)]),
        stages=tuple(stages),
        status="invalid" if problems else "suspect" if warnings else "ok",
        notes=(*problems, *merge_warnings(warnings)),
        seed=runner.seed,
        batch_size=runner.batch_size,
        seconds=clean.seconds + sum(record.seconds for record in records),
    )


def _stage(
    runner: Runner,
    library: ReferenceAttacks,
    attack: str,
    eps: float,
    remaining: Tensor,
    state: AutoAttackState | None,
) -> Iterator[BatchRecord]:
    """One attack on the images that are left, in the batches in which the library's own loop forms them."""
    batches = runner.samples.batches(runner.batch_size, remaining)
    bar = runner.progress.bar(batches, f"autoattack {attack}", len(batches))
    for number, indices in enumerate(bar):
        record = state.load(attack, number, indices) if state else None
        if record is None:
            record = _batch(runner, library, attack, eps, indices)
            if state:
                state.save(attack, number, record)
        yield record


def _batch(
    runner: Runner, library: ReferenceAttacks, attack: str, eps: float, indices: Tensor
) -> BatchRecord:
    """Attack one batch and check what came back, independently of the library."""
    start = time.perf_counter()
    audit = Audit(eps, runner.norm, runner.samples.bounds)
    x, y = runner.samples.take(indices, runner.device)
    returned, warnings = library.perturb(attack, x, y)
    adv = admissible_or_clean(x, returned, audit)
    fooled = (predict(runner.model, adv) != y).cpu()
    return BatchRecord(
        indices=indices.clone(),
        fooled=indices[fooled],
        adversarial=adv.cpu()[fooled],
        violations=audit.found.as_dict(),
        warnings=warnings,
        seconds=time.perf_counter() - start,
    )


def merge_warnings(messages: Sequence[str]) -> list[str]:
    """Join messages that differ in their numbers only: the first, and how many more there were."""
    groups: dict[str, list[str]] = {}
    for message in messages:
        groups.setdefault(re.sub(r"\d+", "#", message), []).append(message)
    return [
        group[0] + (f" ({len(group) - 1} more like this)" if len(group) > 1 else "")
        for group in groups.values()
    ]
