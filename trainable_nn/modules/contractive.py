"""A residual block whose branch is a contraction for every value of its weights, with one fixed factor before it."""

import contextlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import UnboundedError
from .lipschitz import RULES, Reading, Rule, lipschitz_bound
from .residual import _check_input_is_kept


class ContractiveResidual(nn.Module):
    r"""y = skip(x) + a branch(x) with a fixed a such that \|\|J (a branch)\|\|_2 <= strength at all x and all weights.

    a = min(1, strength / L) with L the supremum of the branch's Lipschitz constant over every weight, so the branch must
    be made of layers that have one: ours with a normalised weight, activations, pooling by means. Nothing is measured
    and nothing changes in training, so where \|\|J skip\|\| and its least singular value are 1, the least singular value
    of the block's Jacobian is at least 1 - strength, everywhere. ``SpectrallyBoundedResidual`` takes plain layers too,
    and follows their weights.

    Shape:
        x -> skip(x), of the shape of branch(x). Without skip it is x. input_shape is the shape of one sample, without
        the batch: with it the bounds of pooling and convolutions may be tighter, and hold for that shape only.
    Raises:
        UnboundedError: a layer of the branch has no bound over all weights; the message gives its path.
        ValueError: strength is not between 0 and 1, branch or skip overwrites its input; or, in forward, x has another
        shape than input_shape, or the two outputs differ in shape.
    Source:
        Paper A, Lemma A.8; the uniform margin 1 - strength is THEORY_PAPERS II.1.7, item 4.
    """

    def __init__(
        self,
        branch: nn.Module,
        skip: nn.Module | None = None,
        *,
        strength: float = 0.95,
        input_shape: tuple[int, ...] | None = None,
        rules: Mapping[type, Rule] = RULES,
    ) -> None:
        if not 0.0 < strength < 1.0:
            raise ValueError(f"ContractiveResidual: strength must be above 0 and below 1, got {strength}.")
        for path, module in (("branch", branch), ("skip", skip)):
            _check_input_is_kept(path, module)
        super().__init__()
        self.branch, self.skip = branch, skip
        self.strength, self.input_shape, self.rules = float(strength), input_shape, rules
        self.scale = self._scale()

    def _scale(self) -> float:
        reading = Reading("branch", any_weights=True, input_shape=self.input_shape)
        supremum = lipschitz_bound(self.branch, reading, self.rules)
        return 1.0 if supremum <= self.strength else rounded_down(self.strength / supremum)

    def _apply(self, fn, recurse=True):
        """Move as every module does; the supremum of a normalised weight carries the rounding of its dtype."""
        super()._apply(fn, recurse)
        with contextlib.suppress(UnboundedError):  # a branch that was wrapped or changed moves too
            self.scale = self._scale()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.input_shape is not None and x.shape[-len(self.input_shape) :] != tuple(self.input_shape):
            raise ValueError(
                f"ContractiveResidual: the input has shape {tuple(x.shape)}, and the bound holds for samples of shape "
                f"{tuple(self.input_shape)} only. Leave input_shape out for a bound of every shape."
            )
        kept = x if self.skip is None else self.skip(x)
        change = self.branch(x)
        if kept.shape != change.shape:
            raise ValueError(
                f"ContractiveResidual: the skip gives shape {tuple(kept.shape)} and the branch "
                f"{tuple(change.shape)}. Give a skip of the branch's shape, for example OrthogonalDownsample2d."
            )
        return torch.add(kept, change, alpha=self.scale)

    def extra_repr(self) -> str:
        return f"strength={self.strength:g}, scale={self.scale:.4g}"


def rounded_down(value: float) -> float:
    """The largest number of 20 bits below a positive value less its last bits: exact in float32, float64 and products of both."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.floor(mantissa * 2**20 - 1), exponent - 20)
