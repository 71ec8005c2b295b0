"""Small networks of the provable class and THEORY's reference problems, for the tests and benchmarks of certificates."""

import torch
from torch import nn

import trainable_nn as tnn

ACTIVATIONS = (tnn.Tanh, tnn.Softplus0, tnn.SiLU1, tnn.GELU1, tnn.SmoothReLU)


def readout(width: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A fixed linear layer with orthonormal rows."""
    layer = nn.Linear(width, outputs, bias=False, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(width, outputs, generator=generator, dtype=torch.float64))
    layer.weight = nn.Parameter(q.T.contiguous(), requires_grad=False)
    return layer


def provable_net(
    inputs: int, width: int, outputs: int, blocks: int, *, strength=0.5, leak=0.5, eps=1.0, bias=False, activation=tnn.Tanh,
    spread=1.0, seed=0,
) -> nn.Sequential:  # fmt: skip
    """EntryNormLinear, residual blocks with a weight-normalised branch below ``strength``, a fixed orthonormal readout."""
    generator = torch.Generator().manual_seed(seed)
    options = {"bias": bias, "eps": eps, "dtype": torch.float64}
    layers = [tnn.EntryNormLinear(inputs, width, leak=leak, **options)]
    for _ in range(blocks):
        branch = nn.Sequential(tnn.WeightNormLinear(width, width, **options), activation())
        layers.append(tnn.ContractiveResidual(branch, strength=strength))
    net = nn.Sequential(*layers, readout(width, outputs, generator))
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.copy_(spread * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net


def reference_problem(blocks: int, strength: float, *, leak: float = 0.0, eps: float = 1.0, seed: int = 0):
    """BASELINES G: n = 16, d0 = d = 32, 4 outputs, tanh, entries N(0, 1); (net, inputs, targets)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    net = provable_net(32, 32, 4, blocks, strength=strength, leak=leak, eps=eps, seed=seed)
    inputs = torch.randn(16, 32, generator=generator, dtype=torch.float64)
    targets = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    return net, inputs, targets


def trained(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]
