"""Proved bounds of a network's derivatives in its parameters: everywhere, or on a ball around the present ones."""

from .network import LayerRegularity, NetworkRegularity, network_regularity

__all__ = ["LayerRegularity", "NetworkRegularity", "network_regularity"]
