"""Stateless layers: activations on every float, the orthogonal skip, and what bad input is told."""

import math

import mpmath as mp
import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import nn

import trainable_nn as tnn
from trainable_nn import functional

F64 = torch.float64
ROOT_PI = mp.sqrt(mp.pi)
TRUTH = {  # module: (function, phi in mpmath)
    tnn.Softplus0: (functional.softplus0, lambda z: mp.log1p(mp.exp(z)) - mp.log(2)),
    tnn.SmoothReLU: (functional.smooth_relu, lambda z: (z + mp.sqrt(1 + z * z) - 1) / 2),
    tnn.Tanh: (functional.tanh, mp.tanh),
    tnn.GELU1: (functional.gelu1, lambda z: z * mp.ncdf(z) / (mp.ncdf(mp.sqrt(2)) + mp.exp(-1) / ROOT_PI)),
    tnn.SiLU1: (functional.silu1, lambda z: z / (1 + mp.exp(-z)) / mp.mpf("1.09983932012886691695818492432")),
    tnn.Erf1: (functional.erf1, lambda z: ROOT_PI / 2 * mp.erf(z)),
    tnn.Arctan: (functional.arctan, mp.atan),
    tnn.SoftSign: (functional.softsign, lambda z: z / (1 + abs(z))),
    tnn.ISRU: (functional.isru, lambda z: z / mp.sqrt(1 + z * z)),
}
activations = pytest.mark.parametrize("module", TRUTH, ids=lambda cls: cls.__name__)
FLOATS = (F64, torch.float32, torch.bfloat16, torch.float16)


@activations
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_activation_is_its_formula_for_small_and_large_numbers(module, dtype):
    function, phi = TRUTH[module]
    values = [0.0, 1e-4, 0.3, 1.0, 3.0, 5.5, 11.0, 21.0, 39.0, 41.0, 300.0, 6e4]
    z = torch.tensor([s * v for v in values for s in (1, -1)], dtype=F64).to(dtype)
    with mp.workdps(60):
        exact = [float(phi(mp.mpf(float(v)))) for v in z]
    for y in (function(z), module()(z)):
        error = (y.double() - torch.tensor(exact, dtype=F64)).abs()
        allowed = 8 * torch.finfo(dtype).eps * torch.tensor(exact, dtype=F64).abs().clamp(min=1.0)
        assert y.dtype == dtype and bool((error <= allowed).all()), error / allowed
    assert float(function(torch.zeros((), dtype=dtype))) == module.value_at_zero


@activations
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_slopes_and_curvatures_stay_in_bounds_up_to_the_largest_float(module, dtype):
    largest = torch.finfo(dtype).max
    size = torch.logspace(-8, math.log10(largest) - 1e-3, 300, dtype=F64)
    z = torch.cat([-size, torch.zeros(1, dtype=F64), torch.linspace(-9, 9, 999, dtype=F64), size]).to(dtype)
    z = torch.cat([z, torch.tensor([largest, -largest], dtype=dtype)]).requires_grad_()
    y = module()(z)
    slope = torch.autograd.grad(y.sum(), z, create_graph=True)[0]
    curvature = torch.autograd.grad(slope.sum(), z)[0]
    rounding = 1 + 8 * torch.finfo(dtype).eps
    assert torch.isfinite(y).all()
    assert bool((slope.abs() <= module.slope_bound * rounding).all())  # false for NaN
    assert bool((curvature.abs() <= module.curvature_bound * rounding + 4 * torch.finfo(dtype).eps).all())


def test_torch_s_gelu_at_its_own_slope_would_break_the_bound():
    z = torch.tensor(math.sqrt(2.0), dtype=F64, requires_grad=True)
    assert torch.autograd.grad(F.gelu(z), z)[0] > 1.128 > tnn.GELU1.slope_bound


def test_nan_stays_nan_and_infinity_has_its_limit():
    z = torch.tensor([math.nan, math.inf, -math.inf])
    for module in TRUTH:
        y = module()(z)
        assert torch.isnan(y[0])
    assert functional.smooth_relu(z)[1:].tolist() == [math.inf, -0.5]
    assert functional.gelu1(z)[1:].tolist() == pytest.approx([math.inf, 0.0])


SKIPS = [
    (4, 8, 2),
    (3, 7, 2),
    (5, 20, 3),
    (2, 9, 3),
    (6, 4, 2),
    (5, 2, 2),
    (1, 7, 2),
    (3, 8, 1),
    (4, 4, 4),
    (3, 3, 5),
    (2, 21, 3),
]


@pytest.mark.parametrize("c, wide, s", SKIPS)
def test_all_singular_values_of_the_skip_are_one(c, wide, s):
    skip = tnn.OrthogonalDownsample2d(c, wide, s, dtype=F64)
    matrix = oracles.matrix_of(skip, (c, 2 * s, s))
    singular = torch.linalg.svdvals(matrix)
    assert singular.numel() == min(matrix.shape) and bool(((singular - 1).abs() <= 4e-15).all())


def pooled_channels(c: int, wide: int, s: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels that the paper fills, by our skip and by the paper's pooling with zeros around."""
    x = torch.randn(2, c, 3 * s, 2 * s, generator=torch.Generator().manual_seed(0), dtype=F64).to(dtype)
    before, after = math.ceil((wide - c) / 2), math.floor((wide - c) / 2)
    paper = F.pad(s * F.avg_pool2d(x, s), (0, 0, 0, 0, before, after))  # negative: cuts channels off
    own = slice(max(before, 0), max(before, 0) + min(c, wide))
    return tnn.OrthogonalDownsample2d(c, wide, s, dtype=dtype)(x)[:, own], paper[:, own]


@pytest.mark.parametrize("c, wide, s", SKIPS)
def test_the_skip_holds_the_papers_pooling_at_the_papers_channels(c, wide, s):
    torch.testing.assert_close(*pooled_channels(c, wide, s, F64), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("c, wide, s", [skip for skip in SKIPS if skip[2] in (1, 2, 4)])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_for_a_power_of_two_the_pooling_is_the_same_bit_for_bit(c, wide, s, dtype):
    assert torch.equal(*pooled_channels(c, wide, s, dtype))


def test_the_papers_pooling_itself_has_singular_values_zero():
    pooled = oracles.matrix_of(lambda x: F.pad(2 * F.avg_pool2d(x, 2), (0, 0, 0, 0, 2, 2)), (4, 4, 4))
    assert int((torch.linalg.svdvals(pooled) < 1e-12).sum()) == 16  # 16 of 32 outputs


@seed(0)
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 4))
def test_rows_or_columns_of_every_skip_are_orthonormal(c, wide, s):
    kernel = functional.downsample_kernel(c, wide, s).flatten(1)
    gram = kernel @ kernel.T if wide <= s * s * c else kernel.T @ kernel
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=F64), rtol=0, atol=1e-14)


def test_a_skip_that_was_halved_and_widened_again_is_exact_again():
    skip = tnn.OrthogonalDownsample2d(2, 5, 3, dtype=F64)
    kernel = skip.kernel.clone()
    assert torch.equal(skip.half().double().kernel, kernel)
    assert skip.state_dict() == {} and list(skip.parameters()) == []


def test_the_skip_is_filled_whatever_the_default_device_is():
    with torch.device("meta"):
        skip = tnn.OrthogonalDownsample2d(2, 5, 3).to_empty(device="cpu")
    assert torch.equal(skip.kernel, tnn.OrthogonalDownsample2d(2, 5, 3).kernel)


def test_an_image_that_the_stride_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"must be multiples of the stride 2, got \(5, 4\)"):
        tnn.OrthogonalDownsample2d(2, 2)(torch.zeros(1, 2, 5, 4))
    with pytest.raises(ValueError, match="channels and stride must be at least 1"):
        tnn.OrthogonalDownsample2d(0, 2)
    assert tnn.OrthogonalDownsample2d(2, 2)(torch.zeros(2, 4, 6)).shape == (2, 2, 3)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid", 1])
@pytest.mark.parametrize("mode", oracles.MODES)
def test_functional_convolutions_pad_as_torch_s_layers_do(axes, padding, mode):
    layer = oracles.CONVOLUTIONS[axes](2, 4, 2, padding=padding, dilation=3, padding_mode=mode, groups=2, dtype=F64)
    x = torch.randn(2, 2, *(7,) * axes, dtype=F64)
    w = layer.weight.detach().clone()
    geometry = {"padding": padding, "dilation": 3, "groups": 2, "padding_mode": mode}
    for function, normalise in (
        (functional.entry_norm_conv, functional.entry_norm),
        (functional.weight_norm_conv, functional.weight_norm),
    ):
        layer.weight.data.copy_(normalise(w, 0.5, gain=2.0))
        torch.testing.assert_close(function(x, w, layer.bias, eps=0.5, gain=2.0, **geometry), layer(x))


def test_a_weight_of_no_convolution_and_an_unknown_mode_are_refused():
    with pytest.raises(ValueError, match=r"weight has shape \(2, 2\), and 1, 2 or 3 axes"):
        functional.entry_norm_conv(torch.zeros(1, 2, 3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="padding_mode must be one of zeros, reflect, replicate, circular"):
        functional.weight_norm_conv(torch.zeros(1, 2, 3), torch.zeros(2, 2, 1), padding_mode="mirror")
    with pytest.raises(TypeError, match="only float16"):
        functional.entry_norm_linear(torch.zeros(1, 2), torch.zeros(2, 2, dtype=torch.int32))


@seed(1)
@settings(max_examples=80, deadline=None)
@given(st.floats(-0.999, 0.999), st.floats(1e-3, 1e3), st.floats(1e-6, 1e6), st.sampled_from([0.0, 1e-6, 0.1, 10.0]))
def test_the_inverse_of_entry_norm_is_its_inverse(fraction, gain, eps, leak):
    p = torch.tensor([fraction * gain, 0.0], dtype=F64)
    w = functional.entry_norm_inverse(p, eps, gain=gain, leak=leak)
    torch.testing.assert_close(functional.entry_norm(w, eps, gain=gain, leak=leak), p, rtol=1e-13, atol=1e-300)


@seed(2)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=6), st.floats(0.0, 0.999), st.floats(1e-3, 1e3))
def test_the_inverse_of_weight_norm_is_its_inverse(row, length, gain):
    row = torch.tensor([row], dtype=F64)
    p = gain * length * row / row.norm().clamp(min=1e-3)
    w = functional.weight_norm_inverse(p, 0.3, gain=gain)
    torch.testing.assert_close(functional.weight_norm(w, 0.3, gain=gain), p, rtol=1e-12, atol=1e-300)


def test_a_linear_layer_by_function_is_torch_s_on_the_normalised_weight():
    plain = nn.Linear(3, 2, dtype=F64)
    x = torch.randn(4, 3, dtype=F64)
    ours = functional.weight_norm_linear(x, plain.weight, plain.bias, eps=0.2, gain=3.0)
    rows = 3.0 * plain.weight / torch.sqrt(0.2 + plain.weight.square().sum(1, keepdim=True))
    torch.testing.assert_close(ours, x @ rows.T + plain.bias)
    entries = 3.0 * plain.weight / torch.sqrt(0.2 + plain.weight.square()) + 0.1 * plain.weight
    torch.testing.assert_close(
        functional.entry_norm_linear(x, plain.weight, eps=0.2, gain=3.0, leak=0.1), x @ entries.T
    )
