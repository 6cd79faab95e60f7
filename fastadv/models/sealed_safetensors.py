"""safetensors files with a hash of their own content: safetensors itself has no checksum.

The header of a file that fastadv writes has an entry "fastadv_sha256" among its metadata: the SHA-256 of all other
entries of the header and of the tensors' bytes. So a file that was damaged, for example by copying, is refused.
Files that other programs wrote have no such entry, and are read without this check.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

_SEAL = "fastadv_sha256"
_METADATA = "__metadata__"
_LENGTH = 8  # bytes of the header's length, of which safetensors makes the header a multiple
_BLOCK = 1 << 20


def sealed_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file with its hash.

    Args:
        tensors: by name, contiguous and without shared memory.
        metadata: text by name, for the header.
    """
    from safetensors.torch import save

    plain = save(dict(tensors), metadata=dict(metadata))
    start = _LENGTH + int.from_bytes(plain[:_LENGTH], "little")
    header = json.loads(plain[_LENGTH:start])
    digest = _digest_of(header)
    digest.update(memoryview(plain)[start:])
    header[_METADATA] = {**header.get(_METADATA, {}), _SEAL: digest.hexdigest()}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    return len(text).to_bytes(_LENGTH, "little") + text + plain[start:]


def check_seal(path: Path) -> None:
    """Check the content of a safetensors file by its hash, if it has one.

    Args:
        path: a file that safetensors can read.

    Raises:
        ValueError: if it is damaged.
    """
    with path.open("rb") as file:
        header = _header_of(file)
        seal = header.get(_METADATA, {}).pop(_SEAL, None)
        if seal is None:
            return
        digest = _digest_of(header)
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != seal:
        raise ValueError(
            f"it is damaged, its content does not have the SHA-256 of its entry {_SEAL!r}; take another copy of it"
        )


def _header_of(file: BinaryIO) -> dict[str, Any]:
    header = json.loads(file.read(int.from_bytes(file.read(_LENGTH), "little")))
    assert isinstance(header, dict)  # safetensors has read the file before
    return header


def _digest_of(header: Mapping[str, Any]) -> Any:
    """A SHA-256 of a header without its hash, with entries sorted; to be continued with the tensors' bytes."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode())
