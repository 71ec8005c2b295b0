"""Taylor models along a ray: they hold the network's true curve and loss, by absolute values and by Jacobians."""

import copy
from dataclasses import replace

import mpmath as mp
import pytest
import torch
from kernel_oracle import Network
from provable_nets import provable_net, reference_problem, trained
from test_certify import generated
from torch import nn

import trainable_nn as tnn
from trainable_nn.certify.problem import problem_of
from trainable_nn.certify.ray import Ray, Taylor, jerks, remainder
from trainable_nn.certify.ray.jerks import PEAKS, THIRD, largest_jerk
from trainable_nn.certify.ray.linear import keeps_samples
from trainable_nn.certify.ray.remainder import Jacobians
from trainable_nn.certify.ray.taylor import composed, composed_to_second, product
from trainable_nn.certify.regularity.graph import Graph
from trainable_nn.certify.regularity.rules import RULES
from trainable_nn.certify.regularity.steps import FixedLinear
from trainable_nn.certify.loss_along import loss_at_most
from trainable_nn.certify.outputs_along import along_of
from trainable_nn.certify.step import certified_step, gradient_of

F64 = torch.float64
US = torch.linspace(0.02, 1.0, 50, dtype=F64).tolist()


def direction_of(net, length, seed=0):
    g = torch.Generator().manual_seed(seed)
    moving = {name: p for name, p in net.named_parameters() if p.requires_grad}
    return {name: length * torch.randn(p.shape, generator=g, dtype=F64) for name, p in moving.items()}


def at(net, x, direction, u):
    twin = copy.deepcopy(net)  # functional_call leaves the new values in a layer that stands at two places
    with torch.no_grad():
        for name, d in direction.items():
            twin.get_parameter(name).add_(u * d)
        return twin(x)


def excess(net, x, direction, model, order, shrink=1.0):
    """By how much the true curve leaves the enclosure with r / shrink, at most; 0 or less where it never does."""
    errors = [(at(net, x, direction, u) - model.at(u)).abs() - model.r * u**order / shrink for u in US]
    return float(torch.stack(errors).max()) - 1e-12 * float(1 + model.size.max())


def convolutions(activation=tnn.Softplus0):
    torch.manual_seed(0)
    options = {"dtype": F64}
    branch = nn.Sequential(activation(), tnn.EntryNormConv2d(2, 4, 3, stride=2, padding=1, **options))
    second = nn.Sequential(tnn.WeightNormConv2d(4, 4, 3, padding=1, **options), activation())
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, **options),
        tnn.ContractiveResidual(branch, tnn.OrthogonalDownsample2d(2, 4, **options), strength=0.5),
        tnn.ContractiveResidual(second, strength=0.9),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 2, **options),
    )


def same_layer_twice():
    torch.manual_seed(0)
    layer = tnn.WeightNormLinear(4, 4, dtype=F64)
    return nn.Sequential(nn.Linear(4, 4, dtype=F64), layer, tnn.Tanh(), layer, tnn.GELU1(), nn.Linear(4, 2, dtype=F64))


NETS = {
    **{f"provable {seed}": lambda seed=seed: generated(seed)[:2] for seed in range(8)},
    "16 blocks": lambda: (provable_net(5, 6, 2, 16, strength=0.9, leak=0.0), torch.randn(3, 5, dtype=F64)),
    "convolutions": lambda: (convolutions(), torch.randn(2, 1, 8, 8, dtype=F64)),
    "second order": lambda: (convolutions(tnn.SoftSign), torch.randn(2, 1, 8, 8, dtype=F64)),
    "shared": lambda: (same_layer_twice(), torch.randn(3, 4, dtype=F64)),
    "one sample": lambda: (same_layer_twice(), torch.randn(1, 4, dtype=F64)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("length", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("numbers", [0, remainder.MOST_NUMBERS], ids=["absolute", "jacobians"])
def test_the_true_curve_stays_in_its_enclosure(name, length, numbers, monkeypatch):
    monkeypatch.setattr(remainder, "MOST_NUMBERS", numbers)
    torch.manual_seed(1)
    net, x = NETS[name]()
    direction = direction_of(net, length)
    ray = Ray(net, x)
    model = ray.along(direction)
    assert bool(ray.jacobians.kept) == (numbers > 0)
    assert excess(net, x, direction, model, ray.order) <= 0


@pytest.mark.parametrize("name", ["provable 1", "16 blocks", "convolutions", "second order", "shared"])
def test_a_smaller_enclosure_is_left_by_the_true_curve(name):
    torch.manual_seed(1)
    net, x = NETS[name]()
    direction = direction_of(net, 0.05)
    ray = Ray(net, x)
    assert excess(net, x, direction, ray.along(direction), ray.order, shrink=100.0) > 0


@pytest.mark.parametrize("seed", range(3))
def test_the_curve_in_fifty_digits_stays_in_its_enclosure(seed):
    net = provable_net(3, 4, 2, 3, strength=0.9, leak=0.0, seed=seed)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)
    direction = direction_of(net, 0.1, seed)
    model = Ray(net, x).along(direction)
    for u in (0.125, 0.5, 1.0):
        still = provable_net(3, 4, 2, 3, strength=0.9, leak=0.0, seed=seed).requires_grad_(False)
        for name, d in direction.items():
            still.get_parameter(name).add_(u * d)
        oracle = Network(still)
        truth = [n.v for n in oracle.run(still, oracle.constants(x.numpy())).ravel()]
        middle, rest = model.at(u).flatten().tolist(), (model.r * u**3).flatten().tolist()
        assert all(abs(t - mp.mpf(c)) <= r + 1e-13 for t, c, r in zip(truth, middle, rest, strict=True))
        assert max(abs(t - mp.mpf(c)) for t, c in zip(truth, middle)) > 1e-9


@pytest.mark.parametrize("blocks", [1, 6])
@pytest.mark.parametrize("strength", [0.5, 0.9])
def test_the_true_loss_stays_below_its_bound_on_the_whole_ray(blocks, strength):
    net, x, y = reference_problem(blocks, strength)
    problem = problem_of(net, x, y, "mse")
    gradient = gradient_of(problem)
    step = certified_step(problem, gradient)
    for length in (step.step_size, 3 * step.step_size):
        model = along_of(problem, gradient, length).model(length)
        for u in US:
            outputs = at(problem.model, problem.inputs, {n: -length * g for n, g in gradient.items()}, u)
            true = float(problem.cost.value(outputs, problem.targets))
            assert true <= loss_at_most(problem, model, u)


# sums, products and functions of models, with remainders at their ends


def drawn(seed, size):
    """200 models of numbers: c_0 of order 1, the others of order ``size``."""
    g = torch.Generator().manual_seed(seed)
    c0, *rest = (torch.randn(200, generator=g, dtype=F64) for _ in range(4))
    return Taylor(c0, size * rest[0], size * rest[1], size * rest[2].abs())


def ends(x, u, order=3):
    return [(x.at(u) + sign * x.r * u**order) for sign in (-1.0, 0.3, 1.0)]


@pytest.mark.parametrize("size", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("order", [2, 3])
def test_a_product_holds_the_products_of_all_that_its_factors_hold(size, order):
    a, b = drawn(0, size), drawn(1, size)
    if order == 2:
        a, b = (replace(m, c2=torch.zeros_like(m.c2)) for m in (a, b))
    found = product(a, b, torch.mul, order)
    whole = found.r + a.c0.abs() * b.r
    for u in US:
        for x in ends(a, u, order):
            for y in ends(b, u, order):
                assert bool(((x * y - found.at(u)).abs() <= whole * u**order * (1 + 1e-9) + 1e-12).all())


@pytest.mark.parametrize("size", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("remainder_of", [0.1, 1.0, 10.0])
def test_a_function_of_a_model_holds_the_values_of_all_that_it_holds(size, order, remainder_of):
    x, step = drawn(2, size), step_of("Tanh")
    x = replace(x, r=remainder_of * x.r, c2=x.c2 if order == 3 else torch.zeros_like(x.c2))
    first, second = step._derivatives(x.c0)
    if order == 3:
        found = composed(x, x.c0.tanh(), first, second, largest_jerk(step, x.c0, x.reach), step.phi.slope)
    else:
        found = composed_to_second(x, x.c0.tanh(), first, torch.tensor(step.phi.curvature), step.phi.slope)
    whole = found.r + first.abs() * x.r
    for u in US:
        for end in ends(x, u, order):
            assert bool(((end.tanh() - found.at(u)).abs() <= whole * u**order * (1 + 1e-9) + 1e-12).all())


# what makes the enclosure small


def test_jacobians_carry_the_remainder_as_autograd_says():
    net = provable_net(3, 4, 2, 2, strength=0.9)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    jacobians = Jacobians(Ray(net, x).nodes)
    found = jacobians.kept[len(jacobians.nodes) - 1]
    hidden, expected = x, []
    for k in range(3):  # the sources are the outputs of the first layer and of both blocks
        hidden = net[k](hidden).detach()
        for i in range(len(x)):
            expected.append(torch.autograd.functional.jacobian(net[k + 1 :], hidden[i : i + 1])[0, :, 0].T.abs())
    expected = torch.stack(expected).unflatten(0, (3, len(x))).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_jacobians_shrink_the_remainder_of_a_deep_network(monkeypatch):
    net, x, y = reference_problem(16, 0.9)
    direction = {name: -0.16 * g for name, g in gradient_of(problem_of(net, x, y, "mse")).items()}
    sharp = Ray(net, x).along(direction)
    monkeypatch.setattr(remainder, "MOST_NUMBERS", 0)
    plain = Ray(net, x).along(direction)
    assert bool((sharp.r <= plain.r).all()) and float(sharp.r.norm()) < float(plain.r.norm()) / 3
    for name in ("c0", "c1", "c2"):
        assert torch.equal(getattr(sharp, name), getattr(plain, name))


@pytest.mark.parametrize(("strength", "stable"), [(0.5, 2.074), (0.9, 2.486)])  # stable: benchmarks/certify.py
def test_the_first_step_of_sixteen_blocks_is_a_tenth_of_the_largest_stable_one(strength, stable):
    net, x, y = reference_problem(16, strength)
    problem = problem_of(net, x, y, "mse")
    assert certified_step(problem, gradient_of(problem)).step_size >= stable / 10


def test_a_remainder_that_is_large_grows_no_faster_than_the_network():
    """By powers of it, as Taylor's formula alone has it, it overflows."""
    net, x, _ = reference_problem(16, 0.9)
    assert bool(torch.isfinite(Ray(net, x).along(direction_of(net, 0.3)).r).all())


def test_a_map_that_mixes_the_samples_is_seen():
    x = torch.randn(3, 3, dtype=F64)
    assert not keeps_samples(FixedLinear("", "transpose", lambda t: t.T, 1.0), x)
    assert not keeps_samples(FixedLinear("", "roll", lambda t: t.roll(1, 0), 1.0), x)
    assert keeps_samples(FixedLinear("", "flip", lambda t: t.flip(1), 1.0), x)


# the third derivative


MODULES = {**{kind.__name__: kind for kind in RULES if kind.__name__ in THIRD}, "SiLU": nn.SiLU}
FORMULAS = {
    "Tanh": mp.tanh,
    "Sigmoid": lambda z: 1 / (1 + mp.exp(-z)),
    "Softplus0": lambda z: mp.log(1 + mp.exp(z)),
    "SiLU": lambda z: z / (1 + mp.exp(-z)),
    "SiLU1": lambda z: z / (1 + mp.exp(-z)) / mp.mpf("1.099839320128867"),
    "GELU1": lambda z: z * mp.ncdf(z) / mp.mpf("1.128904145185155"),
    "Erf1": lambda z: mp.sqrt(mp.pi) / 2 * mp.erf(z),
    "Arctan": mp.atan,
    "ISRU": lambda z: z / mp.sqrt(1 + z * z),
    "SmoothReLU": lambda z: (z + mp.sqrt(1 + z * z) - 1) / 2,
}


def step_of(kind):
    graph = Graph(torch.zeros(1, 1, dtype=F64), RULES)
    return graph.nodes[graph.read(MODULES[kind](), "", 0)].step


def truth(kind, z):
    with mp.workdps(40):
        return float(abs(mp.diff(FORMULAS[kind], mp.mpf(z), 3)))


@pytest.mark.parametrize("kind", THIRD)
def test_the_largest_third_derivative_is_above_the_truth_and_near_it(kind):
    step = step_of(kind)
    g = torch.Generator().manual_seed(0)
    centre, reach = 3.0 * torch.randn(12, generator=g, dtype=F64), torch.rand(12, generator=g, dtype=F64)
    bound = largest_jerk(step, centre, reach)
    for c, r, b in zip(centre.tolist(), reach.tolist(), bound.tolist(), strict=True):
        values = [truth(kind, c + r * k / 20) for k in range(-20, 21)]
        assert max(values) <= b <= 1.02 * max(values) + 1e-3 * step.phi.jerk


@pytest.mark.parametrize("kind", THIRD)
def test_the_third_derivative_peaks_where_it_is_said_and_nowhere_else(kind):
    with mp.workdps(40):
        fourth = lambda z: mp.diff(FORMULAS[kind], z, 4)
        places = [mp.mpf(k) / 8 + mp.mpf(1) / 977 for k in range(97)]  # beyond, all are monotone
        changes = [(a, b) for a, b in zip(places, places[1:]) if fourth(a) * fourth(b) < 0]
        found = [mp.findroot(fourth, pair, solver="anderson", tol=1e-20) for pair in changes]
    assert [float(z) for z in found] == pytest.approx(list(PEAKS[kind]), rel=1e-12)


@pytest.mark.parametrize("kind", THIRD)
def test_far_away_and_everywhere_the_third_derivative_has_a_bound(kind):
    step = step_of(kind)
    centre = torch.tensor([0.0, 1e4, -1e300, 0.3, 2.0], dtype=F64)
    reach = torch.tensor([float("inf"), 1.0, 1e300, float("nan"), 2.0], dtype=F64)
    bound = largest_jerk(step, centre, reach)
    assert bound[0] == pytest.approx(step.phi.jerk, rel=1e-6) and bool((bound <= step.phi.jerk).all())
    assert bound[2] == bound[0] and bound[3] == step.phi.jerk
    assert bound[1] < 1e-6 * step.phi.jerk


def test_without_the_peaks_the_third_derivative_is_missed(monkeypatch):
    monkeypatch.setitem(jerks.PEAKS, "Tanh", ())
    bound = largest_jerk(step_of("Tanh"), torch.tensor([1.1], dtype=F64), torch.tensor([0.3], dtype=F64))
    assert float(bound) < truth("Tanh", 1.1462158347805888)


def test_the_weights_of_a_wide_network_still_move(monkeypatch):
    """Without Jacobians a step is proved as before, and a shorter one."""
    net, x, y = reference_problem(8, 0.9)
    problem = problem_of(net, x, y, "mse")
    sharp = certified_step(problem, gradient_of(problem))
    monkeypatch.setattr(remainder, "MOST_NUMBERS", 0)
    plain = certified_step(problem, gradient_of(problem))
    assert 0 < plain.step_size < sharp.step_size and sharp.loss_at_most < plain.loss_at_most < plain.loss
    assert all(p.grad is None for p in trained(problem.model))
