"""Weights on disk: safetensors with the conversion and a hash in the metadata, never a pickle."""

from .state import fill
from .store import Checkpoint, load, save

__all__ = ["Checkpoint", "fill", "load", "save"]
