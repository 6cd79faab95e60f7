"""SHA-256 of named tensors and of JSON content, and JSON content that carries its own hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SEAL = "sha256"


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of a state dict's names and values, whatever their memory layout."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        plain = value.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_json(content: Mapping[str, Any]) -> str:
    """Return a SHA-256 of JSON types, whatever the order of their names."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return content as JSON types with an entry "sha256", the hash of all other entries."""
    plain = json.loads(json.dumps(content))
    return {**plain, SEAL: digest_of_json(plain)}


def is_unchanged(content: Mapping[str, Any]) -> bool:
    """Whether content has the hash that it had when it was written. Content without a hash counts as unchanged."""
    plain = {name: value for name, value in content.items() if name != SEAL}
    return SEAL not in content or content[SEAL] == digest_of_json(plain)


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `sealed` without its hash; content that has no hash is returned as it is.

    Raises:
        ValueError: if it was changed after it was written.
    """
    if not is_unchanged(content):
        raise ValueError(
            f"damaged or changed after it was written: it does not have the SHA-256 of its entry {SEAL!r}. Take "
            "another copy, or write it again"
        )
    return {name: value for name, value in content.items() if name != SEAL}
