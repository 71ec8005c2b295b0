"""Constants and the calculus of bounds, in float64."""

from . import linear_width
from .convolution import geometry_factor
from .costs import Cost
from .nonlinearities import NONLINEARITIES, Nonlinearity
from .parameterisations import EntryNormConstants, WeightNormConstants
from .schatten import SchattenNormConstants
from .training_prediction import TrainingPrediction, predict_training

__all__ = [
    "NONLINEARITIES",
    "Cost",
    "EntryNormConstants",
    "Nonlinearity",
    "SchattenNormConstants",
    "TrainingPrediction",
    "WeightNormConstants",
    "geometry_factor",
    "linear_width",
    "predict_training",
]
