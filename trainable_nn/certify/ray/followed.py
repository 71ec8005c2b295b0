"""What a ray was followed through: the Taylor models of all steps and of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .taylor import Taylor


@dataclass(frozen=True)
class Followed:
    """models of all steps along one ray; for an affine step at its place the model of its weight, w and its move, and the bias's move."""

    direction: Mapping[str, Tensor]
    models: list[Taylor] = field(default_factory=list)
    weights: dict[int, tuple[Taylor, Tensor, Tensor]] = field(default_factory=dict)
    shifts: dict[int, Tensor] = field(default_factory=dict)
