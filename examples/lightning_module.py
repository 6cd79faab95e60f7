"""Adversarial training as a LightningModule: the attack is made once, and called in each training step."""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fastadv
from fastadv.data import ImageData, load_dataset


class AdversarialTraining(lightning.LightningModule):
    """PGD-AT of a classifier.

    Args:
        model: from images [B, C, H, W] in 0..1 to logits.
        eps: radius of the attack.
    """

    def __init__(self, model: torch.nn.Module, eps: float) -> None:
        super().__init__()
        self.model = model
        self.attack = fastadv.PGD(model, eps=eps, alpha=eps / 4, steps=10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = cross_entropy(self.model(self.attack(x, y)), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
        ):  # Lightning validates without gradients
            adv = self.attack(x.clone(), y.clone())
        self.log("clean", (self.model(x).argmax(1) == y).float().mean(), prog_bar=True)
        self.log("robust", (self.model(adv).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def batches(data: ImageData, shuffle: bool) -> DataLoader[Any]:
    """Batches of images in 0..1 and labels."""
    pairs = TensorDataset(data.images.float() / 255, data.labels)
    return DataLoader(pairs, batch_size=64, shuffle=shuffle, drop_last=shuffle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()

    lightning.seed_everything(0)
    data = load_dataset("digits")
    module = AdversarialTraining(fastadv.models.small_cnn(num_classes=10, in_channels=1), eps=0.1)
    trainer = lightning.Trainer(
        max_epochs=options.epochs, accelerator="auto", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, batches(data.train, shuffle=True), batches(data.test, shuffle=False))
    found = trainer.callback_metrics
    print(f"clean {found['clean']:.1%}, robust {found['robust']:.1%}")


if __name__ == "__main__":
    main()
