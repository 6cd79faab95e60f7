"""The function `autoattack`: AutoAttack on the engine or by its reference implementation, with a state on disk.

Source: F. Croce and M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastadv.attacks.apgd import APGD
from fastadv.attacks.apgd_pool import NORMS
from fastadv.attacks.options import names_checked
from fastadv.evaluation.autoattack_library import ReferenceAttacks
from fastadv.evaluation.autoattack_run import APGD_STEPS, FP32, AutoAttackRun, Refinement, rows_of
from fastadv.evaluation.autoattack_stages import search_for
from fastadv.evaluation.autoattack_state import AutoAttackState, BatchRecord
from fastadv.evaluation.autoattack_versions import RAND_PASSES, check_classes, check_version
from fastadv.evaluation.context import Model, evaluation_mode
from fastadv.evaluation.early_checks import check_labels
from fastadv.evaluation.model_checks import model_warnings, square_warnings
from fastadv.evaluation.progress import ProgressDisplay
from fastadv.evaluation.report import library_versions
from fastadv.evaluation.result_row import REFERENCE, Stage, Status
from fastadv.evaluation.runner import Runner
from fastadv.evaluation.samples import (
    as_samples,
    check_batch_size,
    check_eps,
    radius_or_default,
)
from fastadv.evaluation.shared_work import SharedWork
from fastadv.evaluation.state_folder import fingerprint, hash_tensors
from fastadv.evaluation.verify import Violations
from fastadv.ops.values import check_choice, check_path, integer, norm_name

SearchEngine = Literal["auto", "fp32", "reference"]
ENGINES: tuple[SearchEngine, ...] = ("auto", "fp32", "reference")
_MAX_SEED = 2**63
_JOINED = re.compile(r"(.*) \((\d+) more like this\)", re.DOTALL)  # by `merge_warnings`


@dataclass(frozen=True)
class AutoAttackResult:
    """The findings of AutoAttack.

    Attributes:
        robust: [N] bool, images classified correctly without and under every attack.
        fooled: [M] int64, indices of the images for which an adversarial image was found, attack by attack, and in
            ascending order within an attack.
        adversarial: [M, C, H, W] float32 on the CPU, these adversarial images.
        stages: the number of images that withstood each attack.
        status: ``"ok"``, ``"suspect"`` after a warning, ``"invalid"`` after a violation.
        notes: the warnings and violations.
        seed: the seed of every batch, as in the library.
        batch_size: images per batch; the results of the reference's attacks depend on it.
        seconds: time spent attacking, in this call and, for resumed batches, before.
        search: where the attacks ran: ``"bf16"`` or ``"fp16"`` on the engine, ``"fp32"``, or ``"reference"``. A
            stage that ran in another way says so itself.
    """

    robust: Tensor = field(repr=False)
    fooled: Tensor = field(repr=False)
    adversarial: Tensor = field(repr=False)
    stages: tuple[Stage, ...]
    status: Status
    notes: tuple[str, ...]
    seed: int
    batch_size: int
    seconds: float
    search: str = REFERENCE


@names_checked
def autoattack(
    model: Model,
    data: Any,
    *,
    eps: float | None = None,
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    version: str | Sequence[str] = "standard",
    batch_size: int = 256,
    device: torch.device | str | None = None,
    seed: int = 0,
    max_examples: int | None = None,
    progress: bool = False,
    state_dir: str | os.PathLike[str] | None = None,
    engine: SearchEngine = "auto",
    sample_ids: Tensor | None = None,
) -> AutoAttackResult:
    """Run AutoAttack: each attack on the images that no attack before it has broken.

    The plain model confirms every adversarial image in float32. With ``engine="auto"`` the attack on an image that
    only the engine misclassifies is continued in float32 from there. An image that an engine in a narrower
    precision does not break is tried in float32 for a few more steps of Auto-PGD.

    Args:
        model: a float32 module, or any callable from images [B, C, H, W] to logits [B, classes].
        data: an ``ImageData`` or a pair (images, labels), as for ``evaluate``.
        eps: radius of the ball, in the units of the images; by default 8/255, in linf within bounds (0, 1) alone.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        bounds: range of image values.
        version: ``"standard"``, or a list of ``apgd-ce``, ``apgd-dlr``, ``apgd-t``, ``fab``, ``fab-t`` and
            ``square``, run in that order with the settings of the standard version. ``"rand"``, for models that
            draw random numbers: ``apgd-ce`` and ``apgd-dlr``, each gradient the mean of 20.
        batch_size: images per batch.
        device: device of the run; by default the device of the model.
        seed: 0 to 2**63 - 1.
        max_examples: use only so many images, as for ``evaluate``.
        progress: show a bar per attack on a terminal.
        state_dir: folder for the state of this run; the same call continues from it. It belongs to one
            model, one data set and one choice of settings.
        engine: ``"auto"``: Auto-PGD on the attack engine, in bfloat16 where the hardware and the model allow it,
            else in float32, on a copy of the model where that is possible;
            ``"fp32"``: the same on the plain model in float32; ``"reference"``: everything by pyautoattack, in
            float32. ``"rand"`` in l1 always runs by pyautoattack.
        sample_ids: int64 [N], which random numbers each image gets, by default its index; the reference's attacks
            do not use them.

    Returns:
        The flags, the adversarial images and a status.

    Raises:
        ImportError: when attacks are to run by ``pyautoattack``, and it is not installed.
        ValueError: for an argument out of range, an attack that the number of classes does not allow, or a
            ``state_dir`` of another run.
        TypeError: for a ``state_dir`` with a model that is not a module.
    """
    norm, seed = norm_name(norm), integer("seed", seed)
    attacks = check_version(version)
    check_choice("engine", engine, ENGINES)
    if state_dir is not None:
        check_path("state_dir", state_dir)
    if not 0 <= seed < _MAX_SEED:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
    samples = as_samples(data, bounds, max_examples)
    eps = check_eps(radius_or_default(eps, norm, bounds), norm, samples)
    if len(samples.image_shape) != 3:
        shape = (len(samples), *samples.image_shape)
        raise ValueError(f"AutoAttack needs images [N, C, H, W], got {shape}")
    ids = _check_ids(sample_ids, len(samples))
    with evaluation_mode(model, device) as where:
        runner = Runner(
            model,
            samples,
            norm,
            check_batch_size(batch_size),
            where,
            seed,
            SharedWork(ProgressDisplay(progress)),
        )
        passes = RAND_PASSES if version == "rand" else 1
        return _run(_prepared(runner, attacks, eps, engine, ids, state_dir, passes), attacks)


def _check_ids(ids: Tensor | None, n: int) -> Tensor | None:
    if ids is None:
        return None
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.shape != (n,):
        kind = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"sample_ids must be an int64 tensor of shape ({n},), got {kind}")
    return ids.detach().cpu()


def _settings(
    runner: Runner, attacks: tuple[str, ...], eps: float, search: str, ids: Tensor | None
) -> dict[str, Any]:
    """The settings that the result depends on, besides model and data."""
    settings = {
        "attacks": attacks,
        "eps": eps,
        "norm": runner.norm,
        "bounds": runner.samples.bounds,
        "batch_size": runner.batch_size,
        "seed": runner.seed,
        "versions": library_versions(),
    }
    if search == REFERENCE:
        return settings
    own: dict[str, Any] = {"search": search, "refinement": list(astuple(Refinement()))}
    if ids is not None and not torch.equal(ids, torch.arange(len(ids), device="cpu")):
        own["sample_ids"] = hash_tensors(ids)
    rows = rows_of(runner.samples.image_shape, runner.batch_size)
    if rows != runner.batch_size:
        own["rows"] = rows
    return {**settings, **own}


def _prepared(
    runner: Runner,
    attacks: tuple[str, ...],
    eps: float,
    engine: SearchEngine,
    ids: Tensor | None,
    state_dir: str | os.PathLike[str] | None,
    passes: int,
) -> AutoAttackRun:
    """The `AutoAttackRun` of this run: its attacks in each precision, and its state."""
    samples = runner.samples
    classes = check_labels(runner)
    check_classes(attacks, classes)
    common: dict[str, Any] = dict(norm=runner.norm, bounds=samples.bounds, check_inputs=False)
    wide = APGD(runner.model, eps, APGD_STEPS, precision="fp32", engine="eager", **common)
    # engine="fixed" measures no speeds, so that a resumed, repeated or shared evaluation runs the same engine.
    narrow = (
        wide if engine == "fp32" else APGD(runner.model, eps, APGD_STEPS, engine="fixed", **common)
    )
    search, exact = REFERENCE, None
    if engine != "reference" and (passes == 1 or runner.norm in NORMS):
        x, _ = samples.take(samples.batches(runner.batch_size)[0], runner.device)
        searcher = (wide if engine == "fp32" else narrow).engine_for(x)
        search = searcher.precision
        if search == FP32 and searcher.name == "eager":
            narrow = wide
        if search != FP32 and runner.device.type == "cpu":
            exact = APGD(
                runner.model, eps, APGD_STEPS, precision="fp32", engine="compiled", **common
            )
    library = None
    if search == REFERENCE:
        library = ReferenceAttacks(
            runner.model,
            eps=eps,
            norm=runner.norm,
            bounds=samples.bounds,
            device=runner.device,
            seed=runner.seed,
            classes=classes,
            passes=passes,
        )
    state = None
    if state_dir is not None:
        settings = _settings(runner, attacks, eps, search, ids)
        settings |= {"passes": passes} if passes > 1 else {}
        settings |= {"on": "a copy"} if search == FP32 and narrow is not wide else {}
        state = AutoAttackState(state_dir, fingerprint(runner.model, samples, settings))
    return AutoAttackRun(
        runner, eps, search, narrow, wide, library, state, ids, passes=passes, exact=exact
    )


def _run(run: AutoAttackRun, attacks: tuple[str, ...]) -> AutoAttackResult:
    """Run the attacks one after the other; finished batches come from the state."""
    runner, samples = run.runner, run.runner.samples
    clean = runner.clean()
    warnings = model_warnings(runner, may_draw=run.passes > 1)
    robust, records, stages, broken = clean.robust.clone(), [], [], []
    for attack in attacks:
        search = search_for(run, attack)
        found = search.run(robust.nonzero().flatten())
        for record in found:
            robust[record.fooled] = False
        records += found
        broken.append(_broken(found, samples.image_shape))
        stages.append(_stage(attack, search.by, int(robust.sum()), found))
    warnings += square_warnings(stages, len(samples))
    warnings += [text for record in records for text in record.warnings]
    audit = run.audit()
    for record in records:
        audit.found += Violations(**record.violations)
    problems = audit.problems()
    return AutoAttackResult(
        robust=robust,
        fooled=torch.cat([one for one, _ in broken]),
        adversarial=torch.cat([images for _, images in broken]),
        stages=tuple(stages),
        status="invalid" if problems else "suspect" if warnings else "ok",
        notes=(*problems, *merge_warnings(warnings)),
        seed=runner.seed,
        batch_size=runner.batch_size,
        seconds=clean.seconds + sum(record.seconds for record in records),
        search=run.search,
    )


def _broken(records: Sequence[BatchRecord], shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The indices of the images that an attack has broken, in ascending order, and their adversarial images."""
    no_indices = torch.empty(0, dtype=torch.int64, device="cpu")
    no_images = torch.empty(0, *shape, dtype=torch.float32, device="cpu")
    fooled = torch.cat([no_indices, *(one.fooled for one in records)])
    images = torch.cat([no_images, *(one.adversarial for one in records)])
    order = fooled.argsort()
    return fooled[order], images[order]


def _stage(attack: str, by: str, correct: int, records: Sequence[BatchRecord]) -> Stage:
    return Stage(
        attack,
        correct,
        search=by,
        seconds=sum(record.seconds for record in records),
        refined=sum(record.refined for record in records),
        unconfirmed=sum(record.unconfirmed for record in records),
        refinement_seconds=sum(record.refinement_seconds for record in records),
    )


def merge_warnings(messages: Sequence[str]) -> list[str]:
    """Join messages that differ in their numbers only, to the first of them with the number of the others.

    A message that this function has returned, such as one of another process, stands for all that it has joined.
    """
    groups: dict[str, list[str]] = {}
    others: Counter[str] = Counter()
    for message in messages:
        known = _JOINED.fullmatch(message)
        text, more = (known[1], int(known[2])) if known else (message, 0)
        kind = re.sub(r"\d+", "#", text)
        groups.setdefault(kind, []).append(text)
        others[kind] += more + (len(groups[kind]) > 1)
    return [
        group[0] + (f" ({others[kind]} more like this)" if others[kind] else "")
        for kind, group in groups.items()
    ]
