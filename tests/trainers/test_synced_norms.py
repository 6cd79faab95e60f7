"""BatchNorm over the global batch: which class serves, and that attacks fold it."""

from __future__ import annotations

import pytest
import torch
from attack_helpers import copy_of
from torch import nn
from training_helpers import make_model

from fastadv.ranks import Ranks
from fastadv.trainers.distributed import OwnSyncBatchNorm, with_synced_norms
from fastadv.trainers.methods import find_method, method_names


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, OwnSyncBatchNorm])
def test_attacks_fold_synced_batch_norm(kind: type[nn.Module]) -> None:
    plain, synced = make_model(0).eval(), make_model(0).eval()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(synced)
    for module in synced.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = kind
    x = torch.rand(4, 1, 8, 8)
    copies = [copy_of(model, x) for model in (plain, synced)]
    assert torch.equal(copies[0](x), copies[1](x))


@pytest.mark.parametrize(
    ("device", "twice", "kind"),
    [
        ("cpu", False, OwnSyncBatchNorm),
        ("cuda", False, nn.SyncBatchNorm),
        ("cuda", True, OwnSyncBatchNorm),
    ],
)
def test_ours_serves_where_torchs_class_does_not(
    device: str, twice: bool, kind: type[nn.Module]
) -> None:
    found = with_synced_norms(nn.BatchNorm2d(3), Ranks(0, 2, torch.device(device)), twice)
    assert type(found) is kind


def test_the_method_that_differentiates_twice_says_so() -> None:
    names = [name for name in method_names() if find_method(name).differentiates_twice]
    assert names == ["grad_align"]
