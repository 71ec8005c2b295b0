"""The proved operator norm against dense matrices through torch's own layers.

The quick suite draws 1,500 convolutions; ``OPERATOR_NORM_CASES=10000 pytest tests/test_operator_norm.py`` draws
10,000, in seven minutes. Each is bounded for its size, by its matrix and on the circle, and for every size.
"""

import math
import os
import random
import warnings
from dataclasses import replace
from fractions import Fraction

import mpmath as mp
import numpy as np
import oracles
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, svds
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

import trainable_nn as tnn
from trainable_nn.errors import UnboundedError
from trainable_nn.linop import (
    axes,
    channel_box,
    convolution_norm_at_most,
    dense_norm,
    differentiable_norm_at_most,
    matrix_norm_at_most,
    network_norms,
    operator_norm,
    operator_norm_at_most,
    operator_norms_at_most,
    symbol_gram,
)
from trainable_nn.linop.definite import raised_level
from trainable_nn.linop.operator_norm import Attained
from trainable_nn.linop.symbol import frequencies, symbol_of
from trainable_nn.linop.symbol_gram import gram_of, grid_maximum
from trainable_nn.theory.convolution import geometry_factor

F64 = torch.float64
CASES = int(os.environ.get("OPERATOR_NORM_CASES", "1500"))
BATCHES = 20
ORACLE = 1 - 1e-13  # LAPACK's largest singular value of a matrix of at most 1,000 rows errs by fewer units than this
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")


def fill(weight: torch.Tensor, rng: random.Random) -> str:
    """Random, low rank, one-hot, adversarial two-component, positive, huge or tiny entries, in place."""
    kind = rng.choice(("random", "positive", "low rank", "one-hot", "two components", "flat", "huge", "tiny", "zero"))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    w = torch.randn(weight.shape, generator=generator, dtype=F64)
    vectors = [torch.randn(n, generator=generator, dtype=F64) for n in weight.shape for _ in (0, 1)]
    if kind == "positive":
        w = w.abs()
    elif kind == "low rank":
        w = _outer(vectors[::2])
    elif kind == "two components":  # of almost equal norm
        w = _outer([v / v.norm() for v in vectors[::2]]) + (1 - 1e-3) * _outer([v / v.norm() for v in vectors[1::2]])
    elif kind == "one-hot":
        w = torch.zeros_like(w)
        w.view(-1)[rng.randrange(w.numel())] = rng.choice((1.0, -3.0))
    elif kind == "flat":
        w = torch.ones_like(w)
    elif kind == "zero":
        w = torch.zeros_like(w)
    exponent = {torch.float64: 300, torch.float32: 36, torch.bfloat16: 36, torch.float16: 3}[weight.dtype]
    scale = {"huge": 10.0**exponent, "tiny": 10.0**-exponent}.get(kind, 1.0)
    weight.data.copy_(w * scale)
    return kind


def _outer(vectors: list[torch.Tensor]) -> torch.Tensor:
    out = vectors[0]
    for v in vectors[1:]:
        out = out[..., None] * v
    return out


def matrix_norm(layer: nn.Module, channels: int, sizes: tuple[int, ...]) -> float:
    """Largest singular value of the layer's matrix in float64, with the weight scaled by a power of two."""
    wide = type(layer)(**arguments_of(layer), bias=False, dtype=F64)
    weight = layer.weight.detach().double()
    largest = float(weight.abs().max())
    exponent = math.frexp(largest)[1] if largest else 0
    wide.weight.data.copy_(torch.from_numpy(np.ldexp(weight.numpy(), -exponent)))
    return math.ldexp(oracles.norm_of(oracles.matrix_of(wide, (channels, *sizes))), exponent)


def arguments_of(layer: nn.Module) -> dict:
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"]
    transposed = isinstance(layer, tuple(TRANSPOSED.values()))
    return {n: getattr(layer, n) for n in [*names, "output_padding" if transposed else "padding_mode"]}


def random_layer(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    count = rng.choice((1, 1, 2, 2, 2, 3))
    while True:
        arguments, sizes = oracles.random_geometry(rng, count)
        if max(arguments["kernel_size"]) > 5 or max(sizes) > 9:
            continue
        if rng.random() < 0.25:  # more channels on one side than on the other
            arguments[rng.choice(("in_channels", "out_channels"))] *= 4
        dtype = rng.choice((F64, F64, torch.float32, torch.bfloat16, torch.float16))
        if rng.random() < 0.15 and not isinstance(arguments["padding"], str):
            return _transposed(arguments, dtype, sizes, rng)
        return oracles.CONVOLUTIONS[count](**arguments, bias=rng.random() < 0.2, dtype=dtype), sizes


def _transposed(arguments, dtype, sizes, rng):
    options = {k: v for k, v in arguments.items() if k != "padding_mode"}
    options["padding"] = tuple(rng.randint(0, min(p, d * (k - 1) // 2)) for p, d, k in zip(
        arguments["padding"], arguments["dilation"], arguments["kernel_size"]))  # fmt: skip
    options["output_padding"] = tuple(
        rng.randint(0, max(s, d) - 1) for s, d in zip(arguments["stride"], arguments["dilation"])
    )
    return TRANSPOSED[len(sizes)](**options, bias=False, dtype=dtype), sizes


@pytest.fixture
def circles(monkeypatch):
    """No matrix is small enough to be bounded by itself: what is tested is the bound on the circle."""
    monkeypatch.setattr(operator_norm, "MOST_DENSE", (0, 0))


@pytest.fixture
def fresh_axes():
    """What was kept of other axes is forgotten, before and after."""
    axes.circle_of.cache_clear()
    yield
    axes.circle_of.cache_clear()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_the_bound_is_never_below_the_dense_norm(batch, monkeypatch):
    rng = random.Random(batch)
    for _ in range(CASES // BATCHES):
        layer, sizes = random_layer(rng)
        kind = fill(layer.weight, rng)
        truth = matrix_norm(layer, layer.in_channels, sizes)
        bound, every = operator_norm_at_most(layer, sizes), operator_norm_at_most(layer, None)
        with monkeypatch.context() as patch:
            patch.setattr(operator_norm, "MOST_DENSE", (0, 0))
            circle = operator_norm_at_most(layer, sizes)
        assert bound >= truth * ORACLE, (kind, layer, sizes, truth)
        assert circle >= truth * ORACLE, (kind, layer, sizes, truth)
        assert every >= truth * ORACLE, (kind, layer, sizes, truth)
        assert bound <= circle * 1.0011, (kind, layer, sizes, truth)
        assert bound == 0 if kind == "zero" else bound > 0 or truth == 0


def violations(seed: int, cases: int) -> int:
    """How many bounds of zero-padded convolutions are below the dense norm, with a slack too small to hide it."""
    rng, found = random.Random(seed), 0
    for _ in range(cases):
        arguments, sizes = oracles.random_geometry(rng, rng.choice((1, 2)))
        arguments["padding_mode"] = "zeros"
        conv = oracles.CONVOLUTIONS[len(sizes)](**arguments, bias=False, dtype=F64)
        fill(conv.weight, rng)
        found += operator_norm_at_most(conv, sizes, rtol=1e-7) < matrix_norm(conv, conv.in_channels, sizes) * ORACLE
    return found


def test_a_tiny_tolerance_breaks_nothing(circles):
    assert violations(777, 200) == 0


def test_a_circle_with_one_place_less_breaks_the_law(circles, fresh_axes, monkeypatch):
    least = axes._places
    monkeypatch.setattr(axes, "_places", lambda *arguments: max(least(*arguments) - 1, 1))
    assert violations(777, 200) > 10


@pytest.mark.parametrize("batch", range(10))
def test_the_bound_is_never_above_the_kernels_norm_times_the_geometry_factor(batch):
    rng = random.Random(1000 + batch)
    for _ in range(20):
        arguments, sizes = oracles.random_geometry(rng, rng.choice((1, 2, 3)))
        conv = oracles.CONVOLUTIONS[len(sizes)](**arguments)
        fill(conv.weight, rng)
        matrices = conv.weight.detach().flatten(1).unflatten(0, (conv.groups, -1))
        norm = max(matrix_norm_at_most(m, rtol=1e-3) for m in matrices)
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
        for shape in (sizes, None):
            assert operator_norm_at_most(conv, shape) <= norm * geometry_factor(*geometry, shape) * (1 + 1e-12)


def spiked(weight: torch.Tensor) -> None:
    """A rank-one part in channels, of a random pattern in space, above the random rest."""
    rows, columns = (torch.randn(n, dtype=F64) for n in weight.shape[:2])
    pattern = torch.randn(weight.shape[2:], dtype=F64)
    spike = torch.einsum("o,i,...->oi...", rows / rows.norm(), columns / columns.norm(), pattern / pattern.norm())
    weight.data += 2 * spike.to(weight.dtype)


def small_layer(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """One of 1 to 3 axes, any padding mode, groups, dilation, stride and even kernels, with a small matrix of many columns."""
    while True:
        layer, sizes = random_layer(rng)
        outputs = math.prod(layer(torch.zeros(1, layer.in_channels, *sizes, dtype=layer.weight.dtype)).shape)
        if layer.weight.dtype == F64 and min(outputs, layer.in_channels * math.prod(sizes)) <= 200:
            return layer, sizes


def excesses(seed: int, cases: int) -> list[tuple[float, str]]:
    """Bound over numpy's largest singular value of what torch's own layer makes of the unit vectors; and the mode."""
    rng, found = random.Random(seed), []
    for _ in range(cases):
        layer, sizes = small_layer(rng)
        layer.weight.data.normal_()
        truth = np.linalg.norm(oracles.matrix_of(layer, (layer.in_channels, *sizes)).numpy(), 2)
        if truth > 0:
            found.append((operator_norm_at_most(layer, sizes) / truth, layer.padding_mode))
    return found


def test_a_small_convolution_of_any_geometry_is_bounded_tightly():
    torch.manual_seed(0)
    found = excesses(5, 300)
    assert {mode for _, mode in found} == {"zeros", "reflect", "replicate", "circular"}
    assert all(ORACLE <= ratio <= 1.0006 for ratio, _ in found)


def test_another_padding_of_the_same_small_convolution_breaks_the_law(monkeypatch):
    """The law above can fail: with every padded pixel read as zero, reflections and replicas are missed."""
    torch.manual_seed(0)
    reads = axes.reads
    monkeypatch.setattr(dense_norm, "reads", lambda axis: reads(replace(axis, mode="zeros")))
    found = excesses(5, 100)
    assert sum(ratio < ORACLE for ratio, mode in found if mode == "replicate") > 5
    assert sum(ratio < ORACLE for ratio, mode in found if mode == "reflect") > 5


def test_taps_that_meet_on_one_pixel_are_bounded_by_their_exact_sum():
    """1 + u + u for the unit roundoff u, which floats add to 1."""
    u = 2.0**-53
    conv = nn.Conv1d(1, 1, 3, padding=1, padding_mode="replicate", bias=False, dtype=F64)
    for values in ((1.0, u, u), (u, 1.0, u), (u, u, 1.0)):
        conv.weight.data.copy_(torch.tensor(values))
        assert Fraction(1) + 2 * Fraction(u) <= Fraction(operator_norm_at_most(conv, (1,))) <= Fraction(1001, 1000)


def test_a_small_matrix_is_bounded_as_closely_as_is_asked():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, 1, 1, padding_mode="reflect", bias=False, dtype=F64)
    truth = matrix_norm(conv, 4, (5, 4))
    assert truth * ORACLE <= operator_norm_at_most(conv, (5, 4), rtol=1e-7) <= truth * (1 + 1e-9)


spikes = pytest.mark.parametrize("spike", [False, True], ids=["random", "spiked"])


@spikes
@pytest.mark.parametrize(("n", "channels", "excess"), [(16, 3, 0.013), (8, 6, 0.04), (8, 12, 0.065), (4, 12, 0.15)])
def test_the_bound_of_a_padded_convolution_with_few_channels_is_tight(n, channels, excess, spike, circles):
    """The excess falls as 1 / n^2 and with the channels' number."""
    for number in range(3):
        torch.manual_seed(number)
        conv = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        if spike:
            spiked(conv.weight)
        truth = matrix_norm(conv, channels, (n, n))
        assert truth * ORACLE <= operator_norm_at_most(conv, (n, n)) <= truth * (1 + excess)


@spikes
@pytest.mark.parametrize(("n", "stride", "excess"), [(24, 1, 0.005), (16, 1, 0.005), (16, 2, 0.03), (8, 1, 0.03)])
def test_the_bound_of_a_wide_padded_convolution_is_tight(n, stride, excess, spike):
    """A spike that outweighs all else between two frequencies costs no more: its channel is held to the pixels."""
    torch.manual_seed(n)
    conv = nn.Conv2d(64, 64, 3, stride, 1, bias=False)
    if spike:
        spiked(conv.weight)
    truth = large_norm(conv, n)
    assert truth <= operator_norm_at_most(conv, (n, n)) <= truth * (1 + excess)


def test_holding_a_spike_to_the_pixels_halves_the_excess_at_least(circles, monkeypatch):
    """The maximum on the circle is 0.5 to 2 % above the norm in these four cases; what holds the spike is not empty."""
    for seed in range(4):
        torch.manual_seed(seed)
        conv = nn.Conv2d(24, 24, 3, 1, 1, bias=False)
        spiked(conv.weight)
        truth, held = large_norm(conv, 12), operator_norm_at_most(conv, (12, 12))
        with monkeypatch.context() as patch:
            patch.setattr(operator_norm, "boxed_maximum", lambda *arguments: math.inf)
            circle = operator_norm_at_most(conv, (12, 12))
        assert truth <= held <= truth + 0.5 * (circle - truth)


def test_a_box_with_one_pixel_less_breaks_the_law(circles, fresh_axes, monkeypatch):
    def below() -> int:
        found = 0
        for seed in range(12):
            torch.manual_seed(seed)
            conv = nn.Conv1d(6, 6, 3, 1, 1, bias=False, dtype=F64)
            spiked(conv.weight)
            found += operator_norm_at_most(conv, (7,), rtol=1e-3) < matrix_norm(conv, 6, (7,)) * ORACLE
        return found

    assert below() == 0
    box = axes._box
    axes.circle_of.cache_clear()
    monkeypatch.setattr(axes, "_box", lambda *arguments: tuple(n - 2 for n in box(*arguments)))
    assert below() > 0


def test_every_matrix_that_holds_channels_to_the_box_gives_a_bound():
    """The Schur complement is only the best one: random E never go below the norm, and E = 0 is the circle's maximum."""
    for seed in range(6):
        torch.manual_seed(seed)
        conv = nn.Conv1d(4, 4, 3, 1, 1, bias=False, dtype=F64)
        conv.weight.data /= conv.weight.data.abs().max()
        truth = matrix_norm(conv, 4, (6,)) ** 2
        gram = gram_of(symbol_of(conv.weight.data[None], np.arange(3)[:, None], (1,)), 4)
        grid, p = ((7,), (seed % 2,)), torch.linalg.qr(torch.randn(4, 2, dtype=F64))[0]
        where = channel_box._Box(frequencies(*grid), grid, (6,))
        e = torch.randn(len(frequencies(*grid)), 2, 2, dtype=torch.complex128)
        for scale in (0.0, 0.1, 3.0):
            own = where.symmetric(scale * (e + e.mH) / 2)
            circle = grid_maximum(gram, grid, 1e-6)[0]
            chunks = (grams for _, grams in gram.chunks(grid))
            bound = channel_box._proved(gram, chunks, p, own, circle, where, 1e-2)
            assert bound >= truth * ORACLE
            if scale == 0.0:
                assert bound <= circle * 1.02


def large_norm(conv: nn.Conv2d, n: int) -> float:
    """The largest singular value by ARPACK, which is at most the truth, and close."""
    weight, shape, options = conv.weight.detach().double(), (1, conv.in_channels, n, n), (conv.stride, conv.padding)

    def forth(v):
        return nn.functional.conv2d(torch.from_numpy(v).reshape(shape), weight, None, *options).numpy().ravel()

    def back(v):
        grad = torch.from_numpy(v).reshape(1, conv.out_channels, *(2 * [(n - 1) // conv.stride[0] + 1]))
        return nn.grad.conv2d_input(shape, weight, grad, *options).numpy().ravel()

    rows = conv.out_channels * ((n - 1) // conv.stride[0] + 1) ** 2
    operator = LinearOperator((rows, math.prod(shape)), matvec=forth, rmatvec=back, dtype=np.float64)
    return float(svds(operator, 1, tol=1e-4, return_singular_vectors=False, random_state=0)[0])


def test_the_bound_of_a_long_axis_is_tight(circles):
    torch.manual_seed(0)
    for k, s, d in ((3, 1, 1), (5, 1, 1), (4, 2, 1), (3, 1, 2), (5, 3, 1)):
        conv = nn.Conv1d(4, 6, k, s, 1, d, bias=False)
        truth = matrix_norm(conv, 4, (120,))
        assert truth * ORACLE <= operator_norm_at_most(conv, (120,)) <= truth * 1.005
        assert truth * ORACLE <= operator_norm_at_most(conv, None) <= truth * 1.015


@pytest.mark.parametrize("seed", range(4))
def test_a_circular_convolution_is_bounded_within_the_arithmetics_share(seed, circles):
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 5, 3, 1 + seed % 2, 1, padding_mode="circular", bias=False)
    truth = matrix_norm(conv, 3, (6, 8))
    assert truth * ORACLE <= operator_norm_at_most(conv, (6, 8)) <= truth * 1.0011
    assert operator_norm_at_most(conv, (6, 8), rtol=1e-6) <= truth * (1 + 3e-8)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (2, 2), (3, 3), ((2, 3), (2, 3))])
def test_patches_that_do_not_overlap_give_the_kernels_norm(kernel, stride):
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 6, kernel, stride, bias=False, dtype=F64)
    truth = oracles.norm_of(conv.weight.flatten(1))
    assert truth * ORACLE <= operator_norm_at_most(conv, (6, 6)) <= truth * 1.0011
    assert operator_norm_at_most(conv, (6, 6)) == operator_norm_at_most(conv, None)


def cosine_case(n: int) -> tuple[nn.Conv1d, mp.mpf]:
    """The kernel (1, 1, 1) on n zero-padded pixels: its norm is 1 + 2 cos(pi / (n + 1)) exactly."""
    conv = nn.Conv1d(1, 1, 3, 1, 1, bias=False)
    conv.weight.data.fill_(1.0)
    with mp.workdps(50):
        return conv, 1 + 2 * mp.cos(mp.pi / (n + 1))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 31, 100, 2000])
def test_the_twisted_circle_finds_the_exact_norm_of_a_known_matrix(n, circles):
    """Strictly one-sided in 50 digits; a seam that multiplies by -1 puts the frequency pi / (n + 1) on the grid."""
    conv, truth = cosine_case(n)
    bound = operator_norm_at_most(conv, (n,), rtol=1e-8)
    assert truth <= bound <= truth * (1 + mp.mpf(10) ** -9)


def test_without_the_twist_the_same_matrix_is_not_found():
    gram = gram_of(symbol_of(torch.ones(1, 1, 1, 3, dtype=F64), np.arange(3)[:, None], (1,)), 5)
    plain, twisted = (math.sqrt(grid_maximum(gram, ((9,), (t,)), 1e-9)[0]) for t in (0, 1))
    truth = float(cosine_case(8)[1])
    assert plain > 3 - 1e-8 > truth * 1.02 and truth <= twisted <= truth * (1 + 1e-8)


class TestWrongLaws:
    """Three numbers that are taken for bounds elsewhere, each below the dense norm."""

    def test_the_fft_value_at_the_input_size_is_no_bound(self):
        conv = nn.Conv1d(1, 1, 3, 1, 1, bias=False, dtype=F64)
        conv.weight.data.copy_(torch.tensor([1.0, 0.0, -1.0]))
        below = [n for n in range(3, 12) if self.fft_value(conv, n) < matrix_norm(conv, 1, (n,)) * (1 - 1e-3)]
        assert below == [6, 10]

    @staticmethod
    def fft_value(conv, n):
        return float(torch.fft.fft(conv.weight.detach()[0, 0], n).abs().max())

    def test_the_product_over_groups_is_no_bound(self):
        torch.manual_seed(0)
        conv = nn.Conv2d(6, 6, 3, 1, 1, groups=3, bias=False, dtype=F64)
        conv.weight.data *= 0.2
        parts = [convolution_norm_at_most(w, (5, 5), padding=1) for w in conv.weight.detach().chunk(3)]
        assert math.prod(parts) < 0.5 * matrix_norm(conv, 6, (5, 5))
        assert max(parts) * (1 - 2e-3) <= operator_norm_at_most(conv, (5, 5)) <= max(parts) * 1.05

    def test_the_reshaped_kernels_norm_is_no_bound(self):
        torch.manual_seed(0)
        conv = nn.Conv2d(8, 8, 3, 1, 1, bias=False, dtype=F64)
        assert oracles.norm_of(conv.weight.flatten(1)) < 0.8 * matrix_norm(conv, 8, (6, 6))

    def test_an_estimate_of_lanczos_is_no_bound(self):
        """What steers the proof is below the truth; what the proof returns is not."""
        torch.manual_seed(0)
        matrix = torch.randn(1, 90, 90, dtype=torch.complex128)
        gram = matrix @ matrix.mH
        truth = float(torch.linalg.eigvalsh(gram)[0, -1])
        level, _ = raised_level(gram, 0.0, 1e-3, math.inf)
        assert truth * (1 - 1e-13) <= level <= truth * 1.003


@pytest.mark.parametrize("factor", [0.3, 0.9, 0.999, 1.2])
def test_a_wrong_estimate_of_a_grids_maximum_breaks_nothing(circles, monkeypatch, factor):
    """Too low, it costs a second factor; too high, it is what the bound is then."""
    choose = operator_norm.choose_grid
    wrong = lambda *arguments: (choice := choose(*arguments)) and replace(choice, estimate=factor * choice.estimate)
    for seed in range(6):
        torch.manual_seed(seed)
        conv = nn.Conv2d(5, 4, 3, 1, 1, bias=False, dtype=F64)
        if seed % 2:
            spiked(conv.weight)
        truth, right = matrix_norm(conv, 5, (6, 5)), operator_norm_at_most(conv, (6, 5))
        with monkeypatch.context() as patch:
            patch.setattr(operator_norm, "choose_grid", wrong)
            bound = operator_norm_at_most(conv, (6, 5))
        assert truth * ORACLE <= bound <= right * max(1.0, math.sqrt(factor)) * 1.1


def test_a_level_below_the_largest_eigenvalue_is_always_raised():
    torch.manual_seed(3)
    for c in (1, 2, 5, 63, 64, 65, 130):
        matrix = torch.randn(3, c, c, dtype=torch.complex128)
        grams = matrix @ matrix.mH
        truth = float(torch.linalg.eigvalsh(grams).max())
        for start in (0.0, 0.5 * truth, truth * (1 - 1e-9), truth * 1.5):
            level, _ = raised_level(grams, start, 1e-6, math.inf)
            assert max(start, truth * (1 - 1e-12)) <= level <= max(start, truth * (1 + 1e-5))


@pytest.mark.parametrize("small", [0, 2**14], ids=["directly", "by lags"])
@pytest.mark.parametrize("c", [1, 3, 40, 70])
def test_the_gram_of_the_symbol_is_within_its_stated_error(c, small, monkeypatch):
    """Against the symbol itself, of a random kernel with stride 2, in numpy's long doubles."""
    monkeypatch.setattr(symbol_gram, "SMALL", small)
    torch.manual_seed(c)
    kernel = torch.rand(1, c, c, 5, dtype=F64) * 2 - 1
    gram = gram_of(symbol_of(kernel, np.arange(5)[:, None], (2,)), 4 if small else 1)
    assert (gram.even is None) == (small == 0)
    bound, peak = grid_maximum(gram, ((7,), (0,)), 1e-9)
    phases = [np.exp(2j * np.longdouble(np.pi) * m * (np.arange(5) // 2) / 7) for m in range(7)]
    symbols = [
        np.concatenate([sum(kernel[0, :, :, t].numpy() * f[t] for t in range(r, 5, 2)) for r in (0, 1)], 1)
        for f in phases
    ]
    truth = max(np.linalg.norm(s.astype(np.complex128), 2) for s in symbols)
    assert truth**2 * (1 - 1e-12) <= bound <= truth**2 * (1 + 3e-9)
    assert 0 < gram.error < 1e-9 * bound and peak is not None


def test_every_group_counts_and_the_largest_wins():
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, 1, 1, groups=64, bias=False)
    conv.weight.data[17] *= 5
    alone = convolution_norm_at_most(conv.weight[17:18], (12, 12), padding=1)
    assert (
        alone * (1 - 3e-3) <= operator_norm_at_most(conv, (12, 12)) <= alone * 1.03
    )  # one channel alone is held to the pixels
    assert operator_norm_at_most(conv, (12, 12)) >= matrix_norm(nn_conv(conv.weight[17:18]), 1, (12, 12)) * ORACLE


def nn_conv(weight: torch.Tensor) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], 1, 1, bias=False)
    conv.weight.data.copy_(weight)
    return conv


def test_asymmetric_padding_is_bounded_as_torch_pads():
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 4, 3, dtype=F64)
    for mode, torchs in (("zeros", "constant"), ("reflect",) * 2, ("replicate",) * 2, ("circular",) * 2):
        pads = ((2, 0), (1, 3))
        padded = lambda x, torchs=torchs: nn.functional.pad(x, (1, 3, 2, 0), mode=torchs)
        matrix = oracles.matrix_of(lambda x, p=padded: nn.functional.conv2d(p(x), weight, stride=(1, 2)), (2, 5, 6))
        truth = oracles.norm_of(matrix)
        for shape in ((5, 6), None):
            bound = convolution_norm_at_most(weight, shape, stride=(1, 2), padding=pads, padding_mode=mode)
            assert truth * ORACLE <= bound <= 3 * truth


def test_linear_layers_and_our_own_layers_are_read_by_the_weight_that_acts():
    torch.manual_seed(0)
    linear = nn.Linear(7, 5)
    truth = oracles.norm_of(linear.weight)
    assert truth * ORACLE <= operator_norm_at_most(linear, None) <= truth * 1.0011
    assert operator_norm_at_most(linear, (3, 7)) == operator_norm_at_most(linear, None)
    for layer in (tnn.WeightNormConv2d(3, 4, 3, padding=1), tnn.EntryNormConv2d(3, 4, 3, padding=1)):
        plain = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        plain.weight.data.copy_(layer.effective_weight())
        assert operator_norm_at_most(layer, (6, 6)) == operator_norm_at_most(plain, (6, 6))
        assert operator_norm_at_most(layer, (6, 6)) <= layer.operator_norm_bound((6, 6))
    parametrised = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    truth = matrix_norm(nn_conv(parametrised.weight.detach()), 3, (9, 9))
    assert operator_norm_at_most(parametrised, (9, 9)) >= 0.9 * truth


def test_shapes_with_channels_and_batch_are_the_same():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    assert len({operator_norm_at_most(conv, s) for s in ((5, 6), (3, 5, 6), (9, 3, 5, 6), torch.Size((5, 6)))}) == 1


def test_a_large_image_costs_a_grid_and_a_long_signal_no_enumeration():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1)
    every = operator_norm_at_most(conv, None)
    assert operator_norm_at_most(conv, (3000, 3000)) <= every * 1.0001
    assert operator_norm_at_most(nn.Conv1d(1, 2, 9, stride=4), (10**7,)) > 0


def test_no_pixel_read_means_norm_zero():
    conv = nn.Conv1d(1, 1, 1, stride=4, padding=1)  # reads places 0 and 4 of a padded axis; the pixel is at 1
    assert operator_norm_at_most(conv, (1,)) == 0.0


def test_a_norm_past_the_largest_float_is_infinite():
    assert convolution_norm_at_most(torch.full((1, 1, 3), 1.7e308, dtype=F64), (9,), padding=1) == math.inf
    assert convolution_norm_at_most(torch.full((1, 1, 3), 5e-324, dtype=F64), (9,), padding=1) >= 1.4e-323


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (torch.full((1, 1, 3), math.nan), ValueError, "entries that are NaN or infinite"),
        (torch.full((1, 1, 3), -math.inf), ValueError, "entries that are NaN or infinite"),
        (torch.ones(1, 1, 3, dtype=torch.int64), TypeError, "must hold real floats, got torch.int64"),
        (torch.ones(1, 1, 3, dtype=torch.complex64), TypeError, "must hold real floats, got torch.complex64"),
        (torch.ones(1, 1, 3, device="meta"), ValueError, "has no values yet"),
        (torch.ones(1, 0, 3), ValueError, "is no kernel"),
        (torch.ones(3), ValueError, "is no kernel"),
        ([[[1.0]]], TypeError, "must hold real floats, got list"),
    ],
)
def test_a_bad_weight_is_refused(weight, error, words):
    with pytest.raises(error, match=words):
        convolution_norm_at_most(weight, None)


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((9,), {}, "must be 2 whole numbers above 0"),
        ((1, 1, 1, 9, 9), {}, "must be 2 whole numbers above 0"),
        ((0, 9), {}, "must be 2 whole numbers above 0"),
        ((9.0, 9), {}, "must be 2 whole numbers above 0"),
        ((5, 9, 9), {}, "has 5 channels, and the layer takes 2"),
        ((2, 2), {}, "has no output for kernel 3"),
        ((9, 9), {"padding": 9, "padding_mode": "reflect"}, "has no output"),
        ((9, 9), {"rtol": 0.0}, "rtol must be a number above 0"),
        ((9, 9), {"groups": 3}, "doesn't divide"),
        ((9, 9), {"stride": 0}, "stride must be 2 whole numbers of at least 1"),
        ((9, 9), {"padding": (1, 1, 1)}, "padding must be 2 whole numbers"),
        ((9, 9), {"padding": "full"}, "must be 'same', 'valid' or numbers"),
        ((9, 9), {"padding": "same", "stride": 2}, "needs stride 1"),
        ((9, 9), {"padding_mode": "constant"}, "padding_mode must be one of"),
    ],
)
def test_a_bad_geometry_is_refused(shape, options, words):
    with pytest.raises(ValueError, match=words):
        convolution_norm_at_most(torch.ones(4, 2, 3, 3), shape, **options)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


def test_a_layer_whose_weight_may_not_be_the_one_that_acts_is_refused():
    hooked = nn.Conv2d(2, 2, 3)
    hooked.forward = lambda x: 2 * x
    computed = nn.Conv2d(2, 2, 3)
    weight = computed.weight.data
    del computed.weight
    computed.weight = weight
    for layer in (Standardised(2, 2, 3), hooked, computed, nn.ReLU(), nn.Bilinear(2, 2, 2), "conv"):
        with pytest.raises(UnboundedError, match="effective_weight|no convolution or linear layer"):
            operator_norm_at_most(layer, None)


def test_a_layer_without_values_or_output_is_refused():
    with pytest.raises(ValueError, match="has no values yet"):
        operator_norm_at_most(nn.LazyConv2d(4, 3), None)
    with pytest.raises(ValueError, match="gives no output"):
        operator_norm_at_most(nn.ConvTranspose1d(2, 2, 3, padding=3), (1,))
    with pytest.raises(ValueError, match="must end in in_features=3"):
        operator_norm_at_most(nn.Linear(3, 2), (2,))


def differentiated(layer: nn.Module, shape) -> tuple[float, float]:
    """(difference quotient, gradient times direction) of the bound, in a random direction of the weight."""
    bound = differentiable_norm_at_most(layer, shape)
    bound.backward()
    weight = layer.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    start, step, values = weight.data.clone(), 1e-5, []
    for sign in (1, -1):
        weight.data = start + sign * step * direction
        values.append(float(differentiable_norm_at_most(layer, shape)))
    weight.data = start
    return (values[0] - values[1]) / (2 * step), float((weight.grad * direction).sum())


DIFFERENTIABLE = {
    "padded": (lambda: nn.Conv2d(3, 4, 3, 1, 1, dtype=F64), (6, 5)),
    "strided": (lambda: nn.Conv2d(3, 8, 3, 2, 1, dtype=F64), (8, 8)),
    "strided, more rows": (lambda: nn.Conv2d(2, 24, 4, 2, 1, dtype=F64), (8, 8)),
    "dilated, in groups": (lambda: nn.Conv2d(4, 4, 3, 1, 2, 2, groups=2, dtype=F64), (7, 7)),
    "of every size": (lambda: nn.Conv1d(2, 3, 4, 3, 1, dtype=F64), None),
    "patches": (lambda: nn.Conv2d(3, 5, 2, 2, dtype=F64), (6, 6)),
    "unused taps": (lambda: nn.Conv2d(3, 3, (1, 5), 1, (0, 2), dtype=F64), (1, 2)),
    "reflected": (lambda: nn.Conv2d(8, 2, 3, 2, 1, padding_mode="reflect", dtype=F64), (8, 8)),
    "three axes": (lambda: nn.Conv3d(2, 2, 2, 1, 1, dtype=F64), (3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3, 2, 1, dtype=F64), (5, 5)),
    "linear": (lambda: nn.Linear(4, 6, dtype=F64), None),
    "weight norm": (lambda: tnn.WeightNormConv2d(3, 4, 3, padding=1, dtype=F64), (6, 6)),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradient_of_the_bound_is_its_difference_quotient(name):
    make, shape = DIFFERENTIABLE[name]
    torch.manual_seed(0)
    layer = make()
    quotient, product = differentiated(layer, shape)
    assert abs(product) > 1e-3  # a zero gradient would pass otherwise
    assert abs(quotient - product) <= 1e-5 * max(1.0, abs(product))
    bound = float(differentiable_norm_at_most(layer, shape).detach())
    assert operator_norm_at_most(layer, shape) <= bound * (1 + 2e-3)  # which may hold a channel to the pixels, or take the matrix
    if shape is not None and not hasattr(layer, "effective_weight"):
        assert bound >= oracles.norm_of(oracles.matrix_of(layer, (layer.in_channels, *shape))) * ORACLE


def test_the_gradient_of_another_frequency_is_not_the_difference_quotient(monkeypatch):
    """The law above can fail: half a turn beside the peak the derivative is another one."""
    waves = Attained.waves
    monkeypatch.setattr(Attained, "waves", lambda self: waves(replace(self, turns=self.turns + 0.5)))
    torch.manual_seed(0)
    quotient, product = differentiated(nn.Conv2d(3, 4, 3, 1, 1, dtype=F64), (6, 5))
    assert abs(quotient - product) > 0.1


def test_descent_along_the_gradient_lowers_the_bound_and_the_norm():
    torch.manual_seed(1)
    layer = nn.Conv2d(4, 4, 3, padding=1, dtype=F64)
    optimiser = torch.optim.SGD([layer.weight], lr=0.02)
    norms = []
    for _ in range(25):
        norms.append(matrix_norm(layer, 4, (6, 6)))
        optimiser.zero_grad()
        bound = differentiable_norm_at_most(layer, (6, 6))
        assert float(bound.detach()) >= norms[-1] * ORACLE
        bound.backward()
        optimiser.step()
    assert norms[-1] < 0.8 * norms[0]


def test_a_weight_with_arguments_is_differentiated_too_and_only_once(circles):
    weight = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(2), requires_grad=True)
    bound = differentiable_norm_at_most(weight, (8, 8), padding=1, groups=2)
    assert bound.dtype == F64
    assert float(bound.detach()) == pytest.approx(
        convolution_norm_at_most(weight, (8, 8), padding=1, groups=2), rel=2e-3
    )
    (gradient,) = torch.autograd.grad(3 * bound, weight, create_graph=True)
    assert gradient.dtype == torch.float32
    assert float((gradient.detach() * weight.detach()).sum()) == pytest.approx(
        3 * float(bound.detach()), rel=1e-5
    )  # Euler
    with pytest.raises(RuntimeError, match="differentiate twice|does not require grad"):
        torch.autograd.grad(gradient.sum(), weight)
    with pytest.raises(TypeError, match="padding was given beside a Conv2d"):
        differentiable_norm_at_most(nn.Conv2d(1, 1, 3), (8, 8), padding=1)
    zero = nn.Conv2d(2, 2, 3, padding=1)
    zero.weight.data.zero_()
    differentiable_norm_at_most(zero, (5, 5)).backward()
    assert not zero.weight.grad.any()


class Shared(nn.Module):
    """One convolution at two paths and two sizes, one behind a norm, one never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.again, self.norm = self.first, nn.BatchNorm2d(3)
        self.strange = Strange(3, 3, 3)
        self.head, self.idle = nn.Linear(3, 5), nn.Linear(7, 2)
        self.wrapped = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))

    def forward(self, x):
        x = self.strange(self.norm(self.first(x)))
        return self.head(self.wrapped(self.again(x)).mean((2, 3)))


class Strange(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_networks_layers_are_bounded_at_the_sizes_they_see_and_the_others_are_named():
    torch.manual_seed(0)
    model = Shared().train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    rows = operator_norms_at_most(model, (2, 3, 9, 8))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and model.norm.training and not model.first._forward_pre_hooks
    found = {(row.path, row.input_shape): row for row in rows}
    assert len(found) == len(rows) == 7
    for size in ((9, 8), (7, 6)):
        row = found["first", (3, *size)]
        truth = matrix_norm(model.first, 3, size)
        assert (row.kind, row.also, row.reason) == ("Conv2d", ("again",), "")
        assert truth * ORACLE <= row.norm_at_most <= truth * 1.15
    assert found["head", (3,)].norm_at_most == operator_norm_at_most(model.head, None)
    assert found["wrapped", (3, 7, 6)].norm_at_most == operator_norm_at_most(model.wrapped, (7, 6))
    assert found["idle", None].norm_at_most is None and "never reached" in found["idle", None].reason
    assert found["norm", None].reason == "no linear layer or convolution"
    assert "forward or a weight of its own" in found["strange", (3, 9, 8)].reason
    with pytest.raises(ValueError, match="rtol must be a number above 0"):
        operator_norms_at_most(model, torch.zeros(1, 3, 9, 8), rtol=0.0)


class Parallel(nn.Module):
    """Layers of three shapes, several of each, a zero one and one with other weights' geometry."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.mirrored = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect") for _ in range(3))
        self.grouped = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, groups=3, dtype=F64) for _ in range(3))
        self.plain[1].weight.data.zero_()
        self.plain[2].weight.data *= 2.0**-60
        self.grouped[1].weight.data[2] *= 1e3

    def forward(self, x):
        x = sum(layer(x) for layer in (*self.plain, *self.mirrored))
        return sum(layer(torch.cat([x, x], 1).double()) for layer in self.grouped)


def test_equal_layers_that_are_bounded_together_have_the_bounds_of_each_alone(monkeypatch):
    torch.manual_seed(0)
    model, together = Parallel(), []
    equal = network_norms.equal_bounds
    counted = lambda layers, rtol: together.append(len(layers)) or equal(layers, rtol)
    monkeypatch.setattr(network_norms, "equal_bounds", counted)
    rows = operator_norms_at_most(model, (1, 3, 4, 4))
    assert sorted(together) == [3, 3, 3] and len(rows) == 10  # the zero layer is none of them
    for row in rows:
        layer = model.get_submodule(row.path)
        alone = operator_norm_at_most(layer, row.input_shape)
        assert row.norm_at_most == pytest.approx(alone, rel=1e-9)
        assert row.norm_at_most >= matrix_norm(layer, layer.in_channels, row.input_shape[1:]) * ORACLE


def test_a_level_that_is_too_low_for_one_of_equal_layers_is_raised(monkeypatch):
    torch.manual_seed(0)
    kernels = torch.rand(3, 2, 4, 4, 3, dtype=F64) * 2 - 1
    line, taps = (axes.Axis(5, 3, 1, 1, 1, 1, "zeros"),), [np.arange(3)]
    close = dense_norm.dense_norms_at_most(kernels, line, taps, 1e-3)
    monkeypatch.setattr(dense_norm, "CLOSE", -0.1)
    raised = dense_norm.dense_norms_at_most(kernels, line, taps, 1e-3)
    for low, high in zip(close, raised):
        assert low * (1 - 1e-9) <= high <= low * (1 + 1e-3)


def test_the_progress_of_a_network_goes_to_stderr_and_changes_nothing(capsys):
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU())
    silent = operator_norms_at_most(model, (1, 1, 9))
    assert operator_norms_at_most(model, torch.zeros(1, 1, 9), progress=True) == silent
    assert capsys.readouterr().out == ""


def test_a_proof_keeps_numpys_blas_on_one_thread_and_puts_it_back(monkeypatch):
    """Its threads spin while they wait, and took twenty times the work of a small product on busy cores."""
    threads = lambda: [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    seen, choose = [], operator_norm.choose_grid
    monkeypatch.setattr(operator_norm, "choose_grid", lambda *a, **k: seen.extend(threads()) or choose(*a, **k))
    with threadpool_limits(2, user_api="blas"):
        before = threads()
        operator_norm_at_most(nn.Conv2d(24, 24, 3, padding=1), (16, 16))
        assert threads() == before
    assert seen and set(seen) == {1} and 2 in before
