"""The neural tangent kernel: the Gram matrix of the parameter Jacobian, layer by layer."""

from .compute import ntk

__all__ = ["ntk"]
