"""Each constant of the regularity calculus against autograd in float64 and a search for the worst case."""

import itertools
import math
import os

import mpmath as mp
import numpy as np
import pytest
import torch
from regularity_networks import F64, Truth, network
from test_theory import TRUTH
from torch import nn

import trainable_nn as tnn
from trainable_nn import modules
from trainable_nn.certify.regularity import first_layer, network_regularity, residual_structure
from trainable_nn.certify.regularity.elementwise import SLACK
from trainable_nn.certify.regularity.norms import deviations, norms_at_most
from trainable_nn.certify.regularity.rules import RULES
from trainable_nn.errors import UnboundedError
from trainable_nn.theory import EntryNormConstants, WeightNormConstants
from trainable_nn.theory.composition import chain, perron_at_most
from trainable_nn.theory.higher_derivatives import JERKS
from trainable_nn.theory.parameterisation_balls import curvatures_on_ball, slopes_on_ball, steepest_entries
from trainable_nn.theory.regularity import Regularity

NETWORKS = int(os.environ.get("TRAINABLE_NN_NETWORKS", "60"))  # 2000: the whole sweep
RADII = (0.0, 1e-3, 0.1, 1.0, math.inf)
ROUNDING = 1 + 1e-9  # of what autograd finds


def found_violations(model, inputs, radius, seed, steps=4, shrink=1.0):
    """Names of the constants that something found exceeds."""
    proved = network_regularity(model, inputs, radius=radius)
    truth, generator = Truth(model, inputs), torch.Generator().manual_seed(seed)
    assert set(proved.paths) <= set(truth.names) and len(set(proved.paths)) == len(proved.paths)
    reach = min(radius, 3.0)  # a sample of everywhere
    bounds = {"jacobian": proved.jacobian, "jacobian_lipschitz": proved.jacobian_lipschitz, "value": proved.value}
    seen = {
        "jacobian": truth.largest(truth.first, reach, generator, steps),
        "jacobian_lipschitz": truth.largest(truth.second, reach, generator, steps),
        "value": truth.largest(lambda theta, v: truth(theta) + 0.0 * v.sum(), reach, generator, steps),
    }
    now = truth.jacobian(truth.theta)
    seen["jacobian"] = max(seen["jacobian"], float(torch.linalg.matrix_norm(now, 2)))
    used = [n in proved.paths for n in truth.names]
    blocks = [b for b, u in zip(now.split(truth.sizes, dim=1), used) if u]
    assert all(not b.any() for b, u in zip(now.split(truth.sizes, dim=1), used) if not u)
    names = [n for n, u in zip(truth.names, used) if u]
    place = {name: proved.paths.index(name) for name in names}
    for name, block in zip(names, blocks):
        bounds[f"c of {name}"], seen[f"c of {name}"] = float(proved.c[place[name]]), float(torch.linalg.matrix_norm(block, 2))
    for k, (one, other) in enumerate(_pairs(truth, used, generator)):
        (i, v), (j, w) = ((place[names[p]], direction) for p, direction in (one, other))
        mixed = torch.func.jvp(lambda t, v=v: truth.first(t, v), (truth.theta,), (w,))[1]
        bounds[f"Q {k}"], seen[f"Q {k}"] = float(proved.Q[i, j]), float(mixed.norm())
    return [name for name in seen if seen[name] > shrink * bounds[name] * ROUNDING + 1e-12]


def _pairs(truth, used, generator):
    """Unit directions in two parameters each."""
    places = [k for k, u in enumerate(used) if u]
    offsets = np.cumsum([0, *truth.sizes])

    def unit(place):
        v = torch.zeros_like(truth.theta)
        piece = torch.randn(truth.sizes[place], generator=generator, dtype=F64)
        v[offsets[place] : offsets[place + 1]] = piece / piece.norm()
        return places.index(place), v

    pairs = [(a, b) for a in places for b in places if a <= b]
    return [(unit(a), unit(b)) for a, b in pairs[:6]]


@pytest.mark.parametrize("seed", range(NETWORKS))
def test_no_constant_of_a_random_network_is_exceeded(seed):
    model, inputs = network(seed)
    assert found_violations(model, inputs, RADII[seed % len(RADII)], seed) == []


def test_a_linear_layer_has_its_exact_constants_so_one_tenth_less_is_noticed():
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 3, bias=False, dtype=F64), torch.randn(5, 4, dtype=F64)
    model = nn.Sequential(model)
    proved = network_regularity(model, inputs, radius=1.0)
    assert proved.jacobian == pytest.approx(float(torch.linalg.matrix_norm(inputs, 2)), rel=1e-2)
    assert proved.jacobian_lipschitz == 0.0
    assert found_violations(model, inputs, 0.0, 0, shrink=0.9) != []
    assert found_violations(model, inputs, 0.0, 0) == []


@pytest.mark.parametrize("layer", [tnn.EntryNormLinear, tnn.WeightNormLinear])
def test_the_curvature_of_a_normalised_layer_is_reached(layer):
    """One weight at w = sqrt(eps) / 2, where |P''| is largest: Lip(DF) is |x| C3 / eps."""
    model = nn.Sequential(layer(1, 1, bias=False, eps=0.25).double())
    model[0].weight.data.fill_(0.25)
    inputs = torch.tensor([[2.0]], dtype=F64)
    proved = network_regularity(model, inputs, radius=0.0)
    truth = Truth(model, inputs)
    found = float(truth.second(truth.theta, torch.ones(1, dtype=F64)).abs())
    assert proved.jacobian_lipschitz == pytest.approx(2 * 48 / (25 * math.sqrt(5)) / 0.25, rel=1e-6)
    assert found <= proved.jacobian_lipschitz <= found * (1 + 1e-6)
    assert {"jacobian_lipschitz", "Q 0"} <= set(found_violations(model, inputs, 0.0, 0, shrink=0.9))


def test_the_mixed_derivative_of_two_linear_layers_is_reached():
    """F = u (w x): D2F[(w', u'), .] = 2 u' w' x, so Lip(DF) = |x| exactly."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    model[0].weight.data.zero_()
    model[1].weight.data.zero_()
    inputs = torch.tensor([[3.0, 4.0]], dtype=F64)
    proved = network_regularity(model, inputs, radius=0.0)
    assert proved.jacobian == pytest.approx(0.0, abs=1e-9)
    found = Truth(model, inputs)
    best = found.largest(found.second, 0.0, torch.Generator().manual_seed(0), 30)
    assert best <= proved.jacobian_lipschitz * ROUNDING
    assert proved.jacobian_lipschitz <= 5.0 * (1 + 5e-2)
    assert best >= 4.9


@pytest.mark.parametrize("phi", [modules.Tanh, modules.GELU1, nn.SiLU, modules.Arctan, modules.SmoothReLU])
def test_an_activation_at_a_point_is_as_curved_as_stated(phi):
    """phi(w x) with x = 1: F'' = phi''(w), which the bound meets at radius 0 and grows by the jerk on a ball."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), phi()).double()
    inputs = torch.ones(1, 1, dtype=F64)
    truth = Truth(model, inputs)
    for weight in (-1.3, 0.2, 0.9):
        model[0].weight.data.fill_(weight)
        proved = network_regularity(model, inputs, radius=0.0)
        found = float(truth.second(torch.tensor([weight], dtype=F64), torch.ones(1, dtype=F64)).abs())
        assert found * (1 - 1e-12) <= proved.jacobian_lipschitz <= found * (1 + 1e-6) + 1e-9


def test_bounds_grow_with_the_radius_and_meet_the_centre():
    model, inputs = network(3)
    proved = [network_regularity(model, inputs, radius=r) for r in (0.0, 1e-9, 1e-3, 0.1, 1.0, math.inf)]
    for small, large in itertools.pairwise(proved):
        assert small.jacobian <= large.jacobian * ROUNDING
        assert small.jacobian_lipschitz <= large.jacobian_lipschitz * ROUNDING
        assert small.value <= large.value * ROUNDING
    assert proved[1].jacobian_lipschitz <= proved[0].jacobian_lipschitz * (1 + 1e-6)
    assert proved[0].value == pytest.approx(float(model(inputs).detach().norm()), rel=1e-6)


def test_a_centre_jacobian_given_is_used_with_its_growth():
    model, inputs = network(3)
    truth = Truth(model, inputs)
    exact = float(torch.linalg.matrix_norm(truth.jacobian(truth.theta), 2)) * ROUNDING
    for radius in (0.0, 1e-3):
        proved = network_regularity(model, inputs, radius=radius, centre_jacobian=exact)
        assert proved.jacobian <= exact + 1.001 * radius * proved.jacobian_lipschitz + 1e-12
        assert truth.largest(truth.first, radius, torch.Generator().manual_seed(1), 5) <= proved.jacobian * ROUNDING


def test_a_centre_jacobian_bounds_the_centre_where_nothing_bounds_its_growth():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double(), torch.randn(5, 3, dtype=F64)
    loose = network_regularity(model, inputs, radius=0.0)
    exact = 0.5 * loose.jacobian
    assert math.isinf(loose.jacobian_lipschitz)
    assert exact <= network_regularity(model, inputs, radius=0.0, centre_jacobian=exact).jacobian <= exact * (1 + 1e-9)
    assert network_regularity(model, inputs, radius=1e-3, centre_jacobian=exact).jacobian > exact


def test_everywhere_a_plain_layer_has_no_bound_and_a_normalised_one_has():
    inputs = torch.randn(3, 4, dtype=F64)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    normalised = nn.Sequential(tnn.EntryNormLinear(4, 4, False), tnn.Tanh(), tnn.WeightNormLinear(4, 2, False)).double()
    assert math.isinf(network_regularity(plain, inputs, radius=math.inf).jacobian_lipschitz)
    bounded = network_regularity(normalised, inputs, radius=math.inf)
    assert math.isfinite(bounded.jacobian) and math.isfinite(bounded.jacobian_lipschitz)
    assert bounded.value <= math.sqrt(2) * 2 * math.sqrt(3) + 1e-6  # ||P|| < sqrt 2, |tanh| < 1 on 4 x 3 entries


def test_a_step_that_jumps_in_slope_has_an_infinite_lipschitz_constant():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    proved = network_regularity(model, torch.randn(2, 2, dtype=F64), radius=0.1)
    assert math.isinf(proved.jacobian_lipschitz) and math.isfinite(proved.jacobian)
    [relu] = [layer for layer in proved.layers if layer.kind == "ReLU"]
    assert (relu.path, relu.regularity.a, relu.regularity.J) == ("1", math.inf, pytest.approx(1.0))


def test_the_rows_name_each_step_its_domain_and_its_source():
    model = nn.Sequential(tnn.EntryNormLinear(3, 3), modules.ContractiveResidual(nn.Sequential(tnn.Tanh()))).double()
    proved = network_regularity(model, torch.randn(2, 3, dtype=F64), radius=0.5)
    assert [(layer.path, layer.kind) for layer in proved.layers] == [
        ("0", "EntryNormLinear"), ("1.branch.0", "Tanh"), ("1", "sum"),
    ]  # fmt: skip
    assert all("within 0.5 of now" in layer.domain and layer.source and layer.derivation for layer in proved.layers)
    assert proved.paths == ("0.weight", "0.bias")
    assert proved.Q.shape == (2, 2) and proved.c.shape == (2,)


def test_float32_weights_are_read_as_the_numbers_that_they_are():
    model, inputs = network(11)
    single = network_regularity(model.float(), inputs.float(), radius=0.01)
    double = network_regularity(model.double(), inputs.float().double(), radius=0.01)
    assert single.jacobian == pytest.approx(double.jacobian, rel=1e-12)
    assert all(p.dtype == torch.float64 for p in model.parameters())


def test_reading_a_model_changes_nothing_of_it():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network_regularity(model, torch.randn(3, 1, 4, 4), radius=0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_residual_structure_of_theorem_4_7_is_read_off():
    model = nn.Sequential(
        nn.Flatten(), tnn.EntryNormLinear(16, 16, bias=False, leak=0.1), nn.Unflatten(1, (1, 4, 4)),
        modules.ContractiveResidual(nn.Sequential(modules.Tanh(), tnn.WeightNormConv2d(1, 1, 3, padding=1)), strength=0.6),
        modules.ContractiveResidual(tnn.WeightNormConv2d(1, 2, 2, stride=2), tnn.OrthogonalDownsample2d(1, 2), strength=0.5),
        nn.Flatten(), nn.Linear(8, 2),
    ).double()  # fmt: skip
    found = residual_structure(model, torch.randn(3, 1, 4, 4, dtype=F64))
    assert [layer.path for layer in found] == ["2", "3", "4", "5", "6"]
    assert [layer.skip for layer in found] == ["identity", "identity", "OrthogonalDownsample2d", "identity", "none"]
    assert [layer.sigma for layer in found] == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert found[0].rho == 0.0 and found[4].rho == math.inf
    assert 0.55 < found[1].rho <= 0.6 and 0.45 < found[2].rho <= 0.5
    first = first_layer(model)
    assert (first.path, first.kind, first.leak, first.bias, first.weight is model[1].weight) == ("1", "entry", 0.1, False, True)


def test_a_projection_that_is_trained_is_no_skip():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.skip, self.branch = nn.Linear(3, 3), nn.Sequential(tnn.WeightNormLinear(3, 3))

        def forward(self, x):
            return self.skip(x) + self.branch(x)

    model = nn.Sequential(tnn.EntryNormLinear(3, 3), Projected()).double()
    [block] = residual_structure(model, torch.randn(2, 3, dtype=F64))
    assert (block.path, block.sigma, block.rho) == ("1", 0.0, math.inf)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Softmax(1)), "1: nothing bounds torch.nn.modules.activation.Softmax"),
        (nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), "1: Dropout draws at random in training"),
        (nn.Sequential(nn.Linear(3, 3), nn.Softplus(threshold=2.0)), "1: Softplus(beta=1.0, threshold=2.0) jumps"),
    ],
)
def test_a_step_without_a_rule_is_named(model, words):
    with pytest.raises(UnboundedError) as caught:
        network_regularity(model.double().train(), torch.randn(2, 3, dtype=F64), radius=0.1)
    assert str(caught.value).startswith(words)


def test_a_forward_that_multiplies_two_steps_is_refused():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)

        def forward(self, x):
            return self.a(x) * torch.tanh(x)

    with pytest.raises(UnboundedError, match="the model: the forward of Product has mul with something that is no number"):
        network_regularity(Product(), torch.randn(2, 2), radius=0.1)


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        (torch.zeros(0, 3), ValueError), (torch.full((2, 3), math.nan), ValueError), (torch.ones(2, 3).long(), TypeError),
        (torch.zeros(3), ValueError), (torch.empty(2, 3, device="meta"), ValueError),
    ],
)  # fmt: skip
def test_inputs_that_are_no_batch_are_refused(inputs, error):
    with pytest.raises(error, match="network_regularity: the inputs"):
        network_regularity(nn.Linear(3, 1), inputs, radius=0.1)


def test_weights_that_are_not_finite_and_radii_that_are_none_are_refused():
    model, inputs = nn.Sequential(nn.Linear(3, 1)), torch.randn(2, 3)
    for radius in (-1.0, math.nan):
        with pytest.raises(ValueError, match="the radius must be"):
            network_regularity(model, inputs, radius=radius)
    model[0].weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"0\.weight: the parameter has no values yet, or they are NaN or infinite"):
        network_regularity(model, inputs, radius=0.1)


def test_many_norms_at_once_are_bounds_and_tight():
    torch.manual_seed(0)
    for shape in ((50, 7, 7), (20, 3, 40), (9, 40, 3), (5, 1, 6)):
        scale = 10.0 ** torch.randint(-150, 150, (shape[0], 1, 1)).double()
        matrices = torch.randn(shape, dtype=F64) * scale
        exact = torch.linalg.matrix_norm(matrices, 2).numpy()
        bound = norms_at_most(matrices)
        assert np.all(bound >= exact * (1 - 1e-15)) and np.all(bound <= exact * (1 + 6e-3))
    assert norms_at_most(torch.zeros(2, 3, 3, dtype=F64)).tolist() == [0.0, 0.0]


MOST_JERKED = {  # where the third derivative is largest; by symmetry or a search
    "softplus": 1.31695789692, "softplus0": 1.31695789692, "tanh": 0.0, "sigmoid": 0.0, "gelu": 0.792286991393,
    "gelu_tanh": 0.787576186419, "gelu1": 0.792286991393, "silu": 1.03195824178, "silu1": 1.03195824178,
    "mish": 0.715505886707, "erf1": 0.0, "arctan": 0.0, "isru": 0.0, "smooth_relu": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", JERKS)
def test_the_third_derivatives_of_activations_are_bounded_and_reached(name):
    phi, stated = TRUTH[name][0], JERKS[name]
    truth = abs(mp.diff(phi, mp.mpf(MOST_JERKED[name]), 3))
    assert truth <= stated <= truth * (1 + mp.mpf("1e-8"))
    assert max(abs(mp.diff(phi, mp.mpf(i) / 4 + mp.mpf("0.001"), 3)) for i in range(-24, 25)) <= stated


@pytest.mark.parametrize("constants", [EntryNormConstants(0.5, 1.5, 0.2), WeightNormConstants(0.5, 1.5)])
def test_slopes_and_curvatures_on_a_ball_are_reached_at_the_centre_and_not_exceeded_in_it(constants):
    """One row of one entry: P is a function of a number, so autograd tells P' and P'' anywhere on the ball."""

    def derivatives(w):
        s = constants.eps + w**2
        leak = getattr(constants, "leak", 0.0)
        return constants.gain * constants.eps * s**-1.5 + leak, 3 * constants.gain * constants.eps * np.abs(w) * s**-2.5

    for w in (-1.4, -0.3, 0.0, 0.2, 0.6, 3.0):
        for radius in (0.0, 0.1, 1.0):
            here = np.array([[w]])
            slope, curvature = (f(constants, here, radius, here) for f in (slopes_on_ball, curvatures_on_ball))
            truth = derivatives(np.linspace(w - radius, w + radius, 401))
            assert truth[0].max() <= float(slope.max())
            assert truth[1].max() <= float(curvature.max())
            if isinstance(constants, EntryNormConstants):  # a row of one entry has no tangent
                assert float(slope.max()) <= truth[0].max() * (1 + 1e-3)
                assert float(curvature.max()) <= truth[1].max() * (1 + 1e-3) + 1e-9
            nearest = steepest_entries(constants, np.array([[w, w + 0.1, 5.0]]))
            every = np.array([[w, w + 0.1, 5.0]])
            for f in (slopes_on_ball, curvatures_on_ball):
                assert f(constants, nearest, radius, nearest).max() == f(constants, every, radius, every).max()


def test_perron_is_never_below_the_largest_eigenvalue_and_hardly_above():
    generator = np.random.default_rng(0)
    for n in (1, 2, 5, 30):
        half = generator.exponential(size=(n, n)) * (generator.random((n, n)) < 0.6)
        Q = half + half.T
        exact = float(np.linalg.eigvalsh(Q)[-1])
        assert exact * (1 - 1e-14) <= perron_at_most(Q) <= exact * (1 + 1e-2) + 1e-300
    assert perron_at_most(np.array([[0.0, math.inf], [math.inf, 0.0]])) == math.inf
    with pytest.raises(ValueError, match="at least 0"):
        perron_at_most(np.array([[-1.0]]))


def test_the_chain_of_constants_is_the_recursion_of_the_theory():
    """Two layers by hand: c = (J2 D1, D2), Q = [[J2 c1 + a2 D1^2, b2 D1], [b2 D1, c2]]."""
    layers = [Regularity(value=1.0, J=9.0, D=2.0, c=3.0), Regularity(value=4.0, J=5.0, D=7.0, a=11.0, b=13.0, c=17.0)]
    found = chain(layers)
    np.testing.assert_allclose(found.c, [10.0, 7.0], rtol=1e-8)
    np.testing.assert_allclose(found.Q, [[5 * 3 + 11 * 4, 26], [26, 17]], rtol=1e-8)
    assert found.jacobian == pytest.approx(math.hypot(10, 7), rel=1e-8)
    assert found.jacobian_lipschitz == pytest.approx(float(np.linalg.eigvalsh([[59.0, 26], [26, 17]])[-1]), rel=1e-6)


def test_a_regularity_refuses_what_is_no_bound():
    with pytest.raises(ValueError, match="J must be a number of at least 0"):
        Regularity(value=1.0, J=math.nan)


SMOOTH = {  # module: phi in mpmath
    nn.Tanh(): TRUTH["tanh"][0],
    nn.Sigmoid(): TRUTH["sigmoid"][0],
    nn.SiLU(): TRUTH["silu"][0],
    nn.Mish(): TRUTH["mish"][0],
    nn.Softsign(): lambda z: z / (1 + abs(z)),
    nn.GELU(): TRUTH["gelu"][0],
    nn.GELU("tanh"): TRUTH["gelu_tanh"][0],
    nn.ELU(): lambda z: mp.expm1(z) if z < 0 else z,
    **{nn.Softplus(b, 99): lambda z, b=b: mp.log1p(mp.exp(b * z)) / b for b in (1e-3, 1.0, 7.0, 1e6)},
    modules.Softplus0(): TRUTH["softplus0"][0],
    modules.SmoothReLU(): TRUTH["smooth_relu"][0],
    modules.GELU1(): TRUTH["gelu1"][0],
    modules.SiLU1(): TRUTH["silu1"][0],
    modules.Erf1(): TRUTH["erf1"][0],
    modules.Arctan(): TRUTH["arctan"][0],
    modules.ISRU(): TRUTH["isru"][0],
}


def smooth_step(module):
    class Graph:
        add = staticmethod(lambda step, *sources: step)

    return RULES[type(module)](Graph, module, "phi", 0)


def errors_of_derivatives(step, phi):
    """The largest of phi' and phi'' by autograd, at steep and at flat places."""
    scale, errors = max(1.0, 4 * step.phi.curvature), [0.0, 0.0]
    sizes = [(k + 0.37) / 4 for k in range(60)] + [0.1, 1e-3, 1e-6]
    z = torch.tensor([s * size for size in sizes for s in (1.0, -1.0)], dtype=F64) / scale
    with mp.workdps(60):
        for order, found in enumerate(step._derivatives(z)):
            for at, number in zip(z.tolist(), found.tolist()):
                exact = mp.diff(phi, mp.mpf(at), order + 1, h=mp.mpf(10) ** -18 / scale)
                errors[order] = max(errors[order], float(abs(exact - mp.mpf(number))))
    return errors


@pytest.mark.parametrize("module", SMOOTH, ids=str)
def test_the_slack_is_far_above_the_rounding_of_autograds_derivatives(module):
    step = smooth_step(module)
    for error, slack in zip(errors_of_derivatives(step, SMOOTH[module]), step.phi.slack):
        assert error <= slack / 256


def test_a_slack_that_did_not_grow_with_the_curvature_would_be_exceeded():
    steep = nn.Softplus(1e6, 99)
    assert errors_of_derivatives(smooth_step(steep), lambda z: mp.log1p(mp.exp(1e6 * z)) / 1e6)[1] > SLACK


@pytest.mark.parametrize("offset, size, n", [(0.0, 1.0, 3), (1e8, 1.0, 1000), (1e8, 1e-7, 5000), (-3.0, 1e3, 1), (1e-170, 1e-170, 9)])
def test_the_deviation_of_a_group_lies_within_its_slack(offset, size, n):
    groups = offset + size * torch.randn(2, 3, n, dtype=F64, generator=torch.Generator().manual_seed(n))
    spread, slack = deviations(groups)
    assert spread.shape == slack.shape == (2, 3)
    naive = (groups.square().mean(2) - groups.mean(2).square()).clamp(min=0).sqrt()
    with mp.workdps(60):
        for group, s, room in zip(groups.flatten(0, 1).tolist(), spread.flatten().tolist(), slack.flatten().tolist()):
            numbers = [mp.mpf(x) for x in group]
            mean = mp.fsum(numbers) / n
            exact = mp.sqrt(mp.fsum((x - mean) ** 2 for x in numbers) / n)
            assert abs(exact - s) <= room / 2
            assert room <= max(1e-11 * max(map(abs, group)), 1e-100)
    if size == 1.0 < offset:  # the way that cancels is further off than that
        assert bool(((naive - spread).abs() > slack).any())
