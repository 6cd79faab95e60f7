"""The metaclass of recipes: it checks the names of the numbers, and fills in defaults that depend on others."""

from __future__ import annotations

import inspect
from abc import ABCMeta
from collections.abc import Mapping
from typing import Any, TypeVar

from fastadv.ops.synonyms import SYNONYMS
from fastadv.ops.values import did_you_mean, norm_name_if_known

T = TypeVar("T")
# The names of these numbers in other code.
_SYNONYMS = {
    **SYNONYMS,
    **dict.fromkeys(("wd", "l2_reg", "decay"), "weight_decay"),
    **dict.fromkeys(("scheduler", "lr_schedule", "lr_scheduler"), "schedule"),
    **dict.fromkeys(("num_epochs", "n_epochs", "max_epochs"), "epochs"),
    **dict.fromkeys(("amp", "dtype"), "precision"),
    "bs": "batch_size",
    "lambda_": "lam",
}


def with_norm(kind: type, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's numbers, with fastadv's name of a norm that is written as other libraries write it."""
    found = dict(numbers)
    # A recipe without `norms` may have a field of this name for something else.
    if "norm" in found and hasattr(kind, "norms"):
        found["norm"] = norm_name_if_known(found["norm"])
    return found


class RecipeType(ABCMeta):
    """The metaclass of recipes: it checks the names of the numbers before a recipe is made."""

    def __call__(cls: type[T], *args: Any, **numbers: Any) -> T:
        """Make a recipe, with the defaults of `defaults_for`.

        Raises:
            TypeError: if the recipe does not have a given option; the message names a similar one.
        """
        known, numbers = inspect.signature(cls).parameters, with_norm(cls, numbers)
        for name in numbers:
            if name not in known:
                hint = did_you_mean(name, known, _SYNONYMS)
                raise TypeError(f"{cls.__name__} has no option {name!r}{hint}")
        defaults = cls.defaults_for("paper", numbers)  # type: ignore[attr-defined]
        made: T = super().__call__(*args, **{**defaults, **numbers})  # type: ignore[misc]
        return made

    @property
    def __signature__(cls) -> inspect.Signature:
        """The signature of the constructor, which `__call__` would hide from ``help`` and editors."""
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])
