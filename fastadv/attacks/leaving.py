"""The steps after which an attack removes the images that it has broken from the batch."""

from __future__ import annotations

import torch

_STEPS_BETWEEN_LOOKS = 10  # on devices where a look waits


def is_time_to_look(step: int, device: torch.device) -> bool:
    """Whether to look for broken images after this step; on the CPU always, as it costs nothing there.

    The answer depends only on the step and the device, so that an image's result does not depend on the other
    images of its batch.
    """
    return device.type == "cpu" or step % _STEPS_BETWEEN_LOOKS == 0
