"""Adversarial feature stacking: the stack as a model, its merger's training, and what is measured about it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_helpers import CPU, make_batch, make_model, small_data, small_recipe, states_equal

import fastadv
from fastadv.cli import main
from fastadv.commands.training import _default_model
from fastadv.evaluation import delta_z
from fastadv.models import Stack, create_model, importance_ratios
from fastadv.ranks import Ranks
from fastadv.trainers import Attacked, Runtime, load_model, train
from fastadv.trainers.afs import Afs
from fastadv.trainers.checkpoint import load_checkpoint
from fastadv.trainers.phases import PhaseTimer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
DOUBLE = torch.float64


def make_stack(count: int = 3, dtype: torch.dtype = torch.float32) -> Stack:
    torch.manual_seed(9)
    return Stack([make_model(i) for i in range(count)], 4).to(dtype)


def make_afs(stack: Stack, **changes: Any) -> Afs:
    sources = {f"extractor_{i}": copy.deepcopy(e) for i, e in enumerate(stack.extractors, start=1)}
    recipe: Any = small_recipe("afs", **changes)
    return Afs(recipe, stack, Runtime(CPU, None, PhaseTimer(CPU)), sources)


def slow_logits(stack: Any, x: Tensor) -> Tensor:
    """Equations 1 and 2, with the concatenation."""
    pooled = [extractor.forward_features(x).mean((2, 3)) for extractor in stack.extractors]
    return torch.cat(pooled, 1) @ stack.merger.weight.t() + stack.merger.bias


def slow_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    picked = torch.stack([row[label] for row, label in zip(logits, y, strict=True)])
    return (logits.exp().sum(1).log() - picked).mean()


def test_a_stack_is_one_linear_layer_over_all_pooled_features() -> None:
    stack = make_stack(dtype=DOUBLE).eval()
    x = make_batch(dtype=DOUBLE).x
    assert torch.allclose(stack(x), slow_logits(stack, x), rtol=1e-12)
    assert torch.allclose(stack.forward_head(stack.forward_features(x)), stack(x), rtol=1e-12)
    assert stack.forward_head(stack.forward_features(x), pre_logits=True).shape == (8, 192)


@pytest.mark.parametrize(("mix", "weight"), [("loss", 0.5), ("loss", 0.2), ("batch", 0.25)])
def test_loss_and_gradients_equal_the_plain_version(mix: str, weight: float) -> None:
    stack = make_stack(dtype=DOUBLE)
    slow = copy.deepcopy(stack)
    batch = make_batch(dtype=DOUBLE)
    x = (batch.x + 0.05 * torch.sign(torch.sin(50 * batch.x))).clamp(0, 1)
    if mix == "batch":
        x[:2] = batch.x[:2]
    method = make_afs(stack, mix=mix, weight=weight)
    method.train_mode()

    loss = method.training_loss(batch, Attacked(x)).loss
    loss.backward()
    slow.eval().extractors.requires_grad_(False)
    adv_loss = slow_cross_entropy(slow_logits(slow, x), batch.y)
    clean_loss = slow_cross_entropy(slow_logits(slow, batch.x), batch.y)
    expected = adv_loss if mix == "batch" else weight * clean_loss + (1 - weight) * adv_loss
    expected.backward()

    assert torch.allclose(loss, expected, rtol=1e-12)
    assert torch.allclose(stack.merger.weight.grad, slow.merger.weight.grad, rtol=1e-9)
    assert torch.allclose(stack.merger.bias.grad, slow.merger.bias.grad, rtol=1e-9)
    assert all(p.grad is None for p in stack.extractors.parameters())
    assert states_equal(stack.state_dict(), slow.state_dict())  # running statistics too


@pytest.mark.parametrize("mix", ["loss", "batch"])
def test_images_weigh_and_labels_are_smoothed(mix: str) -> None:
    stack = make_stack(dtype=DOUBLE)
    method = make_afs(stack, mix=mix, weight=0.25, label_smoothing=0.3, extra_weight=2.0)
    method.train_mode()
    batch = replace(make_batch(dtype=DOUBLE), weights=torch.linspace(0.5, 1.5, 8, dtype=DOUBLE))
    adv = (batch.x + 0.05).clamp(0, 1)
    loss = method.training_loss(batch, Attacked(adv)).loss
    expected = torch.zeros((), dtype=DOUBLE)
    parts = [(1.0, adv)] if mix == "batch" else [(0.75, adv), (0.25, batch.x)]
    for weight, x in parts:
        log_p = slow_logits(stack, x).log_softmax(1)
        target = 0.7 * nn.functional.one_hot(batch.y, 4).double() + 0.3 / 4
        expected = expected - weight * (batch.weights * (target * log_p).sum(1)).mean()
    assert torch.allclose(loss, expected, rtol=1e-10)


@pytest.mark.parametrize("mix", ["loss", "batch"])
def test_the_attack_is_on_the_whole_stack_and_passes_are_as_stated(mix: str) -> None:
    stack = make_stack()
    method = make_afs(stack, mix=mix, weight=0.25, engine="eager")
    method.train_mode()
    batch = make_batch()
    seen: list[int] = []
    first: Any = stack.extractors[0]
    hook = first.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    out = method.attack(batch)
    method.training_loss(batch, out)
    hook.remove()
    look, *passes = seen  # before the attack two images show whether the model draws random numbers
    assert look == 2
    # With mix "batch" six of the eight images are attacked.
    assert sum(passes) == (8 * 3 + 2 * 8 if mix == "loss" else 6 * 3 + 8)
    assert method.passes(0) == (2 * 3 + 2 if mix == "loss" else 0.75 * 2 * 3 + 1)
    moved = (out.x != batch.x).flatten(1).any(1)
    some = 2 * [True, True, True, False]
    assert moved.tolist() == (some if mix == "batch" else [True] * 8)
    expected = fastadv.pgd_fused(
        stack,
        batch.x,
        batch.y,
        eps=0.1,
        alpha=0.05,
        steps=3,
        precision="fp32",
        engine="eager",
        seed=batch.seed("attack"),
        sample_ids=batch.ids,
    )
    assert torch.equal(out.x[moved], expected[moved])


@pytest.mark.parametrize(("weight", "clean"), [(0.5, 4), (0.7, 5), (0.35, 2), (0.99, 7), (1.0, 8)])
def test_the_clean_part_of_a_batch_is_rounded_down(weight: float, clean: int) -> None:
    method = make_afs(make_stack(), mix="batch", weight=weight)
    method.train_mode()
    batch = make_batch(8)
    moved = (method.attack(batch).x != batch.x).flatten(1).any(1)
    assert moved.sum() == 8 - clean


def test_the_clean_images_are_the_same_whatever_process_has_them() -> None:
    method = make_afs(make_stack(), mix="batch", weight=0.3)
    method.train_mode()
    batch = make_batch(12)
    whole = method.attack(batch).x
    assert int((whole == batch.x).flatten(1).all(1).sum()) == 3
    for rank in range(3):
        rows = slice(4 * rank, 4 * rank + 4)
        method.runtime = replace(method.runtime, ranks=Ranks(rank, 3))
        part = replace(batch, x=batch.x[rows], y=batch.y[rows], ids=batch.ids[rows])
        adv = method.attack(part).x
        assert torch.allclose(adv, whole[rows], rtol=0, atol=1e-6)
        assert int((adv == part.x).flatten(1).all(1).sum()) == 1


def test_awp_perturbs_the_merger() -> None:
    stack = make_stack(dtype=DOUBLE)
    method = make_afs(stack, awp_gamma=0.3)
    method.train_mode()
    batch = make_batch(dtype=DOUBLE)
    slow = copy.deepcopy(stack).eval()
    losses: list[Tensor] = []

    def update(result: Any) -> bool:
        losses.append(result.loss.detach())
        return False

    method.attack = lambda batch: Attacked(batch.x)  # type: ignore[method-assign]
    method.step(batch, update)
    weight = slow.merger.weight
    loss = slow_cross_entropy(slow_logits(slow, batch.x), batch.y)
    (slope,) = torch.autograd.grad(loss, weight)
    with torch.no_grad():
        weight += 0.3 * weight.norm() * slope / slope.norm()
        expected = slow_cross_entropy(slow_logits(slow, batch.x), batch.y)
    assert expected > 1.01 * loss
    assert torch.allclose(losses[0], expected, rtol=1e-12)
    assert method.passes(0) == 2 * 3 + 2 * 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_engine_takes_a_stack(precision: str) -> None:
    stack = make_stack().eval()
    x, y = make_batch().x, make_batch().y
    attack = fastadv.PGD(stack, 0.1, 0.05, 3, precision=precision, engine="compiled")
    plain = fastadv.PGD(stack, 0.1, 0.05, 3, precision="fp32", engine="eager")
    adv, expected = attack(x, y, seed=0), plain(x, y, seed=0)
    assert attack.engine_for(x).name == "compiled"
    same = (adv == expected).float().mean()
    assert same > (0.999 if precision == "fp32" else 0.8)  # untrained networks, small gradients


def test_training_moves_the_merger_alone_and_resumes(tmp_path: Path) -> None:
    data = small_data()
    sources = [make_model(i) for i in range(2)]
    steps: list[int] = []

    def run(name: str, **options: Any) -> Any:
        return train(
            "afs",
            small_recipe("afs"),
            data=data,
            model="stack:2*small_cnn",
            run_dir=tmp_path / name,
            progress=False,
            device="cpu",
            **options,
        )

    whole = run("whole", teacher=sources)
    for extractor, source in zip(whole.model.extractors, sources, strict=True):
        assert states_equal(extractor.state_dict(), source.state_dict())
    fresh = create_model("stack:2*small_cnn", 4, 1)
    assert not torch.equal(whole.model.merger.weight, fresh.merger.weight)  # type: ignore[union-attr]

    def stop(progress: Any) -> None:
        steps.append(progress.step)
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("parts", teacher=sources, on_step=stop)
    resumed = run("parts", resume=True)  # the extractors are in the run
    assert states_equal(whole.model.state_dict(), resumed.model.state_dict())
    assert states_equal(load_model(tmp_path / "whole").state_dict(), whole.model.state_dict())


def test_an_average_of_a_stack_stores_the_merger_alone(tmp_path: Path) -> None:
    def run(**options: Any) -> Any:
        return train(
            "afs",
            small_recipe("afs", ema_decay=0.8, **options.pop("changes", {})),
            data=small_data(),
            model="stack:2*small_cnn",
            run_dir=tmp_path,
            progress=False,
            device="cpu",
            **options,
        )

    first = run(teacher=[make_model(i) for i in range(2)], changes={"epochs": 1})
    weights = load_checkpoint(first.checkpoint).weights
    averaged = {name for name in weights if "/" in name}
    assert averaged == {"ema/merger.weight", "ema/merger.bias"}
    assert not torch.equal(weights["ema/merger.weight"], weights["merger.weight"])
    assert states_equal(load_model(tmp_path).state_dict(), first.model.state_dict())
    result = run(resume=True, allow_changes=True)
    assert not torch.equal(result.model.merger.weight, first.model.merger.weight)
    assert states_equal(load_model(tmp_path).state_dict(), result.model.state_dict())


def test_from_the_command_line_a_list_of_runs_makes_the_stack(tmp_path: Path) -> None:
    options = ["--data", "digits", "--epochs", "1", "--batch_size", "256", "--quiet"]
    options += ["--pad", "1", "--flip", "false", "--monitor_images", "20", "--monitor_steps", "1"]
    runs = [str(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        assert main(["train", "standard", "--run", run, *options]) == 0
    afs = str(tmp_path / "afs")
    words = ["train", "afs", "--run", afs, "--teacher", *runs, "--steps", "1", *options]
    assert main(words) == 0
    model = load_model(afs)
    assert isinstance(model, Stack) and len(model.extractors) == 2
    assert main(["train", "afs", "--run", afs, "--resume", "--steps", "1", *options]) == 0
    assert (
        main(["eval", afs, "--attacks", "clean", "pgd-1", "--max_examples", "20", "--quiet"]) == 0
    )


def test_the_command_line_takes_checkpoints_and_asks_for_the_model_of_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    standard = train(
        "standard",
        small_recipe("standard", epochs=1),
        data=small_data(),
        model="small_cnn",
        run_dir=tmp_path / "a",
        progress=False,
    )
    checkpoint = str(standard.checkpoint)
    assert _default_model("afs", "digits", [checkpoint] * 2, []) == "stack:small_cnn+small_cnn"
    file = tmp_path / "weights.pt"
    torch.save(standard.model.state_dict(), file)
    words = ["train", "afs", "--data", "digits", "--run", str(tmp_path / "r")]
    assert main([*words, "--teacher", str(file)]) == 2
    assert "model must be given with the state dict" in capfd.readouterr().err


def test_importance_ratios_are_parts_of_the_absolute_weights() -> None:
    stack = make_stack(2)
    with torch.no_grad():
        stack.merger.weight.fill_(1.0)
        stack.merger.weight[:, :64] = -3.0
    assert importance_ratios(stack) == pytest.approx([0.75, 0.25])
    nn.init.zeros_(stack.merger.weight)
    assert importance_ratios(stack) == [0.5, 0.5]


class Margins(nn.Module):
    """Two classes whose margin is `scale` times the mean of the image, minus half of that."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        z = self.scale * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack((torch.zeros_like(z), z), 1)


def test_delta_z_is_the_drop_of_the_margin_and_its_curvature() -> None:
    images, labels = torch.full((5, 1, 4, 4), 0.75), torch.ones(5, dtype=torch.int64)
    scales = {1.0: 2.0, 2.0: 5.0, 4.0: 8.0}
    found = delta_z(
        {radius: Margins(scale) for radius, scale in scales.items()}, (images, labels), eps=0.1
    )
    assert found.margin == pytest.approx([0.5, 1.25, 2.0], rel=1e-5)
    assert found.delta_z == pytest.approx([0.2, 0.5, 0.8], rel=1e-4)
    # Slopes .3 and .15, 1.5 apart.
    assert found.curvature == pytest.approx([-0.1], rel=1e-3)
    assert found.concave
    bent = delta_z(
        {1.0: Margins(2.0), 2.0: Margins(3.0), 3.0: Margins(9.0)}, (images, labels), eps=0.1
    )
    assert not bent.concave


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weight must lie in 0\.\.1, got 2"):
        small_recipe("afs", weight=2.0)
    with pytest.raises(ValueError, match="swa_start must be None with afs"):
        small_recipe("afs", swa_start=1)
    with pytest.raises(ValueError, match="mix must be one of loss, batch, got 'both'"):
        small_recipe("afs", mix="both")
    with pytest.raises(ValueError, match="extractors must hold at least one"):
        Stack([], 10)
    with pytest.raises(TypeError, match="Linear has no forward_features"):
        Stack([nn.Linear(1, 1)], 10)
    for name in ("stack:", "stack:0*small_cnn", "stack:x*small_cnn", "stack:small_cnn+"):
        with pytest.raises(ValueError, match="name must be 'stack:'"):
            create_model(name)
    with pytest.raises(ValueError, match="at least 3"):
        delta_z({0.1: make_model(0)}, (torch.rand(2, 1, 8, 8), torch.zeros(2).long()))
    where: dict[str, Any] = {"data": small_data(), "run_dir": tmp_path / "r", "progress": False}
    recipe = small_recipe("afs")
    with pytest.raises(TypeError, match="model must be a Stack"):
        train("afs", recipe, model="small_cnn", teacher=[make_model(0)], **where)
    with pytest.raises(ValueError, match="afs needs a extractor_2"):
        train("afs", recipe, model="stack:2*small_cnn", teacher=[make_model(0)], **where)
    with pytest.raises(ValueError, match="takes only extractor_1, extractor_2, got teacher_3"):
        train("afs", recipe, model="stack:2*small_cnn", teacher=[make_model(0)] * 3, **where)
