"""The methods by name."""

from __future__ import annotations

import difflib
from typing import Any, TypeAlias

from fastadv.trainers.act import Act
from fastadv.trainers.afs import Afs
from fastadv.trainers.alp import Alp
from fastadv.trainers.arrest import Arrest
from fastadv.trainers.dm_at import DmAt
from fastadv.trainers.fast import Fast
from fastadv.trainers.fat import Fat
from fastadv.trainers.free import Free
from fastadv.trainers.grad_align import GradAlign
from fastadv.trainers.hat import Hat
from fastadv.trainers.kd_at import KdAt
from fastadv.trainers.las_at import LasAt
from fastadv.trainers.lbgat import Lbgat
from fastadv.trainers.mart import Mart
from fastadv.trainers.method import Method
from fastadv.trainers.n_fgsm import NFgsm
from fastadv.trainers.pgd_at import PGDAT
from fastadv.trainers.rst import Rst
from fastadv.trainers.s2o import S2o
from fastadv.trainers.sat import Sat
from fastadv.trainers.standard import Standard
from fastadv.trainers.tla import Tla
from fastadv.trainers.trades import Trades
from fastadv.trainers.vfd import Vfd
from fastadv.trainers.zero_grad import ZeroGrad

MethodClass: TypeAlias = type[Method[Any, Any]]

_METHODS: tuple[MethodClass, ...] = (
    Standard,
    PGDAT,
    Arrest,
    Trades,
    Mart,
    Alp,
    Hat,
    Vfd,
    Act,
    Lbgat,
    Afs,
    Fast,
    Free,
    Fat,
    KdAt,
    Tla,
    S2o,
    LasAt,
    Sat,
    Rst,
    NFgsm,
    GradAlign,
    ZeroGrad,
    DmAt,
)


def method_names() -> list[str]:
    """Return the names that `find_method` knows."""
    return [method.name for method in _METHODS]


def find_method(method: str | MethodClass) -> MethodClass:
    """Return a method's class.

    Args:
        method: its name ("pgd-at" is "pgd_at"), or the class itself.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything else.
    """
    if isinstance(method, type) and issubclass(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(f"method must be a name or a subclass of Method, got {method!r}")
    key = method.lower().replace("-", "_")
    for known in _METHODS:
        if known.name == key:
            return known
    close = difflib.get_close_matches(key, method_names(), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"method must be one of {', '.join(method_names())}, got {method!r}{hint}")
