"""Random small networks of every kind that the regularity calculus reads, and what autograd finds of their derivatives.

The search uses the network's own forward in float64 and torch's nested forward mode; nothing of the calculus.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainable_nn as tnn
from trainable_nn import modules
from trainable_nn.errors import UnboundedError
from trainable_nn.modules.floored import FlooredBatchNorm1d, FlooredBatchNorm2d
from trainable_nn.modules.residual import hold_scales
from trainable_nn.modules.shortcut import PooledConv2d, PooledSequential

F64 = torch.float64
NORMS = ("plain", "entry", "leaky", "weight", "spectral")
ACTIVATIONS = (
    modules.Tanh, modules.Softplus0, modules.SmoothReLU, modules.GELU1, modules.SiLU1, modules.Erf1, modules.Arctan,
    modules.ISRU, modules.SoftSign, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Mish, nn.Softsign, nn.ELU,
    lambda: nn.GELU(approximate="tanh"), lambda: nn.Softplus(beta=2.0),
)  # fmt: skip


def dense(rng: random.Random, n: int, m: int) -> nn.Module:
    kind, bias = rng.choice(NORMS), rng.random() < 0.5
    eps, gain = rng.choice((0.3, 1.0)), rng.choice((0.5, 1.0, 2.0))
    layer = {
        "plain": lambda: nn.Linear(n, m, bias),
        "entry": lambda: tnn.EntryNormLinear(n, m, bias, eps=eps, gain=gain),
        "leaky": lambda: tnn.EntryNormLinear(n, m, bias, eps=eps, gain=gain, leak=0.2),
        "weight": lambda: tnn.WeightNormLinear(n, m, bias, eps=eps, gain=gain),
        "spectral": lambda: modules.SpectralNormLinear(n, m, bias, eps=eps, gain=gain, power=rng.choice((1, 2, 8))),
    }[kind]()
    return _drawn(rng, layer)


def convolution(rng: random.Random, n: int, m: int, stride: int = 1) -> nn.Module:
    kernel = rng.choice((1, 2, 3))
    options = {"stride": stride, "padding": rng.choice((0, kernel // 2)), "bias": rng.random() < 0.5}
    options["padding_mode"] = rng.choice(("zeros", "circular")) if options["padding"] else "zeros"
    options["groups"] = 2 if n % 2 == m % 2 == 0 and rng.random() < 0.3 else 1
    kinds = (nn.Conv2d, tnn.EntryNormConv2d, tnn.WeightNormConv2d)
    kind = modules.SpectralNormConv2d if rng.random() < 0.1 else rng.choice(kinds)  # slow in nested forward mode
    return _drawn(rng, kind(n, m, kernel, **options))


def normalisation(rng: random.Random, channels: int, axes: int) -> nn.Module:
    """In evaluation or with the batch's own statistics, which no forward changes."""
    own = rng.random() < 0.5
    plain = {0: nn.BatchNorm1d, 2: nn.BatchNorm2d}[axes]
    floored = {0: FlooredBatchNorm1d, 2: FlooredBatchNorm2d}[axes]
    eps = rng.choice((0.1, 0.5))
    if rng.random() < 0.5:
        layer = plain(channels, eps, track_running_stats=not own, affine=rng.random() < 0.7)
    else:
        layer = floored(channels, eps, track_running_stats=not own, floor=rng.choice((0.3, 1.5)), smooth=True)
    if not own:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.2, 2.0)
    return layer.eval()


def sample_norm(rng: random.Random, channels: int, sizes: tuple[int, ...]) -> nn.Module:
    """Layer or group normalisation, its scale and shift away from where they start."""
    eps = rng.choice((0.05, 0.5))
    if rng.random() < 0.5:
        shape = rng.choice(((channels, *sizes), sizes)) if sizes else (channels,)
        layer = nn.LayerNorm(shape, eps, elementwise_affine=rng.random() < 0.7)
    else:
        layer = nn.GroupNorm(rng.choice((1, channels)), channels, eps, affine=rng.random() < 0.7)
    return _drawn(rng, layer)


class Functional(nn.Module):
    """Pooling, dropout, means and reshapes as functions, as users write them; (N, channels) from images."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5, training=False)
        if self.way == "adaptive":
            return torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)
        if self.way == "average":
            return F.avg_pool2d(x, 2, ceil_mode=True).mean((2, 3))
        if self.way == "sum":
            return torch.sum(x.mean(3, keepdim=True), dim=(2, 3))
        return F.max_pool2d(x, 2, 1).mean(dim=[-2, -1])

    def extra_repr(self) -> str:
        return self.way


class Block(nn.Module):
    """x + scale * branch(x), written as a user would."""

    def __init__(self, branch: nn.Module, scale: float) -> None:
        super().__init__()
        self.branch, self.scale = branch, scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.branch(x)


class Twice(nn.Module):
    """One layer applied twice: its parameters meet themselves."""

    def __init__(self, layer: nn.Module, between: nn.Module) -> None:
        super().__init__()
        self.layer, self.between = layer, between

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.between(self.layer(x))) - torch.tanh(x)


def network(seed: int) -> tuple[nn.Module, Tensor]:
    """A network of float64 and a batch."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model, inputs = (_image_network if rng.random() < 0.3 else _dense_network)(rng)
    model = model.double()
    for parameter in model.parameters():
        if rng.random() < 0.1:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        next(model.parameters()).requires_grad_()
    return model, inputs


def _dense_network(rng: random.Random) -> tuple[nn.Module, Tensor]:
    d0, d = rng.randint(1, 4), rng.randint(1, 4)
    layers = [dense(rng, d0, d)]
    for _ in range(rng.randint(0, 3)):
        activation = rng.choice(ACTIVATIONS)()
        kind = rng.choice(("plain", "block", "contractive", "twice", "norm", "sample norm", "bounded"))
        if kind == "plain":
            layers += [activation, dense(rng, d, d)]
        elif kind == "block":
            layers.append(Block(nn.Sequential(dense(rng, d, 3), activation, dense(rng, 3, d)), rng.choice((0.3, -1.0))))
        elif kind == "contractive":
            branch = nn.Sequential(modules.Tanh(), _drawn(rng, tnn.WeightNormLinear(d, d)))
            layers.append(modules.ContractiveResidual(branch, strength=0.9))
        elif kind == "sample norm":
            layers += [sample_norm(rng, d, ()), activation]
        elif kind == "bounded":
            layers.append(bounded(rng, d, activation))
        elif kind == "twice":
            layers.append(Twice(dense(rng, d, d), activation))
        else:
            layers += [normalisation(rng, d, 0), activation]
    if rng.random() < 0.5:
        layers.append(nn.Linear(d, rng.randint(1, 2)))
    return nn.Sequential(*layers), torch.randn(rng.randint(2, 4), d0, dtype=F64)


def _image_network(rng: random.Random) -> tuple[nn.Module, Tensor]:
    c = rng.choice((1, 2))
    layers: list[nn.Module] = [convolution(rng, c, 2, rng.choice((1, 2))), rng.choice(ACTIVATIONS)()]
    if rng.random() < 0.5:
        layers.append(normalisation(rng, 2, 2))
    elif rng.random() < 0.5:
        sizes = tuple(nn.Sequential(*layers)(torch.zeros(2, c, 5, 4)).shape[2:])
        layers.append(sample_norm(rng, 2, sizes))
    if rng.random() < 0.3:
        layers.append(_shortcut(rng))
    if rng.random() < 0.5:
        branch = nn.Sequential(rng.choice(ACTIVATIONS)(), nn.Conv2d(2, 2, 3, padding=1))
        layers.append(Block(branch, 0.5))
    if rng.random() < 0.5:
        layers += [rng.choice((nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((2, 1)), nn.AvgPool2d(2, ceil_mode=True)))]
        layers += [nn.Dropout(0.5).eval(), nn.Flatten()]
    else:
        layers.append(Functional(rng.choice(("adaptive", "average", "sum"))))
    return nn.Sequential(*layers), torch.randn(2, c, 5, 4, dtype=F64)


def _shortcut(rng: random.Random) -> nn.Module:
    """The paper's projection: a convolution, or a convolution and what follows it, beside the pooled path."""
    stride = rng.choice((1, 2))
    if rng.random() < 0.5:
        return _drawn(rng, PooledConv2d(2, 2, 3, stride, padding=1))
    return PooledSequential(nn.Conv2d(2, 2, 1, stride), rng.choice(ACTIVATIONS)(), in_channels=2, out_channels=2, stride=stride)


def _drawn(rng: random.Random, layer: nn.Module) -> nn.Module:
    """Weights of a size at which slopes and curvatures are neither largest nor gone."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=rng.choice((0.3, 1.0, 2.0)))
    return layer


def bounded(rng: random.Random, d: int, activation: nn.Module) -> nn.Module:
    """A block whose scale is frozen, or follows its weights with or without anchors."""
    branch = [activation, dense(rng, d, d)]
    if rng.random() < 0.5:
        branch += [rng.choice(ACTIVATIONS)(), dense(rng, d, d)]
    if rng.random() < 0.3:
        branch.append(normalisation(rng, d, 0) if rng.random() < 0.5 else sample_norm(rng, d, ()))
    tight, frozen = rng.random() < 0.5, rng.random() < 0.2
    try:
        block = modules.SpectrallyBoundedResidual(nn.Sequential(*branch), bound=rng.choice((0.3, 0.8)), tight=tight)
    except UnboundedError:  # torch's own batch norm has no bound
        return modules.SpectrallyBoundedResidual(nn.Sequential(*branch[:2]), bound=0.8, tight=tight)
    if frozen:
        block.freeze()
    return block


class Truth:
    """theta -> F(theta) of a model at its inputs, and searches for large derivatives on a ball."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        held = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.model, self.inputs = hold_scales(model), inputs  # a forward pass in eager mode may prove new anchors
        self.names = [name for name, _ in held]
        self.shapes, self.sizes = [p.shape for _, p in held], [p.numel() for _, p in held]
        self.theta = torch.cat([p.detach().flatten() for _, p in held])

    def __call__(self, theta: Tensor) -> Tensor:
        pieces = theta.split(self.sizes)
        values = {name: piece.reshape(shape) for name, piece, shape in zip(self.names, pieces, self.shapes)}
        return torch.func.functional_call(self.model, values, (self.inputs,)).flatten()

    def jacobian(self, theta: Tensor) -> Tensor:
        return torch.func.jacrev(self)(theta)

    def first(self, theta: Tensor, v: Tensor) -> Tensor:
        """DF v."""
        return torch.func.jvp(self, (theta,), (v,))[1]

    def second(self, theta: Tensor, v: Tensor) -> Tensor:
        """D2F[v, v]."""
        return torch.func.jvp(lambda t: self.first(t, v), (theta,), (v,))[1]

    def largest(self, derivative, radius: float, generator: torch.Generator, steps: int) -> float:
        """The largest ||derivative(theta, v)|| found, |v| = 1, |theta - now| <= radius: ascent in both."""
        draw = lambda: nn.functional.normalize(torch.randn(self.theta.shape, generator=generator, dtype=F64), dim=0)
        v, away, best = draw(), draw() * radius, 0.0
        for _ in range(steps):
            v.requires_grad_()
            away.requires_grad_()
            size = derivative(self.theta + away, v).norm()
            best = max(best, float(size.detach()))
            if not size.requires_grad or not float(size.detach()) > 0:
                break
            up_v, up_away = torch.autograd.grad(size, (v, away), allow_unused=True)
            v = nn.functional.normalize(nn.functional.normalize(up_v, dim=0) + 0.3 * v, dim=0).detach()  # +- pairs
            away = away.detach() if up_away is None else radius * nn.functional.normalize(up_away, dim=0).detach()
        return best
