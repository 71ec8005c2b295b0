r"""What is measured at the present parameters: features, back-propagated weights, their norms, the exact Gram J J^T.

Notation, as in THEORY_PAPERS II.3.4 and II.3.9: x_h features (x_0 the input), z_h = W_h x_{h-1}, s_h the scale of layer
h, D_h = diag phi'(z_h), b_h = d f / d x_h a row, T_h = Id + s_h D_h W_h (s_h D_h W_h in the feed-forward network). Block
h of the Jacobian's row i is s_h (b_h D_h) x_{h-1}^T, so the Gram is the sum over h of
s_h^2 [(b D)(b D)^T] * [X_{h-1} X_{h-1}^T]: no Jacobian is formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import DatasetError, OptionError
from ..higher_derivatives import JERKS
from ..nonlinearities import Nonlinearity
from ..rounding import ROUNDOFF
from .activations import nonlinearity_called, value_slope_and_bend
from .gaussian import matrix_of
from .network import LinearWidthResNet

EVALUATION = 64  # units roundoff by which a computed phi or phi' may err
DETAIL_LIMIT = 5e9  # width^3 * samples * layers, above which the norms of products of layers are not computed


@dataclass(frozen=True)
class Products:
    """Norms of products of layers at the centre, one row a layer from the second on, one column a sample.

    With P_h = T_{h-1} ... T_2 D_1: ``through`` is ||P_h||, ``into`` ||W_h P_h||, ``bent``
    ||(W_h P_h)^T diag(b_h phi''(z_h)) W_h P_h||, ``layer`` ||T_h||.
    """

    through: np.ndarray
    into: np.ndarray
    bent: np.ndarray
    layer: np.ndarray


@dataclass(frozen=True)
class Centre:
    """One network on one set of inputs. Arrays of layers are lists from layer 1 (index 0) to layer H."""

    phi: Nonlinearity
    jerk: float
    residual: bool
    scales: tuple[float, ...]
    weights: list[np.ndarray]
    weight_norms: np.ndarray  # (H,) spectral
    features: list[np.ndarray]  # x_0 ... x_{H-1}, each (n, width)
    slopes: list[np.ndarray]  # phi'(z_h)
    bends: list[np.ndarray]  # phi''(z_h)
    back: list[np.ndarray]  # b_h
    outputs: np.ndarray
    gram_of_layer: list[np.ndarray]
    products: Products | None
    roundoff: float  # bound of ||computed J - J||_F

    @property
    def gram(self) -> np.ndarray:
        return sum(self.gram_of_layer)

    @property
    def depth(self) -> int:
        return len(self.scales)

    def jacobian(self) -> np.ndarray:
        """The dense Jacobian, (n, parameters), for small problems."""
        blocks = [
            s * np.einsum("ik,il->ikl", b * d, x).reshape(len(x), -1)
            for s, b, d, x in zip(self.scales, self.back, self.slopes, self.features, strict=True)
        ]
        return np.concatenate(blocks, axis=1)

    def gradient(self, residual: np.ndarray) -> list[np.ndarray]:
        """J^T r, layer by layer, in the shapes of the weights."""
        return [
            s * ((b * d) * residual[:, None]).T @ x
            for s, b, d, x in zip(self.scales, self.back, self.slopes, self.features, strict=True)
        ]


def measure(network: LinearWidthResNet, inputs: np.ndarray, *, detail: bool = True) -> Centre:
    """Everything that the certificate and the comparisons need at the network's present parameters.

    Shape:
        inputs: (n, in_features).
    Cost:
        O(n H m^2), and with ``detail`` O(n H m^3) as long as that stays below DETAIL_LIMIT.
    Raises:
        DatasetError: inputs that are not a finite matrix of in_features columns.
        OptionError: parameters that are not finite, or on the meta device.
    """
    x = matrix_of(inputs)
    if x.shape[1] != network.in_features:
        raise DatasetError(
            f"linear_width.measure: the inputs have {x.shape[1]} columns and the network takes "
            f"{network.in_features}. Give it the inputs it was built for."
        )
    if any(w.is_meta for w in (*network.weights, network.a)):
        raise OptionError(
            "linear_width.measure: the network lies on the meta device and has no values. Materialise it first."
        )
    weights = [w.detach().cpu().double().numpy() for w in network.weights]
    a = network.a.detach().cpu().double().numpy()
    for name, array in [*((f"weights.{h}", w) for h, w in enumerate(weights)), ("a", a)]:
        if not np.isfinite(array).all():
            raise OptionError(f"linear_width.measure: {name} holds a value that is not finite. Load finite weights.")
    # a network in float32 has its own rounded constants; those of float64 define the function that is bounded here
    return measure_at(network.nonlinearity, network.scales, weights, a, x, residual=network.residual, detail=detail)


def measure_at(
    nonlinearity: str, scales: tuple[float, ...], weights: list[np.ndarray], a: np.ndarray, x: np.ndarray,
    *, residual: bool, detail: bool,
) -> Centre:  # fmt: skip
    """``measure`` for weights given as float64 arrays."""
    depth, m = len(weights), len(a)
    features, values, slopes, bends = [x], [], [], []
    for h, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        value, slope, bend = value_slope_and_bend(nonlinearity, features[-1] @ weight.T)
        values.append(value), slopes.append(slope), bends.append(bend)
        features.append(scale * value + (features[-1] if h and residual else 0.0))
    back = [np.tile(a, (len(x), 1))]
    for h in range(depth - 1, 0, -1):
        step = scales[h] * (back[0] * slopes[h]) @ weights[h]
        back.insert(0, step + back[0] if residual else step)
    grams = [
        s**2 * ((b * d) @ (b * d).T) * (f @ f.T) for s, b, d, f in zip(scales, back, slopes, features, strict=False)
    ]
    phi = nonlinearity_called(nonlinearity)
    norms = np.array([_norm(w) for w in weights])
    products = None
    if detail and depth > 1 and float(m) ** 3 * len(x) * depth <= DETAIL_LIMIT:
        products = _products(scales, weights, slopes, bends, back, residual)
    return Centre(
        phi, JERKS.get(nonlinearity, np.inf), residual, tuple(scales), weights, norms, features[:-1], slopes, bends,
        back, features[-1] @ a, grams, products,
        _roundoff(phi, scales, weights, norms, features, values, back, residual),
    )  # fmt: skip


def _products(scales, weights, slopes, bends, back, residual) -> Products:
    depth, n = len(weights), len(slopes[0])
    through, into, bent, layer = (np.zeros((depth, n)) for _ in range(4))
    for i in range(n):
        product = np.diag(slopes[0][i])
        for h in range(1, depth):
            entering = weights[h] @ product
            through[h, i], into[h, i] = _norm(product), _norm(entering)
            curved = entering.T @ ((back[h][i] * bends[h][i])[:, None] * entering)
            bent[h, i] = np.abs(np.linalg.eigvalsh((curved + curved.T) / 2)).max()
            branch = (scales[h] * slopes[h][i])[:, None] * weights[h]
            layer[h, i] = _norm(branch + np.eye(len(branch)) if residual else branch)
            product = (scales[h] * slopes[h][i])[:, None] * entering + (product if residual else 0.0)
    return Products(through, into, bent, layer)


def _norm(a: np.ndarray) -> float:
    """Spectral norm from the smaller Gram matrix: its largest eigenvalue is computed to n u relatively."""
    return float(np.sqrt(max(0.0, np.linalg.eigvalsh(a.T @ a if a.shape[1] <= a.shape[0] else a @ a.T)[-1])))


def _roundoff(phi: Nonlinearity, scales, weights, norms, features, values, back, residual: bool) -> float:
    """A bound of ||computed J - J||_F: the rounding of every product and function value, carried forth and back.

    A product of k terms errs by (k + 2) u times the product of the Frobenius norms; phi and phi' are taken to err by
    EVALUATION u relative to max(|phi|, B |z|) and to B.
    """
    slope, curvature, depth = phi.slope, phi.curvature, len(weights)
    size = [np.linalg.norm(f, axis=1) for f in features]
    frobenius = [float(np.linalg.norm(w)) for w in weights]
    x, off_features, off_slopes = np.zeros(len(size[0])), [], []
    for h, (w, scale) in enumerate(zip(weights, scales, strict=True)):
        z = (w.shape[1] + 2) * ROUNDOFF * frobenius[h] * size[h] + norms[h] * x
        off_features.append(x)
        off_slopes.append(curvature * z + EVALUATION * ROUNDOFF * slope * np.sqrt(len(w)))
        branch = slope * z + EVALUATION * ROUNDOFF * (np.linalg.norm(values[h], axis=1) + slope * norms[h] * size[h])
        x = scale * branch + (x if h and residual else 0.0) + 4 * ROUNDOFF * size[h + 1]
    b, total = np.zeros(len(size[0])), 0.0
    for h in range(depth - 1, -1, -1):
        length, entry = np.linalg.norm(back[h], axis=1), np.abs(back[h]).max(axis=1)
        turned = entry * off_slopes[h] + slope * b + 4 * ROUNDOFF * slope * length
        total += float(np.sum((scales[h] * (turned * size[h] + slope * length * off_features[h])) ** 2))
        product = norms[h] * turned + (len(back[h][0]) + 2) * ROUNDOFF * frobenius[h] * slope * length
        b = (b if residual else 0.0) + scales[h] * product + 4 * ROUNDOFF * length
    return 1.01 * float(np.sqrt(total))
