"""Rules of residual blocks and of the paper's shortcuts: sums of paths that are read one by one."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ... import modules as ours
from ...errors import UnboundedError
from ...modules.residual import hold_scales
from ...modules.shortcut import PooledConv2d, PooledSequential
from ...theory.rounding import up
from .affine import affine
from .following import following
from .graph import Graph
from .linear_rules import pooled_path
from .states import Ball, Local, State
from .steps import Step, Sum


def contractive(graph: Graph, module: ours.ContractiveResidual, path: str, source: int) -> int:
    """skip(x) + a branch(x), with a constant a."""
    return _residual(graph, module, path, source, module.scale)


def bounded_residual(graph: Graph, module: ours.SpectrallyBoundedResidual, path: str, source: int) -> int:
    """skip(x) + a branch(x): a constant a where it is frozen, else one that follows the branch's weights.

    Where a layer of the branch has no rule the whole is one step that has a norm, and the reason why it has no more.
    """
    if "_frozen" in vars(module):
        return _residual(graph, module, path, source, float(module.scale))
    skip = source if module.skip is None else graph.read(module.skip, f"{path}.skip".lstrip("."), source)
    try:
        branch = following(graph, module, path, source)
    except UnboundedError as reason:
        branch = graph.add(OpaqueBranch(path, module, reason), source)
    return graph.add(Sum(path, (1.0, 1.0)), skip, branch)


def _residual(graph: Graph, module: nn.Module, path: str, source: int, scale: float) -> int:
    skip = source if module.skip is None else graph.read(module.skip, f"{path}.skip".lstrip("."), source)
    branch = graph.read(module.branch, f"{path}.branch".lstrip("."), source)
    return graph.add(Sum(path, (1.0, scale)), skip, branch)


def pooled_conv(graph: Graph, module: PooledConv2d, path: str, source: int) -> int:
    """conv(x) + the pooled path."""
    convolution = affine(graph, module, path, source)
    pooled = pooled_path(graph, path, source, module.out_channels, module.stride)
    return graph.add(Sum(path, (1.0, 1.0)), convolution, pooled)


def pooled_sequential(graph: Graph, module: PooledSequential, path: str, source: int) -> int:
    """layers(x) + the pooled path."""
    last = source
    for name, child in module._modules.items():
        last = graph.read(child, f"{path}.{name}".lstrip("."), last)
    pooled = pooled_path(graph, path, source, module.out_channels, module.stride)
    return graph.add(Sum(path, (1.0, 1.0)), last, pooled)


class OpaqueBranch(Step):
    """a(theta) branch(x) of a SpectrallyBoundedResidual: \\|\\|J\\|\\| <= bound everywhere, and why no more is known."""

    source = "paper A, Lemma A.8"

    def __init__(self, path: str, module: ours.SpectrallyBoundedResidual, reason: UnboundedError) -> None:
        super().__init__(path, type(module).__name__)
        self.bound, self.reason = module.bound, reason
        self.derivation = f"||J a branch|| <= {module.bound:g} at every weight and input, by its scale"
        self.twin = hold_scales(copy.deepcopy(module)).double()

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.no_grad():
            change = self.twin.branch(inputs[0])
            return float(self.twin.scale) * (1.0 - torch.finfo(change.dtype).eps) * change

    def everywhere(self) -> float:
        return up(self.bound)

    def check(self) -> None:
        raise self.reason

    def local(self, ball: Ball, inputs: Sequence[State]) -> list[Local]:
        bound = np.full(ball.samples, self.everywhere())
        return [Local(bound, 2 * bound, 0.0, np.inf)]
