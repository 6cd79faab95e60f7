"""The metadata that only a build can know: a wheel fits the torch it was built against, and no other.

The compiled part uses torch's C++ interface, which changes with every minor version. The reasons are in
docs/wheels.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from installed_torch import installed_version, minor

ROOT = Path(__file__).resolve().parent.parent
LOCAL_VERSION = "FASTADV_LOCAL_VERSION"  # an environment variable of the build


class Provider:
    """Gives scikit-build-core the version and the dependency on torch."""

    def __init__(self) -> None:
        self._of_source = True

    def build_state(self, state: str) -> None:
        """Be told what is being built: an sdist, a wheel, or the metadata of one."""
        self._of_source = state == "sdist"

    def dynamic_wheel(self, settings: Mapping[str, Any]) -> dict[str, bool]:
        """The fields in which a wheel may differ from the sdist it is built from."""
        return {"dependencies": True}

    def dynamic_metadata(
        self, settings: Mapping[str, Any], project: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Fill in the version, and for a wheel the torch that it needs."""
        version = _version_of_source()
        torch = None if self._of_source else installed_version()
        if torch is None:  # CMake will say what is missing
            return {"version": version}
        # Wheels for several torches can only lie in one index under different versions.
        if os.environ.get(LOCAL_VERSION) == "1":
            version += f"+torch{minor(torch)}"
        return {"version": version, "dependencies": [f"torch=={minor(torch)}.*"]}


def _version_of_source() -> str:
    text = (ROOT / "fastadv" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise ValueError("fastadv/__init__.py must set __version__")
    return found[1]
