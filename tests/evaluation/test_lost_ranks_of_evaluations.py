"""An evaluation whose processes lose each other says how an evaluation goes on, and not how a training does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastadv import lost_ranks
from fastadv.commands import evaluation
from fastadv.commands.result_keeper import ResultKeeper
from fastadv.lost_ranks import LostRanksError, naming_lost_ranks
from fastadv.ranks import Ranks


@contextmanager
def losing(device: torch.device, timeout: float, remedy: str) -> Iterator[Ranks]:
    with naming_lost_ranks(dist.HashStore(), 0, 2, timeout, remedy):
        raise LostRanksError("Connection reset by peer")
    yield Ranks(device=device)


def test_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_ranks, "_TIMEOUT", 0.0)
    monkeypatch.setattr(evaluation, "joined_ranks", losing)
    keeper = ResultKeeper.__new__(ResultKeeper)  # it is not reached
    with (
        pytest.raises(LostRanksError, match="rank 0 got no answer from ranks 0, 1") as caught,
        evaluation._joined_work(torch.device("cpu"), keeper, tmp_path),
    ):
        pass
    assert "The same command goes on" in str(caught.value)
    assert "checkpoint" not in str(caught.value) and "timeout" not in str(caught.value)
