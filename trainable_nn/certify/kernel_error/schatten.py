r"""Rounding of the derivative of the Schatten normalisation, P'(w)[m] = gain (rho m - rho^3 <w, m> q), q = grad L^2 / 2.

With M_f the blocks (the matrix, or the symbol at F frequencies), of rank at most r and n columns, G_f = M_f M_f^* and
sigma_f = \|\|M_f\|\|, in Frobenius norms relative to sigma_f^2, sigma_f^(2 i), ... and u the roundoff:

* G errs by 4 r gamma_n and what the symbol errs, and each squaring doubles the error and adds 4 r gamma_r, since
  \|\|G\|\|_F^2 <= r \|\|G\|\|^2: G^i errs by i (4 r gamma_n + 4 r gamma_r);
* the product G G^2 ... G^(p / 2) M by the sum of these, less than p times, and 4 r gamma_r for each product: call it e;
* q = factor^2 S^(2 - 2 p) c sum over f of the adjoint of the symbol at f, applied to G_f^(p-1) M_f. The adjoint has norm (F / c)^(1/2), and
  sum_f sigma_f^(4 p - 2) <= sigma^(2 p - 2) S^(2 p) / c, so q errs by at most F^(1/2) e beta L, with |q| <= beta L.

With tau >= rho^2 |w| |q| the sum follows, relative to gain rho |m| <= sup \|\|P'\|\| |m|. Source: as ``theory.schatten``.
"""

import math

from ..regularity.affine import Affine
from .states import U, gamma


def derivative_error(step: Affine) -> float:
    """Of P'(w)[m] as computed in float64, relative to sup ||P'|| ||m||."""
    constants = step.options
    rows, columns = len(step.weight) // step.groups, step.free.shape[1]
    r, points, taps = float(constants.rank), constants.points, constants.taps
    squarings = math.log2(constants.power)
    symbol = 0.0 if points == taps == 1 else 2.0**-49 * (taps + 20) * math.sqrt(taps * r)
    one = 4 * r * gamma(r + 4)
    power = constants.power * (4 * r * gamma(_width(step) + 4) + 3 * symbol + one) + (squarings + 2) * one + symbol
    length = constants.length_allowance(max(rows, columns))
    back = symbol + gamma(2 * points + 24) * math.sqrt(taps * r)
    q = (2 * math.sqrt(points) + 2) * (power + back) + 4 * length + 64 * (squarings + 2) * U
    return 2 * length + 64 * U + constants.tau * (4 * length + gamma(rows * columns + 8) + q)


def _width(step: Affine) -> int:
    """n, the larger side of a block."""
    rows, columns = len(step.weight) // step.groups, step.free.shape[1]
    grid = getattr(step.module, "_grid", None)
    if grid is not None:
        columns = columns // len(grid.phases) * (max(grid.phases) + 1)
    return max(rows, columns)
