"""The tangent kernel by other packages; each function raises ImportError where its package is not installed.

Both ask for torch versions of their own, so they are installed without their dependencies:
pip install --no-deps nngeometry curvlinops-for-pytorch einops einconv
"""

import torch
from torch import Tensor, nn


def kernel_by_nngeometry(model: nn.Module, x: Tensor, batch_size: int = 64) -> Tensor:
    """(n C, n C), sample by sample."""
    from nngeometry.gram import GramMatrix
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=batch_size)
    gram = GramMatrix(model, loader).data  # (C, n, C, n)
    return gram.permute(1, 0, 3, 2).reshape(gram.shape[0] * gram.shape[1], -1).detach()


def kernel_products_by_curvlinops(model: nn.Module, x: Tensor):
    """J and its transpose as scipy's linear operators."""
    from curvlinops import JacobianLinearOperator, TransposedJacobianLinearOperator

    y = model(x)
    data, parameters = [(x, torch.zeros_like(y))], list(model.parameters())
    options = {"check_deterministic": False}
    forward = JacobianLinearOperator(model, parameters, data, **options)
    back = TransposedJacobianLinearOperator(model, parameters, data, **options)
    return forward.to_scipy(), back.to_scipy()
