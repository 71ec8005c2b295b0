r"""Activations whose slope jumps: where, by how much, how far they bend in between, and what torch's float64 loses in them.

    |fl phi(z) - phi(z)| <= u (16 slope |z| + value),   |fl phi'(z) - phi'(z)| <= u slope_error, away from the kinks

ReLU6, Hardtanh and Hardsigmoid are straight in between, and few roundings of numbers up to slope |z| + phi(0). As in ``activations``:

    hardswish  z relu6(z + 3) / 6: z + 3 <= 6 errs by 6 u, so the product by |z| u and 3 u of itself; its slope (2 z + 3) / 6, up to
               3 / 2, by 4 u, jumps by 1 / 2 at -3 and at 3; phi'' = 1 / 3
    elu        alpha (e^z - 1) for z < 0: e^z errs by 8 u and the difference and the product by 2 u, so 12 u |alpha|; its slope alpha e^z,
               or alpha + the value, by 14 u |alpha|, jumps by |alpha - 1| at 0; |phi''| <= |alpha|
    selu       the same with alpha = 1.7581, times a product of two constants that are rounded, 3 u; 1.0507 z for z > 0
"""

import math
from dataclasses import dataclass

import torch

from ...errors import UnboundedError
from ...theory.nonlinearities import SELU_SLOPE


@dataclass(frozen=True)
class Kinks:
    """places: where the slope jumps, by ``jump`` at most; curvature >= |phi''| elsewhere; value, slope_error: the numbers above."""

    places: tuple[float, ...]
    jump: float
    curvature: float = 0.0
    value: float = 0.0
    slope_error: float = 0.0


CURVED = {
    "SELU": Kinks((0.0,), 0.75, SELU_SLOPE, 32.0, 32.0),
    "Hardswish": Kinks((-3.0, 3.0), 0.5 + 2.0**-50, 1.0 / 3.0 + 2.0**-50, 0.0, 8.0),
}


def kinks_of(step) -> Kinks:
    """Of a ``Kinked`` step.

    Raises:
        UnboundedError: it is none that is known.
    """
    far = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    if step.kind == "ReLU":
        return Kinks((0.0,), step.slope)
    if step.kind == "LeakyReLU":  # from the slope of its leak, which may be below 0
        return Kinks((0.0,), 2.0 * step.slope, slope_error=8.0 * step.slope)
    if step.kind in ("ReLU6", "Hardtanh"):
        return Kinks(tuple(step.forward(far).tolist()), step.slope, slope_error=8.0 * step.slope)
    if step.kind == "Hardsigmoid":
        return Kinks((-3.0, 3.0), step.slope, slope_error=8.0 * step.slope)
    if step.kind == "ELU":
        alpha = -float(step.forward(far)[0])
        return Kinks((0.0,), abs(alpha - 1.0) * (1.0 + 2.0**-50), abs(alpha), 16.0 * abs(alpha), 16.0 * abs(alpha))
    if step.kind not in CURVED:
        raise UnboundedError(
            f"{step.path}: nothing bounds the rounding of {step.kind} and its slope. Use ReLU, LeakyReLU, or a smooth activation."
        )
    return CURVED[step.kind]
