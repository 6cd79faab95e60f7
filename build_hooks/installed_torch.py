"""Which torch the package is built against, for CMake and for the wheel's metadata.

pip hides the environment's own packages from a build (PEP 517's isolation). They are looked up nevertheless, so
that a build never brings another torch.
"""

from __future__ import annotations

import importlib.metadata
import re
import site
import sys
import sysconfig


def show_environment() -> None:
    """Make the packages of the environment importable that the build is for."""
    sys.path += [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's packages
        sys.path.append(site.getusersitepackages())


def minor(version: str) -> str:
    """The part of a version of torch that its binary interface goes with: ``"2.13"``.

    Raises:
        ValueError: the version does not begin with two numbers.
    """
    found = re.match(r"\d+\.\d+", version)
    if found is None:
        raise ValueError(f"torch's version must begin with two numbers, got {version!r}")
    return found[0]


def installed_version() -> str | None:
    """The version of the torch that the environment has, without importing it; None where it has none."""
    before = list(sys.path)
    show_environment()
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    finally:
        sys.path[:] = before


def main() -> None:
    """Print for CMake, one a line: folder, version, minor version, CUDA version, whether the C++11 ABI is used."""
    show_environment()
    import torch

    print(torch.__path__[0])
    print(torch.__version__)
    print(minor(torch.__version__))
    print(torch.version.cuda or "")
    print(int(torch.compiled_with_cxx11_abi()))


if __name__ == "__main__":
    main()
