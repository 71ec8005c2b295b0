"""Paper A's modified networks, written from their description alone on top of a state_dict.

Nothing here imports the package: pooling is a reshape, padding a concatenation, a block a function of its keys.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def norm(state: State, key: str, x: Tensor) -> Tensor:
    """Batch normalisation in evaluation mode, channel by channel."""
    mean, variance, weight, bias = (
        state[f"{key}.{name}"].reshape(1, -1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def pooled(x: Tensor, channels: int, s: int) -> Tensor:
    """s times the mean of each s x s window, between ceil and floor of half the missing channels."""
    n, c, h, w = x.shape
    means = x.reshape(n, c, h // s, s, w // s, s).mean(dim=(3, 5)) * s
    front, back = -((c - channels) // 2), (channels - c) // 2
    zeros = [x.new_zeros(n, count, h // s, w // s) for count in (front, back)]
    return torch.cat([zeros[0], means, zeros[1]], dim=1)


def projection(state: State, key: str, x: Tensor, s: int, add_pooled: bool = True) -> Tensor:
    """conv1x1 of stride s, plus the pooled path."""
    weight = state[f"{key}.weight"]
    learned = torch.einsum("oi,nihw->nohw", weight[:, :, 0, 0], x[:, :, ::s, ::s])
    return learned + pooled(x, weight.shape[0], s) if add_pooled else learned


def basic_block(
    state: State, key: str, x: Tensor, s: int, *, names: Mapping[str, str], add_pooled: bool = True
) -> Tensor:
    """out = relu(norm(x)); shortcut = projection(out) or x; conv(relu(norm(conv(out)))) + shortcut."""
    u = torch.clamp(norm(state, f"{key}.{names['front']}", x), min=0)
    shortcut = x
    if f"{key}.{names['projection']}.weight" in state:
        shortcut = projection(state, f"{key}.{names['projection']}", u, s, add_pooled)
    out = F.conv2d(u, state[f"{key}.conv1.weight"], stride=s, padding=1)
    out = torch.clamp(norm(state, f"{key}.{names['inner']}", out), min=0)
    return F.conv2d(out, state[f"{key}.conv2.weight"], padding=1) + shortcut


def bottleneck(
    state: State, key: str, x: Tensor, s: int, *, names: Mapping[str, str], add_pooled: bool = True
) -> Tensor:
    """The same with three convolutions, the stride on the middle one."""
    u = torch.clamp(norm(state, f"{key}.{names['front']}", x), min=0)
    shortcut = x
    if f"{key}.{names['projection']}.weight" in state:
        shortcut = projection(state, f"{key}.{names['projection']}", u, s, add_pooled)
    out = F.conv2d(u, state[f"{key}.conv1.weight"])
    out = torch.clamp(norm(state, f"{key}.{names['inner']}", out), min=0)
    middle = state[f"{key}.conv2.weight"]
    out = F.conv2d(out, middle, stride=s, padding=1, groups=out.shape[1] // middle.shape[1])
    out = torch.clamp(norm(state, f"{key}.{names['last']}", out), min=0)
    return F.conv2d(out, state[f"{key}.conv3.weight"]) + shortcut


def torchvision_resnet(state: State, x: Tensor, depths: tuple[int, ...], block, names: Mapping[str, str]) -> Tensor:
    """torchvision's stem and head around pre-activation blocks; no norm after the last stage."""
    x = F.conv2d(x, state["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(torch.clamp(norm(state, "bn1", x), min=0), 3, 2, 1)
    for stage, depth in enumerate(depths):
        for index in range(depth):
            stride = 2 if stage and not index else 1
            x = block(state, f"layer{stage + 1}.{index}", x, stride, names=names)
    return x.mean(dim=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def timm_resnetv2(state: State, x: Tensor, depths: tuple[int, ...], names: Mapping[str, str]) -> Tensor:
    """timm's resnetv2: a bare 7x7 stem, pre-activation bottlenecks, a norm, and a 1x1 convolution as the head."""
    x = F.max_pool2d(F.conv2d(x, state["stem.conv.weight"], stride=2, padding=3), 3, 2, 1)
    for stage, depth in enumerate(depths):
        for index in range(depth):
            stride = 2 if stage and not index else 1
            x = bottleneck(state, f"stages.{stage}.blocks.{index}", x, stride, names=names)
    x = torch.clamp(norm(state, "norm", x), min=0).mean(dim=(2, 3))
    return x @ state["head.fc.weight"].flatten(1).T + state["head.fc.bias"]
