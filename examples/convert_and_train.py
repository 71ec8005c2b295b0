"""Convert a ResNet, train it with an optimiser of torch-optimizer, save it and read it back.

    python examples/convert_and_train.py --optimizer AdaBelief

Needs pip install 'trainable_nn[demo,optim]'. Your own ResNet, or one of torchvision or timm, goes in
the place of ``PreActResNet18``.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile

import torch
import torch_optimizer
from torch import nn

import trainable_nn as tnn
from trainable_nn import datasets
from trainable_nn.demo.resnet import PreActResNet18


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: datasets.ImageData, epochs: int) -> None:
    shuffle = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(len(data.train_labels), generator=shuffle).split(64):
            loss = nn.functional.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: last loss {loss.item():.4f}, test accuracy {accuracy(model, data):.3f}")


@torch.no_grad()
def accuracy(model: nn.Module, data: datasets.ImageData) -> float:
    right = model.eval()(data.test_images).argmax(1) == data.test_labels
    return right.double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="AdaBelief", help="a class of torch_optimizer that takes lr")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--output", type=pathlib.Path, help="file for the weights (default: a temporary one)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    plain = PreActResNet18(width=arguments.width, in_channels=1)
    model = tnn.convert_model(plain, recipe="paper")
    print(model.conversion_report)

    data = datasets.digits(size=16)
    optimizer = getattr(torch_optimizer, arguments.optimizer)(model.parameters(), lr=arguments.lr)
    train(model, optimizer, data, arguments.epochs)

    with tempfile.TemporaryDirectory() as folder:
        path = arguments.output or pathlib.Path(folder) / "converted.safetensors"
        tnn.save(model, path)
        again = tnn.load(path, plain)  # converts a copy of the plain model by the recipe in the file
        print(f"read back from {path.name}: test accuracy {accuracy(again, data):.3f}")


if __name__ == "__main__":
    main()
