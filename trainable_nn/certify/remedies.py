"""Which layer stands in the way of a guarantee, in which words, and what to put in its place.

A rule looks at one layer and the shapes that it sees, and gives the hypotheses that it breaks; no rule, no complaint.
They follow the theorems' order of questions: is the network one function, is it smooth, does every layer keep the
samples apart, is its norm bounded. What holds is stated by ``prove`` from the proved constants.

Source: THEORY_PAPERS II.4.1 item 6 and II.4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import nn

from ..modules.normalised import EntryNormalised, WeightNormalised
from ..modules.residual import SpectrallyBoundedResidual
from ..modules.shortcut import PooledConv2d
from .certificate import Hypothesis
from .seen import Seen

SMOOTH = "smooth activations"
KEEPS = "every step keeps its input apart"
FUNCTION = "one fixed function"
BOUNDED = "bounded weights"
RULE_LESS = "a layer with known constants"

LEMMA_A8 = "paper A, Lemma A.8 and Theorem 4.7, hypothesis 1"
THEOREM_45 = "paper A, Theorem 4.5"
PROPOSITION_43 = "paper A, Proposition 4.3 and Theorem 4.5"


def complaints(layers: Iterable[Seen], model: nn.Module | None = None) -> list[Hypothesis]:
    """A failing row for each hypothesis that a layer breaks, the first and the last layer with parameters told apart.

    With the model, free weights in the branch of a block that follows them are no complaint: it bounds them together.
    """
    layers = list(layers)
    blocks = [] if model is None else [f"{path}.branch.".lstrip(".") for path, m in model.named_modules() if _follows(m)]
    owners = [seen.path for seen in layers if any(True for _ in seen.module.parameters())] or [""]
    rows = []
    for seen in layers:
        rule = next((RULES[kind] for kind in type(seen.module).__mro__ if kind in RULES), None)
        follows = any(f"{seen.path}.".startswith(block) for block in blocks)
        for row in rule(seen, seen.path == owners[0], seen.path == owners[-1]) if rule else ():
            if follows and row.name == BOUNDED and row.source == PROPOSITION_43:
                continue
            rows.append(replace(row, path=seen.path, holds=False))
    return rows


def _follows(module: nn.Module) -> bool:
    return isinstance(module, SpectrallyBoundedResidual) and "_frozen" not in vars(module)


def _row(name: str, source: str, remedy: str, grade: str = "global", **numbers) -> Hypothesis:
    return Hypothesis(name, source, "", False, remedy=remedy, grade=grade, kind="proved", **numbers)


def _kinked(seen: Seen, first: bool, last: bool) -> Iterable[Hypothesis]:
    name = type(seen.module).__name__
    yield _row(
        SMOOTH,
        THEOREM_45,
        f"{name} has a kink, so the gradient jumps and no step size is proved for it. Use a smooth activation of slope "
        f"at most 1: SmoothReLU, Softplus0, GELU1 or Tanh.",
        grade="ball",
        value=math.inf,
    )
    if seen.calls > 1 or name in ("ReLU", "ReLU6"):
        yield _row(
            KEEPS,
            LEMMA_A8,
            f"{name} maps whole half-lines to 0, so on the main path (after an addition, or before a shortcut) it erases "
            f"what samples differ in. Keep activations inside the branches: y = skip(x) + branch(x), nothing after.",
        )


def _max_pool(seen: Seen, first: bool, last: bool) -> Iterable[Hypothesis]:
    words = f"{type(seen.module).__name__} ({seen.width})"
    yield _row(
        SMOOTH,
        THEOREM_45,
        f"{words} has kinks. Use OrthogonalDownsample2d, or an average pool.",
        grade="ball",
        value=math.inf,
    )
    yield _row(
        KEEPS,
        LEMMA_A8,
        f"{words} copies one pixel into several windows and drops the others, so its Jacobian has singular values 0. Use "
        f"OrthogonalDownsample2d, whose singular values are all 1.",
        value=0.0,
        bound=0.0,
    )


def _batch_norm(seen: Seen, first: bool, last: bool) -> Iterable[Hypothesis]:
    module = seen.module
    if module.training or not module.track_running_stats:
        yield _row(
            KEEPS,
            "paper A, Lemma A.6 (II.2.3)",
            f"{type(module).__name__} in training mode maps shifted and scaled batches to the same output, so on the main path "
            f"its Jacobian has singular values 0, and it couples the samples. Move it into a branch, or freeze it "
            f"with eval().",
            value=0.0,
            bound=0.0,
        )
        yield _row(
            BOUNDED,
            "paper A, Theorem 4.5 (II.1.7 item 7)",
            f"{type(module).__name__} is as steep as 1 / (smallest standard deviation), which training can drive to "
            f"eps^(-1/2) = {module.eps**-0.5:.4g}. Use a floored batch norm or leave it out: normalised layers do without.",
            grade="ball",
        )
    if module.affine and module.weight.requires_grad:
        yield _row(
            BOUNDED,
            "II.1.7 item 6",
            f"{type(module).__name__}'s scale and shift are free parameters, so no bound holds for all weights. Freeze them, "
            f"or drop the layer.",
        )


def _plain_affine(seen: Seen, first: bool, last: bool) -> Iterable[Hypothesis]:
    module, name = seen.module, type(seen.module).__name__
    convolution = not isinstance(module, nn.Linear)
    weight = module.weight
    if first:
        if convolution:
            yield _first_convolution(seen)
        return
    if last and seen.after and math.prod(seen.after) > math.prod(seen.before):
        yield _row(
            KEEPS,
            "paper A, Theorem 4.7, hypothesis 1 (dimensions never grow)",
            f"{name} gives more numbers than it gets ({seen.width}), so nothing that earlier layers do reaches every "
            f"output. Use fewer classes than features; its own features then certify what they can (up to "
            f"{seen.before[-1] + 1} samples).",
            value=float(math.prod(seen.after)),
            bound=float(math.prod(seen.before)),
        )
    if convolution and _strided_projection(seen):
        yield _strided_row(seen)
    if weight.requires_grad:
        replacement = f"WeightNorm{name} or SpectralNorm{name}" if name in _NORMALISABLE else "a normalised layer"
        yield _row(
            BOUNDED,
            PROPOSITION_43,
            f"{name}'s weight is free to grow, so no bound of this layer's norm holds for all weights. Use {replacement} "
            f"inside a residual branch of norm below 1; recipe='provable' does it.",
            value=math.inf,
            bound=1.0,
        )


def _first_convolution(seen: Seen) -> Hypothesis:
    module = seen.module
    taps = module.weight[0].numel() * getattr(module, "groups", 1)
    positions = math.prod(seen.after[1:])
    return _row(
        "a first layer that can move every sample by itself",
        "paper A, Theorem 4.7, hypothesis 2 (II.1.7 item 9)",
        f"The first layer is a convolution: its {module.weight.numel()} weights must move {seen.after[0]} x {positions} "
        f"outputs a sample, and each filter has only {taps} taps for {positions} positions, so lambda(Df_1) = 0 for any "
        f"data. Start with a dense EntryNormLinear(leak > 0) on the flattened input, or take the certificate from the last "
        f"layer's features.",
        value=float(taps),
        bound=float(positions),
    )


def _strided_projection(seen: Seen) -> bool:
    """Whether the layer sees fewer numbers than it must give: kernel below stride, and channels that grow."""
    module = seen.module
    if isinstance(module, PooledConv2d):  # its pooled path reads every number
        return False
    if getattr(module, "transposed", False) or not hasattr(module, "stride") or len(seen.before) < 2:
        return False
    below = any(k < s for k, s in zip(module.kernel_size, module.stride))
    return below and math.prod(seen.before) >= math.prod(seen.after) > _numbers_seen(seen)


def _numbers_seen(seen: Seen) -> int:
    positions = math.prod(seen.after[1:])
    return (
        seen.before[0] * positions * math.prod(min(k, s) for k, s in zip(seen.module.kernel_size, seen.module.stride))
    )


def _strided_row(seen: Seen) -> Hypothesis:
    reached, outputs = _numbers_seen(seen), math.prod(seen.after)
    kernel, stride = "x".join(map(str, seen.module.kernel_size)), "x".join(map(str, seen.module.stride))
    return _row(
        "a skip whose singular values are 1",
        "II.4.1 item 6, impossibility (paper A, Theorem 4.7, hypothesis 1)",
        f"A {kernel} convolution of stride {stride} reads {reached} of {math.prod(seen.before)} numbers to make {outputs}, so "
        f"its rank is at most {reached} whatever the weights: as a skip it has singular values 0. Use "
        f"OrthogonalDownsample2d on the raw input and keep this convolution inside the branch.",
        value=float(reached),
        bound=float(outputs),
    )


def _entry_norm(seen: Seen, first: bool, last: bool) -> Iterable[Hypothesis]:
    module = seen.module
    if not isinstance(module, nn.Linear) and first:
        yield _first_convolution(seen)
    if module.leak > 0 and not first:
        yield _row(
            BOUNDED,
            "paper A, Theorem 5.1; THEORY 5",
            f"{type(module).__name__} with leak={module.leak:g} is unbounded, which only the first layer may be. Use leak=0 "
            f"here.",
            value=math.inf,
        )


def _weight_norm(seen: Seen, first: bool, last: bool) -> Iterable[Hypothesis]:
    if first and not isinstance(seen.module, nn.Linear):
        yield _first_convolution(seen)


def _average_pool(seen: Seen, first: bool, last: bool) -> Iterable[Hypothesis]:
    before, after = math.prod(seen.before), math.prod(seen.after)
    if after < before:
        yield _row(
            "singular values of 1 on the main path",
            LEMMA_A8,
            f"{type(seen.module).__name__} ({seen.width}) shrinks what it averages: its singular values are about "
            f"{math.sqrt(after / before):.3g}. That costs a factor {after / before:.3g} in lambda and fails nothing; multiply by "
            f"{math.sqrt(before / after):.3g}, or use OrthogonalDownsample2d.",
            grade="",
            value=math.sqrt(after / before),
            bound=1.0,
        )


def _dropout(seen: Seen, first: bool, last: bool) -> Iterable[Hypothesis]:
    if seen.module.training and seen.module.p > 0:
        yield _row(
            FUNCTION,
            "every theorem of THEORY 4",
            f"{type(seen.module).__name__} draws another network at each step, and nothing is proved of that. Set p=0, or call "
            f"eval().",
            grade="measured",
            value=seen.module.p,
            bound=0.0,
        )


_NORMALISABLE = ("Linear", "Conv1d", "Conv2d", "Conv3d")
KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.SELU)
KINKED += (nn.Threshold, nn.Hardshrink, nn.Softshrink)

Rule = Callable[[Seen, bool, bool], Iterable[Hypothesis]]


RULES: dict[type, Rule] = {
    **{kind: _kinked for kind in KINKED},
    **{kind: _max_pool for kind in (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool2d)},
    **{kind: _average_pool for kind in (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)},
    **{kind: _plain_affine for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)},
    **{kind: _dropout for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)},
    **{kind: _batch_norm for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)},
    EntryNormalised: _entry_norm,
    WeightNormalised: _weight_norm,
}
