"""The command `fastadv reproduce`. The parameters are the options; the docstring is their help."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastadv.commands.documents import as_json
from fastadv.commands.images import check_training_images
from fastadv.models.registry import check_model_name
from fastadv.reproduction import ReproductionJob, all_items, find_item, find_scale, reproduce
from fastadv.reproduction.cost import Estimate
from fastadv.reproduction.reproduce import Reproduced
from fastadv.reproduction.tables import NOT_AT_HAND, Item
from fastadv.reproduction.writers import as_record, markdown


@dataclass(frozen=True)
class ReproductionResult:
    """The outcome of a reproduction.

    Attributes:
        text: the text to print: the table in Markdown, or one JSON document.
        failures: the trainings that failed although nothing that they need is missing.
    """

    text: str
    failures: tuple[str, ...] = ()


def run_reproduction(
    item: str,
    *,
    out: str,
    data: str | None = None,
    root: str | None = None,
    scale: Literal["paper", "small", "tiny"] = "paper",
    seeds: int | None = None,
    network: str | None = None,
    device: str | None = None,
    extra: str | None = None,
    plan: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> ReproductionResult:
    """The table.

    Args:
        item: the table or figure, such as arrest/table2; --list shows all.
        out: folder for the trained models, the tables and the pictures. Its models and results are used again.
        data: data set: digits, cifar10 or cifar100; or folder:PATH, whose folders train and val hold one folder of
            pictures per class; by default the data set of the scale.
        root: folder of the data set's official files (not for digits).
        scale: paper has the papers' own settings. small is real CIFAR-10 on a processor of 2 cores: 5,000 images,
            a small network, few epochs. tiny is digits of 8x8 pixels in seconds, to see that everything works.
        seeds: number of trainings of each row. The table has mean, standard deviation and 95 % interval. By
            default 3 at the scale paper, 1 at the others.
        network: a network that stands for every network of the paper, such as resnet18; by default small_cnn at
            the scales small and tiny.
        device: where to train and measure, e.g. cpu or cuda:0; by default a GPU if there is one.
        extra: a .npz file of further training images, with the arrays image (uint8, N x H x W x C) and label, for
            rows whose method needs further images, which is RST.
        plan: say how much is left to train and to measure, and about how long it takes; do nothing.
        json: print one JSON document in place of the text, also with list and plan.
        quiet: show no progress.

    Returns:
        The table in Markdown and the paths of the files; or JSON.
    """
    chosen = find_scale(scale)
    check_training_images(data or chosen.data, root)
    if network is not None:
        check_model_name("network", network)
    if plan:
        work = ReproductionJob.of(item, out, data, root, scale, seeds, network, device, extra, True)
        left = work.estimate()
        facts = {"item": work.item.id, "scale": scale, **asdict(left)}
        text = f"{find_item(item).heading} at scale {scale}: {left}.\n"
        return ReproductionResult(as_json(facts) if json else text)

    def print_estimate(estimated: Estimate) -> None:
        if not quiet:
            print(f"{find_item(item).heading}: {estimated}", file=sys.stderr, flush=True)

    done = reproduce(
        item,
        out=out,
        data=data,
        root=root,
        scale=scale,
        seeds=seeds,
        network=network,
        device=device,
        extra=extra,
        quiet=quiet,
        on_estimate=print_estimate,
    )
    text = as_json(_document(done)) if json else _as_text(done)
    return ReproductionResult(text, done.failures)


def _document(done: Reproduced) -> dict[str, Any]:
    """A table that was reproduced, its files, and what was done for it, as JSON types."""
    return {
        **as_record(done.table),
        "files": [str(path) for path in done.files],
        "trained": list(done.trained),
        "evaluations": done.judged,
        "failures": list(done.failures),
    }


def _as_text(done: Reproduced) -> str:
    """A table that was reproduced in Markdown, its files, and the failures."""
    files = "\n".join(str(path) for path in done.files)
    text = f"{markdown(done.table)}\n{files}\n"
    if not any(path.suffix == ".png" for path in done.files):
        text += "There is no picture: nothing was measured, or matplotlib is not installed.\n"
    if done.failures:
        text += "\n".join(["failed; the same command tries them again:", *done.failures]) + "\n"
    return text


def list_items(json: bool) -> str:
    """Return all items as lines or as JSON, with a note where figures of the paper are missing."""
    items = all_items()
    if json:
        return as_json(
            [
                {"item": name, "title": item.title, "published": _published(item)}
                for name, item in items.items()
            ]
        )
    notes = {
        "no": f" (the paper's figures: {NOT_AT_HAND})",
        "some": f" (the paper's figures: some {NOT_AT_HAND})",
        "all": "",
    }
    width = max(map(len, items))
    lines = [
        f"{name:<{width}}  {item.title}{notes[_published(item)]}" for name, item in items.items()
    ]
    return "\n".join(lines) + "\n"


def _published(item: Item) -> Literal["no", "some", "all"]:
    """Whether the paper's own figures of an item are known."""
    if not item.published:
        return "no"
    return "some" if item.lacks() else "all"
