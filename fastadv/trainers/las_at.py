"""LAS-AT: adversarial training with a learnable attack strategy."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fastadv.attacks import PGD
from fastadv.attacks.strategic import StrategicPGD
from fastadv.engine.frozen import frozen
from fastadv.losses import cross_entropy
from fastadv.losses.common import at_least_float32
from fastadv.models import check_feature_split
from fastadv.models.registry import check_plain_name
from fastadv.models.split import global_average
from fastadv.ops import random_start
from fastadv.ops.philox import philox
from fastadv.seeding import derive_seed
from fastadv.trainers.method import TrainBatch, Update, accuracy
from fastadv.trainers.number import Number
from fastadv.trainers.optim import decays
from fastadv.trainers.pgd_at import PGDAT
from fastadv.trainers.recipe import AdversarialRecipe, Presets, check_field
from fastadv.trainers.schedules import MultiStep, Schedule

_TENTH_AFTER_99_AND_104 = MultiStep((99, 104), 0.1)
_MAX_CROSS_ENTROPY = 10.0  # bound of the cross-entropy in the reward
_MAX_GRADIENT_NORM = 1.0  # bound of the norm of the strategy network's gradient
_RESTARTS = 2  # of the attack in the reward


@dataclass(frozen=True, kw_only=True)
class LasAtRecipe(AdversarialRecipe):
    """Numbers of the authors' code for LAS-PGD-AT on CIFAR-10; both presets have them.

    Its targets give .7 to the own class and .3 to the others together, which is label smoothing of 1/3 with 10
    classes. For CIFAR-100 that code has .6 and .4, which is label smoothing of .404, and 3 to 12 steps. `LasAt`
    lists the parts of the code that "official" does not reproduce.

    Attributes:
        eps: radius of the noise from which attacks start, and of the attack in the reward.
        alpha: step size of the attack in the reward.
        steps: number of steps of the attack in the reward.
        eps_choices: radii from which the strategy network chooses, in 255ths.
        alpha_choices: step sizes from which it chooses, in 255ths.
        steps_choices: numbers of steps from which it chooses.
        strategy: architecture of the strategy network, one of fastadv's names or "timm:NAME".
        strategy_lr: learning rate of the strategy network, which no schedule changes.
        strategy_every: iterations of the run between two updates of the strategy network.
        robust_weight: weight, in the reward, of the robust accuracy after one step of training.
        clean_weight: weight, in the reward, of the clean accuracy after one step of training.
    """

    epochs: int = 110
    schedule: Schedule = _TENTH_AFTER_99_AND_104
    label_smoothing: Number = 1 / 3
    eps_choices: tuple[int, ...] = tuple(range(3, 16))
    alpha_choices: tuple[int, ...] = (1, 2, 3, 4, 5)
    steps_choices: tuple[int, ...] = tuple(range(3, 15))
    strategy: str = "resnet18"
    strategy_lr: Number = 1e-4
    strategy_every: int = 20
    robust_weight: Number = 4.0
    clean_weight: Number = 2.0

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    presets: ClassVar[Presets] = {"paper": {}, "official": {}}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("strategy_lr", "robust_weight", "clean_weight"):
            check_field(self, name, at_least=0)
        check_field(self, "strategy_every", at_least=1)
        for name in ("eps_choices", "alpha_choices", "steps_choices"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name} must be at least one number, each >= 1, got {values}")
        for name in ("eps_choices", "alpha_choices"):
            if max(getattr(self, name)) > 255:
                raise ValueError(f"{name} must be <= 255, in 255ths, got {getattr(self, name)}")
        check_plain_name("strategy", self.strategy)

    @property
    def choices(self) -> tuple[tuple[int, ...], ...]:
        """The choices of the strategy network: radii, step sizes and numbers of steps."""
        return self.eps_choices, self.alpha_choices, self.steps_choices


class StrategyNetwork(nn.Module):
    """A network with a linear head for each quantity to choose, on the pooled features of its body.

    Args:
        body: a model that can be cut before its pooling; its own classifier is not used.
        counts: the number of choices for each quantity.
    """

    def __init__(self, body: nn.Module, counts: tuple[int, ...]) -> None:
        super().__init__()
        check_feature_split(body)
        width = getattr(body, "num_features", None)
        if not isinstance(width, int):
            raise ValueError(
                "strategy must be a model with num_features, the length of its pooled vector, got "
                f"{type(body).__name__}"
            )
        self.body = body
        like = next(body.parameters())
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in counts).to(like)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the logits of the choices for each quantity, [B, count] each."""
        pooled = global_average(cast(Any, self.body).forward_features(x))
        return [at_least_float32(head(pooled)) for head in self.heads]


class LasAt(PGDAT[LasAtRecipe]):
    """LAS-AT: CE(f(x')) with smoothed labels, x' by PGD whose radius, step size and steps a network draws.

    In every 20th iteration the strategy network is trained before the model, by REINFORCE. Its loss is - R times
    the log probability of the strategies it drew. The reward is R = CE(f(x')) + 4 A_robust + 2 A_clean. The two
    accuracies are measured on a copy of the model after one SGD step on x': under PGD-10 with two restarts, and on
    clean images.

    Source: Jia et al. 2022, equations 3 to 8; recipe as in the authors' code (jiaxiaojunQAQ/LAS-AT), whose R
    bounds the cross-entropy by 10 and which also counts the 20 iterations across epochs. Differences: in that code
    the first gradient is at noise of 8/255 even if the drawn radius is smaller. Here the noise is projected on the
    image's ball first. That code attacks the copy in training mode and stops at misclassified images. Here the
    attack uses evaluation mode and keeps the point of highest loss. The copy's step has the learning rate of the
    epoch's start here. The strategy network draws in evaluation mode for the model's training, and in training
    mode for its own.

    With several processes the reward and the gradients refer to the global batch. The draws depend only on the
    seed, the epoch, the iteration and the image. The strategy network is part of the checkpoints.

    `--awp_gamma` adds AWP to this recipe. The authors' LAS-AWP differs in more: gamma .01, 200 epochs with drops
    after 100 and 150, labels without smoothing, radii from 7 to 15, 8 to 16 steps, step sizes from 2 to 5, an
    update of the strategy network in every iteration, and accuracies with weight 1. It also clips x' to 8/255, and
    perturbs the weights of the copy in the reward.

    Cost per batch: 2KF for the attack, K the longest strategy in the batch, 1F of the strategy network, 3F for
    training; in every 20th iteration another 2KF + 48F and 3F of the strategy network. Running statistics move
    once.
    """

    name = "las_at"
    takes_soft_labels = False
    recipe_class = LasAtRecipe
    attack_class = StrategicPGD

    def setup(self) -> None:
        """Build the strategy network and the attack."""
        super().setup()
        torch.manual_seed(derive_seed(self.recipe.seed, "strategy"))
        counts = tuple(len(values) for values in self.recipe.choices)
        self.strategy = StrategyNetwork(self.runtime.make("strategy", self.recipe.strategy), counts)
        self._probe: tuple[nn.Module, PGD] | None = None

    def trainable(self) -> dict[str, nn.Module]:
        """Return the model and the strategy network. The loop's updates do not change the strategy network."""
        return {"model": self.model, "strategy": self.strategy}

    def start_of(self, batch: TrainBatch) -> Tensor | None:
        """Return the images with uniform noise of the recipe's radius, which the drawn radius does not change."""
        if not self.recipe.random_start:
            return batch.x
        seed = batch.seed("attack")
        return random_start(batch.x, self.recipe.eps, seed=seed, sample_ids=batch.ids)

    def step(self, batch: TrainBatch, update: Update) -> None:
        """Train the strategy network in every `strategy_every`-th iteration, then the model."""
        step = batch.step if batch.run_step is None else batch.run_step
        if (step + 1) % self.recipe.strategy_every == 0:
            with self.runtime.phases("strategy"):
                self.train_strategy(batch)
        with self.runtime.phases("strategy"), frozen(self.strategy), torch.no_grad():
            with self.autocast():
                logits = self.strategy(batch.x)
            self._follow(self._drawn(logits, batch, "strategy"), batch)
        super().step(batch, update)

    def _drawn(self, logits: list[Tensor], batch: TrainBatch, purpose: str) -> list[Tensor]:
        """Draw one choice of each quantity for each image: indices [B] each."""
        words = philox(batch.seed(purpose), batch.ids, 1).double() * 2.0**-32
        return [
            (part.detach().double().softmax(1).cumsum(1) <= words[:, i : i + 1])
            .sum(1)
            .clamp_max(part.shape[1] - 1)
            for i, part in enumerate(logits)
        ]

    def _follow(self, chosen: list[Tensor], batch: TrainBatch) -> None:
        """Make the attack use the drawn strategies."""
        radii, sizes, steps = (
            torch.tensor(values, device=batch.x.device)[rows]
            for values, rows in zip(self.recipe.choices, chosen, strict=True)
        )
        assert isinstance(self.pgd, StrategicPGD)
        self.pgd.strategy = (radii.to(batch.x) / 255, sizes.to(batch.x) / 255, steps)

    def train_strategy(self, batch: TrainBatch) -> None:
        """Take one step of REINFORCE, unless the gradient is not finite."""
        self.strategy.train()
        with self.autocast():
            logits = self.strategy(batch.x)
        chosen = self._drawn(logits, batch, "exploration")
        self._follow(chosen, batch)
        reward = self.reward(batch, self.perturb(batch))
        scores = [
            part.log_softmax(1).gather(1, rows[:, None])
            for part, rows in zip(logits, chosen, strict=True)
        ]
        loss = -reward * torch.cat(scores, 1).sum(1).mean()
        _move(self.strategy, self._mean_gradient(self.strategy, loss), self.recipe.strategy_lr)
        self.runtime.ranks.broadcast(list(self.strategy.buffers()))

    def reward(self, batch: TrainBatch, adv: Tensor) -> Tensor:
        """Return the reward of the strategies that made these images: a scalar, the mean over the processes."""
        recipe, ranks = self.recipe, self.runtime.ranks
        with frozen(self.model), torch.no_grad(), self.autocast():
            hard = cross_entropy(self.model(adv), batch.y)
        model, attack = self._trained_copy(batch, adv)
        seed = batch.seed("reward")
        worst = attack(batch.x, batch.y, seed=seed, sample_ids=batch.ids)
        with frozen(model), torch.no_grad(), self.autocast():
            robust = accuracy(model(worst), batch.y)
            clean = accuracy(model(batch.x), batch.y)
        parts = ranks.sum(torch.stack([hard.float(), robust, clean])) / ranks.world_size
        hard, robust, clean = parts.unbind()
        return (
            hard.clamp(0, _MAX_CROSS_ENTROPY)
            + recipe.robust_weight * robust
            + recipe.clean_weight * clean
        )

    def _trained_copy(self, batch: TrainBatch, adv: Tensor) -> tuple[nn.Module, PGD]:
        """Return a copy of the model after one step of SGD on the images, and an attack on it."""
        recipe = self.recipe
        if self._probe is None:
            model = copy.deepcopy(self.model)
            options: dict[str, Any] = {
                "restarts": _RESTARTS if recipe.random_start else 1,
                "keep": "best",
                "precision": recipe.attack_precision,
                "engine": recipe.attack_engine,
                "check_inputs": False,
            }
            attack = PGD(
                model, recipe.eps, recipe.alpha, recipe.steps, recipe.random_start, **options
            )
            self._probe = (model, attack)
        model, attack = self._probe
        model.load_state_dict(self.model.state_dict())
        model.train()
        with self.autocast():
            loss = self.cross_entropy(model(adv), batch.y).mean()
        gradients = self._mean_gradient(model, loss)
        decay_of, lr = decays(model, recipe), recipe.lr_at(batch.epoch)
        weights = (p for p in model.parameters() if p.requires_grad)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(lr * gradient.add_(weight, alpha=decay_of(weight)))
        self.runtime.ranks.broadcast(list(model.buffers()))
        return model, attack

    def _mean_gradient(self, model: nn.Module, loss: Tensor) -> list[Tensor]:
        """Return the gradient of the processes' mean loss with respect to the trained weights of a model."""
        weights = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        ranks = self.runtime.ranks
        return [gradient / ranks.world_size for gradient in ranks.sum_all(found)]

    def passes(self, epoch: int) -> float:
        """Return the cost with the longest strategy, the strategy network's passes counted as the model's."""
        recipe = self.recipe
        attack = 2 * max(recipe.steps_choices)
        training = 3 * (1 + self.perturbs_weights(epoch))
        probe = 1 + 3 + _RESTARTS * (2 * recipe.steps + 1) + 2
        return attack + 1 + training + (3 + attack + probe) / recipe.strategy_every


@torch.no_grad()
def _move(model: nn.Module, gradients: list[Tensor], lr: float) -> None:
    """Take a step of SGD along gradients clipped to norm 1, unless the norm is not finite."""
    norm = nn.utils.get_total_norm(gradients)
    scale = torch.where(
        torch.isfinite(norm), (_MAX_GRADIENT_NORM / (norm + 1e-6)).clamp_max(1), 0.0
    )
    for weight, gradient in zip(
        (p for p in model.parameters() if p.requires_grad), gradients, strict=True
    ):
        weight.sub_(lr * scale * torch.where(scale > 0, gradient, 0.0))
