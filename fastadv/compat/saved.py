"""The files of `Attack.save`: writing them, and reading them into a loader."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastadv.files import check_archive, write_atomically
from fastadv.ops.values import check_bool, check_path, integer, shown

_IMAGES = ("adv_inputs", "clean_inputs")
_SHOWN = 200  # characters of torch's error, which goes on with how to run the code in a file


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
        ValueError: if the file is damaged or another one, if it lacks an entry, or if ``normalize`` lacks mean or
            std, or has another number of them than the images have channels.
    """
    check_path("load_path", load_path)
    kept = {
        "preds": check_bool("load_predictions", load_predictions),
        "clean_inputs": check_bool("load_clean_inputs", load_clean_inputs),
    }
    if normalize is not None and not {"mean", "std"} <= set(normalize):
        raise ValueError(f"normalize must have mean and std, got {shown(normalize)}")
    names = ["adv_inputs", "labels", *(name for name, wanted in kept.items() if wanted)]
    content = _tensors_in(load_path, names)
    parts = []
    for name in names:
        values = content[name]
        if name in _IMAGES:
            values = values.float() / 255 if values.dtype == torch.uint8 else values
            if normalize is not None:
                mean, std = (
                    _per_channel(f"normalize[{key!r}]", normalize[key], values)
                    for key in ("mean", "std")
                )
                if not (std > 0).all():
                    raise ValueError(f"normalize['std'] must be > 0, got {normalize['std']}")
                values = (values - mean) / std
        parts.append(values)
    size = integer("batch_size", batch_size, at_least=1)
    return DataLoader(TensorDataset(*parts), size, shuffle=check_bool("shuffle", shuffle))


def _tensors_in(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, Tensor]:
    """Read some entries of a file of `Attack.save`, which have one value for each image."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        check_archive(Path(path))
    except OSError:
        raise
    except Exception as error:  # a damaged or foreign file can raise nearly anything
        said = " ".join(str(error).split())[:_SHOWN]
        raise ValueError(
            f"load_path must be a file of save, got {os.fspath(path)}, which cannot be read: {said}"
        ) from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(
            f"load_path must be a file of save, got {os.fspath(path)}, which holds a {kind}"
        )
    for name in names:
        if not isinstance(content.get(name), Tensor):
            raise ValueError(f"load_path must be a file with {name}, which {path} lacks")
    found = {name: content[name] for name in names}
    if len({values.shape[:1] for values in found.values()}) > 1:
        lengths = ", ".join(f"{name} {list(values.shape)}" for name, values in found.items())
        raise ValueError(
            f"load_path must be a file with one value for each image, got {os.fspath(path)} with {lengths}"
        )
    return found


def _per_channel(name: str, numbers: Sequence[float], images: Tensor) -> Tensor:
    """Numbers for the channels of images [B, C, H, W], as [1 or C, 1, 1]."""
    try:
        found = torch.tensor(numbers, dtype=images.dtype, device=images.device)
    except (TypeError, ValueError, RuntimeError):
        found = images.new_empty(0)
    channels = images.shape[1]
    if found.dim() != 1 or len(found) not in (1, channels) or not found.isfinite().all():
        raise ValueError(
            f"{name} must be a list of one number, or of one for each of the {channels} channels, got "
            f"{shown(numbers)}"
        )
    return found.view(-1, 1, 1)
