"""Proved bounds of a network's derivatives in its parameters: everywhere, or on a ball around the present ones."""

from .network import LayerRegularity, NetworkRegularity, PreparedNetwork, network_regularity
from .structure import FirstLayer, ResidualLayer, first_layer, residual_structure

__all__ = [
    "FirstLayer",
    "LayerRegularity",
    "NetworkRegularity",
    "PreparedNetwork",
    "ResidualLayer",
    "first_layer",
    "network_regularity",
    "residual_structure",
]
