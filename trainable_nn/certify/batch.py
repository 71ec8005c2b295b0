"""What batch normalisation asks of the batch: variances that are not degenerate, each against a noise floor.

For bn(W x), \\|\\|J\\|\\| <= (d1 / lambda_min(Cov X))^(1/2) whatever W is (paper A, Lemma A.6 as stated in II.2.3), so the covariance
of what the dense layer before it sees must be positive: at least d0 + 1 samples, none a combination of others. Behind
a convolution, or behind no affine layer, the variances of the normalised channels themselves are given: they bound the
slope at the present weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..theory import samples
from .certificate import Hypothesis
from .held import with_held_weights
from .problem import Problem
from .seen import Seen, takes_batch_statistics

COVARIANCE = "a batch covariance that is not degenerate"
VARIANCE = "batch variances that are not degenerate"
SOURCE = "paper A, Proposition 4.2 (II.2.3, II.2.4)"
MOST_WORK = 1e10  # multiplications for one covariance


def covariance_rows(problem: Problem, layers: Sequence[Seen]) -> list[Hypothesis]:
    """A row for each normalisation by the batch's own statistics; none where there is none."""
    norms = [seen for seen in layers if takes_batch_statistics(seen.module)]
    if not norms:
        return []
    before = {after.path: one for one, after in pairwise(layers) if _feeds(one, after)}
    wanted = {seen.path: before.get(seen.path, seen) for seen in norms}
    inputs = _inputs_of(problem, {seen.path for seen in wanted.values()})
    rows = []
    for norm in norms:
        looked_at = wanted[norm.path]
        x = inputs.get(looked_at.path)
        if x is not None:
            rows.append(_covariance(problem, norm, x) if looked_at is not norm else _variances(problem, norm, x))
    return rows


def _feeds(one: Seen, after: Seen) -> bool:
    """Whether a dense layer of few enough inputs stands right before the normalisation, each running once."""
    dense = isinstance(one.module, nn.Linear) and len(one.before) == 1
    return dense and one.after == after.before and one.calls == after.calls == 1


def _covariance(problem: Problem, norm: Seen, x: Tensor) -> Hypothesis:
    count, size = x.shape
    if min(count, size) * count * size > MOST_WORK:
        return _row(COVARIANCE, norm, 0.0, 0.0, "It is too large to be looked at. Use fewer samples for this row.")
    found = samples.covariance_at_least(x.numpy(), roundoff=problem.data_roundoff)
    remedy = (
        f"The {count} samples that the layer before {norm.path} sees span fewer than their {size} dimensions, so some weights "
        f"give it a channel without variance, where it is as steep as eps^(-1/2). Use at least {size + 1} independent samples, "
        f"or a floored batch norm, which asks nothing of the batch."
    )
    return _row(COVARIANCE, norm, found.value, found.noise, remedy)


def _variances(problem: Problem, norm: Seen, x: Tensor) -> Hypothesis:
    channels = x.transpose(0, 1).flatten(1)
    count = channels.shape[1]
    spread = channels.var(1, correction=0)
    noise = (channels.square().mean(1) * (problem.data_roundoff + count * 2.0**-53) ** 2).clamp_min(2.0**-1000)
    worst = int((spread / noise).argmin())
    remedy = (
        f"Channel {worst} of what {norm.path} normalises is the same for the whole batch up to rounding, so the layer divides "
        f"by eps^(1/2) there and magnifies noise. Use more samples, other weights, or a floored batch norm."
    )
    return _row(VARIANCE, norm, float(spread[worst]), float(noise[worst]), remedy)


def _row(name: str, norm: Seen, value: float, noise: float, remedy: str) -> Hypothesis:
    kind = "proved" if name == COVARIANCE else "measured"
    return Hypothesis(name, SOURCE, norm.path, value > noise, value, noise, kind, remedy, "")


def _inputs_of(problem: Problem, paths: set[str]) -> dict[str, Tensor]:
    """The first input of each module on all samples; what did not run is left out."""
    found: dict[str, Tensor] = {}

    def look(path: str):
        return lambda module, arguments: found.setdefault(path, arguments[0].detach())

    handles = [problem.model.get_submodule(path).register_forward_pre_hook(look(path)) for path in paths]
    buffers = {name: b.clone() for name, b in problem.model.named_buffers()}
    try:
        with torch.no_grad(), with_held_weights(problem.model):
            problem.model(problem.inputs)
    finally:
        for handle in handles:
            handle.remove()
        for name, b in problem.model.named_buffers():
            b.copy_(buffers[name])
    return found
