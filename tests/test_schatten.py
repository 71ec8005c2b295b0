"""Schatten normalisation: values, derivatives, proved norms of generated layers, constants, tightness; and what would fail."""

import math
import random
import sys

import numpy as np
import oracles
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

import trainable_nn as tnn
from trainable_nn.errors import ConversionError
from trainable_nn.functional import schatten_norm, schatten_norm_inverse
from trainable_nn.linop import FrequencyGrid, convolution_norm_at_most, frequency_grid
from trainable_nn.linop.frequency_grid import count_at_least
from trainable_nn.ops import schatten as schatten_operator
from trainable_nn.ops import squared_schatten_norm
from trainable_nn.theory import SchattenNormConstants, geometry_factor

F64 = torch.float64
EPS, GAIN = 0.3, 1.5
POWERS = (1, 2, 4, 16, 64)
GRID_1D = {"kernel_size": (3,), "stride": (2,), "padding": ((1, 1),), "dilation": (1,), "padding_mode": "zeros"}


def random_weight(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def schatten(matrix: np.ndarray, power: int) -> float:
    """By LAPACK's singular values, the largest taken out so that no power overflows."""
    s = scipy.linalg.svdvals(matrix)
    return s[0] * ((s / s[0]) ** (2 * power)).sum() ** (0.5 / power) if s[0] > 0 else 0.0


def naive(w, power: int, eps: float = EPS, gain: float = GAIN):
    """As the formula is written, differentiated by torch."""
    gram = w @ w.T
    size = torch.linalg.matrix_power(gram, power).diagonal().sum() ** (1.0 / power)
    return gain * w / torch.sqrt(eps + size)


def naive_symbol(w, power: int, grid, eps: float = EPS, gain: float = GAIN):
    """A kernel of one axis, over the whole grid in complex numbers; tap j stands at block j // 2 and phase j % 2."""
    total = 0.0
    points = 2 * len(grid.turns)
    for m in range(points):
        turn = (2 * m + 1) / (2 * points)
        phases = [torch.zeros(w.shape[:2], dtype=torch.complex128) for _ in range(2)]
        for j in range(w.shape[2]):
            wave = torch.tensor(np.exp(2j * math.pi * turn * (j // 2)))
            phases[j % 2] = phases[j % 2] + w[:, :, j] * wave
        symbol = torch.cat(phases, 1)
        total = total + torch.linalg.matrix_power(symbol @ symbol.mH, power).diagonal().sum().real
    return gain * w / torch.sqrt(eps + grid.factor**2 * total ** (1.0 / power))


GRIDS = {power: frequency_grid(**GRID_1D, power=power) for power in (1, 2, 4)}
CASES = {
    "matrix, p=2": ((3, 4), lambda w: schatten_norm(w, EPS, 2, gain=GAIN), lambda w: naive(w, 2)),
    "matrix, p=8": ((4, 3), lambda w: schatten_norm(w, EPS, 8, gain=GAIN), lambda w: naive(w, 8)),
    **{
        f"symbol, p={power}": (
            (2, 2, 3),
            lambda w, power=power: schatten_norm(w, EPS, power, gain=GAIN, grid=GRIDS[power]),
            lambda w, power=power: naive_symbol(w, power, GRIDS[power]),
        )
        for power in GRIDS
    },
}
cases = pytest.mark.parametrize("shape, f, plain", CASES.values(), ids=CASES)


class TestValues:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
    @pytest.mark.parametrize("power", POWERS)
    def test_the_scale_is_that_of_lapack_s_singular_values(self, dtype, power):
        for shape in ((5, 9), (9, 5), (1, 4), (90, 50), (4, 3, 2)):
            w = random_weight(*shape).to(dtype)
            x = w.double().numpy()
            expected = GAIN * x / math.sqrt(EPS + 0.7**2 * schatten(x.reshape(shape[0], -1), power) ** 2)
            found = schatten_norm(w, EPS, power, gain=GAIN, factor=0.7)
            tolerance = {"rtol": 1.01 * torch.finfo(dtype).eps + 1e-13, "atol": torch.finfo(dtype).tiny}
            assert found.dtype == dtype
            assert_close(found.double(), torch.from_numpy(expected), **tolerance)

    def test_groups_are_normalised_each_by_itself(self):
        w = random_weight(6, 5) * torch.tensor([1.0, 1, 100, 100, 0, 0], dtype=F64)[:, None]
        found = schatten_norm(w, EPS, 4, groups=3)
        for g in range(3):
            assert_close(found[2 * g : 2 * g + 2], schatten_norm(w[2 * g : 2 * g + 2], EPS, 4), rtol=1e-14, atol=0)

    def test_power_1_is_weight_normalisation_of_the_whole(self):
        w = random_weight(4, 5)
        assert_close(schatten_norm(w, EPS, 1), tnn.functional.weight_norm(w, EPS, None), rtol=1e-14, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
    @pytest.mark.parametrize("power", [1, 2, 16, 1024])
    def test_entries_up_to_the_largest_number_and_down_to_denormals(self, dtype, power):
        info = torch.finfo(dtype)
        pattern = torch.tensor([[1.0, -1.0, 0.5], [0.0, 0.25, 1.0]], dtype=F64)
        for size in (0.0, info.smallest_normal / 4, info.smallest_normal, 1e-3, 1.0, info.max / 8, info.max):
            w = (size * pattern).to(dtype).requires_grad_()
            x = w.detach().double() / max(size, 1.0)
            expected = x / math.hypot(1 / max(size, 1.0), schatten(x.numpy(), power))
            y = schatten_norm(w, 1.0, power)
            assert_close(y.detach().double(), expected, rtol=4 * info.eps, atol=info.smallest_normal * info.eps)
            (dw,) = torch.autograd.grad(y.sum(), w, create_graph=True)
            assert dw.isfinite().all() and (size > 2 or (dw != 0).any())
            assert torch.autograd.grad(dw.sum(), w)[0].isfinite().all()

    def test_zero_is_a_fixed_point_with_slope_one_over_the_root_of_eps(self):
        for f in (lambda w: schatten_norm(w, EPS, 8), lambda w: schatten_norm(w, EPS, 2, grid=GRIDS[2])):
            w = torch.zeros(2, 2, 3, dtype=F64, requires_grad=True)
            (dw,) = torch.autograd.grad(f(w), w, torch.ones_like(w), create_graph=True)
            assert_close(dw.detach(), torch.full_like(w, EPS**-0.5), rtol=1e-14, atol=0)
            assert torch.equal(torch.autograd.grad(dw.sum(), w)[0], torch.zeros_like(w))
            assert_close(jvp(f, (w.detach(),), (torch.ones_like(w),))[1], dw.detach(), rtol=1e-14, atol=0)

    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    def test_a_weight_that_is_not_finite_spoils_its_group_and_no_other(self, bad):
        w = torch.ones(4, 3)
        w[1, 2] = bad
        w.requires_grad_()
        y = schatten_norm(w, EPS, 4, groups=2)
        assert y[:2].isnan().all() and y[2:].isfinite().all()
        assert torch.autograd.grad(y[2:].sum(), w)[0][2:].isfinite().all()

    def test_layout_and_empty_weights_are_kept(self):
        w = random_weight(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
        assert schatten_norm(w).is_contiguous(memory_format=torch.channels_last)
        for shape in ((0, 3), (3, 0)):
            assert schatten_norm(torch.zeros(shape)).shape == shape

    @pytest.mark.parametrize("options, words", [
        ({"power": 3}, "power must be 1, 2, 4"), ({"power": 0}, "power must be"), ({"power": 2.0}, "power must be"),
        ({"eps": 0.0}, "eps must be"), ({"gain": math.inf}, "gain must be"), ({"factor": 0.0}, "factor must be"),
        ({"groups": 3}, "not 3 matrices"), ({"grid": GRIDS[2]}, "made for power=2, got power=16"),
        ({"grid": GRIDS[2], "power": 2}, "made for 3 taps"),
    ])  # fmt: skip
    def test_constants_of_no_normalisation_are_refused(self, options, words):
        with pytest.raises(ValueError, match=f"schatten_norm: .*{words}"):
            schatten_norm(torch.ones(4, 3), **options)
        with pytest.raises(TypeError, match="Convert it first"):
            schatten_norm(torch.ones(4, 3, dtype=torch.int64))


class TestSmallMatrices:
    """Complex matrices and Python's numbers take the place of real ones in Hermitian form."""

    @pytest.mark.parametrize("imaginary", [False, True])
    @pytest.mark.parametrize("shape", [(8, 8), (3, 5), (5, 3), (32, 9)])
    @pytest.mark.parametrize("power", [2, 4, 16, 64])
    def test_both_forms_agree_with_lapack_and_their_gradients(self, shape, power, imaginary):
        x, y = random_weight(1, 3, *shape), random_weight(1, 3, *shape, seed=1) if imaginary else None
        blocks = x[0] if y is None else torch.complex(x[0], y[0])
        s = torch.linalg.svdvals(blocks).flatten()
        expected = s.max() ** 2 * (2.0 * ((s / s.max()) ** (2 * power)).sum()) ** (1.0 / power)
        found = []
        for small in (0, 32):
            leaves = [t.clone().requires_grad_() for t in (x, y) if t is not None]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(schatten_operator, "SMALL", small)
                squared = squared_schatten_norm(leaves[0], leaves[1] if imaginary else None, power, 2.0)
                found.append((squared, *torch.autograd.grad(squared.sum(), leaves)))
            assert type(squared.grad_fn).__name__ == ("_SmallSquaredBackward" if small else "_SquaredBackward")
            assert_close(squared, expected.reshape(1), rtol=1e-13, atol=0.0)
        for a, b in zip(*found):
            assert_close(a, b, rtol=1e-11, atol=1e-12)

    def test_zero_has_gradient_zero_and_no_number_stays_none(self):
        x = torch.zeros(1, 2, 3, 3, dtype=F64, requires_grad=True)
        squared = squared_schatten_norm(x, x * 1.0, 8)
        assert squared.item() == 0.0 and torch.autograd.grad(squared, x)[0].abs().max() == 0.0
        for wrong in (math.nan, math.inf):
            assert squared_schatten_norm(torch.full((1, 2, 3, 3), wrong, dtype=F64), None, 8).isnan().all()


class TestDerivatives:
    @cases
    def test_value_gradient_and_hessian_are_those_of_the_naive_formula(self, shape, f, plain):
        w, g, v = (random_weight(*shape, seed=s).requires_grad_(s < 2) for s in range(3))
        found, expected = [], []
        for function, out in ((f, found), (plain, expected)):
            y = function(w)
            (dw,) = torch.autograd.grad(y, w, g, create_graph=True)
            ddg, ddw = torch.autograd.grad(dw, (g, w), v)
            out += [y, dw, ddg, ddw]
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, rtol=1e-11, atol=1e-13)

    @cases
    def test_every_transform_gives_the_naive_formula_s_derivatives(self, shape, f, plain):
        w, v = random_weight(*shape), random_weight(*shape, seed=1)
        q = lambda h: lambda w: (h(w).sin() * v).sum()
        near = lambda a, b: assert_close(a, b, rtol=1e-10, atol=1e-12)
        jacobian, curvature = jacrev(plain)(w), hessian(q(plain))(w)
        near(jacrev(f)(w), jacobian)
        near(jacfwd(f)(w), jacobian)
        near(hessian(q(f))(w), curvature)
        near(jacrev(jacrev(q(f)))(w), curvature)
        near(jacfwd(jacfwd(q(f)))(w), curvature)
        near(torch.autograd.functional.hessian(q(f), w), curvature)
        near(jvp(f, (w,), (v,))[1], jvp(plain, (w,), (v,))[1])
        stack = torch.stack([w, 2 * w, v], 1)
        near(vmap(f, in_dims=1)(stack)[1], plain(2 * w))
        near(vmap(grad(q(f)), in_dims=1)(stack)[2], grad(q(plain))(v))
        near(jacfwd(hessian(q(f)))(w), jacfwd(hessian(q(plain)))(w))

    @cases
    def test_gradcheck_in_both_modes_and_twice(self, shape, f, plain):
        w = random_weight(*shape).requires_grad_()
        assert torch.autograd.gradcheck(f, w, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, w, check_fwd_over_rev=True)

    def test_the_halves_of_a_large_matrix_make_the_whole(self):
        w = random_weight(300, 310)
        found = grad(lambda w: schatten_norm(w, EPS, 8, gain=GAIN).sin().sum())(w)
        x = w.clone().requires_grad_()
        (eager,) = torch.autograd.grad(schatten_norm(x, EPS, 8, gain=GAIN).sin().sum(), x)
        (expected,) = torch.autograd.grad(naive(x, 8).sin().sum(), x)
        assert_close(found, expected, rtol=1e-9, atol=1e-13)
        assert_close(eager, expected, rtol=1e-9, atol=1e-13)

    @pytest.mark.parametrize("name", CASES)
    def test_the_coarse_gradient_of_float32_weights_has_float32_s_digits(self, name):
        shape, f, plain = CASES[name]
        w, g = random_weight(*shape).float().requires_grad_(), random_weight(*shape, seed=1).float()
        x = w.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(plain(x), x, g.double())
        with torch.autocast("cpu", torch.bfloat16):  # backward inside it too: no product may fall to 8 bits
            (found,) = torch.autograd.grad(f(w), w, g)
        assert found.dtype == torch.float32
        assert (found.double() - expected).norm() <= 1e-6 * expected.norm()

    @pytest.mark.parametrize("name", ["symbol, p=2"])
    def test_compiled_with_the_inductor_without_a_graph_break(self, name):
        shape, f, plain = CASES[name]
        torch._dynamo.reset()
        w = random_weight(*shape).requires_grad_()
        y = torch.compile(f, fullgraph=True)(w)
        assert_close(y, plain(w), rtol=1e-12, atol=1e-14)
        assert_close(
            torch.autograd.grad(y.sin().sum(), w)[0],
            grad(lambda w: plain(w).sin().sum())(w.detach()),
            rtol=1e-10,
            atol=0,
        )


def fill(weight: torch.Tensor, kind: str, rng: random.Random) -> None:
    """In place: weights that are hard to bound."""
    torch.manual_seed(rng.randrange(10**6))
    rows = [weight.shape[0], *[1] * (weight.dim() - 1)]
    if kind == "one-hot":
        weight.zero_().view(-1)[rng.randrange(weight.numel())] = 10.0 ** rng.randint(-3, 12)
    elif kind == "constant":  # its norm is at frequency 0, which lies between two of the grid
        weight.copy_(torch.randn(rows, dtype=F64).expand_as(weight) * 1e4)
    elif kind == "two waves":
        angle = rng.uniform(0, math.pi) * torch.arange(weight[0].numel(), dtype=F64).reshape(weight.shape[1:])
        weight.copy_(1e3 * (angle.cos() + torch.randn(rows, dtype=F64) * (2.3 * angle).sin()))
    else:
        weight.normal_().mul_({"huge": 1e150, "tiny": 1e-150, "random": 1.0, "large": 1e3}[kind])


KINDS = ("one-hot", "constant", "two waves", "huge", "tiny", "random", "large")


class TestOperatorNorms:
    @pytest.mark.parametrize("bound", ["symbol", "kernel"])
    @pytest.mark.parametrize("axes, count", [(1, 42), (2, 28), (3, 7)])
    def test_generated_convolutions_stay_below_gain_and_below_their_bounds(self, bound, axes, count):
        rng = random.Random(axes)
        for i in range(count):
            arguments, sizes = oracles.random_geometry(rng, axes)
            options = {
                "eps": rng.choice((1e-6, 1.0)),
                "gain": rng.choice((0.5, 2.0)),
                "power": rng.choice((1, 2, 4, 16)),
            }
            conv = getattr(tnn, f"SpectralNormConv{axes}d")(**arguments, **options, bound=bound, bias=False, dtype=F64)
            fill(conv.weight.data, KINDS[i % len(KINDS)], rng)
            true = oracles.norm_of(oracles.matrix_of(conv, (conv.in_channels, *sizes)))
            here, anywhere = conv.operator_norm_bound(sizes), conv.operator_norm_bound()
            supremum = conv.operator_norm_supremum(sizes)
            assert true * (1 - 1e-14) <= here <= supremum <= conv.operator_norm_supremum() <= conv.gain * (1 + 1e-9)
            assert here <= anywhere * (1 + 0.1) and anywhere <= conv.operator_norm_supremum(), arguments

    @pytest.mark.parametrize("shape", [(1, 1), (3, 7), (7, 3), (40, 40)])
    def test_linear_layers_stay_below_gain(self, shape):
        rng = random.Random(0)
        for kind in KINDS:
            for power in (1, 2, 16):
                layer = tnn.SpectralNormLinear(*shape, bias=False, eps=1e-6, gain=0.7, power=power, dtype=F64)
                fill(layer.weight.data, kind, rng)
                true = oracles.norm_of(oracles.matrix_of(layer, shape[:1]))
                assert true <= layer.operator_norm_bound() <= layer.operator_norm_supremum() <= 0.7 * (1 + 1e-9)
                assert layer.operator_norm_bound() <= 1.002 * true

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_stored_weights_stay_below_the_supremum_of_their_dtype(self, dtype):
        rng = random.Random(1)
        for i in range(24):
            conv = tnn.SpectralNormConv2d(3, 5, 3, padding=1, bias=False, eps=1e-4, dtype=dtype)
            fill(
                wide := torch.empty(conv.weight.shape, dtype=F64),
                ("one-hot", "constant", "two waves", "random")[i % 4],
                rng,
            )
            conv.weight.data.copy_(wide.clamp(-6e4, 6e4))
            twin = nn.Conv2d(3, 5, 3, padding=1, bias=False, dtype=F64)
            twin.weight.data.copy_(conv.effective_weight())
            true = oracles.norm_of(oracles.matrix_of(twin, (3, 6, 6)))
            assert (
                true
                <= conv.operator_norm_bound((6, 6))
                <= conv.operator_norm_supremum()
                <= 1 + 16 * torch.finfo(dtype).eps
            )

    def test_the_symbol_is_the_sum_over_the_taps_compiled_or_not(self, monkeypatch):
        grid = frequency_grid((3, 2), (2, 1), ((1, 1), (0, 0)), (1, 1), "zeros", 4)
        kernel = random_weight(2, 3, 2, 6)
        expected = torch.zeros(2, len(grid.turns), 3, max(grid.phases) + 1, 2, dtype=torch.complex128)
        for tap, (block, phase) in enumerate(zip(grid.blocks, grid.phases)):
            for index, turn in enumerate(grid.turns):
                wave = np.exp(2j * math.pi * sum(t * b for t, b in zip(turn, block)))
                expected[:, index, :, phase] += complex(wave) * kernel[..., tap]
        for compiling in (False, True):
            monkeypatch.setattr(sys.modules[FrequencyGrid.__module__], "may_look_at", lambda x: not compiling)  # noqa: B023
            x, y = grid.symbol(kernel)
            assert_close(torch.complex(x, y), expected.flatten(3), rtol=1e-13, atol=1e-13)

    def test_the_grid_bounds_the_supremum_over_all_frequencies(self):
        """For scalar kernels of one axis the supremum is a maximum over a fine grid, found by numpy's FFT."""
        rng = np.random.default_rng(0)
        closest = {}
        for power in (1, 2, 4, 16, 64):
            for taps in (2, 3, 4, 5, 7):
                grid = frequency_grid((taps,), (1,), ((0, 0),), (1,), "zeros", power)
                for kind in range(40):
                    k = rng.standard_normal(taps) if kind % 2 else np.cos(rng.uniform(0, 3) * np.arange(taps) + kind)
                    supremum = np.abs(np.fft.fft(k, 4096)).max()
                    x, y = grid.symbol(torch.from_numpy(k).reshape(1, 1, 1, -1))
                    length = (2 * ((x**2 + y**2) ** power).sum()) ** (0.5 / power)
                    ratio = float(grid.factor * length) / supremum
                    assert ratio >= 1 - 1e-12
                    closest[power] = min(closest.get(power, 9.0), ratio)
        assert max(closest.values()) < 1.07  # a smaller constant would soon fail

    @pytest.mark.parametrize("wrong", ["no constant", "a power iteration", "a root of the rank less", "fewer uses"])
    def test_an_under_estimate_is_caught(self, wrong):
        """What each part of the bound is for: without it some layer's norm is above gain."""
        found = []
        for seed in range(6):
            torch.manual_seed(seed)
            conv = tnn.SpectralNormConv2d(2, 2, 3, padding=1, bias=False, power=16, dtype=F64)
            fill(conv.weight.data, ("constant", "random")[seed % 2], random.Random(seed))
            w = conv.weight.detach()
            matrix = w.flatten(1)
            if wrong == "no constant":
                length = float(torch.linalg.svdvals(torch.complex(*conv._grid.symbol(w.flatten(2)[None]))).max())
            elif wrong == "a power iteration":
                v = torch.nn.functional.normalize(matrix.T @ torch.randn(2, dtype=F64), dim=0)
                length = float((matrix @ v).norm())
            elif wrong == "a root of the rank less":
                length = 3 * schatten(matrix.numpy(), 1) / math.sqrt(2)
            else:
                length = 2 * oracles.norm_of(matrix)
            twin = nn.Conv2d(2, 2, 3, padding=1, bias=False, dtype=F64)
            twin.weight.data.copy_(w / math.sqrt(1e-8 + length**2))
            image = wrong != "a power iteration"  # which is of the kernel as a matrix
            found.append(oracles.norm_of(oracles.matrix_of(twin, (2, 12, 12)) if image else twin.weight.flatten(1)))
        assert max(found) > 1.01


class TestGrid:
    def test_the_count_is_below_every_offset_s_sum_and_close_to_the_least(self):
        for degree in (0.5, 1.0, 1.5, 3.0):
            for power in (1, 2, 8, 32):
                size = 2 * math.floor(degree) + 4
                for t in np.random.default_rng(1).uniform(-4, 4, 400):
                    x = degree * ((t + 2 * math.pi * np.arange(size) / size + math.pi) % (2 * math.pi) - math.pi)
                    total = (np.where(np.abs(x) < math.pi / 2, np.cos(x), 0.0) ** (2 * power)).sum()
                    assert count_at_least(size, degree, power) <= total * (1 + 1e-12)
                middle = 2 * math.cos(math.pi * degree / size) ** (2 * power)
                assert (
                    count_at_least(size, degree, power) >= 0.99 * min(middle, 1.0) - 0.001
                )  # the slope between samples

    def test_patches_that_do_not_overlap_need_one_frequency(self):
        grid = frequency_grid((2, 3), (2, 3), ((0, 0), (0, 0)), (1, 1), "zeros", 4)
        assert grid.points == 1 and grid.factor == pytest.approx(1.0, abs=1e-11) and grid.taps == 1
        assert tnn.SpectralNormConv2d(3, 4, 2, 2).bound == "kernel"

    @pytest.mark.parametrize("power, at_most", [(4, 2.2), (16, 1.3), (64, 1.12)])
    def test_random_convolutions_are_bounded_tightly_and_their_kernels_are_not(self, power, at_most):
        torch.manual_seed(0)
        weight = torch.randn(32, 24, 3, 3, dtype=F64)
        true = convolution_norm_at_most(weight, None, padding=1)
        layer = tnn.SpectralNormConv2d(24, 32, 3, padding=1, eps=1e-20, power=power, bound="symbol", dtype=F64)
        layer.weight.data.copy_(weight)
        ratio = float((weight / layer.effective_weight()).flatten()[0]) / true
        kernel = geometry_factor((3, 3), (1, 1), (1, 1), (1, 1)) * schatten(weight.flatten(1).numpy(), power) / true
        assert 1 <= ratio <= at_most and kernel > max(1.6, 1.2 * ratio)


def largest(value, starts, steps: int) -> float:
    """Gradient ascent of the logarithm, from several starts."""
    best = 0.0
    for start in starts:
        x = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([x], lr=0.05)
        for _ in range(steps):
            optimiser.zero_grad()
            found = value(x)
            best = max(best, float(found))
            (-found.log()).backward()
            optimiser.step()
    return best


CONSTANTS = {  # shape, power, on a grid; the most that the constants may be above what ascent finds
    "p=1": ((2, 3), 1, False, 1.01, 1.02),
    "p=2": ((2, 3), 2, False, 1.01, 2.5),
    "p=4": ((2, 3), 4, False, 1.1, 2.5),
    "p=1, symbol": ((2, 1, 3), 1, True, 1.01, 1.02),
    "p=2, symbol": ((2, 2, 3), 2, True, 1.2, 4.5),
}


class TestConstants:
    @pytest.mark.parametrize("shape, power, symbol, slope_ratio, curve_ratio", CONSTANTS.values(), ids=CONSTANTS)
    def test_slope_and_its_lipschitz_constant_enclose_what_ascent_finds(
        self, shape, power, symbol, slope_ratio, curve_ratio
    ):
        grid = GRIDS[power] if symbol else None
        blocks = (grid.factor, grid.points, grid.taps) if symbol else ()
        rank = min(shape[0], shape[1] * (2 if symbol else 1))
        constants = SchattenNormConstants(EPS, GAIN, power, rank, *blocks)
        f = lambda w: schatten_norm(w.reshape(shape), EPS, power, gain=GAIN, grid=grid).flatten()
        n = math.prod(shape)

        def slope(w):
            return torch.linalg.matrix_norm(jacrev(f)(w), 2)

        def curve(z):
            w, u, v = z.reshape(3, n)
            u, v = u / u.norm(), v / v.norm()
            return jvp(lambda w: jvp(f, (w,), (u,))[1], (w,), (v,))[1].norm()

        starts = [random_weight(n, seed=s, scale=0.2) for s in range(2)]
        found = largest(slope, starts, 20)
        assert found <= constants.slope_supremum <= slope_ratio * found
        pairs = [
            torch.cat([random_weight(n, seed=s, scale=0.3), *[random_weight(n, seed=9 + s)] * 2]) for s in range(2)
        ]
        found = largest(curve, pairs, 50)
        assert found <= constants.slope_lipschitz <= curve_ratio * found
        for s, scale in enumerate((0.0, 0.1, 1.0, 10.0)):
            w = random_weight(*shape, seed=s, scale=scale)
            least = float(torch.linalg.svdvals(jacrev(f)(w.flatten()))[-1])
            below = constants.slope_at_least(w.numpy())
            assert 0 < below <= least * (1 + 1e-12)
            assert below >= least / (2 if power == 1 and not symbol else 200)

    def test_the_two_comparisons_with_the_euclidean_norm_hold_and_are_nearly_reached(self):
        for power in (1, 2, 4):
            grid = GRIDS[power]
            constants = SchattenNormConstants(EPS, GAIN, power, 2, grid.factor, grid.points, grid.taps)
            one_tap = torch.zeros(2, 2, 3, dtype=F64)
            one_tap[:, :, 1] = torch.eye(2)  # the same at every frequency, both singular values equal: kappa
            aligned = torch.zeros(2, 2, 3, dtype=F64)
            aligned[0, 0, 0] = aligned[0, 0, 2] = 1.0
            tight = {}
            for w in (one_tap, aligned, *(random_weight(2, 2, 3, seed=s) for s in range(20))):
                length = 1 / float((schatten_norm(w, 1e-20, power, grid=grid) / w).nan_to_num().abs().max())
                ratio = length / float(w.norm())
                assert 1 / constants.kappa <= ratio * (1 + 1e-9) and ratio <= constants.beta * (1 + 1e-9)
                tight = {"least": min(tight.get("least", 9e9), ratio), "most": max(tight.get("most", 0), ratio)}
            assert tight["least"] <= 1.001 / constants.kappa and tight["most"] >= 0.7 * constants.beta

    def test_a_smaller_constant_fails(self):
        constants = SchattenNormConstants(EPS, GAIN, 16, 40)
        assert (
            constants.slope_supremum > 2 * GAIN * EPS**-0.5
        )  # beside eps^(-1/2), the bound of p = 1, the slope grows:
        w = torch.diag(torch.cat([torch.ones(1), torch.full((39,), 0.82)])).to(F64)
        steepest = torch.linalg.matrix_power(w, 31) / torch.linalg.matrix_power(w, 31).norm()
        f = lambda w: schatten_norm(w, EPS, 16, gain=GAIN)
        slopes = [float(jvp(f, (s * w,), (steepest,))[1].norm()) for s in (0.3, 0.6, 0.9)]
        assert 1.1 * GAIN * EPS**-0.5 < max(slopes) <= constants.slope_supremum


class TestLayers:
    def test_from_module_keeps_the_function_where_the_norm_is_in_range(self):
        for groups, options in ((1, {}), (2, {"bound": "kernel"}), (2, {"bound": "symbol", "power": 4})):
            plain = nn.Conv2d(4, 6, 3, padding=1, groups=groups, dtype=F64)
            ours = tnn.SpectralNormConv2d.from_module(plain, gain=6.0, eps=0.5, **options)
            x = random_weight(2, 4, 7, 6)
            assert_close(ours(x), plain(x), rtol=1e-12, atol=1e-13)
            assert torch.equal(ours.bias, plain.bias) and ours.weight.requires_grad
        plain = nn.Linear(5, 4)
        ours = tnn.SpectralNormLinear.from_module(plain, gain=3.0)
        assert_close(ours.effective_weight(), plain.weight, rtol=4e-7, atol=0)

    def test_a_norm_out_of_range_is_named_with_the_gain_that_does(self):
        plain = nn.Linear(3, 3, dtype=F64)
        plain.weight.data.copy_(5 * torch.eye(3))
        with pytest.raises(ConversionError) as caught:
            tnn.SpectralNormLinear.from_module(plain, power=1)
        assert str(caught.value) == (
            "SpectralNormLinear.from_module: group 0 of the weight has norm bound 8.66025, and gain=1 reaches only what "
            "is below it. Use gain=10.9, or nearest=True for the nearest weight in range."
        )
        near = tnn.SpectralNormLinear.from_module(plain, power=1, nearest=True)
        assert_close(near.effective_weight(), torch.eye(3, dtype=F64) / math.sqrt(3), rtol=1e-12, atol=0)

    def test_the_inverse_inverts(self):
        for shape, options in (((4, 5), {"groups": 2}), ((2, 2, 3), {"grid": GRIDS[2]})):
            w = random_weight(*shape, scale=3.0)
            p = schatten_norm(w, EPS, 2, gain=GAIN, **options)
            assert_close(schatten_norm_inverse(p, EPS, 2, gain=GAIN, **options), w, rtol=1e-12, atol=0)

    def test_the_parametrisation_inverts_at_assignment_and_bounds_every_step(self):
        layer = nn.Linear(6, 5, dtype=F64)
        before = layer.weight.detach().clone()
        nn.utils.parametrize.register_parametrization(layer, "weight", tnn.parametrizations.SchattenNorm(gain=2.0))
        assert_close(layer.weight, before, rtol=1e-12, atol=0)
        layer.parametrizations.weight.original.data.mul_(1e6)
        assert 1.5 < oracles.norm_of(layer.weight) < 2.0
        assert "power=16" in repr(layer)

    def test_training_at_a_rate_that_diverges_without_the_norm_keeps_it(self):
        torch.manual_seed(0)
        norms = []
        for layer in (tnn.SpectralNormConv2d(2, 2, 3, padding=1, dtype=F64), nn.Conv2d(2, 2, 3, padding=1, dtype=F64)):
            optimiser = torch.optim.SGD(layer.parameters(), lr=30.0)
            for _ in range(20):
                x = torch.randn(4, 2, 6, 6, dtype=F64)
                optimiser.zero_grad()
                (layer(x) - 3 * x).square().mean().backward()
                optimiser.step()
            norms.append(oracles.norm_of(oracles.matrix_of(layer, (2, 6, 6))))
        assert norms[0] < 1 and norms[1] > 1e3

    def test_options_that_change_the_layer_are_refused_or_act(self):
        with pytest.raises(ValueError, match="bound must be 'auto', 'symbol' or 'kernel', got 'tight'"):
            tnn.SpectralNormConv2d(2, 2, 3, bound="tight")
        with pytest.raises(ValueError, match="SpectralNormLinear: power must be"):
            tnn.SpectralNormLinear(2, 2, power=6)
        assert (
            tnn.SpectralNormConv2d(64, 256, 3).bound == "symbol"
            and tnn.SpectralNormConv2d(256, 256, 3).bound == "kernel"
        )
        layer = tnn.SpectralNormConv2d(2, 2, 3, bound="symbol")
        layer.power = 2  # the grid is for 16: no wrong number
        with pytest.raises(ValueError, match="the grid was made for power=16"):
            layer.effective_weight()

    def test_empty_layers_behave_as_torch_s(self):
        with pytest.warns(UserWarning, match="zero-element"):
            ours = tnn.SpectralNormLinear(0, 3)
        assert torch.equal(ours(torch.zeros(2, 0)), ours.bias.expand(2, 3))
        assert ours.operator_norm_bound() == ours.operator_norm_supremum() == 0.0

    def test_fold_gives_torch_s_layers(self):
        model = nn.Sequential(tnn.SpectralNormConv2d(2, 4, 3), nn.Flatten(), tnn.SpectralNormLinear(16, 3)).double()
        folded = tnn.fold(model)
        assert [type(m) for m in folded] == [nn.Conv2d, nn.Flatten, nn.Linear]
        assert not {"eps", "power", "bound", "_grid", "_factor"} & {name for m in folded for name in vars(m)}
        x = random_weight(2, 2, 4, 4)
        assert_close(folded(x), model(x), rtol=1e-14, atol=1e-14)
