"""The neural tangent kernel: the Gram matrix of the parameter Jacobian, layer by layer."""

from .compute import KernelBlock, ntk, ntk_blocks

__all__ = ["KernelBlock", "ntk", "ntk_blocks"]
