"""Networks whose training is guaranteed: drop-in layers, model conversion and certificates for PyTorch."""

from . import errors, functional, ops

__version__ = "0.1.0"

__all__ = ["errors", "functional", "ops", "__version__"]
