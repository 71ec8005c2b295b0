"""Operators: schema, reference, fake kernel and gradient, once each; the compiled kernels are loaded here."""

from . import batch_norm, convolution, native
from .entry_norm import entry_norm
from .schatten import squared_schatten_norm
from .weight_norm import weight_norm

__all__ = ["batch_norm", "convolution", "entry_norm", "native", "squared_schatten_norm", "weight_norm"]

native.load()  # after the schemas: a library adds kernels to them
