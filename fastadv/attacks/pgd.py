"""Projected gradient descent (Madry et al. 2018), as an object that is called with batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import fields

import torch
from torch import Tensor

from fastadv.attacks.arguments import EngineName, Precision, TrainMode
from fastadv.attacks.attack import Attack
from fastadv.attacks.batch import AttackBatch, CallOverrides, ValueOf
from fastadv.attacks.best import Best
from fastadv.attacks.objectives import SOFT_OBJECTIVES, LabelCrossEntropy, LossFunction, Objective
from fastadv.attacks.options import Setting, names_checked
from fastadv.attacks.pgd_settings import Keep, PGDSettings
from fastadv.attacks.soft_labels import is_soft
from fastadv.engine.cuda_graph import MOST_GRADIENTS, GraphCache
from fastadv.engine.engines import Model
from fastadv.ops.checks import over_samples
from fastadv.ops.pgd_step_per_channel import Bounds, image_bounds, numbers
from fastadv.ops.values import integer
from fastadv.seeding import derive_seed

Direction = Callable[[Tensor], Tensor]  # input gradient [B, ...] -> where to step, [B, ...]
StepSize = Callable[[Tensor], float | Tensor]  # logits [B, C] -> how far, a number or [B]


class PGD(Attack):
    """A PGD attack on one model, to be called many times: ``adv = PGD(model)(x, y)``.

    It holds the engine, built at the first call for the images' device and dtype, and reads the model's live
    weights at every call. Between calls the model may be trained, moved or changed in structure. ``last``
    describes the last call.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018, section 2.1.

    Args:
        model: a module, or any callable, from images [B, ...] to logits [B, C]; normalisation of the
            images belongs inside it.
        eps: radius of the ball, in the units of the images; at most the distance between two images within the
            bounds.
        alpha: step size, in the units of the images; in l2 and l1 the length of the whole step.
        steps: number of steps, at least 1.
        random_start: start from a uniform random point of the ball (`fastadv.ops.random_start`), else from the
            image. In l2 such a point lies close to the surface of the ball; `fastadv.attacks.uniform_radius_start`
            lies nearer to the image.
        norm: ``"linf"``, ``"l2"``, or ``"l1"`` (sparse steps: Tramer and Boneh 2019; `fastadv.ops.pgd_step`), also
            as other libraries write it: "Linf", "L2", np.inf, 2.
        bounds: lowest and highest allowed value of an image.
        restarts: runs from different random starts; per sample the result of highest loss (or best as by ``keep``)
            is returned.
        targeted: minimise the loss of the classes that a call gives, instead of maximising it.
        loss: ``"ce"``, ``"cw"`` (margin), ``"dlr"``, ``"kl"`` (TRADES, against the clean logits; needs
            ``random_start``, since its gradient is zero at the image) or a callable
            ``(logits, y) -> [B] or scalar``.
        precision: precision of the network: ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"auto"``: bf16 for modules
            where the hardware has it, else fp32. Logits, loss and images are float32 (float64 for float64 images)
            always.
        engine: ``"eager"`` runs the live model; ``"compiled"`` runs a folded copy (with ``torch.compile``
            on a GPU); ``"graph"`` runs the whole attack on the copy as a CUDA graph. ``"auto"`` runs a folded
            copy in a narrow precision, on a GPU recorded at the second call of a batch size. On the CPU it
            measures where another engine may be faster, and runs the fastest that is right. With
            ``precision="fp32"`` it runs the live model, and the result equals the result of a plain loop to the
            bit. Where ``precision="auto"`` comes to fp32, it runs a folded copy on a CPU, and the live model on a
            GPU. ``"fixed"`` is ``"auto"`` without measuring, so that every process runs the same engine.
        train_mode: attack the model in train mode, for recipes that do so; its buffers are restored. A sample's
            result then depends on the other samples of the batch. ``"moving"`` is train mode in which every pass
            of the attack updates BatchNorm's running statistics for good, as in loops that do not restore them.
        keep: the point of a run that is returned: ``"last"`` or ``"best"``. For each sample the best point has the
            highest loss among the successful points, or among all points if no point succeeds, start and end
            included. ``"best"`` costs one more forward pass per restart.
        sparsity: share of an image's elements that an l1 step does not move, 0 <= sparsity < 1; other norms
            ignore it.
        seed: seed of every call without a seed; None draws a seed per call from torch's default generator.
        check_inputs: check the values of images and labels at every call. On a GPU this waits for the device
            once per call; turn it off where the data are known to be good.

    Every argument is also an attribute, which may be set. After ``attack.eps = 4 / 255`` the next call has that
    radius. ``attack.passes = n`` follows the mean of n gradients, for models that draw random numbers.

    Raises:
        TypeError: an argument of the wrong type, named in the message.
        ValueError: an argument out of range, shapes or devices that do not fit, images that are not finite
            or outside ``bounds``, labels outside the model's classes.
    """

    settings: PGDSettings
    alpha = Setting[float]()
    steps = Setting[int]()
    random_start = Setting[bool]()
    restarts = Setting[int]()
    keep = Setting[Keep]()
    loss = Setting[str | LossFunction]()
    sparsity = Setting[float]()

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        *,
        norm: str = "linf",
        bounds: tuple[float, float] = (0.0, 1.0),
        restarts: int = 1,
        targeted: bool = False,
        loss: str | LossFunction = "ce",
        precision: Precision = "auto",
        engine: EngineName = "auto",
        train_mode: TrainMode = False,
        keep: Keep = "last",
        sparsity: float = 0.95,
        seed: int | None = None,
        check_inputs: bool = True,
    ) -> None:
        chosen = PGDSettings(
            eps,
            alpha,
            steps,
            random_start,
            norm=norm,
            bounds=bounds,
            restarts=restarts,
            targeted=targeted,
            loss=loss,
            precision=precision,
            engine=engine,
            train_mode=train_mode,
            keep=keep,
            sparsity=sparsity,
        )
        Attack.__init__(self, model, chosen, seed, check_inputs)

    @names_checked
    def __call__(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        seed: int | None = None,
        sample_ids: Tensor | None = None,
        eps: float | Tensor | None = None,
        start: Tensor | None = None,
        alpha: float | Tensor | None = None,
        steps: int | Tensor | None = None,
        bounds: Bounds | None = None,
    ) -> Tensor:
        """Attack a batch.

        Args:
            x: images [B, ...] within the bounds.
            y: labels, or targets, [B], or soft labels [B, C]. None where the attack does not look at labels: for
                the loss ``"kl"`` with ``keep="last"``, except in `fastadv.FriendlyPGD`.
            seed: seed of the random numbers, for this call.
            sample_ids: int64 [B], which random numbers each sample gets; default 0 .. B-1.
            eps: radius for this call: a number, one per image [B], or in linf one per channel, for images
                [B, C, H, W] of shape [C, 1, 1], [1, C, 1, 1] or [B, C, 1, 1].
            start: images within the bounds to begin from, [B, ...]; they are brought into the ball first. Of
                several restarts only the first begins there.
            alpha: step size for this call, as ``eps``; by default the attack's own, in proportion to ``eps``.
            steps: number of steps for this call, one for all or int64 [B]. All images go through the network as
                often as the image with the most steps. An image whose steps are made no longer moves. Reading the
                largest number waits for the device.
            bounds: lowest and highest value of an image for this call, in linf also tensors, as ``eps``.

        Returns:
            Adversarial images [B, ...] in ``x``'s dtype and layout.

        Raises:
            TypeError: as in `fastadv.PGD`.
            ValueError: as in `fastadv.PGD`.
        """
        overrides = checked_overrides(alpha, steps, x, bounds, self.norm)
        return self._attack(x, y, seed, sample_ids, eps, start, overrides)

    def _perturb(self, batch: AttackBatch, seed: int) -> Tensor:
        alpha, graphs = self._alpha(batch), batch.engine.graphs
        found = None if graphs is None else self._replay(graphs, batch, seed, alpha)
        return self._search(batch, self._starts(batch, seed), alpha) if found is None else found

    def _replay(
        self, graphs: GraphCache, batch: AttackBatch, seed: int, alpha: float | Tensor
    ) -> Tensor | None:
        """Run the search as a CUDA graph, valid until the next one; None if it must be run step by step."""
        obstacle = self._graph_obstacle()
        if obstacle is None and is_soft(batch.y):
            obstacle = "soft labels are not recorded"
        if obstacle is None and batch.overrides.steps is not None:
            obstacle = "images with numbers of steps of their own are not recorded"
        if obstacle is None and _has_own_numbers(batch, alpha):
            obstacle = "bounds of a call and numbers per channel are not recorded"
        if obstacle is not None:
            batch.counters.reason += f"; {obstacle}"
            return None
        batch.check_values(graphs.classes)
        limits = (_per_image(batch.eps, batch.x), _per_image(alpha, batch.x))
        inputs = (batch.x, batch.y, *limits, *self._starts(batch, seed))

        def loop(inputs: tuple[Tensor, ...], active: Tensor) -> tuple[Tensor, ...]:
            x, y, eps, alpha, *starts = inputs
            recorded = batch.on(x, y, eps, active)
            adv = self._search(recorded, [start.clone() for start in starts], alpha)
            counters = recorded.counters
            return adv, torch.stack(counters.losses), counters.counts, counters.nan_points

        found = graphs.run(self._graph_key(), inputs, loop)
        if found is None:
            batch.counters.reason += f"; {graphs.refusal}"
            return None
        adv, losses, counts, nan_points = found
        batch.counters.engine = "graph"
        batch.counters.elements += len(losses) * adv.numel()
        batch.counters.losses.extend(losses.clone().unbind())
        batch.counters.counts += counts
        batch.counters.nan_points += nan_points
        return adv

    def _graph_obstacle(self) -> str | None:
        settings = self.settings
        if not isinstance(settings.loss, str):
            return "its loss is a callable, which may depend on more than its arguments"
        gradients = settings.steps * settings.restarts * self.passes
        if gradients > MOST_GRADIENTS:
            return f"it takes {gradients} gradients, and a graph at most {MOST_GRADIENTS}"
        return None

    def _soft_labels_obstacle(self) -> str | None:
        loss = self.settings.loss
        taken = not isinstance(loss, str) or loss in SOFT_OBJECTIVES
        return None if taken else f"with loss {loss!r}"

    def _labels_obstacle(self) -> str | None:
        if self.settings.loss != "kl":
            return f"with loss {self.settings.loss!r}"
        return "with keep 'best'" if self.settings.keep == "best" else None

    def _graph_key(self) -> tuple[Hashable, ...]:
        """The facts on which a recorded search depends: all settings except radius and step size, its inputs."""
        names = [field.name for field in fields(self.settings)]
        kept = [name for name in names if name not in ("eps", "alpha")]
        return (type(self), self.passes, *(getattr(self.settings, name) for name in kept))

    def _starts(self, batch: AttackBatch, seed: int) -> Iterator[Tensor]:
        """The points at which the runs begin, [B, ...] each."""
        for restart in range(self.settings.restarts):
            run_seed = derive_seed(seed, "restart", restart) if restart else seed
            later = batch.with_own_start() if restart else batch
            yield later.start(run_seed, self.settings.random_start)

    def _search(
        self, batch: AttackBatch, starts: Iterable[Tensor], alpha: float | Tensor
    ) -> Tensor:
        """Run from every start, overwriting it, and return the images to keep."""
        value_of = self._value_of(batch)
        keep_best = self.settings.keep == "best"
        best = Best(prefer_success=keep_best)
        for start in starts:
            adv = self._run(batch, value_of, start, alpha, best if keep_best else None)
            if self.settings.restarts == 1 and not keep_best:
                return adv
            logits = batch.logits(adv)
            best.offer(adv, value_of(logits), batch.succeeded(logits))
        return best.images

    def _value_of(self, batch: AttackBatch) -> ValueOf:
        """The loss as a function of the logits, to be raised."""
        settings = self.settings
        if settings.loss == "ce" and not is_soft(batch.y):
            return LabelCrossEntropy(batch.y, settings.targeted)
        objective = Objective(settings.loss, settings.targeted)
        compares = objective.needs_clean_logits and not is_soft(batch.y)
        clean_logits = batch.logits(batch.x) if compares else None
        ranked_for = "restarts > 1" if settings.restarts > 1 else "keep='best'"
        ranked = settings.restarts > 1 or settings.keep == "best"

        def value_of(logits: Tensor) -> Tensor:
            value = objective(logits, batch.y, clean_logits)
            if ranked and value.dim() == 0:
                raise ValueError(
                    f"loss must return one value per sample, [B], with {ranked_for}; got a scalar"
                )
            return value

        return value_of

    def _run(
        self,
        batch: AttackBatch,
        value_of: ValueOf,
        adv: Tensor,
        alpha: float | Tensor,
        best: Best | None,
    ) -> Tensor:
        """One run of K steps from ``adv``, in place; every point but the last is offered to ``best``."""
        direction, size_at = self._direction(batch), self._size_at(batch, alpha)
        sparsity, own = self.settings.sparsity, batch.overrides.steps
        for step in range(self.settings.steps if own is None else batch.overrides.max_steps):
            found = batch.gradient(adv, value_of)
            if best is not None:
                best.offer(adv, found.value, batch.succeeded(found.logits))
            size = size_at(found.logits)
            if own is not None:  # in the images' precision, also if the size is a number
                size = _per_image(size, batch.x)
                size = torch.where(over_samples(step < own, size), size, 0.0)
            if direction is None:
                batch.step_(adv, found.grad, size, sparsity)
            else:
                batch.step_along_(adv, direction(found.grad), size, sparsity)
        return adv

    def _direction(self, batch: AttackBatch) -> Direction | None:
        """The function from gradients of one run to directions; None if the gradients are the directions."""
        return None

    def _size_at(self, batch: AttackBatch, alpha: float | Tensor) -> StepSize:
        """The function from the logits at the point where a step starts to the size of the step."""
        return lambda logits: alpha

    def _radius(self, x: Tensor, eps: float | Tensor | None, bounds: Bounds) -> float | Tensor:
        if isinstance(eps, Tensor):
            return numbers("eps", eps, self.norm, x)
        return super()._radius(x, eps, bounds)

    def _alpha(self, batch: AttackBatch) -> float | Tensor:
        """The step size, scaled in proportion if a call has its own radius.

        Raises:
            ValueError: if the attack was made with a radius of 0, so that there is no proportion.
        """
        settings = self.settings
        given = batch.overrides.alpha
        if given is not None:
            moves = isinstance(batch.eps, Tensor) or batch.eps > 0
            if moves and not isinstance(given, Tensor) and given == 0:
                raise ValueError(f"alpha must be > 0, got 0; {settings._without_steps}")
            return given
        if not isinstance(batch.eps, Tensor) and batch.eps == settings.eps:
            return settings.step_size
        if settings.eps == 0:
            raise ValueError("eps must not be given to a call of an attack made with eps 0")
        return settings.step_size * (batch.eps / settings.eps)


def checked_overrides(
    alpha: float | Tensor | None,
    steps: int | Tensor | None,
    x: Tensor,
    bounds: Bounds | None = None,
    norm: str = "linf",
) -> CallOverrides:
    """Check the step sizes, numbers of steps and bounds of a call."""
    if not isinstance(x, Tensor) or (alpha is None and steps is None and bounds is None):
        return CallOverrides()
    if alpha is not None:
        alpha = numbers("alpha", alpha, norm, x)
    if bounds is not None:
        bounds = image_bounds(bounds, norm, x)
    if steps is None or x.shape[0] == 0:
        return CallOverrides(alpha, bounds=bounds)
    if not isinstance(steps, Tensor):
        steps = torch.full((x.shape[0],), integer("steps", steps, at_least=1), device=x.device)
    if steps.dtype != torch.int64 or steps.shape != (x.shape[0],) or steps.device != x.device:
        raise ValueError(
            f"steps must be a number or int64 of shape ({x.shape[0]},) on the device {x.device}, got "
            f"{steps.dtype} {tuple(steps.shape)} on {steps.device}"
        )
    smallest, largest = torch.stack(steps.aminmax()).tolist()
    if smallest < 0:
        raise ValueError(f"steps must be >= 0, got {smallest}")
    return CallOverrides(alpha, steps, largest, bounds)


def _has_own_numbers(batch: AttackBatch, alpha: float | Tensor) -> bool:
    """Whether the call has its own bounds, or a radius or a step size per channel."""
    per_channel = any(isinstance(n, Tensor) and n.dim() > 1 for n in (batch.eps, alpha))
    return per_channel or batch.overrides.bounds is not None


def _per_image(value: float | Tensor, x: Tensor) -> Tensor:
    """A number as a tensor [B]; a tensor unchanged."""
    return value if isinstance(value, Tensor) else x.new_full((x.shape[0],), value)
