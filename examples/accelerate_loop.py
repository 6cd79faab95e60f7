"""Adversarial training in a loop of Hugging Face Accelerate, on one device or many.

`accelerate launch examples/accelerate_loop.py` starts it on several. The attack gets the network inside of the
distributed wrapper, so that it communicates with nobody.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fastadv
from fastadv.data import load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()

    torch.manual_seed(0)
    accelerator = Accelerator()
    data = load_dataset("digits")
    pairs = TensorDataset(data.train.images.float() / 255, data.train.labels)
    model = fastadv.models.small_cnn(num_classes=10, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(pairs, batch_size=64, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    attack = fastadv.PGD(accelerator.unwrap_model(model), eps=0.1, alpha=0.025, steps=10)
    for _ in range(options.epochs):
        for x, y in loader:
            loss = cross_entropy(model(attack(x, y)), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()

    x = (data.test.images.float() / 255).to(accelerator.device)
    y = data.test.labels.to(accelerator.device)
    model.eval()
    clean = (model(x).argmax(1) == y).float().mean()
    robust = (model(attack(x, y)).argmax(1) == y).float().mean()
    accelerator.print(f"clean {clean:.1%}, robust {robust:.1%}")


if __name__ == "__main__":
    main()
