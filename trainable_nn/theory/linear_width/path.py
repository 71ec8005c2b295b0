r"""Where gradient descent on the squared loss can go: an enclosure of its residual over the length of its path.

Steps theta' = theta - eta g, g = J^T r, r = f - y; s the length of the path so far. Let Lambda(s) >= ||J - J_0|| and
L(s) >= sup ||D^2 f|| along it, and q = 2 - eta (beta^2 + L |r_0|) with beta >= ||J||.

1. r' = r - eta C g with C the mean Jacobian of the step, ||C - J|| <= L eta |g| / 2, so |r'|^2 <= |r|^2 - eta q |g|^2,
   also for a shortened step (its q is larger).
2. Let p_k bound the norm of r in the span of the k lowest left singular directions of J_0 (values sigma_1 <= ...).
   C g = J_0 J_0^T r + J_0 E^T r + E' g with ||E||, ||E'|| <= Lambda, and eta sigma_n^2 <= 1, so one step adds at most
   the integral of Lambda + sigma_k Lambda / (sigma_1 - Lambda) over its length, since eta |r| <= eta |g| /
   (sigma_1 - Lambda); crudely, of Lambda + sigma_k. Hence p_k(s) = |P_k r_0| + int_0^s Lambda + sigma_k min(1,
   Lambda / (sigma_1 - Lambda)).
3. So |g| >= G(s, |r|) = (sum_k sigma_k^2 m_k)^(1/2) - Lambda(s) |r|, where the masses m_k, of sum |r|^2, lie as low as
   the p_k allow. G falls in s and rises in |r| (the last mass lies at the highest direction in use; Lambda < sigma_1).
4. Let rho(s) start at |r_0| with (rho^2 / 2)' = -(q / 2) G(s, rho). Then |r_t| <= rho(s_t). For suppose it at t and that
   the step of length D ends with E = |r|^2 / 2 above rho(s + D)^2 / 2 =: e(s + D). As E falls, e(s*) = E_t for some s* in
   [s, s + D), and e(s*) - e(s + D) = (q / 2) int G <= (q / 2) D G(s*, rho(s*)) <= (q / 2) D |g| <= E_t - E, which
   contradicts it.
5. If rho reaches 0 at s = R, no step leaves: shortened to end at R it would leave |r| < 0. All constants are thus needed
   up to R only, and |r_t|^2 <= (1 - eta q alpha^2)^t |r_0|^2 with alpha = sigma_1 - Lambda(R).

The set that s allows (``growth``): layer h has moved by at most min(s, int beta_h / (sigma_1 - Lambda)), since its
share of a step is at most beta_h |r| / |g|; the same for a row of W_1; and the direction of each step has such shares.

The integral over s is taken in cells, each constant at its worst end. With Lambda = L s and no step 2 it closes if
sigma_1^2 >= 2 L |r_0|; THEORY_PAPERS II.4.1 item 4 needs 8, since it takes Lambda(R) everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..rounding import ROUNDOFF
from .centre import Centre
from .growth import OUTWARD, CentreNorms, Growth, centre_norms, growth

CELLS = 160  # to the length |r_0| / sigma_1
SHARES = (1.0, 0.5, 0.2, 0.05, 0.01)  # of the step 1 / (beta^2 + L |r_0|): a shorter one needs a smaller ball


@dataclass(frozen=True)
class Enclosure:
    """The enclosure on a grid: at the path length ``s[j]`` the residual is at most ``residual[j]`` and so on.

    ``closes`` says that the residual reaches 0, at ``s[-1]``, while sigma_min(J) >= ``alpha`` > 0.
    """

    closes: bool
    share: float
    s: np.ndarray
    residual: np.ndarray
    drift: np.ndarray  # Lambda
    radii: np.ndarray  # (cells, H)
    unit: np.ndarray
    sigma_smallest: float
    sigma_largest: float
    beta: float
    lipschitz: float

    @property
    def alpha(self) -> float:
        return max(0.0, self.sigma_smallest - float(self.drift[-1]))

    @property
    def needed_over_available(self) -> float:
        """|r_0| over the part of it that provably vanishes before the bound of sigma_min reaches 0; 1 if it closes."""
        gone = self.residual[0] - self.residual[-1]
        return float(self.residual[0] / gone) if gone > 0 else np.inf

    @property
    def step_size(self) -> float:
        return self.share / (self.beta**2 + self.lipschitz * self.residual[0]) * (1 - 1e-12)

    @property
    def rate(self) -> float:
        """|r_t|^2 <= rate^t |r_0|^2."""
        return float(1 - self.step_size * (2 - self.share) * self.alpha**2 * (1 - 1e-12)) if self.closes else 1.0


def enclose(c: Centre, residual: np.ndarray) -> Enclosure:
    """The enclosure for the largest step that closes, or for the smallest one tried where none does."""
    norms = centre_norms(c)
    first = _enclose(c, norms, residual, SHARES[0])
    if first.closes:
        return first
    last = _enclose(c, norms, residual, SHARES[-1])
    between = (_enclose(c, norms, residual, share) for share in SHARES[1:-1] if last.closes)
    return next((enclosure for enclosure in between if enclosure.closes), last)


def closes(c: Centre, residual: np.ndarray) -> bool:
    """Whether the enclosure closes for the smallest step that is tried."""
    return _enclose(c, centre_norms(c), residual, SHARES[-1]).closes


def singular_values(c: Centre) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bounds of the singular values of J from below and above, rising, and left singular vectors.

    With E the rounding of J, the Gram is off by at most 2 E ||J||_F + E^2, besides its own products and eigenvalues.
    """
    gram = (c.gram + c.gram.T) / 2
    eigenvalues, vectors = np.linalg.eigh(gram)
    square = float(np.trace(gram))  # ||J||_F^2
    own = 8 * ROUNDOFF * (len(gram) + 2 * max(w.shape[0] + w.shape[1] for w in c.weights) + c.depth)
    allowance = 2 * c.roundoff * square**0.5 + c.roundoff**2 + own * square
    return np.sqrt((eigenvalues - allowance).clip(0)), np.sqrt((eigenvalues + allowance).clip(0)), vectors


def _enclose(c: Centre, norms: CentreNorms, r0: np.ndarray, share: float) -> Enclosure:
    lower, upper, vectors = singular_values(c)
    smallest, length = float(lower[0]), float(np.linalg.norm(r0)) * (1 + 1e-12)
    start = np.sqrt(np.cumsum((vectors.T @ r0) ** 2)) * (1 + 1e-12) + 1e-14 * length  # |P_k r_0|
    allowance = float(upper[-1] ** 2 - lower[-1] ** 2)  # of the Gram, and so of P_k's commuting with it
    q = 2.0 - share
    s, drift, unit, residual = 0.0, 0.0, 0.0, length
    radii, low = np.zeros(c.depth), start.copy()
    lines = [(s, residual, drift, radii, unit)]
    beta, lipschitz, closes = float(upper[-1]), 0.0, length == 0.0
    cell = length / smallest / CELLS if smallest > 0 else 0.0
    while smallest > 0 and not closes:
        step = _cell(growth(c, norms, radii + cell, unit + cell), smallest, drift, cell)
        if step is None:
            break
        drift, radii, unit, lipschitz = step[0], radii + step[1], unit + step[2], step[3]
        gap = smallest - drift
        low = low + cell * (drift + upper * min(1.0, drift / gap) + allowance / gap)
        beta = float(min(upper[-1] + drift, np.linalg.norm(step[4]))) * OUTWARD
        guess = residual - cell * q / 2 * _steepness(residual, low, lower, drift)
        fall = q / 2 * _steepness(max(guess, 0.0), low, lower, drift) * (1 - 1e-9)
        closes = fall * cell >= residual
        s, residual = (s + residual / fall, 0.0) if closes else (s + cell, residual - fall * cell)
        lines.append((s, residual, drift, radii, unit))
    columns = [np.array(column) for column in zip(*lines, strict=True)]
    return Enclosure(bool(closes), share, *columns, smallest, float(upper[-1]), beta, lipschitz)


def _cell(g: Growth, smallest: float, drift: float, cell: float) -> tuple | None:
    """Lambda at the cell's end, what radii and unit gain, L along steps, sup ||J_h||; None where Lambda passes sigma."""
    rough = drift + g.lipschitz * cell
    if rough >= smallest:
        return None
    shares = np.minimum(1.0, g.layers / (smallest - rough))
    row = min(1.0, g.unit / (smallest - rough))
    lipschitz = g.along(shares, row)
    return (drift + lipschitz * cell) * (1 + 1e-12), cell * shares, cell * row, lipschitz, g.layers


def _steepness(residual: float, low: np.ndarray, sigma: np.ndarray, drift: float) -> float:
    """G(s, rho) / rho of the module's text, where the masses are the differences of min(p_k, ...)^2."""
    if residual == 0.0:
        return float(sigma[0]) - drift
    mass = np.minimum(low / residual, 1.0) ** 2
    mass[-1] = 1.0
    mass = np.minimum.accumulate(mass[::-1])[::-1]
    return float(np.sqrt(sigma**2 @ np.diff(mass, prepend=0.0))) - drift
