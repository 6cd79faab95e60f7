"""What the results of `fastadv eval` record of the model and the images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastadv.commands.judged import Images, JudgedModel
from fastadv.digest import digest_of
from fastadv.evaluation import Subject
from fastadv.evaluation.cost import multiply_adds
from fastadv.evaluation.samples import Samples


def subject_of(judged: JudgedModel, module: nn.Module, images: Images, samples: Samples) -> Subject:
    """The judged model and its images, as the results record them."""
    return Subject(
        run=judged.name,
        method=judged.method,
        network=judged.network,
        checkpoint=judged.checkpoint,
        weights=digest_of(module.state_dict()),
        data=images.name,
        images=samples.fingerprint(),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        multiply_adds=_cost(module, samples.source.shape),
    )


def _cost(model: nn.Module, shape: Sequence[int]) -> int:
    """The multiply-adds of one image; 0 if they cannot be counted."""
    # They are counted with tensors that have shapes and no values. A user's network may fail on these in any way.
    try:
        return multiply_adds(model, shape)
    except Exception:
        return 0
