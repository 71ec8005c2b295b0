"""How far certified numbers are from the truth, on THEORY's reference problems (tanh, 4 to 16 blocks, c from 0.25 to 0.9).

Largest stable step over certified step: stable is the largest constant step for which plain gradient descent never
raises the loss in ``--steps`` iterations, by bisection, from the same weights; the certified one is the median over
certified descent and, in brackets, the smallest of its first 60 steps, or the certificate's constant step: along its
path from the start (``certify_path``), at the start (leaky first layer, grade global) and where the ball closes first
after certified descent (no leak, grade ball). lambda: measured over proved lower bound; for a path where it ends. The
last lines say whether each figure that is asked for holds (status 1 where one does not); grade global, of all weights at
once, is asked for none.

    python tests/benchmarks/certify.py [--blocks 4 8 16] [--steps 100] [--descent 60] [--paths]
    python tests/benchmarks/certify.py --resnet18 128 [--cases stock paper provable]     CPU seconds and memory of certify
"""

import argparse
import pathlib
import sys
import time

import torch
from torch.nn import functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from certify_resnet import CASES, certify_resnet18
from provable_nets import reference_problem, trained

import trainable_nn as tnn
from trainable_nn.certify.measure import extremes_of

PROBLEMS = {blocks: (0.25, 0.5, 0.9) for blocks in (4, 8, 16)}
ASKED = {"constant step": 100.0, "certified descent": 10.0, "its worst step": 10.0, "lambda": 30.0}  # at most
LEAK = 0.5  # of the problems with grade global
CLOSED = 10.0  # the ball counts once lambda on it is within this factor of the measured one


def stable(net, x, y, step: float, steps: int) -> bool:
    """Whether no iteration raises the loss; the weights are put back."""
    start = [p.detach().clone() for p in trained(net)]
    before, good = float("inf"), True
    for _ in range(steps):
        loss = F.mse_loss(net(x), y)
        if not loss.item() <= before * (1 + 1e-12) + 1e-28:
            good = False
            break
        before = loss.item()
        with torch.no_grad():
            for p, g in zip(trained(net), torch.autograd.grad(loss, trained(net))):
                p -= step * g
    with torch.no_grad():
        for p, s in zip(trained(net), start):
            p.copy_(s)
    return good


def largest_stable(net, x, y, steps: int) -> float:
    low, high = 1e-3, 1e3
    for _ in range(14):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if stable(net, x, y, middle, steps) else (low, middle)
    return low


def sigma_squared(net, x) -> float:
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(entry, trained(net), retain_graph=True)])
        for entry in net(x).flatten()
    ]
    return extremes_of(torch.stack(rows))[0] ** 2


def constant(name: str, net, x, y, steps: int) -> tuple[str, ...]:
    start = time.process_time()
    certificate = tnn.certify(net, x, y)
    seconds = time.process_time() - start
    if certificate.step_size is None:
        return (name, certificate.grade, "-", "-", "-", f"{seconds:.1f}")
    ratio = largest_stable(net, x, y, steps) / certificate.step_size
    factor = sigma_squared(net, x) / certificate.lambda_lower
    return (name, certificate.grade, f"{ratio:.3g}", f"{factor:.3g}", f"{certificate.radius:.3g}", f"{seconds:.1f}")


def along_its_path(name: str, net, x, y, steps: int) -> tuple:
    """The weights are moved to where the path ends, for the measured lambda there, and put back."""
    start = time.process_time()
    path = tnn.certify_path(net, x, y)
    seconds = time.process_time() - start
    if path.step_size is None:
        raise SystemExit(f"{name}: {path.explain()}")
    ratio = largest_stable(net, x, y, steps) / path.step_size
    before = [p.detach().clone() for p in trained(net)]
    optimizer = torch.optim.SGD(trained(net), lr=path.step_size)
    for _ in range(path.steps):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    factor = sigma_squared(net, x) / path.lambda_lower
    with torch.no_grad():
        for p, s in zip(trained(net), before):
            p.copy_(s)
    return (name, path.grade, f"{ratio:.3g}", f"{factor:.3g}", f"{path.radius:.3g}", f"{seconds:.1f}", path)


def descend(net, x, y, most: int):
    """Certified descent until the ball closes with lambda within CLOSED; ratios come from its steps."""
    optimizer = torch.optim.SGD(trained(net), lr=1.0)
    schedule = tnn.optim.CertifiedDescent(optimizer, net, x, y)
    for k in range(most):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
        schedule.step()
        if k % 10 == 9 and schedule.history[-1].loss < 1e-4:
            certificate = tnn.certify(net, x, y)
            if certificate.grade == "ball" and sigma_squared(net, x) <= CLOSED * certificate.lambda_lower:
                break
    return schedule


def held(seen: dict[str, list[float]]) -> bool:
    """Print the largest of each figure beside the one that is asked for."""
    good = True
    for name, values in seen.items():
        good = good and max(values) <= ASKED[name]
        print(f"{name}: at most {max(values):.3g} in {len(values)} rows, asked for {ASKED[name]:g}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=list(PROBLEMS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--descent", type=int, default=150)
    parser.add_argument("--paths", action="store_true", help="only the constant step along its path")
    parser.add_argument("--resnet18", type=int, metavar="IMAGES", help="only ResNet-18 at CIFAR size, with so many images")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="of --resnet18")
    arguments = parser.parse_args()
    if arguments.resnet18:
        certify_resnet18(arguments.resnet18, tuple(arguments.cases))
        return
    seen: dict[str, list[float]] = {name: [] for name in ASKED}
    row = "{:34} {:9} {:>15} {:>16} {:>9} {:>7}"
    print(row.format("problem", "grade", "stable/certified", "lambda/certified", "radius", "s"))
    for blocks in arguments.blocks:
        for strength in PROBLEMS[blocks]:
            name = f"{blocks} blocks, c {strength}"
            net, x, y = reference_problem(blocks, strength)
            *cells, path = along_its_path(f"{name}: constant, path", net, x, y, arguments.steps)
            print(row.format(*cells))
            seen["constant step"].append(float(cells[2]))
            seen["lambda"].append(float(cells[3]))
            print(
                f"  loss {path.losses[0]:.3g} to {path.losses[-1]:.2g} in {path.steps} steps, then rate {path.rate:.4g}",
                flush=True,
            )
            if arguments.paths:
                continue
            most, truth = largest_stable(net, x, y, arguments.steps), sigma_squared(net, x)
            at_start = truth / tnn.certify(net, x).lambda_lower
            start = time.process_time()
            schedule = descend(net, x, y, arguments.descent)
            seconds = (time.process_time() - start) / len(schedule.history)
            sizes = sorted(step.step_size for step in schedule.history[:60] if step.step_size > 0)
            median, worst = most / sizes[len(sizes) // 2], most / sizes[0]
            print(
                row.format(
                    f"{name}: certified descent",
                    "-",
                    f"{median:.3g} ({worst:.3g})",
                    f"{at_start:.3g}",
                    "-",
                    f"{seconds:.2f}",
                )
            )
            kept = f"{schedule.history[0].loss:.3g} to {schedule.history[-1].loss:.2g} in {len(schedule.history)} steps"
            print(f"  loss {kept}, guarantee {schedule.guarantee:.2g}")
            seen["certified descent"].append(median)
            seen["its worst step"].append(worst)
            seen["lambda"].append(at_start)
            cells = constant(f"{name}: ball there", net, x, y, arguments.steps)
            print(row.format(*cells), flush=True)
            if cells[2] != "-":  # a descent cut short by --descent ends before a ball closes
                seen["constant step"].append(float(cells[2]))
                seen["lambda"].append(float(cells[3]))
            leaky, x, y = reference_problem(blocks, strength, leak=LEAK)
            print(row.format(*constant(f"{name}, leak {LEAK}: start", leaky, x, y, arguments.steps)), flush=True)
    sys.exit(0 if held({name: values for name, values in seen.items() if values}) else 1)


if __name__ == "__main__":
    main()
