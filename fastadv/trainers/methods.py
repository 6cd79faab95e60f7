"""The list of all training methods, and finding one by its name."""

from __future__ import annotations

from typing import Any, TypeAlias

from fastadv.ops.values import did_you_mean
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
from fastadv.trainers.own_method import check_method, label_of, own_method
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
        method: the method's name ("pgd-at" is "pgd_at"); "package.module:Class" for a method of your own; or the
            class itself. "package.module:Class" is imported, so it must not be read from a file that others wrote.

    Returns:
        The class, a subclass of `Method`.

    Raises:
        ValueError: if the name is unknown, or a method of your own has no name.
        ImportError: if a method of your own cannot be imported.
        TypeError: if the argument is no name and no subclass of `Method`.
    """
    if isinstance(method, type) and issubclass(method, Method):
        check_method(method)
        return method
    if not isinstance(method, str):
        raise TypeError(f"method must be a name or a subclass of Method, got {method!r}")
    if ":" in method:
        return own_method(method, tuple(method_names()))
    key = method.lower().replace("-", "_")
    for known in _METHODS:
        if known.name == key:
            return known
    known_names = method_names()
    raise ValueError(
        f"method must be one of {', '.join(known_names)}, or package.module:Class, got {method!r}"
        f"{did_you_mean(method, known_names)}"
    )


def command_name(method: MethodClass) -> str:
    """Return a method's name on the command line: its own name, or "package.module:Class"."""
    return method.name if method in _METHODS else label_of(method) or method.name


def own_code(method: MethodClass) -> dict[str, str]:
    """Return the facts that a run records about the code of a method that is not fastadv's own."""
    label = None if method in _METHODS else label_of(method)
    return {} if label is None else {"method_code": label}
