"""Certify a network in provable form on real images, then descend with a proved step at every iteration.

    python examples/certified_descent.py                       # 64 images of Fashion-MNIST
    python examples/certified_descent.py --images 512 --steps 20
    python examples/certified_descent.py --network resnet18 --width 8 --images 512 --steps 20

A pre-activation ResNet, small or of 18 layers, becomes its provable form; `certify` states what is proved from these weights; and plain
gradient descent on the squared loss follows `CertifiedDescent`, whose bound of the next loss stands beside the loss.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from train_provable import SmallResNet

import trainable_nn as tnn
from trainable_nn import datasets
from trainable_nn.convert import provable
from trainable_nn.demo.resnet import PreActResNet18


def on_grid(images: Tensor, black: Tensor) -> Tensor:
    """Images with a black border, their sides a multiple of the 8 by which a ResNet-18 divides them."""
    rows, columns = (-side % 8 for side in images.shape[-2:])
    return nn.functional.pad(images - black, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)) + black


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--network", choices=("small", "resnet18"), default="small")
    parser.add_argument("--width", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=1, help="in each of the two stages of the small network")
    parser.add_argument("--strength", type=float, default=0.5)
    parser.add_argument("--leak", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("certified-descent.json"))
    arguments = parser.parse_args()

    data = datasets.idx(arguments.folder)
    x = data.train_images[: arguments.images].double()
    y = nn.functional.one_hot(data.train_labels[: arguments.images], len(data.classes)).double()
    torch.manual_seed(arguments.seed)
    if arguments.network == "resnet18":
        x = on_grid(x, (-data.mean / data.std)[:, None, None].double())
        plain = PreActResNet18(arguments.width, x.shape[1], len(data.classes))
    else:
        plain = SmallResNet(arguments.width, arguments.blocks, x.shape[1], len(data.classes))
    recipe = provable(strength=arguments.strength, leak=arguments.leak)
    model = tnn.convert_model(plain.double(), recipe, sample_input=x[:2])

    console, start = Console(), time.perf_counter()
    certificate = tnn.certify(model, x, y)
    console.print(certificate.explain(), f"({time.perf_counter() - start:.0f} s)", highlight=False, markup=False)

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = tnn.optim.CertifiedDescent(optimizer, model, x, y)
    table = Table("iteration", "step size", "loss is proved to be at most", "loss", title="certified descent")
    rows, last = [], nn.functional.mse_loss(model(x), y).item()
    for iteration in range(1, arguments.steps + 1):
        step, promised = optimizer.param_groups[0]["lr"], scheduler.loss_at_most
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        now = nn.functional.mse_loss(model(x), y).item()
        if not now <= promised <= last:
            raise SystemExit(f"iteration {iteration}: the loss is {now}, and at most {promised} was proved after {last}.")
        rows.append({"iteration": iteration, "step": step, "at_most": promised, "loss": now})
        table.add_row(str(iteration), f"{step:.4g}", f"{promised:.6f}", f"{now:.6f}")
        last = now
    console.print(table)
    console.print(f"The loss is proved to be at most {scheduler.guarantee:.4f} of what it was, one iteration from here included.")
    console.print(f"The rounding of float64 in these bounds is {scheduler.rounding}.")
    for reason in dict.fromkeys(step.reason for step in scheduler.history if step.reason):
        console.print(reason, highlight=False, markup=False)
    result = {"certificate": json.loads(certificate.to_json()), "steps": rows, "guarantee": scheduler.guarantee}
    result["rounding"] = scheduler.rounding
    arguments.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
