r"""Constants of P(w) = gain * w (eps + L(w)^2)^(-1/2), L = factor * S a Schatten-2p norm of w, or of its symbol on a grid.

Two numbers compare L with the Euclidean norm: L(v) <= beta |v| and |v| <= kappa L(v). For F frequencies, blocks of
rank at most r, and T taps that share a phase (F = T = 1 for a matrix),

    sum_f ||M_f||_F^2 = F |v|^2 and ||M_f||_F^2 <= T |v|^2 give beta = factor T^((p-1)/(2p)) F^(1/(2p)),
    Hoelder's inequality over F r singular values gives kappa = r^((p-1)/(2p)) F^(-1/(2p)) / factor.

Let tau = beta kappa = (T r)^((p-1)/(2p)), q = L grad L, a = L^2 / (eps + L^2), rho = (eps + L^2)^(-1/2). Then

    DP[v] = gain (rho v - rho^3 <q, v> w),  <q, w> = L^2, |q| <= beta L, |w| <= kappa L,

so DP = gain rho (Id - x y^T) with <x, y> = a and |x| |y| <= tau a. Off span(x, y) it is gain rho; on it the singular
values have product 1 - a and sum of squares 2 - 2 a + (|x| |y|)^2, so they are z and (1 - a) / z with
z = (tau a + (tau^2 a^2 + 4 (1 - a))^(1/2)) / 2 at most and at worst. All are for exact arithmetic; the allowances cover floats.

Source: THEORY 5, sharpened there where its text has tau + 1 for tau; that L^2 / 2 is (2p - 1)-smooth in its own norm is
Ball, Carlen and Lieb (1994), Inventiones 115, theorem 1.
"""

import math
from dataclasses import dataclass

import numpy as np

from .nonlinearities import C3
from .rounding import down, up

ENTRY_ROUNDINGS = 4  # of the entries of P(w) between the scale and the stored number


@dataclass(frozen=True)
class SchattenNormConstants:
    """Constants of P(w) = gain * w (eps + L(w)^2)^(-1/2) on one matrix, or one group of a convolution's kernel.

    power: p.  rank: the least side of a block.  factor: L = factor * S.  points: F.  taps: T.
    """

    eps: float
    gain: float
    power: int
    rank: int
    factor: float = 1.0
    points: int = 1
    taps: int = 1

    @property
    def beta(self) -> float:
        """sup L(v) / |v|, or above it."""
        root = 1.0 / (2 * self.power)
        return up(self.factor * self.taps ** (0.5 - root) * self.points**root, 8)

    @property
    def kappa(self) -> float:
        """sup |v| / L(v), or above it."""
        root = 1.0 / (2 * self.power)
        return up(self.rank ** (0.5 - root) * self.points**-root / self.factor, 8)

    @property
    def tau(self) -> float:
        """At least beta * kappa; 1 for p = 1."""
        return 1.0 if self.power == 1 else up((self.taps * self.rank) ** (0.5 - 0.5 / self.power), 4)

    def operator_norm_supremum(self) -> float:
        """sup of the operator norm of what P(w) stands for: gain, approached as w grows, never reached."""
        return self.gain

    @property
    def slope_supremum(self) -> float:
        """sup ||DP|| <= gain eps^(-1/2) max(1, 2 tau^(3/2) (27 (tau - 1))^(-1/2)), the second for tau > 3/2 only.

        z <= 1 + (tau - 1) a, and rho = eps^(-1/2) (1 - a)^(1/2): the maximum over a is at 1 - a = tau / (3 tau - 3).
        """
        slope = up(self.gain / math.sqrt(self.eps), 2)
        if self.tau <= 1.5:
            return slope
        return up(slope * 2.0 * self.tau**1.5 / math.sqrt(27.0 * (self.tau - 1.0)), 12)

    def slope_at_least(self, w: np.ndarray) -> float:
        """A lower bound of sigma(DP(w)) = gain rho (1 - a) / z, which falls in a; L(w) <= beta |w|_F is put in."""
        w = np.abs(np.asarray(w, dtype=np.float64))
        most = float(np.max(w, initial=0.0))
        length = most * math.sqrt(float(np.sum(np.square(w / most)))) if most > 0 else 0.0
        t = up(self.beta * length / math.sqrt(self.eps), 16 + 2 * w.size)
        rest = 1.0 / math.hypot(1.0, t) ** 2  # 1 - a
        share = self.tau * (1.0 - rest)
        z = (share + math.sqrt(share**2 + 4.0 * rest)) / 2.0
        return down(self.gain / math.sqrt(self.eps) * math.sqrt(rest) * rest / z, 64)

    @property
    def slope_lipschitz(self) -> float:
        """Lip(DP) <= gain beta / eps * 2 27^(-1/2) (2 + (2 p - 1) tau); for p = 1 gain beta C3 / eps, reached.

        D^2 P[u, v] = -gain rho^3 (<q, u> v + <q, v> u + (H - 3 rho^2 q q^T)[u, v] w), H the Hessian of L^2 / 2:
        q q^T / L^2 <= H <= (2 p - 1) beta^2, so the difference is at most (2 p - 1) beta^2 for p >= 2, and
        rho^3 L = a^(1/2) (1 - a) / eps <= 2 27^(-1/2) / eps. For p = 1 P is weight normalisation of beta w.
        """
        if self.power == 1:
            return up(self.gain * self.beta * C3 / self.eps, 4)
        rate = 2.0 / math.sqrt(27.0) * (2.0 + (2 * self.power - 1) * self.tau)
        return up(self.gain * self.beta / self.eps * rate, 12)

    def length_allowance(self, columns: int) -> float:
        """A bound of the relative error of L as it is computed in float64.

        The product of n numbers for each entry of a Gram matrix errs by gamma_n ||M||_F^2 in the Frobenius norm, so by
        r gamma_n relative to its Schatten norm, and r gamma_r for each squaring, halved at each root; complex numbers
        and the waves of the symbol take a few times that.
        """
        rank = float(self.rank)
        gram = rank * (columns + rank + 16.0)
        symbol = (self.taps + 20.0) * math.sqrt(self.taps * rank)
        return up(2.0**-50 * (gram + symbol), 8)

    def rounding_allowance(self, columns: int, roundoff: float) -> float:
        """A bound of the relative error of each computed entry, stored with that unit roundoff."""
        return up(self.length_allowance(columns) + ENTRY_ROUNDINGS * roundoff)

    def norm_allowance(self, rows: int, columns: int, roundoff: float) -> float:
        """A bound of the error of ||P(w)||_2 relative to it, two computations of P(w) apart.

        L errs as one factor; each entry's own error counts by the Frobenius norm.
        """
        entries = ENTRY_ROUNDINGS * roundoff * math.sqrt(min(rows, columns))
        return up(2.0 * (self.length_allowance(max(rows, columns)) + entries), 4)
