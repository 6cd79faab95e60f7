"""The demo: three ways to train on small digits, judged and compared in about two minutes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from fastadv.commands import run_evaluation, run_report
from fastadv.trainers import (
    PGDAT,
    AdversarialRecipe,
    Arrest,
    ArrestRecipe,
    Recipe,
    Standard,
    train,
)
from fastadv.trainers.schedules import MultiStep

# A quarter of .435, the smallest L-infinity distance between two training digits of different
# classes: no two such images come near each other, so a robust classifier exists. Fixed once,
# from the training images alone.
_EPS = 0.1
_IMAGES = 100  # of the 500 test images; AutoAttack takes most of the demo's time on them


def _for_digits(recipe: Recipe) -> Recipe:
    """Change the numbers of a recipe that do not suit 1,297 images of 8x8 pixels."""
    return replace(
        recipe,
        batch_size=64,  # 20 steps an epoch instead of 10
        pad=1,  # 4 pixels would be half of the image
        flip=False,  # a mirrored digit is no digit
    )


def _attacked(recipe: AdversarialRecipe) -> AdversarialRecipe:
    """Set the radius of the demo, and steps of a quarter of it, as in the papers' recipes."""
    adapted = _for_digits(recipe)
    assert isinstance(adapted, AdversarialRecipe)
    return replace(adapted, eps=_EPS, alpha=_EPS / 4)


def demo_recipes() -> dict[str, Recipe]:
    """Return the demo's recipes by the names of their methods."""
    # A third of the papers' 100 epochs, with the drops of the learning rate at the same parts.
    shorter = MultiStep((23, 27), 0.1)
    return {
        Standard.name: replace(_for_digits(Recipe()), epochs=30, schedule=shorter),
        PGDAT.name: replace(_attacked(AdversarialRecipe()), epochs=30, schedule=shorter),
        Arrest.name: _attacked(ArrestRecipe()),
    }


def run_demo(out: str = "demo_run", quiet: bool = False) -> str:
    """Train a standard network, PGD-AT and ARREST on digits, attack all three, compare them.

    Args:
        out: folder for the three runs, the table and the plot; runs of an earlier demo in it are
            replaced.
        quiet: show no progress.

    Returns:
        The table and the paths of the files, as text.
    """
    began = time.perf_counter()
    with _one_thread():
        table, report = _train_and_compare(Path(out), quiet)
    return "\n".join(
        [
            table,
            "",
            f"{_IMAGES} test images, so differences of a few percent say nothing. Digits this easy",
            "lose no clean accuracy to PGD-AT, so ARREST has no accuracy to win back; it needs CIFAR.",
            "",
            *report,
            f"checkpoints: {out}/*/checkpoints/latest",
            f"took {time.perf_counter() - began:.0f} s",
        ]
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: passes this small take less time than threads need to wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train_and_compare(folder: Path, quiet: bool) -> tuple[str, list[str]]:
    """The table, and lines with the paths of report and plot, or with the reason why there is no report."""
    recipes = demo_recipes()
    for name, recipe in recipes.items():
        run = folder / name
        train(
            name,
            recipe,
            data="digits",
            model="small_cnn",
            run_dir=run,
            teacher=folder / Standard.name if name == Arrest.name else None,
            overwrite=(run / "run.json").exists(),
            progress=not quiet,
        )
    for name in recipes:
        if not quiet:
            print(f"evaluating {name} on {_IMAGES} test images", file=sys.stderr)
        run_evaluation(str(folder / name), eps=_EPS, max_examples=_IMAGES, quiet=quiet)
    runs = [str(folder / name) for name in recipes]
    try:
        table = run_report(runs, out=str(folder))
    except ImportError as error:
        return run_report(runs), [f"There is no report and no plot: {error}"]
    return table, [f"report: {folder / 'report.html'}", f"plot: {folder / 'trade_off.png'}"]
