"""Items of AFS (Liu and Zhao 2021): a linear merger over extractors of different robustness."""

from __future__ import annotations

from fastadv.reproduction.measures import Accuracy, DeltaZMeasure, ImportanceMeasure, SizeMeasure
from fastadv.reproduction.specs import RunSpec, spec, stack
from fastadv.reproduction.tables import Column, Item, RowSpec
from fastadv.trainers import MartRecipe

_WRN = "wrn_28_10"
_RADII = (3, 4, 5, 6, 7, 8)
# The numbers of MART's code for WRNs. Its default recipe is for ResNet-18.
_MART = {k: v for k, v in MartRecipe.presets["wrn"].items() if k != "code_constants"}
_WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)
_CLEAN, _PGD_20 = Column("Clean", Accuracy()), Column("PGD-20", Accuracy("pgd-20"))
_ATTACKS = (
    _CLEAN,
    Column("FGSM", Accuracy("fgsm")),
    Column("PGD-10", Accuracy("pgd-10")),
    _PGD_20,
    Column("C&W", Accuracy("cw-20")),
)
_AFS = "AFS, 6 extractors"
# (clean, PGD-20)
_SINGLE = {
    3: (92.16, 36.64),
    4: (91.17, 42.65),
    5: (90.21, 46.12),
    6: (88.52, 48.76),
    7: (87.30, 51.74),
    8: (85.15, 54.06),
}
_SIX = (91.01, 53.94)
_FROM_TABLE_6 = (
    "The paper's figures that are known here are of single networks, from a table that is not known here, "
    "and of table 6; they stand wherever their network does."
)


def _extractor(radius: int) -> RunSpec:
    """A network for one radius; the paper takes its best checkpoint."""
    return spec("pgd_at", _WRN, eps=radius / 255).at_best()


def _afs(radii: tuple[int, ...] = _RADII, weight: float = 0.5) -> RunSpec:
    return stack([_extractor(radius) for radius in radii], weight=weight)


def _singles() -> list[RowSpec]:
    return [RowSpec(f"AT, eps = {r}/255", _extractor(r), "AT") for r in _RADII]


def _published(rows: dict[str, tuple[float, float]]) -> dict[str, dict[str, dict[str, float]]]:
    return {"cifar10": {row: {"Clean": c, "PGD-20": p} for row, (c, p) in rows.items()}}


_KNOWN = {**{f"AT, eps = {r}/255": pair for r, pair in _SINGLE.items()}, _AFS: _SIX}


def _table_1() -> Item:
    return Item(
        "afs",
        "table1",
        "single networks and their stack under white-box attacks, WRN-28-10",
        (*_singles(), RowSpec(_AFS, _afs())),
        _ATTACKS,
        published=_published(_KNOWN),
        guess=f"rows and columns. {_FROM_TABLE_6}",
    )


def _table_2() -> Item:
    rows = tuple(RowSpec(f"alpha = {w:g}", _afs(weight=w), "AFS") for w in _WEIGHTS)
    return Item(
        "afs",
        "table2",
        "the weight alpha of the clean images",
        rows,
        (_CLEAN, _PGD_20),
        "trade_off",
        _published({"alpha = 0.5": _SIX}),
        f"that table 2 shows alpha, and its values. {_FROM_TABLE_6}",
    )


def _table_3() -> Item:
    sources = {
        "a standard model": RunSpec("standard", network=_WRN, repetition=1),
        "an AT model, eps = 8/255": RunSpec("pgd_at", (("eps", 8 / 255),), _WRN, repetition=1),
    }
    columns = [Column(f"PGD-20 from {t}", Accuracy("pgd-20", source=s)) for t, s in sources.items()]
    return Item(
        "afs",
        "table3",
        "black-box attacks",
        (RowSpec("AT, eps = 8/255", _extractor(8)), RowSpec(_AFS, _afs())),
        (_CLEAN, *columns),
        guess="that table 3 shows black-box attacks, and on which models they are made.",
    )


def _table_4() -> Item:
    rivals = (
        RowSpec("AT", _extractor(8)),
        RowSpec("TRADES", spec("trades", _WRN)),
        RowSpec("MART", spec("mart", _WRN, **_MART)),
        RowSpec("FAT", spec("fat", _WRN)),
        RowSpec("Free", spec("free", _WRN)),
        RowSpec("Fast", spec("fast", _WRN)),
        RowSpec("TLA", spec("tla", _WRN)),
        RowSpec("SAT", spec("sat", _WRN)),
        RowSpec("RST", spec("rst", _WRN)),
        RowSpec("AWP", spec("pgd_at", _WRN, awp_gamma=0.01)),
        RowSpec(_AFS, _afs()),
    )
    return Item(
        "afs",
        "table4",
        "comparison with other methods",
        rivals,
        _ATTACKS,
        published=_published({"AT": _SINGLE[8], _AFS: _SIX}),
        guess=f"which methods it has beside TLA, and the columns. {_FROM_TABLE_6}",
    )


def _table_5() -> Item:
    rows = (
        RowSpec("WRN-28-10", _extractor(8)),
        RowSpec("WRN-28-30", spec("pgd_at", "wrn_28_30", eps=8 / 255).at_best()),
        RowSpec(_AFS, _afs()),
        RowSpec("AFS, random eps", _afs().changed(eps_low=3 / 255)),
    )
    columns = (
        Column("Parameters (M)", SizeMeasure()),
        Column("Multiply-adds (G)", SizeMeasure("multiply_adds")),
        _CLEAN,
        _PGD_20,
    )
    return Item(
        "afs",
        "table5",
        "a stack against one large network, and a stack whose merger is attacked at random radii",
        rows,
        columns,
        published=_published({"WRN-28-10": _SINGLE[8], _AFS: _SIX}),
        guess=f"rows and columns. {_FROM_TABLE_6}",
    )


def _table_6() -> Item:
    rows = []
    for first in (8, 7, 6, 5, 4, 3):
        radii = tuple(range(first, 9))
        title = "extractor" if len(radii) == 1 else "extractors"
        rows.append(RowSpec(f"{len(radii)} {title}", _afs(radii)))
    return Item(
        "afs",
        "table6",
        "the number of extractors",
        tuple(rows),
        (_CLEAN, _PGD_20),
        "trade_off",
        _published({"6 extractors": _SIX}),
        "that the extractors of small radius are left out first.",
    )


def _figure_3() -> Item:
    radii = (1, 2, 4, 6, 8, 10, 12, 16)
    return Item(
        "afs",
        "figure3",
        "accuracy under PGD-20 over the radius",
        (*_singles(), RowSpec(_AFS, _afs())),
        tuple(Column(f"{r}/255", Accuracy("pgd-20", float(r)), x=float(r)) for r in radii),
        "lines",
        guess="that figure 3 shows the radius.",
        axes=("Radius (1/255)", "Accuracy under PGD-20 (%)"),
    )


def _figure_4() -> Item:
    steps = (1, 5, 10, 20, 50, 100)
    return Item(
        "afs",
        "figure4",
        "accuracy over the steps of PGD",
        (RowSpec("AT, eps = 8/255", _extractor(8)), RowSpec(_AFS, _afs())),
        tuple(Column(f"PGD-{k}", Accuracy(f"pgd-{k}"), x=float(k)) for k in steps),
        "lines",
        guess="that figure 4 shows the steps.",
        axes=("Steps of PGD", "Accuracy (%)"),
    )


def _figure_5(name: str, title: str, of: str, unit: str) -> Item:
    rows = tuple(RowSpec(f"alpha = {w:g}", _afs(weight=w)) for w in _WEIGHTS)
    columns = tuple(
        Column(f"eps = {r}/255", ImportanceMeasure(number, of), x=float(r))
        for number, r in enumerate(_RADII, 1)
    )
    return Item(
        "afs",
        name,
        title,
        rows,
        columns,
        "lines",
        guess="which of both halves shows which figure, and the values of alpha.",
        axes=("Radius of the extractor's training (1/255)", unit),
    )


def _figure_6() -> Item:
    columns = tuple(
        Column(f"eps = {r}/255", DeltaZMeasure(number), x=float(r))
        for number, r in enumerate(_RADII, 1)
    )
    return Item(
        "afs",
        "figure6",
        "delta z of the extractors over the radius of their training",
        (RowSpec("delta z", _afs()),),
        columns,
        "lines",
        guess="that figure 6 shows delta z.",
        axes=("Radius of the extractor's training (1/255)", "delta z"),
    )


def items() -> tuple[Item, ...]:
    """Return the items in the paper's order."""
    return (
        _table_1(),
        _table_2(),
        _table_3(),
        _table_4(),
        _table_5(),
        _table_6(),
        _figure_3(),
        _figure_4(),
        _figure_5("figure5a", "importance ratios of the extractors", "share", "Importance (%)"),
        _figure_5("figure5b", "mean absolute weights of the merger", "weight", "Mean weight"),
        _figure_6(),
    )
