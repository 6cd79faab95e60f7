"""TRADES in a training loop of your own. Two lines are fastadv's: the attack and the loss."""

from __future__ import annotations

import argparse

import torch

import fastadv
from fastadv.data import Loader, load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()

    torch.manual_seed(0)
    data = load_dataset("digits")
    model = fastadv.models.small_cnn(num_classes=10, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    # The attack holds a fast copy of the network. It brings the current weights over at every call.
    attack = fastadv.PGD(model, eps=0.1, alpha=0.025, steps=10, loss="kl")

    for epoch in range(options.epochs):
        loader = Loader(data.train, batch_size=64, train=True, pad=0, flip=False, seed=0)
        for x, y, _ in loader.epoch(epoch):
            adv = attack(x, y)
            loss = fastadv.losses.trades(model(x), model(adv), y, beta=6.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x, y = data.test.images.float() / 255, data.test.labels
        model.eval()
        clean = (model(x).argmax(1) == y).float().mean()
        robust = (
            (model(fastadv.pgd_fused(model, x, y, eps=0.1, alpha=0.025)).argmax(1) == y)
            .float()
            .mean()
        )
        model.train()
        print(f"epoch {epoch}: loss {loss.item():.3f}, clean {clean:.1%}, robust {robust:.1%}")


if __name__ == "__main__":
    main()
