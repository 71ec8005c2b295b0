"""Swap the layers of a small network, and leave its training loop as it is.

    python examples/swap_layers.py                 # torch.nn and trainable_nn, one after the other
    python examples/swap_layers.py --layers plain  # torch.nn alone

The images are the digits of scikit-learn: pip install 'trainable_nn[demo]'.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import trainable_nn as tnn
from trainable_nn import datasets

# Each of ours takes the arguments of the layer that it replaces.
LAYERS = {
    "plain": {"conv": nn.Conv2d, "linear": nn.Linear, "activation": nn.ReLU},
    "normalised": {"conv": tnn.WeightNormConv2d, "linear": tnn.EntryNormLinear, "activation": tnn.SmoothReLU},
}


def network(conv: type[nn.Module], linear: type[nn.Module], activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        conv(1, 16, 3, padding=1),
        activation(),
        conv(16, 32, 3, stride=2, padding=1),
        activation(),
        nn.Flatten(),
        linear(32 * 4 * 4, 64),
        activation(),
        linear(64, 10),
    )


def train(model: nn.Module, data: datasets.ImageData, epochs: int, lr: float) -> None:
    """Nothing in this loop knows which layers the model has."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    shuffle = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        for batch in torch.randperm(len(data.train_labels), generator=shuffle).split(64):
            loss = nn.functional.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = model(data.test_images).argmax(1) == data.test_labels
        print(f"  epoch {epoch + 1}: last loss {loss.item():.4f}, test accuracy {right.double().mean():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", choices=["both", *LAYERS], default="both")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.1)
    arguments = parser.parse_args()

    data = datasets.digits()
    for name in LAYERS if arguments.layers == "both" else [arguments.layers]:
        print(f"{name} layers")
        torch.manual_seed(0)
        model = network(**LAYERS[name])
        train(model, data, arguments.epochs, arguments.lr)
        for path, module in model.named_children():
            if hasattr(module, "operator_norm_bound"):
                print(f"  {path}: {type(module).__name__}, operator norm at most {module.operator_norm_bound():.3g}")


if __name__ == "__main__":
    main()
