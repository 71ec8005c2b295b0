"""A SpectrallyBoundedResidual whose weights train: its scale's derivatives, and those of networks of it, against autograd."""

import copy
import math

import pytest
import torch
from regularity_networks import F64, Truth
from test_regularity import found_violations
from torch import nn

import trainable_nn as tnn
from trainable_nn import modules
from trainable_nn.certify.regularity import network_regularity, residual_structure
from trainable_nn.certify.regularity.following import FollowingScale
from trainable_nn.certify.regularity.network import graph_of
from trainable_nn.certify.regularity.rules import RULES
from trainable_nn.certify.regularity.states import Ball
from trainable_nn.errors import UnboundedError
from trainable_nn.modules.residual import hold_scales, slack_of
from trainable_nn.modules.shortcut import PooledConv2d
from trainable_nn.modules.smooth_maximum import smooth_maximum_with_one
from trainable_nn.theory.following_scale import SizeOnBall, scale_on

# a of r


def derivatives_of_scale(r):
    """1 / h, r (1 / h)', r^2 (1 / h)'' by autograd."""
    r = torch.as_tensor(r, dtype=F64).requires_grad_()
    a = 1 / smooth_maximum_with_one(r, 0.5)
    (first,) = torch.autograd.grad(a.sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    return a.detach(), (r * first).detach(), (r**2 * second).detach()


@pytest.mark.parametrize("r", [0.0, 0.5, 0.5001, 0.52, 0.7, 0.868, 1.0, 1.5, 4.0, 1e3, 1e6])
def test_the_scale_at_a_point_is_as_steep_and_curved_as_stated(r):
    found, (a, first, second) = scale_on(r, r), derivatives_of_scale([r])
    assert found.least * (1 - 1e-11) <= float(a) <= found.most * (1 + 1e-15)
    for stated, exact in ((found.first, float(first.abs())), (found.second, float(second.abs()))):
        assert exact * (1 - 1e-9) - 1e-13 <= stated <= exact * (1 + 1e-6) + 1e-11


@pytest.mark.parametrize("low", [0.0, 0.4, 0.55, 0.8, 2.0, 50.0])
@pytest.mark.parametrize("width", [1e-9, 1e-3, 0.2, 3.0, math.inf])
def test_on_an_interval_the_suprema_are_bounds_and_nearly_reached(low, width):
    found = scale_on(low, low + width)
    points = torch.linspace(low, min(low + width, low + 60.0), 40001, dtype=F64)
    a, first, second = (value.abs() for value in derivatives_of_scale(points))
    assert found.least <= float(a.min()) and float(a.max()) <= found.most * (1 + 1e-15)
    assert float(first.max()) <= found.first * (1 + 1e-12) <= float(first.max()) * 1.06 + 1e-12
    assert float(second.max()) <= found.second * (1 + 1e-12) <= float(second.max()) * 1.5 + 1e-11


def test_sizes_multiply_and_add_as_their_logarithms_do():
    one = SizeOnBall(2.0, 3.0, 0.5, {"u": 0.7}, {("u", "u"): 0.2})
    other = SizeOnBall(4.0, 5.0, 0.8, {"v": 0.3}, {("v", "v"): 0.1})
    product = 2.0 * (one * other)
    assert (product.least, product.most) == pytest.approx((16.0, 30.0))
    assert product.ratio == pytest.approx(0.4) and product.is_product
    assert product.second[("u", "v")] == product.second[("v", "u")] == pytest.approx(0.21)
    total = one + other
    assert (total.least, total.most) == pytest.approx((6.0, 8.0)) and not total.is_product
    assert total.first == pytest.approx({"u": 0.7 * 3 / 7, "v": 0.3 * 5 / 7})
    assert total.ratio == pytest.approx(5 / 7 * 0.8 + 2 / 7 * 0.5)
    shifted = one + 1.0
    assert shifted.ratio == pytest.approx(1 / 3 * 1.0 + 2 / 3 * 0.5) and shifted.first["u"] == pytest.approx(0.7 * 3 / 4)


# the derivatives of a


def blocks():
    """Branches of every kind of part: name -> (layers, shape of one sample)."""
    floored = modules.FlooredBatchNorm2d(2, 0.3, floor=0.5, smooth=True)
    nested = modules.SpectrallyBoundedResidual(nn.Sequential(nn.Tanh(), nn.Linear(3, 3)), nn.Linear(3, 3), bound=0.4, tight=False)
    return {
        "plain": ([nn.Tanh(), nn.Linear(3, 3)], (3,)),
        "two": ([nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)], (3,)),
        "normalised": ([tnn.WeightNormLinear(3, 3, eps=0.5), tnn.Tanh(), tnn.EntryNormLinear(3, 3)], (3,)),
        "spectral": ([modules.SpectralNormLinear(3, 3, power=2), tnn.Tanh(), nn.Linear(3, 3)], (3,)),
        "frozen layer": ([nn.Linear(3, 3).requires_grad_(False), tnn.Tanh(), nn.Linear(3, 3)], (3,)),
        "layer norm": ([nn.Linear(3, 3), nn.LayerNorm(3, 0.3), nn.Tanh()], (3,)),
        "convolution": ([nn.Tanh(), nn.Conv2d(2, 2, 3, padding=1), tnn.Tanh(), nn.Conv2d(2, 2, 1, groups=2)], (2, 3, 4)),
        "floored": ([nn.Conv2d(2, 2, 3, padding=1, bias=False), floored, nn.Tanh()], (2, 3, 4)),
        "pooled": ([PooledConv2d(2, 2, 3, 1, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 1)], (2, 3, 4)),
        "nested": ([nn.Linear(3, 3), nested, nn.Tanh(), nn.Linear(3, 3)], (3,)),
    }  # fmt: skip


def network_of(name, tight=False, spread=1.0, seed=0, bound=0.8):
    torch.manual_seed(seed)
    layers, shape = blocks()[name]
    for module in nn.Sequential(*layers).modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm, modules.FlooredBatchNorm2d)):
            nn.init.normal_(module.weight, std=spread)
    block = modules.SpectrallyBoundedResidual(nn.Sequential(*layers), bound=bound, tight=tight)
    n = math.prod(shape)
    model = nn.Sequential(nn.Linear(n, n), nn.Unflatten(1, shape), block, nn.Flatten(), nn.Linear(n, 2))
    model[-1].weight.data.mul_(0.5)
    return model.double().eval(), torch.randn(3, n, dtype=F64)


def step_of(model, inputs):
    [step] = [n.step for n in graph_of(model, inputs, RULES).nodes if isinstance(n.step, FollowingScale) and n.step.path == "2"]
    return step


class Scale:
    """theta -> a, the block's own scale, with autograd."""

    def __init__(self, model, names):
        self.block = hold_scales(copy.deepcopy(model))[2]
        self.names = [name.removeprefix("2.") for name in names]
        parameters = dict(self.block.named_parameters())
        self.now = [parameters[name].detach().clone() for name in self.names]

    def __call__(self, *values):
        return torch.func.functional_call(_ScaleOf(self.block), {f"block.{n}": v for n, v in zip(self.names, values)}, ())

    def gradients(self, values):
        return torch.autograd.functional.jacobian(self, tuple(values))

    def hessians(self, values):
        return torch.autograd.functional.hessian(self, tuple(values))


class _ScaleOf(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self):
        return self.block.scale


def exceeded(model, inputs, radius, shrink=1.0, tries=4):
    """Blocks of a's gradient and Hessian, found on the ball, that are above what is stated."""
    step = step_of(model, inputs)
    least, most, first, second = step._scale(Ball(radius, 1))
    scale, found = Scale(model, step.parameters), set()
    generator = torch.Generator().manual_seed(0)
    for k in range(tries):
        away = [torch.randn(v.shape, generator=generator, dtype=F64) for v in scale.now]
        if k == 0:
            away = [torch.zeros_like(v) for v in scale.now]
        elif k % 3 == 1:
            away = [-v for v in scale.now]  # towards smaller sizes, and larger ones
        elif k % 3 == 2:
            away = [v * torch.randn((), generator=generator) for v in scale.now]
        length = max(math.sqrt(sum(float(v.square().sum()) for v in away)), 1e-300)
        at = [v + radius / length * w for v, w in zip(scale.now, away)]
        a = float(scale(*at))
        if not least * shrink * (1 - 1e-12) <= a <= most / shrink * (1 + 1e-12):
            found.add("value")
        gradients, hessians = scale.gradients(at), scale.hessians(at)
        for i, one in enumerate(step.parameters):
            if float(gradients[i].norm()) > shrink * first[one] * (1 + 1e-9) + 1e-12:
                found.add(one)
            for j, other in enumerate(step.parameters):
                matrix = hessians[i][j].reshape(scale.now[i].numel(), -1)
                if float(torch.linalg.matrix_norm(matrix, 2)) > shrink * second[one, other] * (1 + 1e-9) + 1e-11:
                    found.add((one, other))
    return found


@pytest.mark.parametrize("name", blocks())
@pytest.mark.parametrize("tight", [False, True])
def test_no_derivative_of_the_scale_is_exceeded_on_its_ball(name, tight):
    for spread, radius in [(0.2, 0.3), (1.0, 0.0), (1.0, 1e-3), (1.0, 1.0), (3.0, 0.03)]:
        model, inputs = network_of(name, tight, spread)
        assert exceeded(model, inputs, radius) == set(), (spread, radius)


def test_of_one_plain_layer_the_gradient_is_exact_so_a_tenth_less_is_noticed():
    model, inputs = network_of("plain", spread=0.5)
    assert exceeded(model, inputs, 0.0) == set()
    assert exceeded(model, inputs, 0.0, shrink=0.99) >= {"2.branch.1.weight"}
    _, _, first, _ = step_of(model, inputs)._scale(Ball(0.0, 1))
    exact = Scale(model, first)
    assert first["2.branch.1.weight"] == pytest.approx(float(exact.gradients(exact.now)[0].norm()), rel=1e-5)


@pytest.mark.parametrize("name", ["two", "convolution"])
def test_gradients_of_products_of_plain_layers_are_exact_too(name):
    model, inputs = network_of(name, spread=0.5)
    step = step_of(model, inputs)
    _, _, first, _ = step._scale(Ball(0.0, 1))
    scale = Scale(model, step.parameters)
    for parameter, gradient in zip(step.parameters, scale.gradients(scale.now)):
        assert first[parameter] == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_a_weight_that_passes_through_zero_leaves_bounds_that_are_finite_and_hold():
    """On a ball that holds w = 0 only weights with r > 1 / 2 move the scale, and those are not small."""
    model, inputs = network_of("two", spread=0.3)
    for radius in (2.0, 5.0):
        _, _, first, second = step_of(model, inputs)._scale(Ball(radius, 1))
        assert all(value < 1e6 for value in (*first.values(), *second.values()))
        assert exceeded(model, inputs, radius, tries=10) == set()


@pytest.mark.parametrize("name", blocks())
def test_the_slack_that_is_stated_is_the_block_s_own(name):
    model, inputs = network_of(name, tight=True)
    step, own = step_of(model, inputs), slack_of(model)["2"]
    assert own * (1 - 1e-12) <= step._size(Ball(0.0, 1)).ratio / step.tightness <= own * (1 + 1e-9)


# the network's derivatives


@pytest.mark.parametrize("name", blocks())
@pytest.mark.parametrize("tight", [False, True])
def test_no_constant_of_a_network_with_the_block_is_exceeded(name, tight):
    for seed, radius in enumerate((1e-3, 0.2)):
        model, inputs = network_of(name, tight, spread=0.7, seed=seed)
        assert found_violations(model, inputs, radius, seed, steps=2) == []


def test_without_the_derivative_of_the_scale_the_law_is_broken(monkeypatch):
    model, inputs = network_of("plain", spread=2.0)
    assert found_violations(model, inputs, 1e-3, 0, steps=8) == []
    assert found_violations(model, inputs, 1e-3, 0, steps=8, shrink=0.9) != []
    still = lambda self, ball: (self.now, self.now, dict.fromkeys(self.parameters, 0.0), _Zeros())
    monkeypatch.setattr(FollowingScale, "_scale", still)
    model[0].requires_grad_(False)
    model[-1].requires_grad_(False)
    assert "jacobian_lipschitz" in found_violations(model, inputs, 1e-3, 0, steps=12)


class _Zeros(dict):
    def __missing__(self, key):
        return 0.0


def test_with_everything_but_the_branch_frozen_the_bound_is_near_the_truth():
    """Of y = a(w) w phi(x) the calculus adds what has opposite signs: J = a + |w| |Da|, at most twice the truth here."""
    model, inputs = network_of("plain", spread=1.0)
    for part in (model[0], model[-1]):
        part.requires_grad_(False)
    proved, truth = network_regularity(model, inputs, radius=0.0), Truth(model, inputs)
    exact = float(torch.linalg.matrix_norm(truth.jacobian(truth.theta), 2))
    assert exact <= proved.jacobian <= 3.0 * exact


# where it is no function, or one with kinks


def test_on_a_ball_that_may_spend_the_slack_nothing_is_bounded_but_the_input_slope():
    model, inputs = network_of("two", tight=True)
    small, large = (network_regularity(model, inputs, radius=r) for r in (1e-4, 0.5))
    assert math.isfinite(small.jacobian_lipschitz) and math.isinf(large.jacobian_lipschitz)
    [layer] = residual_structure(model, inputs)[1:2]
    assert layer.path == "2" and layer.sigma == 1.0 and 0.8 <= layer.rho <= 0.8 * (1 + 1e-12)
    loose, _ = network_of("two", tight=False)
    assert math.isfinite(network_regularity(loose, inputs, radius=0.5).jacobian_lipschitz)


def test_weights_that_have_spent_the_slack_are_refused_with_the_way_out():
    model, inputs = network_of("plain", tight=True)
    nn.init.eye_(model[2].branch[1].weight)
    model[2].certify()
    nn.init.constant_(model[2].branch[1].weight, 0.5)
    [slack] = slack_of(model).values()
    assert slack > 0.93
    with pytest.raises(UnboundedError) as caught:
        network_regularity(model, inputs, radius=0.0)
    assert str(caught.value).startswith("2: the slack of this SpectrallyBoundedResidual is spent (V / (t S) is ")
    assert str(caught.value).endswith("Call certify() on the block first, or build it with tight=False.")
    found = tnn.certify(model, inputs, torch.zeros(3, 2, dtype=F64))
    [row] = [row for row in found.hypotheses if row.name == "layers with known constants"]
    assert not row.holds and row.path == "2" and found.grade == "measured"
    assert float(model[2].tightness) == float(copy.deepcopy(model)[2].tightness)  # certify left the block as it was
    model[2].certify()
    assert math.isfinite(network_regularity(model, inputs, radius=0.0).jacobian_lipschitz)


def test_a_loaded_tightness_without_anchors_has_kinks_and_is_refused():
    model, inputs = network_of("plain", tight=False)
    model[2].tightness.fill_(0.5)
    with pytest.raises(UnboundedError, match="has kinks here"):
        network_regularity(model, inputs, radius=0.0)


def test_a_rule_of_ones_own_is_refused_where_it_states_no_derivatives():
    def bounds(module, reading, rules):
        norm = module.weight.norm().double()
        return modules.anchor.Bounds(1.2 * norm, norm) if reading.linear else float(norm)

    branch = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    rules = {**modules.residual.BRANCH_RULES, nn.Linear: bounds}
    model = nn.Sequential(nn.Linear(3, 3), modules.SpectrallyBoundedResidual(branch, rules=rules, tight=False)).double()
    with pytest.raises(UnboundedError, match="says nothing of how"):
        network_regularity(model, torch.randn(2, 3, dtype=F64), radius=0.0)


def test_a_branch_with_a_layer_without_a_rule_keeps_its_input_slope_and_names_the_layer():
    block = modules.SpectrallyBoundedResidual(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), bound=0.5)
    model = nn.Sequential(nn.Linear(3, 4), block).double().train()
    inputs = torch.randn(2, 3, dtype=F64)
    [layer] = residual_structure(model, inputs)
    assert (layer.path, layer.sigma) == ("1", 1.0) and 0.5 <= layer.rho <= 0.5 * (1 + 1e-12)
    with pytest.raises(UnboundedError, match=r"1\.branch\.1: Dropout draws at random"):
        network_regularity(model, inputs, radius=0.1)
