"""Adversarial training on several processes, with DistributedDataParallel.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py

The attack gets `model.module`. Its passes then communicate with nobody. All processes must attack one network, so
the BatchNorm statistics of process 0 are sent to the others before each attack.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fastadv
from fastadv.data import Loader, load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    on_gpu = torch.cuda.is_available()
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    )
    if device.type == "cpu":
        torch.set_num_threads(1)

    torch.manual_seed(0)
    data = load_dataset("digits")
    model = DistributedDataParallel(
        fastadv.models.small_cnn(num_classes=10, in_channels=1).to(device)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    attack = fastadv.PGD(model.module, eps=0.1, alpha=0.025, steps=10)
    loader = Loader(
        data.train,
        batch_size=64,
        train=True,
        pad=0,
        flip=False,
        device=device,
        rank=rank,
        world_size=world_size,
    )
    for epoch in range(options.epochs):
        for x, y, ids in loader.epoch(epoch):
            for buffer in model.module.buffers():
                dist.broadcast(buffer, 0)
            # With the images' own numbers as `sample_ids`, an image's noise does not depend on its process.
            adv = attack(x, y, seed=epoch, sample_ids=ids)
            loss = cross_entropy(model(adv), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if rank == 0:
        model.eval()
        x, y = (data.test.images.float() / 255).to(device), data.test.labels.to(device)
        robust = (model.module(attack(x, y)).argmax(1) == y).float().mean()
        print(f"robust {robust:.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
