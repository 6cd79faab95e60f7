"""When an attack of many steps looks which images it has broken, so that they leave the batch."""

from __future__ import annotations

import torch

_STEPS_BETWEEN_LOOKS = 10  # where a look waits for the device


def is_time_to_look(step: int, device: torch.device) -> bool:
    """Whether to look after this step; on the CPU always, as it costs nothing there.

    It depends on nothing else, so that an image's result does not depend on the others of its batch.
    """
    return device.type == "cpu" or step % _STEPS_BETWEEN_LOOKS == 0
