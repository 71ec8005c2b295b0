"""What a kernel's eigenvalues say of training: the loss of gradient descent to first order, and the step it allows.

With residual r = F - Y and loss a |r|^2, one step of gradient descent moves r to r - 2 a eta K r, to first order in the
change of the parameters; so with K = sum_i l_i u_i u_i^T and c_i = u_i^T r_0

    loss_t = a sum_i c_i^2 (1 - 2 a eta l_i)^(2 t).

It is exact for a network that is linear in its parameters, and holds for others as long as K hardly moves.

Source: Jacot, Gabriel and Hongler (2018), arXiv:1806.07572, section 5; Lee et al. (2019), arXiv:1902.06720, equation 8,
here in discrete time and for torch's losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tables import Table, numeral

WHERE = "predict_training"
LOSSES = ("mse", "half_square")


@dataclass(frozen=True)
class TrainingPrediction:
    """Eigenvalues (n,) in rising order, the residual's part c_i along each, and the a of the loss a |r|^2."""

    eigenvalues: Tensor
    parts: Tensor
    scale: float

    @property
    def largest_stable_step(self) -> float:
        """2 / (2 a l_max): above it the part along the largest eigenvalue grows; infinite for a zero kernel."""
        largest = float(self.eigenvalues[-1])
        return 1.0 / (self.scale * largest) if largest > 0 else math.inf

    @property
    def condition_number(self) -> float:
        """l_max / l_min; infinite unless l_min is positive."""
        smallest = float(self.eigenvalues[0])
        return float(self.eigenvalues[-1]) / smallest if smallest > 0 else math.inf

    def effective_dimension(self, ridge: float | None = None) -> float:
        """How many directions count: sum l / (l + ridge); without a ridge (sum l)^2 / sum l^2."""
        values = self.eigenvalues.clamp_min(0.0)
        if ridge is not None:
            if not 0.0 < ridge < math.inf:
                raise ValueError(f"effective_dimension: ridge must be positive and finite, got {ridge}.")
            return float((values / (values + ridge)).sum())
        squares = float(values.square().sum())
        return float(values.sum()) ** 2 / squares if squares > 0 else 0.0

    def predict_loss(self, steps: int | Sequence[int] | Tensor, step_size: float | None = None) -> float | Tensor:
        """The loss after so many steps of gradient descent, to first order; without a step size, half the largest.

        Shape:
            steps: a number -> a number; (m,) -> (m,) in float64.
        """
        step = 0.5 * self.largest_stable_step if step_size is None else step_size
        if not 0.0 < step < math.inf:
            raise ValueError(f"predict_loss: step_size must be positive and finite, got {step}.")
        times = torch.as_tensor(steps, dtype=torch.float64)
        if bool((times < 0).any()):
            raise ValueError(f"predict_loss: steps must be at least 0, got {steps}.")
        factors = (1.0 - 2.0 * self.scale * step * self.eigenvalues).abs()
        losses = self.scale * (self.parts.square() * factors ** (2.0 * times.reshape(-1, 1))).sum(1)
        return float(losses) if times.dim() == 0 else losses

    def rate(self, step_size: float | None = None) -> float:
        """max_i (1 - 2 a eta l_i)^2, over directions that the residual has: loss_{t+1} <= rate loss_t, to first order."""
        step = 0.5 * self.largest_stable_step if step_size is None else step_size
        reached = self.parts.abs() > 0
        factors = (1.0 - 2.0 * self.scale * step * self.eigenvalues[reached]).square()
        return float(factors.max()) if factors.numel() else 0.0

    def table(self) -> Table:
        """The numbers that the eigenvalues give."""
        rows = (
            ("smallest eigenvalue", numeral(float(self.eigenvalues[0]), ".6g")),
            ("largest eigenvalue", numeral(float(self.eigenvalues[-1]), ".6g")),
            ("condition number", numeral(self.condition_number, ".6g")),
            (f"effective dimension, of {len(self.eigenvalues)}", numeral(self.effective_dimension(), ".6g")),
            ("largest stable step, to first order", numeral(self.largest_stable_step, ".6g")),
        )
        return Table("What the kernel predicts", ("quantity", "value"), rows)

    def __rich__(self):
        return self.table().to_rich()

    def _repr_html_(self) -> str:
        return self.table().to_html()


def predict_training(kernel: Tensor, residual: Tensor, *, loss: str = "mse") -> TrainingPrediction:
    """The prediction from a kernel and the residual F - Y that it starts from.

    Shape:
        kernel: (n, n), symmetric, as ``linop.ntk(outputs="all")`` gives it. residual: n numbers of any shape, in the
        kernel's order, sample by sample.
        loss: "mse", torch.nn.functional.mse_loss with its mean over all n numbers; "half_square", |r|^2 / 2.
    Cost:
        One symmetric eigendecomposition, O(n^3).
    Raises:
        ValueError: shapes do not fit, an unknown loss, or entries that are not finite.
    """
    if loss not in LOSSES:
        raise ValueError(f"{WHERE}: loss must be one of {', '.join(LOSSES)}, got {loss!r}.")
    if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1] or len(kernel) != residual.numel() or len(kernel) == 0:
        raise ValueError(
            f"{WHERE}: a kernel (n, n) and a residual of n numbers are needed, got shapes {tuple(kernel.shape)} and "
            f"{tuple(residual.shape)}. Use ntk(outputs='all') and F - Y."
        )
    if not (bool(torch.isfinite(kernel).all()) and bool(torch.isfinite(residual).all())):
        raise ValueError(f"{WHERE}: kernel or residual has entries that are NaN or infinite.")
    values, vectors = torch.linalg.eigh(kernel.detach().double())
    parts = vectors.T @ residual.detach().double().flatten().to(vectors.device)
    return TrainingPrediction(values, parts, 1.0 / len(kernel) if loss == "mse" else 0.5)
