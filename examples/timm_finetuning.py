"""A network of timm, fine-tuned by ARREST: its own standard weights are the teacher.

`pretrained=True` in `timm.create_model` starts from published weights. Here the network is first trained on clean
images for an epoch, so that the script needs no network connection.
"""

from __future__ import annotations

import argparse
import tempfile

import timm
import torch
from torch.nn.functional import cross_entropy, interpolate

from fastadv.data import ImageData, Splits, from_tensors, load_dataset
from fastadv.trainers import ArrestRecipe, train


def colour_pictures(data: ImageData, size: int) -> ImageData:
    """Grey images as colour pictures [3, size, size], bytes."""
    large = interpolate(data.images.float(), size=(size, size), mode="bilinear")
    return from_tensors(large.round().to(torch.uint8).repeat(1, 3, 1, 1), data.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet10t")
    parser.add_argument("--images", type=int, default=256, help="to train on")
    options = parser.parse_args()

    torch.manual_seed(0)
    digits = load_dataset("digits")
    data = Splits(colour_pictures(digits.train, 32), colour_pictures(digits.test, 32))

    teacher = timm.create_model(options.model, num_classes=10)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9)
    for start in range(0, len(data.train), 64):
        x, y = (
            data.train.images[start : start + 64].float() / 255,
            data.train.labels[start : start + 64],
        )
        optimizer.zero_grad()
        cross_entropy(teacher(x), y).backward()
        optimizer.step()

    recipe = ArrestRecipe(
        epochs=1,
        batch_size=64,
        eps=0.1,
        alpha=0.05,
        steps=2,
        pad=0,
        flip=False,
        train_images=options.images,
    )
    student = timm.create_model(options.model, num_classes=10)
    result = train(
        "arrest",
        recipe,
        data=data,
        model=student,
        teacher=teacher,
        run_dir=tempfile.mkdtemp(),
        progress=False,
    )
    print(f"trained: {result.checkpoint}")


if __name__ == "__main__":
    main()
