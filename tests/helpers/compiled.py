"""Keeps what tests have compiled, so that the next run compiles again only what has changed."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from paths import ROOT

FOLDER = ROOT / "build" / "tests"  # `make clean` removes it


def kept(path: Path, texts: list[str], make: Callable[[Path], None]) -> Path:
    """Return a file that is made of some texts, and make it unless an earlier call has.

    A digest of the texts gets into the name. The file of other texts is removed.

    Args:
        path: its place, with a name that the digest is put into.
        texts: all that the file depends on: sources, options, the compiler's version.
        make: writes the file to the path that it is given.
    """
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    made = path.with_name(f"{path.stem}-{digest}{path.suffix}")
    if not made.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_name(f"{made.stem}-{os.getpid()}{path.suffix}")
        make(unfinished)
        os.replace(unfinished, made)
        for other in path.parent.glob(f"{path.stem}-{'?' * len(digest)}{path.suffix}"):
            if other != made:
                other.unlink(missing_ok=True)
    return made


@functools.cache
def version_of(compiler: str) -> str:
    """What a compiler says of its version."""
    return subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout
