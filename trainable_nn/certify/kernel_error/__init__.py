"""Proved bounds of what rounding has done to a computed tangent kernel, to its Jacobian, and to a network's outputs."""

from .bound import JacobianError, KernelError, jacobian_error_at_most, kernel_error_at_most
from .outputs import OutputsAlong, outputs_error_at_most

__all__ = [
    "JacobianError",
    "KernelError",
    "OutputsAlong",
    "jacobian_error_at_most",
    "kernel_error_at_most",
    "outputs_error_at_most",
]
