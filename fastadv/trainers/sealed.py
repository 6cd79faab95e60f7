"""Reading and writing JSON files with a hash of their own content, the seal: `run.json` and `meta.json`.

The entry "sha256" is the hash of all other entries. A file whose hash is wrong is refused. Files in format 1,
which older versions wrote, have no seal.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fastadv
from fastadv.digest import SEAL, digest_of_json, sealed
from fastadv.files import json_of

FORMAT = 2
_UNSEALED = 1


class CheckpointError(RuntimeError):
    """A checkpoint or a run is absent, damaged or in another format; the message names the file and the reason."""


def sealed_json(content: Mapping[str, Any]) -> str:
    """Return the text of a sealed file with this content, the format and the hash.

    Args:
        content: JSON types; tuples become lists.
    """
    return json.dumps(sealed({"format": FORMAT, **content}), indent=2) + "\n"


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a sealed file.

    Returns:
        The content and the format, without the hash.

    Raises:
        CheckpointError: if the file is damaged, or has another format. The message names the file.
        OSError: if the file cannot be read.
    """
    try:
        content = json_of(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged, {error}") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version not in (FORMAT, _UNSEALED) or isinstance(version, bool):
        raise CheckpointError(_other_format(path, version, content))
    seal = content.pop(SEAL, None)
    if seal is None and version == _UNSEALED:
        warnings.warn(
            f"{path}: written by an older fastadv in format {_UNSEALED}, which has no hash of its own content; "
            "damage to it would not be noticed",
            stacklevel=2,
        )
    elif seal != digest_of_json(content):
        raise CheckpointError(
            f"{path}: damaged or changed, its content does not have the SHA-256 of the entry {SEAL!r}; "
            "take another copy of it"
        )
    return content


def _other_format(path: Path, version: Any, content: Any) -> str:
    versions = content.get("versions") if isinstance(content, dict) else None
    writer = versions.get("fastadv") if isinstance(versions, dict) else None
    by = f"; it was written by fastadv {writer}" if writer else ""
    return (
        f"{path}: format must be {_UNSEALED} or {FORMAT}, which fastadv {fastadv.__version__} reads, got "
        f"{version!r}{by}. Open it with the version that wrote it, or begin a new run in another directory"
    )
