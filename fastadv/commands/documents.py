"""The output of a command as one JSON document, for scripts."""

from __future__ import annotations

import json
from typing import Any


def as_json(content: dict[str, Any] | list[Any]) -> str:
    """Return the document as text, with a newline at its end."""
    return json.dumps(content, indent=2) + "\n"
