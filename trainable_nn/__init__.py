"""Networks whose training is guaranteed: drop-in layers, model conversion and certificates for PyTorch."""

from . import errors, functional, linop, modules, ops, theory
from .modules import OrthogonalDownsample2d

__version__ = "0.1.0"

__all__ = [
    "OrthogonalDownsample2d",
    "errors",
    "functional",
    "linop",
    "modules",
    "ops",
    "theory",
    "__version__",
]
