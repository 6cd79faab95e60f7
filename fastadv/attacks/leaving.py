"""The steps after which an attack removes images that it has broken, and the sizes that its batches then have."""

from __future__ import annotations

import torch

_STEPS_BETWEEN_LOOKS = 10  # on devices where a look waits
_SMALLEST = 8  # batches of a copy that is proven at each size are not made smaller than this


def is_time_to_look(step: int, device: torch.device) -> bool:
    """Whether to look for broken images after this step; on the CPU always, as it costs nothing there.

    The answer depends only on the step and the device, so that an image's result does not depend on the other
    images of its batch.
    """
    return device.type == "cpu" or step % _STEPS_BETWEEN_LOOKS == 0


def batch_sizes(size: int, live: bool) -> list[int]:
    """The sizes of batches at each of which an engine may have to be proven or recorded, the largest first.

    Args:
        size: the largest.
        live: whether the live model runs. It takes any size. A copy gets few sizes.
    """
    if live:
        return list(range(size, 0, -1)) if size <= _SMALLEST else _eighths(size)
    sizes = (size * eighths // 8 for eighths in (6, 4, 3, 2, 1) if size * eighths % 8 == 0)
    return [size, *(one for one in sizes if one >= _SMALLEST)]


def fine_size(rows: int) -> int:
    """The smallest batch for a number of rows, of an engine that takes any size without another proof.

    At most an eighth of a batch is empty. There are few sizes, as the libraries prepare each size once.
    """
    step = 1 << max(rows.bit_length() - 4, 0)
    return -(-rows // step) * step


def _eighths(size: int) -> list[int]:
    parts = [size * eighths // 8 for eighths in range(8, 0, -1)]
    while parts[-1] > 1:
        parts.append(parts[-1] // 2)
    return parts
