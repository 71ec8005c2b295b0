"""Constants of P(w) = gain * en(w) + leak * w (by entries) and P(w) = gain * wn(w) (by rows).

With en(w) = w (eps + w^2)^(-1/2) and wn(w) = w (eps + |w_row|^2)^(-1/2). Upper bounds are
rounded up and lower bounds down. All are for exact arithmetic; ``rounding_allowance`` covers
a weight that was computed in floats.

Source: paper A, Example A.2, equations (30) to (36); THEORY_PAPERS II.2.1.
"""

import math
from dataclasses import dataclass

import numpy as np

from .nonlinearities import C3
from .rounding import down, root_up, up

ENTRY_ROUNDINGS = 12  # rounded operations between w and P(w), constants included, the sum of squares apart


@dataclass(frozen=True)
class EntryNormConstants:
    """Constants of P(w) = gain * en(w) + leak * w on matrices of floats."""

    eps: float
    gain: float = 1.0
    leak: float = 0.0

    @property
    def largest_entry(self) -> float:
        """sup |P_ij| = gain, not attained; infinite with a leak."""
        return self.gain if self.leak == 0 else math.inf

    def operator_norm_supremum(self, rows: int, columns: int) -> float:
        """sup ||P(w)||_2 = gain sqrt(rows * columns), approached by equal entries that grow."""
        return _times_root(self.largest_entry, rows * columns)

    @property
    def slope_supremum(self) -> float:
        """sup ||DP||_2 = gain eps^(-1/2) + leak, at w = 0."""
        slope = up(self.gain / math.sqrt(self.eps), 2)
        return up(slope + self.leak) if self.leak else slope

    def slope_at_least(self, w: np.ndarray) -> float:
        """sigma(DP(w)) = min over entries of gain eps (eps + w^2)^(-3/2) + leak; the largest entry has it."""
        t = float(np.max(np.abs(w), initial=0.0)) / math.sqrt(self.eps)
        return down(self.gain / math.sqrt(self.eps) * (1.0 / math.hypot(1.0, t)) ** 3 + self.leak, 12)

    @property
    def slope_lipschitz(self) -> float:
        """Lip(DP) = gain C3 / eps with C3 = 48 / (25 sqrt 5), reached at |w| = sqrt(eps) / 2."""
        return up(self.gain * C3 / self.eps, 2)

    def rounding_allowance(self, columns: int, roundoff: float) -> float:
        """A bound of the relative error of each computed entry, in arithmetic with that unit roundoff."""
        return ENTRY_ROUNDINGS * roundoff

    def norm_allowance(self, rows: int, columns: int, roundoff: float) -> float:
        """A bound of the error of ||P(w)||_2 relative to it, two computations of P(w) apart."""
        return 2 * ENTRY_ROUNDINGS * roundoff * math.sqrt(min(rows, columns))


@dataclass(frozen=True)
class WeightNormConstants:
    """Constants of P(w) = gain * wn(w), row by row, on matrices of floats."""

    eps: float
    gain: float = 1.0

    @property
    def largest_row(self) -> float:
        """sup |P_row|_2 = gain, not attained."""
        return self.gain

    def operator_norm_supremum(self, rows: int, columns: int) -> float:
        """sup ||P(w)||_2 = gain sqrt(rows), approached by equal rows that grow; 0 for rows without entries."""
        return _times_root(self.gain, rows if columns else 0)

    @property
    def slope_supremum(self) -> float:
        """sup ||DP||_2 = gain eps^(-1/2), at w = 0."""
        return up(self.gain / math.sqrt(self.eps), 2)

    def slope_at_least(self, w: np.ndarray) -> float:
        """sigma(DP(w)) = min over rows of gain eps (eps + |w_row|^2)^(-3/2), radial; the longest row has it.

        The length is bounded from above by m sqrt(sum (w / m)^2), so that nothing overflows.
        """
        w = np.abs(np.asarray(w, dtype=np.float64).reshape(len(w), -1))
        most = float(np.max(w, initial=0.0))
        length = most * math.sqrt(np.max(np.sum(np.square(w / most), axis=1))) if most > 0 else 0.0
        t = length / math.sqrt(self.eps)
        return down(self.gain / math.sqrt(self.eps) * (1.0 / math.hypot(1.0, t)) ** 3, 12 + 3 * w.shape[1])

    @property
    def slope_lipschitz(self) -> float:
        """Lip(DP) = gain C3 / eps, all three directions radial, at |w_row| = sqrt(eps) / 2."""
        return up(self.gain * C3 / self.eps, 2)

    def rounding_allowance(self, columns: int, roundoff: float) -> float:
        """A bound of the relative error of each computed entry; n squares, summed in any order, err by n roundings."""
        return (columns + ENTRY_ROUNDINGS) * roundoff

    def norm_allowance(self, rows: int, columns: int, roundoff: float) -> float:
        """A bound of the error of ||P(w)||_2 relative to it, two computations of P(w) apart.

        A row's length errs as a factor of the whole row, a diagonal matrix in front; each entry's own error counts
        by the Frobenius norm, at most min(rows, columns)^(1/2) times the spectral.
        """
        return 2 * roundoff * (columns + ENTRY_ROUNDINGS * math.sqrt(min(rows, columns)))


def _times_root(gain: float, n: int) -> float:
    """gain sqrt(n), rounded up."""
    if n == 0:
        return 0.0
    root = root_up(n)
    return gain * root if gain == 1.0 or root == 1.0 else up(gain * root)
