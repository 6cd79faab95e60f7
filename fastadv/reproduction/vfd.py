"""Items of VFD-Adv (Cao et al. 2022): adversarial training guided by the features of a vanilla model."""

from __future__ import annotations

from typing import Any

from fastadv.reproduction.measures import Accuracy
from fastadv.reproduction.specs import RunSpec, spec, spec_with_teachers
from fastadv.reproduction.tables import Column, Item, RowSpec

_BASES = {"ALP": "alp", "TRADES": "trades", "MART": "mart", "HAT": "hat"}
_LAMBDAS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.04)
_BETAS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
_LAYERS = ("layer1", "layer2", "layer3", "layer4", "logits")
_RADII = (1, 2, 4, 6, 8, 10, 12, 16)
_WHITE = (
    Column("PGD-20", Accuracy("pgd-20")),
    Column("C&W", Accuracy("cw-20")),
    Column("Clean", Accuracy()),
)
_CLEAN_FIRST = (_WHITE[2], _WHITE[0], _WHITE[1])
# (PGD-20, C&W, clean)
_TABLE_1 = {
    "ALP": (51.8, 29.7, 83.7),
    "ALP + VFD": (52.6, 33.1, 88.3),
    "TRADES": (53.5, 53.2, 81.1),
    "TRADES + VFD": (54.7, 55.5, 87.5),
    "MART": (55.4, 46.3, 82.3),
    "MART + VFD": (54.6, 47.1, 88.7),
    "HAT": (49.8, 44.9, 83.9),
    "HAT + VFD": (52.2, 46.5, 88.3),
}


def _vanilla() -> RunSpec:
    return spec("standard")


def _base(name: str, **changes: Any) -> RunSpec:
    """A base method, which for HAT needs the standard model."""
    return (
        spec_with_teachers("hat", _vanilla(), **changes) if name == "hat" else spec(name, **changes)
    )


def _vfd(base: str = "trades", **changes: Any) -> RunSpec:
    return spec_with_teachers("vfd", _vanilla(), base=base, **changes)


def _guided(base: str) -> dict[str, RunSpec]:
    """KD, BGAT and LBGAT on a base method. BGAT and LBGAT on TRADES are the published methods themselves."""
    around: dict[str, Any] = {} if base == "trades" else {"base": base}
    beta: dict[str, Any] = {"beta": 6.0} if base == "trades" else {}
    return {
        "KD": spec_with_teachers(
            "kd_at", _vanilla(), base=base, label_weight=1.0, robust_weight=0.0
        ),
        "BGAT": spec_with_teachers("lbgat", _vanilla(), fixed=True, **beta, **around),
        "LBGAT": spec_with_teachers("lbgat", _vanilla(), **beta, **around),
    }


def _rows() -> tuple[RowSpec, ...]:
    """The 21 rows: the vanilla model, and each base alone, with KD, BGAT, LBGAT and VFD."""
    rows = [RowSpec("Vanilla", _vanilla())]
    for title, base in _BASES.items():
        rows.append(RowSpec(title, _base(base), title))
        rows += [RowSpec(f"{title} + {name}", run, title) for name, run in _guided(base).items()]
        rows.append(RowSpec(f"{title} + VFD", _vfd(base), title))
    return tuple(rows)


def _on(network: str, rows: tuple[RowSpec, ...]) -> tuple[RowSpec, ...]:
    return tuple(RowSpec(row.label, row.run.on(network), row.group) for row in rows)


def _table_1() -> Item:
    names = [column.label for column in _WHITE]
    figures = {row: dict(zip(names, values, strict=True)) for row, values in _TABLE_1.items()}
    return Item(
        "vfd",
        "table1",
        "white-box attacks, ResNet-18",
        _rows(),
        _WHITE,
        published={"cifar10": figures},
        guess="the order of the 21 rows; that KD distills from the vanilla model alone, with weight .1; and "
        "that the 20 steps of C&W are on the margin in linf.",
    )


def _table_2() -> Item:
    source = RunSpec("standard", repetition=1)
    robust = RunSpec("pgd_at", repetition=1)
    return Item(
        "vfd",
        "table2",
        "black-box attacks, ResNet-18",
        _rows(),
        (
            Column("PGD-20 from a vanilla model", Accuracy("pgd-20", source=source)),
            Column("C&W from a vanilla model", Accuracy("cw-20", source=source)),
            Column("PGD-20 from an AT model", Accuracy("pgd-20", source=robust)),
        ),
        guess="on which models the adversarial images are made, and the columns.",
    )


def _figure_2() -> Item:
    rows = [RowSpec(f"TRADES, beta = {b:g}", spec("trades", beta=b), "TRADES") for b in _BETAS]
    rows += [RowSpec(f"TRADES + VFD, beta = {b:g}", _vfd(beta=b), "TRADES + VFD") for b in _BETAS]
    published = {
        "cifar10": {
            "TRADES, beta = 6": {"Clean": 81.1, "PGD-20": 53.5},
            "TRADES + VFD, beta = 6": {"Clean": 87.5, "PGD-20": 54.7},
        }
    }
    return Item(
        "vfd",
        "figure2",
        "the trade-off of TRADES over beta, without and with VFD",
        tuple(rows),
        _CLEAN_FIRST[:2],
        "trade_off",
        published,
        "that figure 2 shows the weights beta 1 to 6; the points of beta 6 are those of table 1.",
    )


def _figure_3() -> Item:
    rows = []
    for title, base in _BASES.items():
        rows += [RowSpec(title, _base(base), title), RowSpec(f"{title} + VFD", _vfd(base), title)]
    columns = tuple(Column(f"{r}/255", Accuracy("pgd-20", float(r)), x=float(r)) for r in _RADII)
    return Item(
        "vfd",
        "figure3",
        "accuracy under PGD-20 over the radius",
        tuple(rows),
        columns,
        "lines",
        guess="that figure 3 shows the radius of the attack.",
        axes=("Radius (1/255)", "Accuracy under PGD-20 (%)"),
    )


def _figure_4a() -> Item:
    rows = [RowSpec("TRADES", spec("trades"))]
    # VFD-Adv takes the last block by default. It also runs where no layer can be chosen.
    rows += [
        RowSpec(f"k = {layer}", _vfd() if layer == "layer4" else _vfd(layer=layer))
        for layer in _LAYERS
    ]
    return Item(
        "vfd",
        "figure4a",
        "the layer k whose features are distilled",
        tuple(rows),
        _CLEAN_FIRST[:2],
        guess="the layers on the axis, and the base TRADES.",
    )


def _figure_4b() -> Item:
    return Item(
        "vfd",
        "figure4b",
        "the weight lambda of the distillation",
        tuple(RowSpec(f"lambda = {lam:g}", _vfd(lam=lam), "TRADES + VFD") for lam in _LAMBDAS),
        _CLEAN_FIRST[:2],
        "trade_off",
        guess="the values of lambda between 0 and .04, and the base TRADES.",
    )


def _vgg16() -> Item:
    return Item(
        "vfd",
        "vgg16",
        "white-box attacks, VGG-16",
        _on("vgg16_bn", _rows()),
        _WHITE,
        guess="that it has the rows and columns of table 1.",
    )


def items() -> tuple[Item, ...]:
    """Return the items in the paper's order."""
    return (
        _table_1(),
        _table_2(),
        _figure_2(),
        _figure_3(),
        _figure_4a(),
        _figure_4b(),
        _vgg16(),
    )
