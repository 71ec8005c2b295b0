r"""Rounding of batch normalisation in evaluation mode: y = gamma (x - mu) / m + beta, affine, channel by channel.

Torch computes x (gamma / m) + (beta - mu gamma / m), where large numbers may cancel; so sizes are those of the terms.
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..regularity.normalisation import FixedNormalisation
from .rules import Rounding
from .states import LOST, UP, Gradients, Part, U, Value, gamma, norms

ROUNDINGS = 32  # between buffers, parameters and an entry: the root, the floor, quotients, products and sums


class FixedNormalisationRounding(Rounding):
    """nn.BatchNorm or FlooredBatchNorm in evaluation mode."""

    def slope(self, step: FixedNormalisation, position: int) -> float:
        return float((step.gamma.abs() * step.scale.abs()).max()) * UP

    def forward(self, step: FixedNormalisation, inputs: Sequence[Value]) -> np.ndarray:
        (x,) = inputs
        scale = (step.gamma * step.scale).abs()
        terms = _sizes(step, x) * _shaped(scale, x) + _shaped(step.beta.abs(), x)
        slope = self.slope(step, 0)
        return (slope * x.error + ROUNDINGS * U * (norms(terms, len(x.error)) + slope * x.apart)) * UP + LOST

    def on_ball(self, step: FixedNormalisation, inputs: Sequence[Value], radius: float) -> tuple[np.ndarray, np.ndarray]:
        (x,) = inputs
        turned, shifted = (radius if trains else 0.0 for trains in step.trains)
        steepest, root = float(step.scale.abs().max()) * UP, math.sqrt(x.entries // len(step.gamma)) * UP
        longest = norms(_sizes(step, x) * _shaped(step.scale.abs(), x), len(x.error)) + steepest * x.apart
        further = turned * longest + shifted * root  # of the output, where gamma and beta move
        error = self.forward(step, inputs) + turned * steepest * x.error + ROUNDINGS * U * further
        return error * UP, (self.slope(step, 0) * x.moved + further) * UP

    def backward(self, step: FixedNormalisation, inputs: Sequence[Value], y: Gradients) -> list[np.ndarray]:
        return [self.slope(step, 0) * (y.error + ROUNDINGS * U * y.norm) * UP + LOST]

    def parts(self, step: FixedNormalisation, x: Value, y: Gradients) -> list[Part]:
        found, channels = {}, len(step.gamma)
        positions = x.entries // channels
        steepest = float(step.scale.abs().max()) * UP
        longest = norms(_sizes(step, x) * _shaped(step.scale.abs(), x), len(x.error)) + 2 * steepest * x.error
        size = longest * y.norm * UP
        error = y.error * longest + steepest * x.error * y.norm + (gamma(positions) + ROUNDINGS * U) * size
        found[0] = (error * UP + LOST, size)
        root = math.sqrt(positions) * UP
        found[1] = (root * (y.error + gamma(positions + 4) * y.norm) * UP + LOST, root * y.norm * UP)
        kept = [found[i] for i, trains in enumerate(step.trains) if trains]
        return [Part(name, *pair, channels, 0, 8) for name, pair in zip(step.parameters, kept)]


def _sizes(step: FixedNormalisation, x: Value) -> Tensor:
    """|x| + |mu|."""
    return x.values.abs() + _shaped(step.mean.abs(), x)


def _shaped(channels: Tensor, x: Value) -> Tensor:
    return channels.reshape(1, -1, *[1] * (x.values.dim() - 2))
