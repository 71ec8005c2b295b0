r"""A start near the top singular vector of a convolution, by Lanczos on its Gram matrix in float32.

Float32 convolutions are two to five times as fast as float64's, and vectors are half as long. What this finds is only where
Golub-Kahan starts in float64, which needs a few steps from there instead of some hundred; a bad start costs steps, and
no digit of the result. So nothing is reorthogonalised either: copies of values that have converged do no harm.
"""

import torch
from torch import Tensor

from .products import Products
from .toeplitz import ToeplitzConv

MOST_STEPS = 160
CHECK_EVERY = 8
REACHABLE = 2e-6  # of |G v - m v| / m in float32, with a margin


def rough_top(op: ToeplitzConv, products: Products, tol: float, most_steps: int, seed: int) -> Tensor:
    """A float64 unit vector on the smaller side of the scaled op.

    Cost:
        Two float32 products a step, at most 160; as many float32 vectors.
    """
    narrow = op.to(torch.float64)
    narrow.weight = products.scaled(narrow.weight.detach())
    narrow = narrow.to(torch.float32)
    small = min(op.shape)
    gram = (lambda v: narrow.mv(narrow.rmv(v))) if op.shape[0] < op.shape[1] else (lambda v: narrow.rmv(narrow.mv(v)))
    steps = max(1, min(MOST_STEPS, most_steps, small))
    basis = torch.empty(steps, small, dtype=torch.float32, device=op.device)
    diagonal, beside = [], []
    v = products.random(seed)(small).float()
    v, top = v / torch.linalg.vector_norm(v), None
    with torch.no_grad():
        for j in range(steps):
            basis[j] = v
            w = gram(v) - (beside[-1] * basis[j - 1] if j else 0.0)
            diagonal.append(float(v @ w))
            w -= diagonal[-1] * v
            beside.append(float(torch.linalg.vector_norm(w)))
            last = j + 1 == steps or beside[-1] <= 1e-6 * max(map(abs, diagonal))
            if last or j % CHECK_EVERY == 0:
                values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside[:-1]))
                top = vectors[:, -1]
                if last or beside[-1] * abs(float(top[-1])) <= max(tol, REACHABLE) * float(values[-1]):
                    break
            v = w / beside[-1]
        products.count += 2 * len(diagonal)
        start = (top.float().to(basis.device) @ basis[: len(diagonal)]).double()
    return start / torch.linalg.vector_norm(start)


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    if beside:
        off = torch.diag(torch.tensor(beside, dtype=torch.float64, device="cpu"), 1)
        matrix += off + off.mT
    return matrix
