"""Black-box transfer: adversarial images that are made on one model and judged by another."""

from __future__ import annotations

from dataclasses import dataclass

from fastadv.evaluation.context import Model


@dataclass(frozen=True)
class Surrogate:
    """A model on which adversarial images for another are made.

    Attributes:
        model: as for ``evaluate``, with the same classes as the judged one.
        name: what it is called in a report; by default the model's class.
    """

    model: Model
    name: str = ""

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise TypeError(f"surrogate must be a model, got {type(self.model).__name__}")
        object.__setattr__(self, "name", self.name or type(self.model).__name__)


def as_surrogate(surrogate: Surrogate | Model | None) -> Surrogate | None:
    """Give a model that comes without a name its class's.

    Raises:
        TypeError: it is no model.
    """
    if surrogate is None or isinstance(surrogate, Surrogate):
        return surrogate
    return Surrogate(surrogate)
