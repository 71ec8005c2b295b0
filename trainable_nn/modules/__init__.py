"""Drop-in modules: forward is one call of a function in ``functional``."""

from .skip import OrthogonalDownsample2d

__all__ = ["OrthogonalDownsample2d"]
