"""Items of ACT (Arani et al. 2020): a robust and a natural model that learn from each other."""

from __future__ import annotations

from fastadv.reproduction.measures import Accuracy, AnalysisMeasure, SmallestPerturbationMeasure
from fastadv.reproduction.specs import RunSpec, spec
from fastadv.reproduction.tables import Column, Item, RowSpec
from fastadv.trainers import ActRecipe

_CLEAN, _PGD_20 = Column("Clean", Accuracy()), Column("PGD-20", Accuracy("pgd-20"))
_WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)
_RADII = (1, 2, 4, 6, 8, 10, 12, 16)
_OF_ACT_ALONE = ("weight", "temperature", "attack_divergence")  # numbers of its preset for ImageNet
# By data set and row: (clean, PGD-20), ResNet-18.
_TABLE_1 = {
    "cifar10": {"Madry": (85.11, 50.53), "TRADES": (83.49, 53.79), "ACT": (84.33, 55.83)},
    "cifar100": {"Madry": (58.36, 24.48), "TRADES": (56.91, 28.88), "ACT": (61.56, 31.14)},
}


def _rows(network: str = "resnet18") -> tuple[RowSpec, ...]:
    """The three methods; TRADES has beta 5 in ACT's tables."""
    return (
        RowSpec("Madry", spec("pgd_at", network)),
        RowSpec("TRADES", spec("trades", network, beta=5.0)),
        RowSpec("ACT", spec("act", network)),
    )


def _table_1() -> Item:
    columns = [
        Column(f"{column.label} ({title})", column.measure, network)
        for title, network in (("ResNet-18", "resnet18"), ("WRN-28-10", "wrn_28_10"))
        for column in (_CLEAN, _PGD_20)
    ]
    published = {
        data: {
            row: {"Clean (ResNet-18)": clean, "PGD-20 (ResNet-18)": robust}
            for row, (clean, robust) in rows.items()
        }
        for data, rows in _TABLE_1.items()
    }
    return Item(
        "act",
        "table1",
        "clean and robust accuracy",
        _rows(),
        tuple(columns),
        "trade_off",
        published,
        "the paper has several data sets in one table; here --data chooses.",
    )


def _table_2() -> Item:
    columns = (
        Column("FGSM, linf (1/255)", SmallestPerturbationMeasure("min-fgsm", 255.0)),
        Column("PGD-20, linf (1/255)", SmallestPerturbationMeasure("min-pgd-20", 255.0)),
        Column("C&W, l2", SmallestPerturbationMeasure("cwl2-1000")),
    )
    return Item(
        "act",
        "table2",
        "mean of the smallest perturbations",
        _rows(),
        columns,
        guess="that table 2 shows the smallest perturbations, and by which attacks.",
        axes=("", "Distance"),
    )


def _table_3() -> Item:
    sources = {
        "Standard": RunSpec("standard", repetition=1),
        "Madry": RunSpec("pgd_at", repetition=1),
        "TRADES": RunSpec("trades", (("beta", 5.0),), repetition=1),
        "ACT": RunSpec("act", repetition=1),
    }
    columns = [Column(f"from {t}", Accuracy("pgd-20", source=s)) for t, s in sources.items()]
    return Item(
        "act",
        "table3",
        "black-box attacks: PGD-20 on images made on another model",
        _rows(),
        tuple(columns),
        guess="that table 3 shows black-box attacks, and their sources.",
    )


def _table_4() -> Item:
    numbers = dict(ActRecipe.presets["imagenet"])
    shared = {name: value for name, value in numbers.items() if name not in _OF_ACT_ALONE}
    rows = (
        RowSpec("Madry", spec("pgd_at", "resnet50", **shared)),
        RowSpec("ACT", spec("act", "resnet50", **numbers)),
    )
    figures = {
        "Madry": {"Clean": 65.70, "PGD-100": 42.36},
        "ACT": {"Clean": 68.20, "PGD-100": 44.29},
    }
    return Item(
        "act",
        "table4",
        "ImageNet, ResNet-50",
        rows,
        (_CLEAN, Column("PGD-100", Accuracy("pgd-100", 2.0))),
        "trade_off",
        {"imagenet": figures},
        "that table 4 is the one on ImageNet, its radius 2/255 and its rows. Madry has ACT's numbers. The images "
        "are those of --data, such as folder:IMAGENET.",
    )


def _table_5() -> Item:
    return Item(
        "act",
        "table5",
        "the weight alpha of the mutual divergences",
        tuple(RowSpec(f"alpha = {w:g}", spec("act", weight=w), "ACT") for w in _WEIGHTS),
        (_CLEAN, _PGD_20),
        "trade_off",
        {"cifar10": {"alpha = 0.9": {"Clean": 84.33, "PGD-20": 55.83}}},
        "that table 5 shows alpha, and its values; the row of .9 is the row of table 1.",
    )


def _figure_2() -> Item:
    return Item(
        "act",
        "figure2",
        "accuracy under PGD-20 over the radius",
        _rows(),
        tuple(Column(f"{r}/255", Accuracy("pgd-20", float(r)), x=float(r)) for r in _RADII),
        "lines",
        guess="that figure 2 shows the radius.",
        axes=("Radius (1/255)", "Accuracy under PGD-20 (%)"),
    )


def _figure_3(side: str, title: str, analysis: AnalysisMeasure, unit: str) -> Item:
    return Item(
        "act",
        f"figure3-{side}",
        title,
        _rows(),
        (Column(unit, analysis),),
        guess="which side of figure 3 shows which analysis. `fastadv analyse` draws its curve.",
        axes=("", unit),
    )


def _figure_4() -> Item:
    return Item(
        "act",
        "figure4",
        "Frobenius norm of the weights",
        _rows(),
        (Column("All layers", AnalysisMeasure("frobenius", "norm of all layers")),),
        guess="that figure 4 shows the norms. The table has the norm of all layers together; "
        "`fastadv analyse OUT/runs/... --what frobenius` has each layer's.",
        axes=("", "Frobenius norm"),
    )


def items() -> tuple[Item, ...]:
    """Return the items in the paper's order."""
    entropy = AnalysisMeasure("entropy", "mean entropy", train=True)
    labels = AnalysisMeasure("random-labels", "accuracy in the last epoch", 100.0, train=True)
    return (
        _table_1(),
        _table_2(),
        _table_3(),
        _table_4(),
        _table_5(),
        _figure_2(),
        _figure_3("left", "posterior entropy on training images", entropy, "Mean entropy"),
        _figure_3(
            "right",
            "accuracy of an MLP that fits random labels on frozen features",
            labels,
            "Training accuracy (%)",
        ),
        _figure_4(),
    )
