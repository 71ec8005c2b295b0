r"""Bounds that hold on a set around the centre: how strongly the Jacobian bends there, and how large it gets.

The set: layer h has moved by at most ``radii[h]`` in Frobenius norm, and each row of W_1 by at most ``unit``.

For unit c in R^n and directions v, w of layer norms e, e', the second derivative is
sum_i c_i D^2 f_i [v, w] <= e^T Q e'. With chi_h = d x_h[v] and zeta_h = V_h x_{h-1} + W_h chi_{h-1} it is the sum of

* s_h sum_i c_i zeta_h^v diag(b phi'') zeta_h^w: bounded by s_h max|b phi''| N(zeta^v) N(zeta^w), where N is the 4-norm
  over samples, (sum_i |.|^4)^(1/4), since sum |c_i| p_i q_i <= N(p) N(q) for |c| = 1. It obeys the triangle inequality,
  and N(V X) <= |V|_F tau(X) with tau(X)^4 = lambda_max of the Gram's entrywise square, since |V x_i|^2 =
  <V^T V, x_i x_i^T> and the x_i x_i^T have that Gram. (Summing samples by squares instead costs sqrt(n) / tau^2.)
* s_h sum_i c_i b_h D_h (V_h chi^w_{h-1} + W'_h chi^v_{h-1}): bounded by s_h max|b D| e_h (sum_i |chi_i|^2)^(1/2), and
  that norm of V X is at most |V|_F ||X||_2.

Layer 1 alone splits into its units: Q_11's part is max_k nu_k with nu_k = lambda_max((g_k g_k^T) * (X X^T)^2)^(1/2),
g_ik = s_1 b_ik phi''(z_ik), and a direction whose rows are short meets only an average of the nu_k^2.

Every norm is the one measured at the centre plus its drift on the set: |x_h - x_h^0| and |b_h - b_h^0| by the
recursion of II.3.9, phi' by sup |phi''| and phi'' by sup |phi'''| times the drift of z.

Source: Lnum of THEORY_PAPERS II.3.9, sharpened as said; each bound is searched for a violation by the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .centre import Centre

OUTWARD = 1 + 1e-7  # covers the rounding of measured norms and of the recursion
AT_ONCE = 2**22  # entries of the Grams of units that are held together
TINY = 1e-9  # of the bound by sup |phi''|, added where the measured phi'' is used, which may be small by cancellation


@dataclass(frozen=True)
class Growth:
    """Bounds on the set. For directions of layer norms e, e': |D^2 f| <= e^T (rest + units.max() e_1 e_1^T) e'."""

    rest: np.ndarray  # (H, H)
    units: np.ndarray  # (m,) nu_k, falling
    layers: np.ndarray  # (H,) sup ||J_h||
    unit: float  # sup over rows of W_1 of the norm of their block of J

    @property
    def lipschitz(self) -> float:
        """sup ||D^2 f||, so ||J(a) - J(b)|| <= lipschitz ||a - b||_F for a and b in the set."""
        whole = self.rest.copy()
        whole[0, 0] += self.units[0]
        return float(np.linalg.eigvalsh(whole)[-1]) * OUTWARD

    def along(self, shares: np.ndarray, row: float) -> float:
        """sup ||D^2 f[v]|| over unit v whose layer norms are at most ``shares``, and whose rows of W_1 ``row``.

        max sum nu_k^2 t_k under t_k <= row^2, sum t_k <= 1 fills the largest nu_k first.
        """
        vector = self.rest @ shares
        mass = np.clip(1.0 - row**2 * np.arange(len(self.units)), 0.0, min(row, 1.0) ** 2)
        vector[0] += min(np.sqrt(mass @ self.units**2), self.units[0]) if row < np.inf else self.units[0]
        return min(self.lipschitz, float(np.linalg.norm(vector)) * OUTWARD)


@dataclass(frozen=True)
class Drift:
    """Per layer and sample, how far things have moved at most on the set."""

    features: list[np.ndarray]  # |x_h - x_h^0|, h = 0 ... H-1
    z: list[np.ndarray]  # |z_h - z_h^0|_2
    entry: list[np.ndarray]  # the same, largest entry
    back: list[np.ndarray]  # |b_h - b_h^0|_2
    layer: list[np.ndarray]  # ||T_h|| on the set, and for difference quotients of phi; unused for layer 1


@dataclass(frozen=True)
class CentreNorms:
    """Norms of the centre's arrays, per layer; those of b per sample too."""

    size: list[np.ndarray]  # |x_h|
    tau: list[float]
    spectral: list[float]
    back: list[np.ndarray]  # |b|_2
    back_entry: list[np.ndarray]  # max |b|
    back_slope: list[np.ndarray]  # |b D|_2
    back_bend: list[np.ndarray]  # max |b phi''|
    units: np.ndarray  # nu_k
    row: float
    layers: list[float]  # ||J_h||


def centre_norms(c: Centre) -> CentreNorms:
    """Cost: O(m n^3) for the units, O(n m) per layer else."""
    x, first = c.features[0], c.scales[0]
    gram = x @ x.T
    units = _norms_of_rows(first * c.back[0] * c.bends[0], gram**2)
    row = _norms_of_rows(first * c.back[0] * c.slopes[0], gram).max()
    return CentreNorms(
        size=[np.linalg.norm(f, axis=1) for f in c.features],
        tau=[np.linalg.eigvalsh((f @ f.T) ** 2)[-1] ** 0.25 for f in c.features],
        spectral=[np.linalg.norm(f, 2) for f in c.features],
        back=[np.linalg.norm(b, axis=1) for b in c.back],
        back_entry=[np.abs(b).max(axis=1) for b in c.back],
        back_slope=[np.linalg.norm(b * d, axis=1) for b, d in zip(c.back, c.slopes, strict=True)],
        back_bend=[np.abs(b * d).max(axis=1) for b, d in zip(c.back, c.bends, strict=True)],
        units=units, row=float(row), layers=[np.sqrt(max(0.0, np.linalg.eigvalsh(g)[-1])) for g in c.gram_of_layer],
    )  # fmt: skip


def growth(c: Centre, norms: CentreNorms, radii: np.ndarray, unit: float) -> Growth:
    """The bounds on the set. Cost: O(H (n + m)), and the eigenvalues of an (H, H) matrix."""
    drift = _drift(c, norms, radii, unit)
    slope, curvature = c.phi.slope, c.phi.curvature
    w = c.weight_norms + radii
    tau = [t + (d**4).sum() ** 0.25 for t, d in zip(norms.tau, drift.features, strict=True)]
    spectral = [s + np.sqrt((d**2).sum()) for s, d in zip(norms.spectral, drift.features, strict=True)]
    turn = [b * np.minimum(curvature * z, 2 * slope) for b, z in zip(norms.back_entry, drift.entry, strict=True)]
    moved = [
        slope * db + np.minimum(bi * curvature * z, 2 * slope * b2)
        for db, bi, z, b2 in zip(drift.back, norms.back_entry, drift.z, norms.back, strict=True)
    ]  # |b D - b^0 D^0|_2
    reach = [
        np.minimum(slope * (b2 + db), bd + mv)
        for b2, db, bd, mv in zip(norms.back, drift.back, norms.back_slope, moved, strict=True)
    ]  # |b D|_2
    bend_moved = [_bend_moved(c, norms, drift, h) for h in range(c.depth)]
    bend = [
        np.minimum(curvature * (bi + db), bb + bm)
        for bi, db, bb, bm in zip(norms.back_entry, drift.back, norms.back_bend, bend_moved, strict=True)
    ]  # max_k |b phi''|

    first = c.scales[0]
    units = np.minimum(norms.units + first * bend_moved[0].max() * tau[0] ** 2, first * bend[0].max() * tau[0] ** 2)
    layers = [_layer(c, norms, drift, h, moved[h], reach[h], spectral[h]) for h in range(c.depth)]
    row = norms.row + first * (slope * drift.back[0] + turn[0]).max() * norms.spectral[0]

    rest = np.zeros((c.depth, c.depth))
    axis = np.eye(c.depth)
    four, two = first * slope * tau[0] * axis[0], first * slope * spectral[0] * axis[0]  # N(chi), |chi|_2
    products = _product_drift(c, drift, radii, w)
    for h in range(1, c.depth):
        zeta = tau[h] * axis[h] + w[h] * four
        through = into = bent = np.inf
        if c.products is not None:
            through = (c.products.through[h] + products.through[h]).max()
            into_moved = products.into[h]
            into = (c.products.into[h] + into_moved).max()
            bent = (
                c.products.bent[h]
                + bend_moved[h] * (c.products.into[h] + into_moved) ** 2
                + norms.back_bend[h] * into_moved * (2 * c.products.into[h] + into_moved)
            ).max()
        four[0], two[0] = min(four[0], first * tau[0] * through), min(two[0], first * spectral[0] * through)
        zeta[0] = min(zeta[0], w[h] * four[0], first * tau[0] * into)
        block = bend[h].max() * np.outer(zeta, zeta)
        block[0, 0] = min(block[0, 0], (first * tau[0]) ** 2 * bent)
        mixed = reach[h].max() * np.outer(axis[h], two)
        rest += c.scales[h] * (block + mixed + mixed.T)
        step = c.scales[h] * slope
        four = drift.layer[h].max() * four + step * tau[h] * axis[h]
        two = drift.layer[h].max() * two + step * spectral[h] * axis[h]
    return Growth(rest, np.sort(units)[::-1], np.array(layers) * OUTWARD, float(row) * OUTWARD)


def _norms_of_rows(g: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """lambda_max((g_k g_k^T) * gram)^(1/2) for each column g_k, some at a time."""
    size = max(1, AT_ONCE // gram.size)
    parts = (g.T[start : start + size] for start in range(0, g.shape[1], size))
    largest = [np.linalg.eigvalsh(part[:, :, None] * part[:, None, :] * gram)[:, -1] for part in parts]
    return np.sqrt(np.concatenate(largest).clip(0))


def _drift(c: Centre, norms: CentreNorms, radii: np.ndarray, unit: float) -> Drift:
    slope, curvature = c.phi.slope, c.phi.curvature
    w0, w = c.weight_norms, c.weight_norms + radii
    features, z, entry, layer = [np.zeros(len(c.outputs))], [], [], []
    for h, scale in enumerate(c.scales):
        z.append(radii[h] * norms.size[h] + w[h] * features[h])
        entry.append(np.minimum(z[h], unit * norms.size[0]) if h == 0 else z[h])
        own = scale * slope * radii[h] * norms.size[h]  # from W_h alone
        if h == 0:
            layer.append(np.full_like(own, np.nan))
            features.append(own)
            continue
        t = (1.0 if c.residual else 0.0) + scale * slope * w[h]
        if c.products is not None:
            moved = slope * radii[h] + w0[h] * np.minimum(curvature * entry[h], 2 * slope)
            t = np.minimum(t, c.products.layer[h] + scale * moved)
        layer.append(np.broadcast_to(t, own.shape))
        features.append(layer[h] * features[h] + own)
    back = [np.zeros(len(c.outputs))]
    for h in range(c.depth - 1, 0, -1):
        turned = np.minimum(norms.back_entry[h] * curvature * z[h], 2 * slope * norms.back[h])
        moved = slope * radii[h] * norms.back[h] + w0[h] * turned
        back.insert(0, layer[h] * back[0] + c.scales[h] * moved)
    return Drift(features[:-1], z, entry, back, layer)


def _bend_moved(c: Centre, norms: CentreNorms, drift: Drift, h: int) -> np.ndarray:
    """max_k |b phi'' - b^0 phi''^0| per sample."""
    known = c.phi.curvature * (drift.back[h] + TINY * norms.back_entry[h])
    if np.isfinite(c.jerk):
        turned = np.minimum(c.jerk * drift.entry[h], 2 * c.phi.curvature)
    else:
        turned = np.where(drift.entry[h] > 0, 2 * c.phi.curvature, 0.0)
    return known + norms.back_entry[h] * turned


def _layer(c: Centre, norms: CentreNorms, drift: Drift, h: int, moved, reach, spectral: float) -> float:
    """sup ||J_h||: rows s b D (x) x, whose Gram is an entrywise product, so ||J_h|| <= s max|b D| ||X||_2."""
    shift = np.sqrt((drift.features[h] ** 2).sum())
    near = norms.layers[h] + c.scales[h] * (moved.max() * norms.spectral[h] + reach.max() * shift)
    return min(near, c.scales[h] * reach.max() * spectral)


@dataclass(frozen=True)
class ProductDrift:
    """How far P_h and W_h P_h of ``Products`` have moved, in norm, per layer and sample."""

    through: list[np.ndarray | float]
    into: list[np.ndarray | float]


def _product_drift(c: Centre, drift: Drift, radii: np.ndarray, w: np.ndarray) -> ProductDrift:
    if c.products is None:
        return ProductDrift([np.inf] * c.depth, [np.inf] * c.depth)
    slope, curvature = c.phi.slope, c.phi.curvature
    turn = [np.minimum(curvature * e, 2 * slope) for e in drift.entry]  # ||D - D^0||
    through, into = [np.zeros(1), turn[0]], [np.zeros(1)]
    for h in range(1, c.depth):
        into.append(w[h] * through[h] + radii[h] * c.products.through[h])
        layer = c.scales[h] * (slope * radii[h] + c.weight_norms[h] * turn[h])  # ||T - T^0||
        through.append(drift.layer[h] * through[h] + layer * c.products.through[h])
    return ProductDrift(through[:-1], into)
