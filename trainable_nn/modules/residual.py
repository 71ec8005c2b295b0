"""A residual block whose branch is provably shorter than its skip, whatever training does to the weights."""

import contextlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import UnboundedError
from ..theory.rounding import product_up, up
from .lipschitz import RULES, Reading, Rule, lipschitz_bound


class SpectrallyBoundedResidual(nn.Module):
    r"""y = skip(x) + a * branch(x), a = min(1, bound / L), L a Lipschitz bound of the branch for all its weights.

    So \|\|J(a branch)\|\|_2 <= bound for every input and at every step, and with a skip whose singular values are 1
    the block's Jacobian has all of its within [1 - bound, 1 + bound]. L is the product over the branch: normalised
    layers count with the supremum over all weights, which is pessimistic, so the branch is weak at the start.

    Shape:
        x: what branch and skip take; their outputs must have one shape.
    Raises:
        UnboundedError: a part of the branch has no bound for all weights; the message gives its path.
        ValueError: bound is not between 0 and 1, or branch or skip overwrites its input; or, in forward, the two
        outputs differ in shape.
    Source:
        Paper A, Lemma A.8; the uniform margin 1 - bound is THEORY_PAPERS II.1.7, item 4.
    """

    def __init__(
        self,
        branch: nn.Module,
        skip: nn.Module | None = None,
        *,
        bound: float = 0.9,
        rules: Mapping[type, Rule] | None = None,
    ) -> None:
        if not 0.0 < bound < 1.0:
            raise ValueError(f"SpectrallyBoundedResidual: bound must be above 0 and below 1, got {bound}.")
        for path, module in (("branch", branch), ("skip", skip)):
            _check_input_is_kept(path, module)
        super().__init__()
        self.branch, self.skip = branch, skip
        self.bound, self.rules = float(bound), rules
        self.scale = self._scale()

    def _scale(self) -> float:
        """min(1, bound / L), rounded down to a float32, so no dtype multiplies by more."""
        supremum = self._branch_bound(Reading("branch", any_weights=True))
        if supremum <= self.bound:
            return 1.0
        mantissa, exponent = math.frexp(math.nextafter(self.bound / supremum, 0.0))
        return math.ldexp(math.floor(mantissa * 2**24), exponent - 24)

    def _apply(self, fn, recurse=True):
        """Move as every module does; the bound of a normalised weight carries the rounding of its dtype."""
        super()._apply(fn, recurse)
        with contextlib.suppress(UnboundedError):  # a wrapped or changed branch moves too; certified_bound tells of it
            self.scale = self._scale()
        return self

    def forward(self, x: Tensor) -> Tensor:
        kept = x if self.skip is None else self.skip(x)
        change = self.branch(x)
        if kept.shape != change.shape:
            raise ValueError(
                f"SpectrallyBoundedResidual: the skip gives shape {tuple(kept.shape)} and the branch "
                f"{tuple(change.shape)}. Give a skip of the branch's shape, for example OrthogonalDownsample2d."
            )
        return torch.add(kept, change, alpha=self.scale)

    def certified_bound(self, input_shape: Sequence[int] | None = None) -> float:
        """A proved upper bound of the Lipschitz constant of a * branch with the weights and the mode of now.

        At most ``bound``, and often far below it, since the weights are not at their supremum.

        Shape:
            input_shape: the shape of one sample, without the batch; without it the bound holds for all.
        Raises:
            UnboundedError: the branch was changed to one that nothing bounds.
        """
        shape = None if input_shape is None else tuple(input_shape)
        return product_up([self.scale, self._branch_bound(Reading("branch", any_weights=False, input_shape=shape))])

    def _branch_bound(self, reading: Reading) -> float:
        return lipschitz_bound(self.branch, reading, BRANCH_RULES if self.rules is None else self.rules)

    def extra_repr(self) -> str:
        return f"bound={self.bound:g}, scale={self.scale:.4g}"


def residual_rule(module: SpectrallyBoundedResidual, reading: Reading, rules: Mapping[type, Rule]) -> float:
    """L(skip) + a L(branch), for a residual inside a branch."""
    inside = Reading(f"{reading.path}.branch", reading.any_weights, reading.input_shape)
    beside = Reading(f"{reading.path}.skip", reading.any_weights, reading.input_shape)
    skip = 1.0 if module.skip is None else lipschitz_bound(module.skip, beside, rules)
    return up(skip + product_up([module.scale, lipschitz_bound(module.branch, inside, rules)]))


BRANCH_RULES: dict[type, Rule] = {**RULES, SpectrallyBoundedResidual: residual_rule}
PASSED_ON = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def _check_input_is_kept(prefix: str, module: nn.Module | None) -> None:
    """Refuse a side that starts in place: it would write into x, which the other side still needs."""
    for path, leaf in [] if module is None else module.named_modules(prefix=prefix):
        if isinstance(leaf, nn.Sequential):
            continue
        if getattr(leaf, "inplace", False):
            raise ValueError(
                f"{path}: {type(leaf).__name__} works in place on the block's input, which both sides need. "
                f"Use inplace=False."
            )
        if type(leaf) not in PASSED_ON:
            return
