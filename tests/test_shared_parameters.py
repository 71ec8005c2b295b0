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


def test_a_first_layer_whose_weight_stands_elsewhere_grants_no_bound_over_all_weights():
    net = provable_net(4, 4, 2, 1, strength=0.3, spread=0.2)
    x, y = torch.randn(2, 4, dtype=F64), torch.randn(2, 2, dtype=F64)
    assert tnn.certify(net, x, y).grade == "global"
    net[1].branch[0].weight = net[0].weight
    found = tnn.certify(net, x, y)
    [row] = [row for row in found.hypotheses if row.name == "a first layer whose weights move every sample"]
    assert not row.holds and row.path == "0" and row.remedy.endswith("Give it weights of its own.")
    assert found.grade != "global"
