"""Constants and the calculus of bounds, in float64."""

from . import linear_width
from .convolution import geometry_factor
from .costs import Cost
from .nonlinearities import NONLINEARITIES, Nonlinearity
from .parameterisations import EntryNormConstants, WeightNormConstants
from .schatten import SchattenNormConstants

__all__ = [
    "NONLINEARITIES",
    "Cost",
    "EntryNormConstants",
    "Nonlinearity",
    "SchattenNormConstants",
    "WeightNormConstants",
    "geometry_factor",
    "linear_width",
]
