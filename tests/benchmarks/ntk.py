"""The exact tangent kernel beside its peers, on ResNet-18 at CIFAR size in evaluation mode; one thread, one run.

    python tests/benchmarks/ntk.py [--quick] [--samples 16] [--outputs 1 10] [--peers [NAME ...]] [--width 64]

The figures that the peers are held against, each in one run:

    python tests/benchmarks/ntk.py --samples 64 --outputs 1 --peers nngeometry torch.func --memory 4 --batch 16
    python tests/benchmarks/ntk.py --samples 128 --outputs 1 --peers nngeometry --batch 16
    python tests/benchmarks/ntk.py --samples 16 --outputs 10 --peers nngeometry --in-part --smallest
    python tests/benchmarks/ntk.py --samples 128 --outputs 10     # where the others run out of memory
    python tests/benchmarks/ntk.py --samples 64 --outputs 10 --budget 1

CPU seconds of each way to the kernel, as ratios to ours; peers that are not installed are left out. ``floor`` is the
least work of a layer-wise route: one forward pass, one backward pass of the data alone for each output, and for each
weight the fewer multiply-adds of its explicit and its structured Gram matrix, half of them by symmetry, at the rate of a
large matrix product measured beside it. Ours has a third formula, so it may pass below. ``--smallest`` adds the
smallest eigenvalue by curvlinops and scipy's eigsh, and ours by products alone. ``--in-part`` gives nngeometry networks
of 1 and 2 outputs in the place of C, and extrapolates by its C + C^2 backward passes. Its batches are of ``--batch``
samples: the larger, the faster it is, and the more it holds (at 16 about as much as ours).
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from kernel_peers import kernel_by_nngeometry, kernel_products_by_curvlinops
from small_resnets import PostActBlock

import trainable_nn as tnn


class ResNet18(nn.Module):
    """The usual one for images of 32 x 32."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        blocks = []
        for i, (a, b) in enumerate(pairwise(widths)):
            blocks += [PostActBlock(a, b, 2 if i else 1), PostActBlock(b, b)]
        self.blocks, self.linear = nn.Sequential(*blocks), nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def cpu_seconds(f: Callable[[], object], rounds: int = 1) -> tuple[object, float]:
    best, found = float("inf"), None
    for _ in range(rounds):
        start = time.process_time()
        found = f()
        best = min(best, time.process_time() - start)
    return found, best


def by_torch_func(model: nn.Module, x: Tensor) -> Tensor:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample.unsqueeze(0),)).squeeze(0)

    rows = vmap(jacrev(one), (None, 0))(parameters, x)
    return sum(r.flatten(0, 1).flatten(1) @ r.flatten(0, 1).flatten(1).T for r in rows.values())


def by_autograd_loop(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    rows = []
    for i in range(y.numel()):
        found = torch.autograd.grad(y.flatten()[i], list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T


def extremes_by_curvlinops(model: nn.Module, x: Tensor) -> list[float]:
    from scipy.sparse.linalg import LinearOperator, eigsh

    forward, back = kernel_products_by_curvlinops(model, x)
    n = forward.shape[0]
    operator = LinearOperator((n, n), matvec=lambda v: forward @ (back @ v), dtype=forward.dtype)
    return [float(eigsh(operator, 1, which=end, tol=1e-3, return_eigenvectors=False)[0]) for end in ("SA", "LA")]


def extremes_by_products(model: nn.Module, x: Tensor) -> list[float]:
    jacobian = tnn.linop.ParameterJacobian(model, x)
    found = tnn.linop.kernel_extremes(jacobian, dense_up_to=0, tol=1e-3)
    print(f"    (ours, by products: {found.products} of them, converged {found.converged})")
    return [found.smallest, found.largest]


def floor_seconds(model: nn.Module, x: Tensor, outputs: int) -> float:
    """See the head of this file."""
    shapes = []
    hooks = [
        m.register_forward_hook(lambda m, i, o: shapes.append((m, i[0].shape, o.shape)))
        for m in model.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(x[:1])
    for hook in hooks:
        hook.remove()
    n, total = len(x), 0.0
    for _, (m, _, y) in enumerate(shapes):
        t = y[2:].numel() if len(y) > 2 else 1
        o, d = m.weight.shape[0], m.weight[0].numel()
        pairs = n * (n + 1) / 2
        explicit = n * outputs * t * d * o + pairs * outputs**2 * d * o
        structured = pairs * t * t * (d + outputs**2 * o)
        total += min(explicit, structured) + n * t * d * o * (1 + outputs)
    a = torch.randn(1024, 1024)
    _, product = cpu_seconds(lambda: a @ a, 5)
    return total * product / 1024**3


class Peak:
    """GiB that the process grew to beyond what it holds when this is made; Linux forgets the peak before."""

    def __init__(self) -> None:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        self.before = self._status("VmRSS")

    def __call__(self) -> float:
        return self._status("VmHWM") - self.before

    @staticmethod
    def _status(name: str) -> float:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**20


def measure(arguments, outputs: int, samples: int) -> None:
    torch.manual_seed(0)
    model = ResNet18(arguments.width, outputs).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0.0, 0.1), m.running_var.uniform_(0.5, 1.5)
    x = torch.randn(samples, 3, 32, 32)
    tnn.linop.ntk(model, x[:2])  # rates are measured, buffers of the libraries made

    def forward_and_backward() -> None:
        model(x).sum().backward()
        model.zero_grad(set_to_none=True)

    _, one = cpu_seconds(forward_and_backward, 2)
    peak = Peak()
    budget = None if arguments.budget is None else int(arguments.budget * 2**30)
    ours, seconds = cpu_seconds(lambda: tnn.linop.ntk(model, x, budget=budget), 2 if samples * outputs < 200 else 1)
    grown = peak()
    least = floor_seconds(model, x, outputs)
    print(f"n = {samples}, {outputs} outputs, width {arguments.width}: ours {seconds:.2f} CPU s, {grown:.2f} GiB more at its peak")
    print(f"    {seconds / one:6.2f} forward-and-backward passes of the batch ({one:.2f} s), {seconds / least:.2f} floors ({least:.2f} s)")
    memory = 4e-9 * samples * outputs * sum(p.numel() for p in model.parameters())
    if arguments.peers is not None:
        routes = {"nngeometry": lambda model, x: kernel_by_nngeometry(model, x, arguments.batch)}
        if memory < arguments.memory:
            routes |= {"autograd in a loop": by_autograd_loop, "torch.func": by_torch_func}
        if arguments.in_part:
            extrapolate(arguments, x, outputs, seconds)
            routes.pop("nngeometry")
        for name, route in routes.items():
            if not arguments.peers or name in arguments.peers:
                compare(name, lambda route=route: route(model, x), ours, seconds)
    if arguments.smallest:
        values = torch.linalg.eigvalsh(ours)[[0, -1]].tolist()
        for name, route in (("curvlinops and eigsh", extremes_by_curvlinops), ("ours by products", extremes_by_products)):
            try:
                found, theirs = cpu_seconds(lambda route=route: route(model, x))
            except ImportError as error:
                print(f"    {name}: not installed ({error})")
                continue
            off = [f / v - 1 for f, v in zip(found, values)]
            print(f"    {theirs / seconds:6.2f} x  {name}: both ends, off by {off[0]:.1e} and {off[1]:.1e}", flush=True)


def compare(name: str, route: Callable[[], Tensor], ours: Tensor, seconds: float) -> None:
    try:
        found, theirs = cpu_seconds(route)
    except ImportError as error:
        print(f"    {name}: not installed ({error})")
        return
    error = float((found.detach().double() - ours).abs().max() / ours.abs().max())
    print(f"    {theirs / seconds:6.2f} x  {name}, which differs by {error:.1e} of the largest entry", flush=True)


def extrapolate(arguments, x: Tensor, outputs: int, seconds: float) -> None:
    """nngeometry's seconds as a line in C + C^2, through those for one and for two outputs."""
    times = []
    for few in (1, 2):
        model = ResNet18(arguments.width, few).eval()
        times.append(cpu_seconds(lambda model=model: kernel_by_nngeometry(model, x, arguments.batch))[1])
    theirs = times[0] + (times[1] - times[0]) / 4 * (outputs + outputs**2 - 2)
    print(
        f"    {theirs / seconds:6.2f} x  nngeometry, EXTRAPOLATED from {times[0]:.1f} s for one output and {times[1]:.1f} s "
        f"for two, by C + C^2 backward passes: {theirs:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a narrow network and few samples, in seconds")
    parser.add_argument("--samples", type=int, nargs="+", default=[16])
    parser.add_argument("--outputs", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--peers", nargs="*", help="all that fit, or these: nngeometry, torch.func, autograd in a loop")
    parser.add_argument("--batch", type=int, default=64, help="samples in one batch of nngeometry")
    parser.add_argument("--in-part", action="store_true", help="nngeometry at 1 and 2 outputs, and what follows for all")
    parser.add_argument("--budget", type=float, help="GiB that ours may take beside model and result")
    parser.add_argument("--smallest", action="store_true")
    parser.add_argument("--memory", type=float, default=2.5, help="GB that a peer's dense Jacobian may take")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.quick:
        arguments.samples, arguments.outputs, arguments.width, arguments.peers = [8], [1, 3], 8, []
    for outputs in arguments.outputs:
        for samples in arguments.samples:
            measure(arguments, outputs, samples)


if __name__ == "__main__":
    main()
