"""Parsers of `fastadv train` that are built once for each method, where a user's process builds one and ends."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

_NOTHING: Mapping[str, Any] = {}


def keep_parsers(module: ModuleType) -> None:
    """Let the commands of this process share the parsers of `fastadv.cli.train`.

    Building one takes as long as many a test. It depends on the method and on the deciding settings alone. Parsing
    leaves it as it was, as `test_kept_parsers.py` shows.
    """
    if hasattr(module.training_parser, "built"):
        return
    build, built = module.training_parser, {}

    def training_parser(method: Any, settings: Mapping[str, Any] = _NOTHING) -> Any:
        key = method, repr(sorted(settings.items()))  # in which 1, 1.0 and True differ
        if key not in built:
            built[key] = build(method, settings)
        return built[key]

    training_parser.built = built  # type: ignore[attr-defined]
    training_parser.build = build  # type: ignore[attr-defined]
    module.training_parser = training_parser  # type: ignore[attr-defined]
