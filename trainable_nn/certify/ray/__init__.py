"""Taylor models of a network's outputs along rays in its parameters."""

from .network import Ray
from .taylor import Taylor

__all__ = ["Ray", "Taylor"]
