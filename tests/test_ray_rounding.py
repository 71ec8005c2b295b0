"""The rounding of Taylor models along rays, against 50 digits: of weights, second derivatives, outputs and the certified loss."""

import copy
import math

import numpy as np
import pytest
import torch
from kernel_oracle import ACTIVATIONS, Network, Number, exact, knows
from mpmath import mp, mpf
from provable_nets import provable_net, reference_problem
from regularity_networks import network
from test_optim import follow
from test_outputs_rounding import cancelling, exact_mse
from torch import nn
from torch.nn import functional as F

import trainable_nn as tnn
from trainable_nn.certify import loss_along, outputs_along, slope_along
from trainable_nn.certify.kernel_error import outputs_error_at_most
from trainable_nn.certify.kernel_error.activations import Rounded
from trainable_nn.certify.loss_along import ROUNDING, Model, loss_at_most
from trainable_nn.certify.outputs_along import along_of
from trainable_nn.certify.problem import problem_of
from trainable_nn.certify.ray import Ray, rounding, seconds
from trainable_nn.certify.ray.weight_rounding import weight_error_along
from trainable_nn.certify.ray.weights import weight_along
from trainable_nn.certify.regularity.network import read_graph
from trainable_nn.certify.regularity.rules import RULES
from trainable_nn.certify.step import certified_step, gradient_of
from trainable_nn.errors import UnboundedError
from trainable_nn.optim import CertifiedDescent
from trainable_nn.theory import Cost

F64 = torch.float64
U = 2.0**-53
US = (1 / 32, 0.40625, 1.0)
value_of = np.frompyfunc(lambda n: n.v, 1, 1)


def rays(seed: int):
    """A network with a ray and its inputs; None where a layer has no Taylor rule or no oracle."""
    model, x = network(seed)
    if not knows(model):
        return None
    try:
        return model, x, Ray(model, x)
    except UnboundedError:
        return None


RARE = (166, 181, 220, 273)  # with kinds that the first of them lack
SEEDS = [seed for seed in (*range(120), *RARE) if rays(seed) is not None]


def drawn(model: nn.Module, length: float, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: length * torch.randn(p.shape, generator=g, dtype=F64) for n, p in model.named_parameters() if p.requires_grad}


def exact_outputs(model: nn.Module, x: torch.Tensor, direction: dict, u) -> np.ndarray:
    """At theta + u d in 50 digits; u and d are not rounded."""
    still = copy.deepcopy(model).requires_grad_(False)
    oracle = Network(still)
    for name, d in direction.items():
        p, none = still.get_parameter(name), np.zeros(0, dtype=object)
        moved = exact(p.numpy()) + mpf(u) * exact(d.numpy())
        oracle.numbers[id(p)] = np.frompyfunc(lambda v, none=none: Number(v, none), 1, 1)(moved)
    return value_of(oracle.run(still, oracle.constants(x.numpy())))


def stored(model: nn.Module, direction: dict, u: float) -> nn.Module:
    """With the weights that torch.optim.SGD leaves in float64."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, d in direction.items():
            twin.get_parameter(name).add_(d, alpha=u)
    return twin


def excess(truth: np.ndarray, found, u: float, order: int):
    """The norm of what leaves the enclosure without its rounding."""
    out = [mpf(0)]
    for t, p, r in zip(truth.ravel(), found.at(u).flatten().tolist(), found.r.flatten().tolist(), strict=True):
        out.append(max(abs(t - mpf(p)) - mpf(r) * mpf(u) ** order, mpf(0)))
    return mp.sqrt(sum(v * v for v in out))


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("length", [1e-6, 0.1])
@pytest.mark.parametrize("seed", SEEDS)
def test_random_networks_never_leave_their_model_by_more_than_its_rounding(seed, length, scale):
    model, x, _ = rays(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    direction, ray = drawn(model, length, seed), Ray(model, x)
    found = ray.followed(direction)
    bound = ray.rounding(found)
    for u in US:
        assert excess(exact_outputs(model, x, direction, u), found.models[-1], u, ray.order) <= bound
        assert excess(exact_outputs(stored(model, direction, u), x, {}, 0), found.models[-1], u, ray.order) <= bound
    assert bound <= 1e-7 * max(1.0, float(found.models[-1].size.norm()))
    assert bound >= 2.0**-54 * float(found.models[-1].c0.norm())


def test_the_networks_of_these_tests_have_every_kind_of_weight_and_activation():
    seen = {node.step.kind for seed in SEEDS for node in rays(seed)[2].nodes}
    layers = {f"{norm}{kind}" for norm in ("", "EntryNorm", "WeightNorm") for kind in ("Linear", "Conv2d")}
    assert {*layers, *seconds.SECOND, "SpectralNormLinear", "SoftSign", "Softsign", "Softplus", "AdaptiveAvgPool2d", "sum"} <= seen


# where large numbers cancel


def cancelling_direction(seed: int):
    """h_1 - h_2 for an h that moves by 1e8 while the outputs move by 1: an exactly linear network, so r is 0."""
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    net[1].weight.requires_grad_(False)
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, -1.0]]))
        net[0].weight.copy_(torch.randn(2, 3, generator=g, dtype=F64))
    large = 1e8 * torch.randn(3, generator=g, dtype=F64)
    x = torch.randn(4, 3, generator=g, dtype=F64)
    y = torch.randn(4, 1, generator=g, dtype=F64)
    return net, x, y, {"0.weight": torch.stack([large + torch.randn(3, generator=g, dtype=F64), large])}


@pytest.mark.parametrize("seed", range(8))
def test_where_moves_cancel_the_outputs_leave_the_assumption_of_before_and_not_the_bound(seed):
    net, x, _, direction = cancelling_direction(seed)
    ray = Ray(net, x)
    found = ray.followed(direction)
    outputs, bound = found.models[-1], ray.rounding(found)
    off = excess(exact_outputs(net, x, direction, 1.0), outputs, 1.0, ray.order)
    assert off > outputs_error_at_most(net, x) + ROUNDING * float(outputs.size.norm())  # as it was
    assert off <= bound <= 1e4 * off


def test_where_moves_cancel_the_loss_was_above_its_bound_of_before_and_is_below_the_proved_one():
    missed = 0
    for seed in range(12):
        net, x, y, direction = cancelling_direction(seed)
        problem = problem_of(net, x, y, "mse")
        truth = exact_mse(exact_outputs(net, x, direction, 1.0), y)
        model = along_of(problem, {name: -d for name, d in direction.items()}, 1.0).model(1.0)
        before = problem.outputs_error + ROUNDING * float(sum(c.abs() for c in model.coefficients).norm())
        assert truth <= loss_at_most(problem, model, 1.0)
        missed += truth > loss_at_most(problem, Model(model.coefficients, model.remainder, model.order, before, model.entries), 1.0)
    assert missed >= 3


@pytest.mark.parametrize("scale", [1e4, 1e6, 1e8])
def test_certified_steps_of_a_network_whose_values_cancel_are_proved_and_hold(scale):
    net, x, y = cancelling(scale)
    problem = problem_of(net, x, y, "mse")
    gradient = gradient_of(problem)
    step = certified_step(problem, gradient)
    truth = exact_mse(exact_outputs(net, x, {n: -g for n, g in gradient.items()}, step.step_size), y)
    assert step.rounding == "proved" and step.loss <= exact_mse(exact_outputs(net, x, {}, 0), y)
    assert truth <= step.loss_at_most


def test_without_the_rounding_of_affine_layers_the_bound_would_be_wrong(monkeypatch):
    net, x, _, direction = cancelling_direction(0)
    monkeypatch.setattr(rounding, "gamma", lambda terms: 0.0)
    monkeypatch.setattr(rounding, "weight_error_along", lambda *a: 0.0)
    ray = Ray(net, x)
    found = ray.followed(direction)
    off = excess(exact_outputs(net, x, direction, 1.0), found.models[-1], 1.0, ray.order)
    assert off > ray.rounding(found)


def test_without_the_rounding_of_activations_the_bound_would_be_wrong(monkeypatch):
    """Two units whose inputs are equal but for the last digits: their outputs' rounding is all that is left of them."""
    net = nn.Sequential(nn.Linear(1, 2), tnn.Tanh(), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [1.0 + 2.0**-40]], dtype=F64))
        net[0].bias.zero_()
        net[2].weight.copy_(torch.tensor([[1.0, -1.0]]))
    x = torch.tensor([[0.25 * k] for k in range(1, 9)], dtype=F64)  # all products are exact
    ray = Ray(net.requires_grad_(False), x)
    found = ray.followed({})
    off = excess(exact_outputs(net, x, {}, 0), found.models[-1], 1.0, ray.order)
    monkeypatch.setattr(rounding, "gamma", lambda terms: 0.0)
    assert 0 < off <= ray.rounding(found) <= 1e3 * off
    monkeypatch.setattr(rounding, "rounded", lambda step: Rounded(0.0, 0.0, 0.0))
    assert off > ray.rounding(found)


def test_without_the_weights_own_rounding_the_stored_ones_leave_the_bound(monkeypatch):
    """Two large weights cancel, and one moves by less than its last digit: float64 keeps it where it is."""
    net = nn.Sequential(nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[2.0**40, -(2.0**40)]]))
    x, direction = torch.ones(1, 2, dtype=F64), {"0.weight": torch.tensor([[2.0**-14, 0.0]], dtype=F64)}
    ray = Ray(net, x)
    found = ray.followed(direction)
    assert excess(exact_outputs(net, x, direction, 1.0), found.models[-1], 1.0, ray.order) == 0
    kept = excess(exact_outputs(stored(net, direction, 1.0), x, {}, 0), found.models[-1], 1.0, ray.order)
    monkeypatch.setattr(rounding, "gamma", lambda terms: 0.0)
    assert kept == mpf(2) ** -14 and kept <= ray.rounding(found)
    monkeypatch.setattr(rounding, "weight_error_along", lambda *a: 0.0)
    assert kept > ray.rounding(found)


# certified steps


@pytest.mark.parametrize("seed", SEEDS[:40])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_the_loss_in_50_digits_after_a_certified_step_is_below_its_bound(seed, loss):
    model, x, _ = rays(seed)
    outputs, g = model(x).detach(), torch.Generator().manual_seed(seed)
    if loss == "cross_entropy" and (outputs.dim() != 2 or outputs.shape[1] < 2):
        outputs = None
    y = torch.zeros(1) if outputs is None else torch.randn(outputs.shape, generator=g, dtype=F64)
    if loss == "cross_entropy" and outputs is not None:
        y = y.argmax(1)
    if outputs is None:
        model, x = nn.Sequential(nn.Linear(3, 4), tnn.Tanh(), nn.Linear(4, 3)).double(), torch.randn(4, 3, generator=g, dtype=F64)
        y = torch.tensor([0, 1, 2, 0])
    measure = exact_mse if loss == "mse" else exact_cross_entropy
    assert certified_step(problem_of(model, x, y, loss), gradient_of(problem_of(model, x, y, loss))).step_size > 0
    for _ in range(2):  # the second may be at a minimum
        problem = problem_of(model, x, y, loss, prove=False)
        gradient = gradient_of(problem)
        step = certified_step(problem, gradient)
        direction = {name: -d for name, d in gradient.items()}
        assert step.rounding == "proved" and step.loss <= measure(exact_outputs(model, x, {}, 0), y)
        assert measure(exact_outputs(model, x, direction, step.step_size), y) <= step.loss_at_most
        model = stored(model, direction, step.step_size)
        assert measure(exact_outputs(model, x, {}, 0), y) <= step.loss_at_most


def exact_cross_entropy(outputs: np.ndarray, targets: torch.Tensor):
    rows = [mp.log(sum(mp.exp(z) for z in row)) - row[k] for row, k in zip(outputs, targets.tolist())]
    return sum(rows) / len(rows)


def test_certified_descent_holds_in_50_digits_down_to_its_last_step():
    """At the minimum rounding is all that is left of the bound."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), tnn.Tanh(), nn.Linear(4, 1)).double(), torch.randn(2, 3, dtype=F64)
    y = torch.tensor([[0.3], [-0.2]], dtype=F64)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    descent, last = CertifiedDescent(optimizer, net, x, y), None
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
        last = descent.history[-1]
        assert exact_mse(exact_outputs(net, x, {}, 0), y) <= last.loss_at_most
        descent.step()
    assert last.loss_at_most < 1e-20 and descent.rounding == "proved"


@pytest.mark.parametrize("cost", ["mse", "cross_entropy"])
def test_the_pairing_with_the_gradient_is_not_below_its_value_in_50_digits(cost):
    g = torch.Generator().manual_seed(0)
    z, e = 30 * torch.randn(5, 4, generator=g, dtype=F64), torch.rand(5, 4, generator=g, dtype=F64)
    y = torch.randn(5, 4, generator=g, dtype=F64)
    y = y.argmax(1) if cost == "cross_entropy" else y
    problem = problem_of(nn.Sequential(nn.Linear(4, 4)).double(), z, y, cost)
    found, truth = loss_along._along_gradient(problem, e, z), mpf(0)
    for i in range(5):
        total = sum(mp.exp(mpf(v)) for v in z[i].tolist())
        for j in range(4):
            own = mp.exp(mpf(float(z[i, j]))) / total - int(cost == "cross_entropy" and int(y[i]) == j)
            slope = own / 5 if cost == "cross_entropy" else (mpf(float(z[i, j])) - mpf(float(y[i, j]))) / 10
            truth += abs(slope) * mpf(float(e[i, j]))
    assert truth <= found <= truth * (1 + 1e-5)


# weights


LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "entry": lambda: tnn.EntryNormLinear(5, 3, eps=1e-6),
    "entry, leak": lambda: tnn.EntryNormLinear(5, 3, eps=0.5, leak=0.3),
    "weight": lambda: tnn.WeightNormLinear(5, 3, eps=1e-6),
    "weight, gain": lambda: tnn.WeightNormLinear(5, 3, eps=1.0, gain=2.0),
    "schatten": lambda: tnn.SpectralNormLinear(5, 3, eps=0.1, power=8),
    "frobenius": lambda: tnn.SpectralNormLinear(5, 3, eps=1e-3, power=1),
}
MOVES = {
    "small": lambda w, g: 1e-6 * torch.randn(w.shape, generator=g, dtype=F64),
    "large": lambda w, g: 3.0 * torch.randn(w.shape, generator=g, dtype=F64),
    "almost back": lambda w, g: -w * (1 + 1e-9 * torch.randn(w.shape, generator=g, dtype=F64)),
    "across": lambda w, g: w.roll(1, 0) * torch.tensor([[1.0], [-1.0], [1e3]], dtype=F64),
}


@pytest.mark.parametrize("spread", [1e-5, 1.0, 1e6])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_weights_model_is_off_by_no_more_than_its_rounding(name, move, spread):
    torch.manual_seed(0)
    layer, g = LAYERS[name]().double(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.weight.copy_(spread * torch.randn(3, 5, generator=g, dtype=F64))
        layer.weight[0, 0] = 0.0
    step = read_graph(layer, torch.ones(1, 5, dtype=F64), RULES).nodes[-1].step
    w = layer.weight.detach()
    d, order = MOVES[move](w, g), 2 if "schatten" in name or "frobenius" in name else 3
    model = weight_along(step, layer, w, d, order)
    bound = weight_error_along(step, model, w, d)
    still = copy.deepcopy(layer).requires_grad_(False)
    for u in US:
        oracle = Network(still)
        for at in (exact(w.numpy()) + mpf(u) * exact(d.numpy()), exact((w + u * d).numpy())):
            oracle.numbers[id(still.weight)] = np.frompyfunc(lambda v: Number(v, np.zeros(0, dtype=object)), 1, 1)(at)
            off = excess(value_of(oracle.weight(still)), model, u, order)
            assert off <= bound
    assert bound <= 1e-12 * max(1.0, float(model.size.norm())) * max(1.0, float(step.options.slope_supremum if name != "linear" else 1))


# the second derivative


POINTS = [*np.linspace(-12, 12, 97), *(s * v for v in np.geomspace(1e-9, 900, 40) for s in (-1.0, 1.0)), 0.0]
OTHERS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.Hardswish, nn.Softsign, tnn.SoftSign)  # without a third derivative
SMOOTH = [k() for k in ACTIVATIONS if k not in OTHERS]
SMOOTH += [nn.GELU(approximate="tanh"), nn.Softplus(beta=0.3), nn.Softplus(beta=7.0)]


@pytest.mark.parametrize("activation", SMOOTH, ids=str)
def test_second_derivatives_and_the_slopes_beside_them_err_by_no_more_than_their_numbers(activation):
    z = torch.tensor(POINTS, dtype=F64)
    step = read_graph(activation, z[None], RULES).nodes[-1].step
    second, own = seconds.second_of(step), rounding.rounded(step)
    slope, h = step._derivatives(z)[0], mpf(10) ** -20
    phi = lambda t: ACTIVATIONS[type(activation)](t, activation)
    for point, d, s in zip(POINTS, second.formula(z).tolist(), slope.tolist(), strict=True):
        truth = (phi(mpf(point) + h)[1] - phi(mpf(point) - h)[1]) / (2 * h)
        assert abs(truth - mpf(d)) <= second.units * U
        assert abs(phi(mpf(point))[1] - mpf(s)) <= U * float(own.slope_error(torch.tensor(abs(point), dtype=F64)))


@pytest.mark.parametrize("activation", SMOOTH, ids=str)
def test_values_as_a_ray_computes_them_err_by_no_more_than_their_numbers(activation):
    """A softplus without its threshold."""
    z = torch.tensor(POINTS, dtype=F64)
    step = read_graph(activation, z[None], RULES).nodes[-1].step
    own = rounding.rounded(step)
    for point, v in zip(POINTS, step.function(z).tolist(), strict=True):
        off = abs(ACTIVATIONS[type(activation)](mpf(point), activation)[0] - mpf(v))
        assert off <= U * (own.value_slope * abs(point) + own.value) + 2.0**-1000


def test_every_smooth_activation_of_third_order_has_a_second_derivative_with_a_rounding():
    for activation in SMOOTH:
        step = read_graph(activation, torch.zeros(1, 1, dtype=F64), RULES).nodes[-1].step
        assert step.phi.jerk < math.inf and seconds.second_of(step) is not None


# Jacobians where they pay


@pytest.mark.parametrize(("width", "blocks", "steps", "pays"), [(128, 1, 2, False), (32, 16, 0, True)])
def test_a_step_asks_for_jacobians_only_where_the_remainder_takes_from_its_fall(width, blocks, steps, pays, monkeypatch):
    g = torch.Generator().manual_seed(0)
    net, guess = provable_net(32, width, 4, blocks, strength=0.5, leak=0.0), None
    x, y = torch.randn(16, 32, generator=g, dtype=F64), torch.randn(16, 4, generator=g, dtype=F64)
    for _ in range(steps):  # the first steps of any network are short
        gradient = gradient_of(problem_of(net, x, y, "mse"))
        guess = certified_step(problem_of(net, x, y, "mse"), gradient, guess).step_size
        net = stored(net, {name: -d for name, d in gradient.items()}, guess)
    problem, asked, follow_ray = problem_of(net, x, y, "mse"), [], Ray.followed
    assert Ray(net, x).jacobians.sources and Ray(net, x).jacobians.products > outputs_along.CHEAP
    monkeypatch.setattr(Ray, "followed", lambda ray, d, sharp=True: (asked.append(sharp), follow_ray(ray, d, sharp))[1])
    step = certified_step(problem, gradient_of(problem), guess)
    assert (True in asked) == pays
    monkeypatch.setattr(outputs_along, "CHEAP", math.inf)  # all at once
    sharp = certified_step(problem, gradient_of(problem), guess)
    assert sharp.loss_at_most <= step.loss_at_most * (1 + 1e-9) <= sharp.loss_at_most + 0.02 * (step.loss - sharp.loss_at_most)


# what is said of it


def test_a_step_says_that_its_rounding_is_proved():
    net, x, y = reference_problem(2, 0.5)
    _, descent = follow(net, x, y, steps=2)
    assert {step.rounding for step in descent.history} == {"proved"} and descent.history[0].reason == ""
    assert descent.rounding == "proved"


def test_the_way_by_a_ball_of_many_outputs_says_that_its_rounding_is_assumed(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, eps=0.5), nn.Linear(4, 2)).double()
    x = torch.randn(6, 5, dtype=F64)
    _, descent = follow(copy.deepcopy(net), x, torch.ones(6, 2, dtype=F64), steps=1)
    assert {(step.way, step.rounding) for step in descent.history} == {("ball", "proved")}
    monkeypatch.setattr(slope_along, "MOST_OUTPUTS", 11)
    losses, descent = follow(net, x, torch.ones(6, 2, dtype=F64), steps=1)
    assert descent.rounding == "assumed" and "more than 11 outputs" in descent.history[0].reason
    assert losses[1] <= descent.history[0].loss_at_most < descent.history[0].loss


def test_an_activation_without_a_rule_and_a_cost_without_one_say_that_rounding_is_assumed(monkeypatch):
    net, x, y = reference_problem(2, 0.5)
    cost = Cost("huber", lambda z, y: F.huber_loss(z, y, reduction="sum"), smoothness=1.0)
    _, descent = follow(net, x, y, loss=cost, steps=1)
    assert descent.rounding == "assumed" and "Cost" in descent.history[0].reason
    monkeypatch.delitem(seconds.SECOND, "Tanh")
    losses, descent = follow(net, x, y, steps=2)
    assert descent.rounding == "assumed" and "second derivative of Tanh" in descent.history[0].reason
    assert losses[2] <= descent.history[1].loss_at_most < descent.history[1].loss


def test_a_cost_that_states_its_own_rounding_is_proved_without_its_gradient():
    def huber_rounding(z, y, value):
        return (z.numel() + 8) * U * value * 2

    cost = Cost("huber", lambda z, y: F.huber_loss(z, y, reduction="sum"), smoothness=1.0, rounding=huber_rounding)
    net, x, y = reference_problem(2, 0.5)
    losses, descent = follow(net, x, y, loss=cost, steps=2)
    assert descent.rounding == "proved" and losses[2] <= descent.history[1].loss_at_most < descent.history[1].loss


def test_norms_that_multiply_until_nothing_is_proved_leave_the_assumption():
    torch.manual_seed(0)
    layers = [part for _ in range(40) for part in (nn.Linear(6, 6), tnn.Tanh())]
    net = nn.Sequential(*layers, nn.Linear(6, 1)).double()
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.copy_(3.0 * torch.eye(len(layer.weight), 6))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    problem = problem_of(net, x, torch.zeros(3, 1, dtype=F64), "mse")
    step = certified_step(problem, gradient_of(problem))
    assert step.rounding == "assumed" and "norms of layers multiply" in step.reason
