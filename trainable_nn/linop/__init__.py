"""Linear maps as operators, and proved bounds of their norms."""

from .jacobian import Jacobian
from .norm import matrix_norm_at_most

__all__ = ["Jacobian", "matrix_norm_at_most"]
