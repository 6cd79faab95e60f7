"""Judge a file of weights: clean accuracy, then AutoAttack, as RobustBench reports them.

On the command line `fastadv eval --model resnet18 --weights FILE --data cifar10 --root DATA --attacks autoattack`
does the same for CIFAR-10. Without --weights a small network is trained first, for a moment.
"""

from __future__ import annotations

import argparse
import json

import torch

import fastadv
from fastadv.data import load_dataset
from fastadv.evaluation import evaluate
from fastadv.models import load_published_state_dict


def trained_for_a_moment() -> torch.nn.Module:
    """A network that is somewhat robust."""
    data = load_dataset("digits").train
    model = fastadv.models.small_cnn(num_classes=10, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = data.images.float() / 255, data.labels
    attack = fastadv.PGD(model, eps=0.1, alpha=0.05, steps=3)
    for _ in range(3):
        for rows in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(attack(x[rows], y[rows])), y[rows]).backward()
            optimizer.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--weights", help="a state dict of a small_cnn, in a file that torch.save made"
    )
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--eps", type=float, default=0.1)
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.weights is None:
        model = trained_for_a_moment()
    else:
        model = fastadv.models.small_cnn(num_classes=10, in_channels=1)
        load_published_state_dict(
            model, torch.load(options.weights, map_location="cpu", weights_only=True)
        )

    report = evaluate(
        model, load_dataset("digits").test, ["clean", "autoattack"], eps=options.eps,
        max_examples=options.images, batch_size=32, seed=0, progress=False,
    )  # fmt: skip
    rows = {row.name: 100 * row.accuracy for row in report.rows}
    card = {
        "clean_acc": rows["clean"],
        "autoattack_acc": rows["autoattack"],
        "eps": options.eps,
        "norm": "linf",
    }
    print(json.dumps(card))


if __name__ == "__main__":
    main()
