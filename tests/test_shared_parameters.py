"""One tensor in two places: its uses move together, which every bound must count."""

import math

import pytest
import torch
from provable_nets import provable_net
from regularity_networks import F64, Twice, network
from test_regularity import RADII, found_violations
from torch import nn

import trainable_nn as tnn
from trainable_nn.certify.regularity import network_regularity
from trainable_nn.modules.shortcut import PooledSequential


class Squared(nn.Module):
    """x -> w w x."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False, dtype=F64)
        nn.init.ones_(self.layer.weight)

    def forward(self, x):
        return self.layer(self.layer(x))


@pytest.mark.parametrize("radius", [1e-6, 1e-3, 0.1, 1.0])
def test_the_square_of_a_weight_grows_as_the_square_of_the_radius(radius):
    """sup (1 + u)^2 over -R <= u <= R is (1 + R)^2; with uses that share the radius it would be below at small R."""
    proved = network_regularity(Squared(), torch.ones(1, 1, dtype=F64), radius=radius)
    assert (1 + radius) ** 2 <= proved.value <= (1 + radius) ** 2 * (1 + 1e-6)
    assert 2 * (1 + radius) <= proved.jacobian <= 2 * (1 + radius) * (1 + 1e-6)
    as_if_apart = 1 + math.sqrt(2) * radius * (1 + radius)
    assert as_if_apart < (1 + radius) ** 2


@pytest.mark.parametrize("seed", range(12))
def test_no_constant_of_a_layer_applied_twice_is_exceeded(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(Twice(nn.Linear(2, 2), nn.Mish()), Twice(tnn.WeightNormLinear(2, 2), tnn.Tanh())).double()
    inputs = torch.randn(2, 2, dtype=F64)
    assert found_violations(model, inputs, RADII[1 + seed % 3], seed, steps=12) == []


def test_the_random_network_that_showed_it_is_bounded():
    model, inputs = network(836)
    assert found_violations(model, inputs, 1e-3, 836) == []


def test_a_module_that_stands_twice_in_a_sequence_is_two_steps():
    torch.manual_seed(0)
    phi, layer = nn.Tanh(), nn.Linear(3, 3)
    inputs = torch.randn(2, 3, dtype=F64)
    once = nn.Sequential(nn.Linear(3, 3), phi, nn.Linear(3, 3), phi, nn.Linear(3, 2)).double()
    for radius in (0.0, 1e-3, 0.1):
        assert found_violations(once, inputs, radius, 0, steps=12) == []
    model = nn.Sequential(layer, phi, layer, phi, nn.Linear(3, 2)).double()
    proved = network_regularity(model, inputs, radius=0.0)
    assert [row.path for row in proved.layers] == ["0", "1", "2", "3", "4"]
    assert proved.paths == ("0.weight", "0.bias", "4.weight", "4.bias")
    assert proved.value == pytest.approx(float(model(inputs).detach().norm()), rel=1e-6)
    shortcut = PooledSequential(nn.Conv2d(2, 2, 1), phi, nn.Conv2d(2, 2, 1), phi, in_channels=2, out_channels=2, stride=1)
    images = torch.randn(2, 2, 3, 3, dtype=F64)
    proved = network_regularity(nn.Sequential(shortcut).double(), images, radius=0.0)
    assert proved.value == pytest.approx(float(shortcut(images).detach().norm()), rel=1e-6)


def _exact(model, inputs):
    """Squares of the extreme singular values of DF, by torch.autograd one row at a time."""
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in model(inputs).flatten()]
    return torch.linalg.svdvals(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])).square()


@pytest.mark.parametrize("tied", ["module", "tensor"])
def test_certify_counts_a_repeated_layer_once_and_moves_it_everywhere(tied):
    torch.manual_seed(0)
    first, second = nn.Linear(6, 6, dtype=F64), nn.Linear(6, 6, dtype=F64)
    second.weight, second.bias = first.weight, first.bias
    layers = [first, nn.Tanh(), first if tied == "module" else second, nn.Tanh(), nn.Linear(6, 1, dtype=F64)]
    model, x, y = nn.Sequential(*layers), torch.randn(2, 6, dtype=F64), torch.randn(2, 1, dtype=F64)
    before = _exact(model, x)
    found = tnn.certify(model, x, 0.1 * y)
    assert found.parameters == sum(p.numel() for p in model.parameters()) == 49
    assert found.lambda_lower == pytest.approx(float(before[-1]), rel=1e-9)
    assert float(before[0]) ** 0.5 <= found.jacobian_upper <= float(before[0]) ** 0.5 * (1 + 1e-6)
    assert torch.equal(_exact(model, x), before)
    path = tnn.certify_path(model, x, 0.1 * y)
    assert path.grade == "ball", path.explain()


def test_a_first_layer_whose_weight_stands_elsewhere_grants_no_bound_over_all_weights():
    net = provable_net(4, 4, 2, 1, strength=0.3, spread=0.2)
    x, y = torch.randn(2, 4, dtype=F64), torch.randn(2, 2, dtype=F64)
    assert tnn.certify(net, x, y).grade == "global"
    net[1].branch[0].weight = net[0].weight
    found = tnn.certify(net, x, y)
    [row] = [row for row in found.hypotheses if row.name == "a first layer whose weights move every sample"]
    assert not row.holds and row.path == "0" and row.remedy.endswith("Give it weights of its own.")
    assert found.grade != "global"
