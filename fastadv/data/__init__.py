"""Data sets, and the loader that serves them from the device."""

from __future__ import annotations

from fastadv.data.batches import Batch, Batches
from fastadv.data.cifar import load_cifar10, load_cifar100
from fastadv.data.datasets import dataset_names, load_dataset
from fastadv.data.digits import load_digits
from fastadv.data.errors import DataFormatError
from fastadv.data.folder import FolderImages
from fastadv.data.hub import HubImages, load_hub
from fastadv.data.images import ImageData, Splits, from_dataset, from_tensors
from fastadv.data.loader import Loader
from fastadv.data.npz import load_npz
from fastadv.data.pseudo_labels import load_extra, load_pseudo_labels
from fastadv.data.selection import split_validation, subset
from fastadv.data.streaming import StreamedData, StreamLoader
from fastadv.data.training_folders import load_folders

__all__ = [
    "Batch",
    "Batches",
    "DataFormatError",
    "FolderImages",
    "HubImages",
    "ImageData",
    "Loader",
    "Splits",
    "StreamLoader",
    "StreamedData",
    "dataset_names",
    "from_dataset",
    "from_tensors",
    "load_cifar10",
    "load_cifar100",
    "load_dataset",
    "load_digits",
    "load_extra",
    "load_folders",
    "load_hub",
    "load_npz",
    "load_pseudo_labels",
    "split_validation",
    "subset",
]
