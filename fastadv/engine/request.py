"""The engine and the precision that a caller asks for."""

from __future__ import annotations

from typing import NamedTuple


class EngineRequest(NamedTuple):
    """The options that the caller has asked for, in the words of `fastadv.PGD`."""

    precision: str
    engine: str
    train_mode: bool | str

    @property
    def is_free(self) -> bool:
        """Whether the engine is left to us."""
        return self.engine in ("auto", "fixed")
