"""Paper B's certificate: the scale at which it closes against the prototype's, bound over truth, and what it costs.

omega multiplies f - f(theta_0) and leaves the residual: the least omega that is certified says how lazy the network must
be. The prototype is II.4.1 item 4 of the theory with the recursion Lnum of II.3.9, as tests/test_linear_width.py has
it; "paper" is the same criterion with the corrected closed form of L. L over found: the bound at the centre over the
largest bend of the Jacobian that gradient ascent finds. Seconds are CPU seconds of one
certificate at omega = 1, a refusal.

    python tests/benchmarks/linear_width.py [--seeds 3] [--short]
"""

import argparse
import math
import pathlib
import statistics
import sys
import time

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import test_linear_width as oracle

from trainable_nn.theory import linear_width
from trainable_nn.theory.linear_width import bounds
from trainable_nn.theory.linear_width.certificate import scaled
from trainable_nn.theory.linear_width.growth import centre_norms, growth

SETTINGS = (
    (64, 0.1, "tanh"),
    (64, 0.5, "tanh"),
    (64, 0.9, "tanh"),
    (256, 0.1, "tanh"),
    (64, 0.5, "gelu"),
    (64, 0.5, "softplus"),
)


def prototype_scale(centre, length: float) -> float:
    """Least omega, to 5%, for which the prototype closes."""
    low, high = 1.0, 2.0
    while not oracle.prototype_closes(scaled(centre, high), length):
        low, high = high, 2 * high
    while high > 1.05 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if oracle.prototype_closes(scaled(centre, middle), length) else (middle, high)
    return high


def closed_form_scale(net, centre, length: float) -> float:
    """sigma_0^2 >= 8 L |r_0| with L = sqrt(n) C_fix at A = the largest ||W_h||, where it has a value."""
    s = bounds.Setting(
        len(centre.outputs), net.in_features, net.width, net.depth, centre.phi.slope, centre.phi.curvature,
        net.residual_scale, net.c_phi, float(net.a.abs().max()), centre.phi.at_zero,
    )  # fmt: skip
    if centre.phi.at_zero:
        return math.nan
    smallest = float(np.linalg.eigvalsh(centre.gram)[0])
    return 8 * bounds.lipschitz_corrected(s, float(centre.weight_norms.max())) * length / smallest


def bend_found(net, x: np.ndarray) -> float:
    quotient = lambda a, b, distance: torch.linalg.matrix_norm(a - b, 2) / distance
    return oracle.largest_found(net, x, [1e-3] * net.depth, 1e-3, quotient, steps=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="one seed, one setting")
    arguments = parser.parse_args()
    print(
        f"{'network':26s} {'certified':>9s} {'prototype':>9s} {'paper':>9s} {'ratio':>6s} {'L/found':>8s} {'seconds':>8s}"
    )
    for m, c, phi in SETTINGS[:1] if arguments.short else SETTINGS:
        lines = []
        for seed in range(1 if arguments.short else arguments.seeds):
            x, y = oracle.problem(seed=seed)
            net = oracle.net_for(y, m=m, residual_scale=c, nonlinearity=phi, seed=seed)
            targets = y + oracle.outputs(net, x)
            length, centre = float(np.linalg.norm(y)), linear_width.measure(net, x)
            ours = linear_width.scale_that_certifies(net, x, targets)
            theirs = prototype_scale(centre, length)
            bend = growth(centre, centre_norms(centre), np.zeros(net.depth), 0.0).lipschitz / bend_found(net, x)
            start = time.process_time()
            linear_width.certificate(net, x, targets)
            seconds = time.process_time() - start
            lines.append((ours, theirs, closed_form_scale(net, centre, length), theirs / ours, bend, seconds))
        a, b, paper, ratio, bend, seconds = (statistics.median(column) for column in zip(*lines, strict=True))
        name = f"{phi}, m={m}, c_res={c}"
        print(f"{name:26s} {a:9.1f} {b:9.1f} {paper:9.3g} {ratio:6.1f} {bend:8.2f} {seconds:8.2f}")


if __name__ == "__main__":
    main()
