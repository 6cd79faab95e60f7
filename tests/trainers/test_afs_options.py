"""AFS with random radii, parts of stacks, wide networks of any size, and extractors stopped early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_helpers import train_quickly
from test_afs import make_afs, make_stack
from training_helpers import make_batch, make_model, small_data, small_recipe, states_equal

import fastadv
from fastadv.cli import main
from fastadv.evaluation import load_results
from fastadv.models import Stack, WideResNet, create_model
from fastadv.trainers import AfsRecipe, load_model, train
from fastadv.trainers.checkpoint import CheckpointError, find_checkpoint, load_checkpoint
from fastadv.trainers.weights import load_teacher

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("mix", ["loss", "batch"])
def test_the_radius_of_a_batch_is_drawn(mix: str) -> None:
    method = make_afs(make_stack(), eps=0.1, eps_low=0.02, alpha=0.05, mix=mix, weight=0.25)
    method.train_mode()
    radii = []
    for step in range(12):
        batch = make_batch(step=step)
        radius = method.radius_of(batch)
        adv = method.attack(batch).x
        expected = fastadv.pgd_fused(
            method.stack,
            batch.x,
            batch.y,
            eps=radius,
            alpha=0.05 * radius / 0.1,
            steps=3,
            precision="fp32",
            seed=batch.seed("attack"),
            sample_ids=batch.ids,
        )
        attacked = [0, 1, 2, 4, 5, 6] if mix == "batch" else slice(None)
        assert torch.allclose(adv[attacked], expected[attacked], rtol=0, atol=1e-7)
        # An attack that fills its ball shows the radius.
        assert float((adv - batch.x).abs().max()) == pytest.approx(radius, rel=1e-4)
        radii.append(radius)
    again = [method.radius_of(make_batch(step=step)) for step in range(12)]
    assert again == radii and len(set(radii)) == 12
    assert 0.02 <= min(radii) < 0.05 and 0.07 < max(radii) <= 0.1


def test_radii_are_spread_evenly_over_the_range() -> None:
    method = make_afs(make_stack(1), eps=0.1, eps_low=0.02)
    radii = torch.tensor(
        [method.radius_of(make_batch(1, epoch=e, step=s)) for e in range(10) for s in range(100)]
    )
    counts = torch.histc((radii - 0.02) / 0.08, 10, 0, 1)
    assert float(((counts - 100) ** 2 / 100).sum()) < 27.9  # chi squared, 9 degrees, .1 %
    assert make_afs(make_stack(1), eps=0.1).radius_of(make_batch()) == 0.1


@pytest.mark.parametrize("low", [0.0, -0.1, 0.2])
def test_a_lowest_radius_out_of_range_is_refused(low: float) -> None:
    with pytest.raises(ValueError, match=r"eps_low must be > 0 and <= eps, 0\.1, got"):
        AfsRecipe(eps=0.1, eps_low=low)


def test_a_part_of_a_stack_has_its_blocks_of_the_merger() -> None:
    stack = make_stack(4, torch.float64).eval()
    some = stack.subset([1, 3])
    x = make_batch(dtype=torch.float64).x
    pooled = stack.pooled_features(x)
    weights = stack.merger.weight.split(64, 1)
    expected = pooled[0] @ weights[0].t() + pooled[2] @ weights[2].t() + stack.merger.bias
    assert torch.allclose(some(x), expected, rtol=1e-12) and not some.training
    assert torch.allclose(stack.subset([1, 2, 3, 4])(x), stack(x), rtol=1e-12)
    with torch.no_grad():
        some.merger.weight.zero_()
    assert bool(stack.merger.weight.all())


@pytest.mark.parametrize("numbers", [[], [0], [5], [2, 1], [1, 1], [1.5]])
def test_a_part_that_is_not_there_is_refused(numbers: list[Any]) -> None:
    with pytest.raises((ValueError, TypeError), match="numbers must be"):
        make_stack(4).subset(numbers)


def test_a_part_of_a_run_is_judged_apart(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    extractors = []
    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            torch.save(create_model("small_cnn", 10, 1).state_dict(), tmp_path / f"{seed}.pt")
        extractors.append(str(tmp_path / f"{seed}.pt"))
    run = tmp_path / "run"
    options = ["--model", "stack:3*small_cnn", "--teacher", *extractors, "--eps_low", "0.01"]
    options += ["--train_images", "64", "--batch-size", "32", "--steps", "1"]
    options += ["--monitor_images", "16", "--monitor_steps", "1"]
    assert train_quickly("afs", run, *options, "--quiet") == 0
    words = ["eval", str(run), "--attacks", "clean", "--quiet", "--device", "cpu"]
    words += ["--max-examples", "40"]
    assert main(words) == 0
    assert main([*words, "--extractors", "1,3"]) == 0
    (whole,), (part,) = (
        load_results(run / name) for name in ("eval.json", "extractors_1+3.eval.json")
    )
    model: Any = load_model(run)
    assert whole.subject.parameters - part.subject.parameters == 56554 + 640
    assert part.subject.run == "run extractors 1+3"
    assert part.subject.method == "afs extractors 1+3"
    images = fastadv.data.load_dataset("digits").test
    x, y = images.images[:40].float() / 255, images.labels[:40]
    with torch.no_grad():
        assert part.row.correct == int((model.subset([1, 3])(x).argmax(1) == y).sum())

    capfd.readouterr()
    for numbers in ("3,1", "a"):
        assert main([*words, "--extractors", numbers]) == 2
        assert "extractors must be numbers from 1 to 3" in capfd.readouterr().err


def test_parts_of_what_is_no_stack_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train_quickly("standard", tmp_path / "run", "--quiet") == 0
    assert main(["eval", str(tmp_path / "run"), "--extractors", "1", "--quiet"]) == 2
    assert "extractors must be left out with small_cnn, which is no stack" in capfd.readouterr().err
    words = ["--model", "small_cnn", "--weights", "x.pt", "--data", "digits", "--extractors", "1"]
    assert main(["eval", *words]) == 2
    assert "extractors must come with a run, got '1'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "depth", "widen"), [("wrn_28_30", 28, 30), ("WRN-16-4", 16, 4), ("wrn_70_16", 70, 16)]
)
def test_wide_networks_of_any_size_have_names(name: str, depth: int, widen: int) -> None:
    with torch.device("meta"):
        model = create_model(name, 7, 3)
    assert isinstance(model, WideResNet)
    assert model.num_features == 64 * widen and model.num_classes == 7
    assert len(model.block1.layer) == (depth - 4) // 6
    with torch.device("meta"):
        assert isinstance(create_model("stack:2*wrn_10_2+wrn_16_1"), Stack)


@pytest.mark.parametrize("name", ["wrn_28", "wrn_28_0", "wrn_0_1", "wrn_28_10_3", "wrn_28_x"])
def test_other_wide_names_are_unknown(name: str) -> None:
    with pytest.raises(ValueError, match=r"name must be one of .*'wrn_DEPTH_WIDTH'"):
        create_model(name)


def test_a_depth_that_cannot_be_is_told() -> None:
    with pytest.raises(ValueError, match=r"depth must be 6 \* n \+ 4 with n >= 1, got 27"):
        create_model("wrn_27_10")


def test_an_extractor_is_taken_from_its_best_checkpoint(tmp_path: Path) -> None:
    runs = []
    for seed in range(2):
        runs.append(tmp_path / f"run{seed}")
        train(
            "pgd_at",
            small_recipe("pgd_at", epochs=3, seed=seed, lr=0.3 * seed + 0.05),
            data=small_data(32, 24),
            model="small_cnn",
            run_dir=runs[-1],
            progress=False,
            device="cpu",
        )
    first = runs[0] / "checkpoints"
    (first / "best").unlink()
    (first / "best").symlink_to("step_000002")  # whichever was best, another than the last one
    best = load_model(runs[0], checkpoint="best").state_dict()
    assert not states_equal(best, load_model(runs[0]).state_dict())
    for source in (runs[0] / "best", runs[0] / "step_000002"):
        assert find_checkpoint(source) == first.resolve() / "step_000002"
        assert states_equal(load_teacher(source, make_model(0)).state_dict(), best)
    stack: Any = train(
        "afs",
        small_recipe("afs", epochs=1),
        data=small_data(32, 16),
        model="stack:2*small_cnn",
        teacher=[runs[0] / "best", str(runs[1] / "latest")],
        run_dir=tmp_path / "afs",
        progress=False,
        device="cpu",
    ).model
    assert states_equal(stack.extractors[0].state_dict(), best)
    assert states_equal(stack.extractors[1].state_dict(), load_model(runs[1]).state_dict())
    with pytest.raises((CheckpointError, FileNotFoundError), match="no such file or directory"):
        load_teacher(tmp_path / "best", make_model(0))
    with pytest.raises(CheckpointError, match="no such file or directory"):
        find_checkpoint(runs[0] / "step_000009")
    assert load_checkpoint(find_checkpoint(runs[0] / "latest")).path.name != "step_000002"
