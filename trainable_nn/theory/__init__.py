"""Constants and the calculus of bounds, in float64."""

from .convolution import geometry_factor
from .nonlinearities import NONLINEARITIES, Nonlinearity
from .parameterisations import EntryNormConstants, WeightNormConstants

__all__ = ["NONLINEARITIES", "EntryNormConstants", "Nonlinearity", "WeightNormConstants", "geometry_factor"]
