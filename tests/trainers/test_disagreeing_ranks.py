"""Processes that were started with other arguments or data than the first are refused, all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import spawn
from run_helpers import run
from training_helpers import make_model, small_data

from fastadv.data import Splits
from fastadv.evaluation import evaluate
from fastadv.ranks import Ranks
from fastadv.trainers import Settings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def other_images(rank: int) -> Splits:
    data = small_data()
    data.train.images[0, 0, 0, 0] += rank
    return data


def judged(seed: int = 0, eps: float = 0.1, model: int = 0, images: int = 24) -> Callable[[], Any]:
    data = small_data().test
    pair = (data.images[:images].float() / 255, data.labels[:images])
    options: dict[str, Any] = {"eps": eps, "seed": seed, "sharded": True, "progress": False}
    return lambda: evaluate(make_model(model), pair, ("clean", "fgsm"), **options)


def attempts(rank: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """What each process tries, and the name that the message must have."""
    here = folder / "run"
    return {
        "lr": lambda: run("standard", here, changes={"lr": 0.1 + rank}),
        "batch_size": lambda: run("standard", here, changes={"batch_size": 16 << rank}),
        "data.pixels": lambda: run("standard", here, data=other_images(rank)),
        "method": lambda: run(["standard", "pgd_at"][rank], here),
        "log_every": lambda: run("standard", here, settings=Settings(log_every=1 + rank)),
        "seed": judged(seed=rank),
        "eps": judged(eps=0.1 + 0.1 * rank),
        "model": judged(model=rank),
        "data": judged(images=24 - rank),
    }


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    for name, attempt in attempts(rank, Path(folder)).items():
        with pytest.raises(
            ValueError, match=f"^{name} must be the same in all processes, got .* in rank 1$"
        ):
            attempt()
    assert not (Path(folder) / "run").exists()
    assert judged()()["clean"].n == 24
    dist.destroy_process_group()


@pytest.mark.processes
def test_what_differs_between_processes_is_named_in_all_of_them(tmp_path: Path) -> None:
    spawn(process, (str(tmp_path),), 2)


def test_one_process_agrees_with_itself() -> None:
    Ranks().check_same({"a": object()})
