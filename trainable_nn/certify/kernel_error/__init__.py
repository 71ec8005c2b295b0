"""Proved bounds of what rounding has done to a computed tangent kernel and to its Jacobian."""

from .bound import JacobianError, KernelError, jacobian_error_at_most, kernel_error_at_most

__all__ = ["JacobianError", "KernelError", "jacobian_error_at_most", "kernel_error_at_most"]
