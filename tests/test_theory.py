"""Constants against 40 digits, against autograd, and against dense matrices of torch's own convolutions."""

import math
import random

import mpmath as mp
import numpy as np
import oracles
import pytest
import torch

from trainable_nn import functional
from trainable_nn.theory import NONLINEARITIES, EntryNormConstants, WeightNormConstants, convolution, rounding
from trainable_nn.theory.nonlinearities import C3, GELU_TO_SLOPE_1, SILU_TO_SLOPE_1

mp.mp.dps = 40
F64 = torch.float64
HALF, ROOT2, ROOT3 = mp.mpf(1) / 2, mp.sqrt(2), mp.sqrt(3)


def sigmoid(z):
    return 1 / (1 + mp.exp(-z))


def gelu_tanh(z):
    return z / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (z + mp.mpf("0.044715") * z**3)))


FAR = mp.mpf(10) ** 12  # where the slope is a limit

# name: (phi, a point of steepest slope, a point of greatest curvature)
TRUTH = {
    "softplus": (lambda z: mp.log1p(mp.exp(z)), 99, 0),
    "softplus0": (lambda z: mp.log1p(mp.exp(z)) - mp.log(2), 99, 0),
    "tanh": (mp.tanh, 0, mp.atanh(1 / ROOT3)),
    "sigmoid": (sigmoid, 0, mp.log(2 + ROOT3)),
    "gelu": (lambda z: z * mp.ncdf(z), ROOT2, 0),
    "gelu_tanh": (gelu_tanh, mp.mpf("1.4185040087908283555480335"), 0),
    "gelu1": (lambda z: mp.mpf(GELU_TO_SLOPE_1) * z * mp.ncdf(z), ROOT2, 0),
    "silu": (lambda z: z * sigmoid(z), mp.findroot(lambda z: z * mp.tanh(z / 2) - 2, 2.4), 0),
    "silu1": (
        lambda z: mp.mpf(SILU_TO_SLOPE_1) * z * sigmoid(z),
        mp.findroot(lambda z: z * mp.tanh(z / 2) - 2, 2.4),
        0,
    ),
    "mish": (
        lambda z: z * mp.tanh(mp.log1p(mp.exp(z))),
        mp.mpf("1.4905711794854284592944189"),
        mp.mpf("-0.0879344313149142113266859"),
    ),
    "erf1": (lambda z: mp.sqrt(mp.pi) / 2 * mp.erf(z), 0, 1 / ROOT2),
    "arctan": (mp.atan, 0, 1 / ROOT3),
    "isru": (lambda z: z / mp.sqrt(1 + z * z), 0, HALF),
    "smooth_relu": (lambda z: (z + mp.sqrt(1 + z * z) - 1) / 2, FAR, 0),
}
GRID = [mp.mpf(i) / 8 + mp.mpf("0.0001") for i in range(-48, 49)]


@pytest.mark.parametrize("name", TRUTH)
def test_the_constants_of_an_activation_are_never_below_and_hardly_above_the_truth(name):
    phi, steepest, most_curved = TRUTH[name]
    stated = NONLINEARITIES[name]
    for order, point, bound in ((1, steepest, stated.slope), (2, most_curved, stated.curvature)):
        truth = abs(mp.diff(phi, point, order))
        assert truth * (1 - mp.mpf(10) ** -18) <= bound <= truth * (1 + mp.mpf("1e-15"))
        assert max(abs(mp.diff(phi, z, order)) for z in GRID) <= bound * (1 + mp.mpf(10) ** -18)
    assert phi(mp.mpf(0)) - mp.mpf(10) ** -30 <= stated.at_zero <= phi(mp.mpf(0)) + mp.mpf(10) ** -16


@pytest.mark.parametrize("name", ["relu", "elu", "selu", "softsign"])
def test_piecewise_activations_of_torch_stay_within_their_constants(name):
    z = torch.linspace(-6, 6, 4000, dtype=F64).requires_grad_()  # an even count: no point at the kink
    slope = torch.autograd.grad(getattr(torch.nn.functional, name)(z).sum(), z)[0]
    stated = NONLINEARITIES[name]
    assert 0.95 * stated.slope <= float(slope.abs().max()) <= stated.slope
    quotient = (slope.diff() / z.detach().diff()).abs().max()
    assert float(quotient) <= stated.curvature * (1 + 1e-9)


def test_a_constant_one_unit_too_low_is_noticed():
    truth = abs(mp.diff(TRUTH["gelu"][0], ROOT2))
    assert math.nextafter(NONLINEARITIES["gelu"].slope, 0.0) < truth


ENTRY = [EntryNormConstants(0.3, 1.7), EntryNormConstants(2.0, 0.5, 0.25), EntryNormConstants(1e-6)]
ROW = [WeightNormConstants(0.3, 1.7), WeightNormConstants(2.0, 0.5), WeightNormConstants(1e-6)]


def entry_derivative(constants, w):
    w = w.detach().requires_grad_()
    value = functional.entry_norm(w, constants.eps, gain=constants.gain, leak=constants.leak)
    return torch.autograd.grad(value.sum(), w)[0]


def row_derivative(constants, row):
    f = lambda w: functional.weight_norm(w[None], constants.eps, gain=constants.gain)[0]
    return torch.autograd.functional.jacobian(f, row)


@pytest.mark.parametrize("constants", ENTRY)
def test_entry_norm_reaches_its_constants_and_never_passes_them(constants):
    root = math.sqrt(constants.eps)
    w = torch.linspace(-4 * root, 4 * root, 40001, dtype=F64)
    slopes = entry_derivative(constants, w)
    assert (1 - 1e-9) * constants.slope_supremum <= slopes.max() <= constants.slope_supremum * (1 + 1e-14)
    quotients = (slopes.diff() / w.diff()).abs()
    assert (1 - 1e-6) * constants.slope_lipschitz <= quotients.max() <= constants.slope_lipschitz * (1 + 1e-9)
    least = constants.slope_at_least(w[:900].numpy())
    assert (1 - 1e-12) * slopes[0] <= least <= slopes[:900].min()


@pytest.mark.parametrize("constants", ROW)
def test_weight_norm_reaches_its_constants_and_never_passes_them(constants):
    root = math.sqrt(constants.eps)
    direction = torch.nn.functional.normalize(torch.tensor([1.0, -2.0, 3.0], dtype=F64), dim=0)
    assert oracles.norm_of(row_derivative(constants, 0 * direction)) == pytest.approx(constants.slope_supremum)
    for length in (0.1, 0.5, 1.0, 7.0):
        derivative = row_derivative(constants, length * root * direction)
        assert oracles.norm_of(derivative) <= constants.slope_supremum
        smallest = float(torch.linalg.svdvals(derivative)[-1])
        least = constants.slope_at_least((length * root * direction)[None].numpy())
        assert (1 - 1e-12) * smallest <= least <= smallest * (1 + 1e-14)
    step = 1e-4 * root
    around = [row_derivative(constants, (0.5 * root + s) * direction) for s in (-step, step)]
    quotient = oracles.norm_of(around[1] - around[0]) / (2 * step)
    assert (1 - 1e-6) * constants.slope_lipschitz <= quotient <= constants.slope_lipschitz * (1 + 1e-9)


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 5), (7, 2), (0, 4), (4, 0)])
def test_equal_growing_weights_approach_the_operator_norm_suprema(rows, columns):
    w = torch.full((rows, columns), 1e8, dtype=F64)
    entry = oracles.norm_of(functional.entry_norm(w, 0.3, gain=1.7))
    row = oracles.norm_of(functional.weight_norm(w, 0.3, gain=1.7))
    assert (1 - 1e-9) * ENTRY[0].operator_norm_supremum(rows, columns) <= entry * (1 + 1e-12)
    assert (1 - 1e-9) * ROW[0].operator_norm_supremum(rows, columns) <= row * (1 + 1e-12)
    assert entry <= ENTRY[0].operator_norm_supremum(rows, columns) * (1 + 1e-14)
    assert row <= ROW[0].operator_norm_supremum(rows, columns) * (1 + 1e-14)


def test_a_leak_takes_the_supremum_away():
    assert ENTRY[1].operator_norm_supremum(2, 2) == math.inf and ENTRY[1].operator_norm_supremum(0, 2) == 0


def test_slope_at_least_is_a_bound_for_huge_weights():
    assert ENTRY[0].slope_at_least(np.array([1e308, -1e308])) == 0.0
    assert ROW[0].slope_at_least(np.full((2, 9), 1e308)) == 0.0
    assert ENTRY[1].slope_at_least(np.array([1e308])) == pytest.approx(0.25)


def test_c3_is_the_largest_second_derivative():
    assert mp.mpf(C3) >= 48 / (25 * mp.sqrt(5)) > mp.mpf(math.nextafter(C3, 0))


@pytest.mark.parametrize("axes, count", [(1, 400), (2, 300), (3, 120)])
def test_a_convolution_never_exceeds_its_kernel_times_the_geometry_factor(axes, count):
    rng = random.Random(axes)
    torch.manual_seed(axes)
    for _ in range(count):
        arguments, sizes = oracles.random_geometry(rng, axes)
        conv = oracles.CONVOLUTIONS[axes](**arguments, bias=False, dtype=F64)
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
        here, anywhere = (convolution.geometry_factor(*geometry, shape) for shape in (sizes, None))
        kernel = max(oracles.norm_of(group.flatten(1)) for group in conv.weight.chunk(conv.groups))
        true = oracles.norm_of(oracles.matrix_of(conv, (conv.in_channels, *sizes)))
        assert true <= here * kernel * (1 + 1e-12) and here <= anywhere, arguments
        copies = oracles.norm_of(oracles.matrix_of(oracles.patches_of(conv, axes), (1, *sizes)))
        assert here == pytest.approx(copies, rel=1e-12), arguments  # exact, not only above


def test_the_factor_for_every_size_is_the_largest_over_the_sizes():
    rng = random.Random(5)
    for _ in range(300):
        k, s, d = rng.randint(1, 6), rng.randint(1, 4), rng.randint(1, 3)
        before, after, mode = rng.randint(0, 5), rng.randint(0, 5), rng.choice(oracles.MODES)
        span = d * (k - 1) + 1
        lengths = [n for n in range(1, 90) if n + before + after >= span]
        counts = []
        for n in lengths:
            if convolution._padding_exists(n, before, after, mode):
                counts.append(convolution._count(n, k, s, d, before, after, mode))
                assert convolution.uses_at(n, k, s, d, before, after, mode) == counts[-1]
        assert convolution.most_uses(k, s, d, before, after, mode) == max(counts)


def test_the_crude_factor_for_large_kernels_is_above_the_exact_one(monkeypatch):
    rng = random.Random(6)
    cases = [
        (rng.randint(1, 6), rng.randint(1, 4), rng.randint(1, 3), rng.randint(0, 5), rng.randint(0, 5), mode)
        for mode in oracles.MODES
        for _ in range(40)
    ]
    exact = [convolution.most_uses(*case) for case in cases]
    monkeypatch.setattr(convolution, "ENUMERATION_LIMIT", 0)
    crude = [convolution.most_uses.__wrapped__(*case) for case in cases]
    assert all(a <= b for a, b in zip(exact, crude)) and crude != exact


def test_neither_no_factor_nor_the_one_without_dilation_would_do():
    conv = torch.nn.Conv1d(1, 1, 3, stride=2, dilation=2, bias=False, dtype=F64)
    conv.weight.data.fill_(1.0)
    true, kernel = oracles.norm_of(oracles.matrix_of(conv, (1, 60))), math.sqrt(3)
    assert true > kernel * math.sqrt(math.ceil(3 / 2)) * 1.2
    assert true <= kernel * convolution.geometry_factor((3,), (2,), (0,), (2,))


def test_a_shape_that_gives_no_output_is_named():
    with pytest.raises(ValueError, match=r"axis of length 2 with padding \(0, 0\) \(zeros\) has no output"):
        convolution.geometry_factor((3,), (1,), (0,), (1,), "zeros", (2,))
    with pytest.raises(ValueError, match="too few axes"):
        convolution.geometry_factor((3, 3), (1, 1), (0, 0), (1, 1), "zeros", (8,))


def test_rounding_up_and_down_encloses_exact_products_and_roots():
    rng = random.Random(0)
    for _ in range(300):
        a, b, n = rng.uniform(0, 9), rng.uniform(0, 9), rng.randint(0, 999)
        assert rounding.down(a * b) <= mp.mpf(a) * mp.mpf(b) <= rounding.product_up([a, b])
        assert mp.sqrt(n) <= mp.mpf(rounding.root_up(n)) <= mp.sqrt(n) * (1 + mp.mpf("1e-15"))
    assert rounding.product_up([]) == 1.0 and rounding.product_up([math.inf, 0.0]) == 0.0
