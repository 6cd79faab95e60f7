"""The files of `Attack.save`: writing them, and reading them into a loader."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastadv.files import write_atomically
from fastadv.ops.values import check_bool, check_path, integer, shown

_IMAGES = ("adv_inputs", "clean_inputs")


def write_results(path: str | os.PathLike[str], content: dict[str, Tensor], save_type: str) -> None:
    """Write the results of `Attack.save` into a file for ``torch.load``, the images as floats or as bytes."""
    if save_type == "int":
        for name in content.keys() & set(_IMAGES):
            content[name] = (content[name] * 255).round().to(torch.uint8)
    buffer = io.BytesIO()
    torch.save({**content, "save_type": save_type}, buffer)
    write_atomically(path, buffer.getvalue())


def load_results(
    load_path: str | os.PathLike[str],
    batch_size: int = 128,
    shuffle: bool = False,
    normalize: Mapping[str, Sequence[float]] | None = None,
    load_predictions: bool = False,
    load_clean_inputs: bool = False,
) -> DataLoader[tuple[Tensor, ...]]:
    """Read a file of `Attack.save`, or of torchattacks' ``save``, into a loader.

    Args:
        load_path: the file.
        batch_size: images in a batch.
        shuffle: give the images in a random order, which is new in each pass.
        normalize: ``{"mean": ..., "std": ...}`` per channel, by which the images are normalised. In the file they
            are in 0..1.
        load_predictions: add the predicted classes, which ``save`` kept with ``save_predictions``.
        load_clean_inputs: add the clean images, which ``save`` kept with ``save_clean_inputs``.

    Returns:
        A loader of adversarial images [B, C, H, W], labels [B], and then what was added, in this order.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file lacks an entry, or ``normalize`` lacks mean or std.
    """
    check_path("load_path", load_path)
    kept = {
        "preds": check_bool("load_predictions", load_predictions),
        "clean_inputs": check_bool("load_clean_inputs", load_clean_inputs),
    }
    if normalize is not None and not {"mean", "std"} <= set(normalize):
        raise ValueError(f"normalize must have mean and std, got {shown(normalize)}")
    content = torch.load(load_path, map_location="cpu", weights_only=True)
    names = ["adv_inputs", "labels", *(name for name, wanted in kept.items() if wanted)]
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(f"load_path must be a file with {missing[0]}, which {load_path} lacks")
    parts = []
    for name in names:
        values = content[name]
        if name in _IMAGES:
            values = values.float() / 255 if values.dtype == torch.uint8 else values
            if normalize is not None:
                mean, std = (
                    torch.tensor(normalize[key], dtype=values.dtype, device=values.device)
                    for key in ("mean", "std")
                )
                values = (values - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        parts.append(values)
    size = integer("batch_size", batch_size, at_least=1)
    return DataLoader(TensorDataset(*parts), size, shuffle=check_bool("shuffle", shuffle))
