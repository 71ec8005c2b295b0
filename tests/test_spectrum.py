"""Extreme singular values against matrices of known spectrum, and what is claimed against what the residual shows.

``SPECTRUM_LARGE=1 pytest tests/test_spectrum.py -k resnet`` adds layers of up to 4,096 unknowns, in some minutes.
"""

import dataclasses
import math
import os
import random

import numpy as np
import oracles
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import nn

import trainable_nn as tnn
from trainable_nn.linop import (
    ConvParameterJacobian,
    Extremes,
    Jacobian,
    ToeplitzConv,
    block_inverse,
    extreme_singular_values,
    slabs,
    spectrum,
)
from trainable_nn.linop.block_inverse import Gram, Lu, pseudo_inverse
from trainable_nn.linop.golub_kahan import Bases
from trainable_nn.linop.products import products_of

F64 = torch.float64
SPECTRA = {
    "spread": [3.0, 2.0, 1.0],
    "one value": [0.7] * 10,
    "two clusters": [1.0] + [0.999] * 39,
    "steep": [1.0, 1e-3, 1e-8],
    "clustered at both ends": [2.0] * 5 + [1.5] * 60 + [1e-5] * 5,
    "close clusters": [1.0 - 1e-9 * i for i in range(8)] + [0.5] * 20 + [1e-3 * (1 + 1e-7 * i) for i in range(8)],
    "even": [1.0 - i / 200 for i in range(100)],
    "geometric": [0.8**i for i in range(60)],
    "single": [5.0],
}
SHAPES = {"square": (0, 0), "tall": (23, 0), "wide": (0, 31)}


class Bare:
    """shape, mv and rmv on single vectors, and nothing else."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix, self.shape, self.calls = matrix, tuple(matrix.shape), 0

    def mv(self, v):
        assert v.dim() == 1
        self.calls += 1
        return self.matrix @ v

    def rmv(self, u):
        assert u.dim() == 1
        self.calls += 1
        return self.matrix.T @ u


@pytest.mark.parametrize("dense_up_to", [0, 2048], ids=["golub-kahan", "dense"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_both_ends_of_a_prescribed_spectrum_are_found(name, shape, dense_up_to):
    spectrum, extra = SPECTRA[name], SHAPES[shape]
    matrix = oracles.matrix_with(spectrum, len(spectrum) + extra[0], len(spectrum) + extra[1], seed=3)
    found = extreme_singular_values(Bare(matrix), dense_up_to=dense_up_to)
    assert found.largest_converged
    assert abs(found.largest - spectrum[0]) <= 1e-6 * spectrum[0]
    assert abs(found.smallest - min(spectrum)) <= 1e-6 * min(spectrum) + 1e-14 * spectrum[0]
    assert found.smallest >= min(spectrum) * (1 - 1e-6) - 1e-14 * spectrum[0]
    assert found.side == ("outputs" if shape == "wide" else "inputs")
    assert found.method == ("dense" if dense_up_to else "golub-kahan")


def test_what_is_called_converged_lies_within_the_tolerance():
    """Over random matrices, sizes, tolerances and budgets: never a claim that the residual does not show."""
    claims = {True: 0, False: 0}
    for seed in range(160):
        generator = torch.Generator().manual_seed(seed)
        n, m = (int(torch.randint(1, 160, (), generator=generator)) for _ in range(2))
        power = float(torch.rand((), generator=generator)) * 12
        spectrum = (10.0 ** (-power * torch.rand(min(n, m), generator=generator, dtype=F64))).tolist()
        matrix = oracles.matrix_with(spectrum, n, m, seed=seed)
        tol = 10.0 ** -(2 + seed % 7)
        found = extreme_singular_values(matrix, tol=tol, dense_up_to=0, most_products=8 + 3 * seed, seed=seed)
        truth = torch.linalg.svdvals(matrix)
        for i, value, true in ((0, found.smallest, truth[-1]), (1, found.largest, truth[0])):
            claims[found.converged[i]] += 1
            nearest = float((truth - value).abs().amin())
            assert nearest <= found.residuals[i] + 1e-13 * float(truth[0])
            if found.converged[i]:
                assert abs(value - float(true)) <= tol * float(true)
        assert float(truth[-1]) - 1e-13 * float(truth[0]) <= found.smallest  # from above, to rounding
        assert found.largest <= float(truth[0]) * (1 + 1e-13)
    assert min(claims.values()) > 50


def test_the_residuals_are_those_of_triplets_of_the_map():
    matrix = torch.randn(90, 70, dtype=F64, generator=torch.Generator().manual_seed(1))
    found = extreme_singular_values(matrix, dense_up_to=0, most_products=30)
    truth = torch.linalg.svdvals(matrix)
    assert not any(found.converged)
    for value, residual in ((found.smallest, found.residuals[0]), (found.largest, found.residuals[1])):
        assert 1e-4 < residual / float(truth[0]) < 1
        assert float((truth - value).abs().amin()) <= residual


def test_a_cut_short_run_is_not_called_converged_and_a_long_one_is():
    """Too few products give a wrong value, which nothing claims; the law above has something to catch."""
    matrix = oracles.matrix_with([1.0 - i / 2000 for i in range(300)], 300, 300, seed=4)
    short = extreme_singular_values(matrix, which="largest", most_products=12)
    long = extreme_singular_values(matrix, which="largest")
    assert not short.largest_converged
    assert abs(short.largest - 1) > 1e-4
    assert long.largest_converged
    assert abs(long.largest - 1) < 1e-9


@pytest.mark.parametrize("smallest", [1e-13, 1e-15, 0.0])
@pytest.mark.parametrize("dense_up_to", [0, 2048])
def test_a_smallest_value_at_the_level_of_rounding_is_not_called_converged(smallest, dense_up_to):
    matrix = oracles.matrix_with([1.0, 0.5, 0.25, smallest], 9, 4, seed=5)
    found = extreme_singular_values(matrix, dense_up_to=dense_up_to)
    assert found.largest_converged
    assert not found.smallest_converged
    assert abs(found.smallest - smallest) <= 1e-14


def test_a_restart_keeps_both_relations():
    """A V = U B and A^T U = V B^T + r e_last^T, with orthonormal U and V, before and after restarts."""
    matrix = torch.randn(120, 100, dtype=F64, generator=torch.Generator().manual_seed(2))
    products = products_of("here", matrix)
    bases = Bases(products.mv, products.rmv, 120, 100, 16, products, seed=0)
    for step in range(60):
        if bases.size == bases.room:
            bases.restart("both")
        bases.extend()
        k, scaled = bases.size, matrix / products.unscaled(1.0)
        u, v, b = bases.u[:k].T, bases.v[:k].T, bases.b[:k, :k]
        rest = torch.zeros(100, k, dtype=F64)
        rest[:, -1] = bases.beta * bases.next
        gaps = (scaled @ v - u @ b, scaled.T @ u - v @ b.T - rest, u.T @ u - torch.eye(k), v.T @ v - torch.eye(k))
        assert max(float(gap.abs().max()) for gap in gaps) < 1e-12, step


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_one_end_alone_leaves_the_other_unknown(which):
    matrix = torch.diag(torch.linspace(1, 3, 50, dtype=F64))
    found = extreme_singular_values(matrix, which=which, dense_up_to=0)
    other = "smallest" if which == "largest" else "largest"
    assert abs(getattr(found, which) - (3 if which == "largest" else 1)) < 1e-6
    assert math.isnan(getattr(found, other))
    assert getattr(found, f"{which}_converged")
    assert not getattr(found, f"{other}_converged")


def test_the_smallest_of_a_wide_matrix_is_that_of_the_output_side():
    """J^T J of a wide J has zeros; the smallest of min(outputs, inputs) singular values is not one of them."""
    for rows, columns in ((40, 100), (100, 40)):
        matrix = torch.randn(rows, columns, dtype=F64, generator=torch.Generator().manual_seed(6))
        found = extreme_singular_values(matrix, dense_up_to=0)
        assert abs(found.smallest - float(torch.linalg.svdvals(matrix)[-1])) < 1e-6
        assert found.smallest_converged
        assert found.side == ("outputs" if rows < columns else "inputs")


OPERATORS = {
    "torch": lambda a: a,
    "sparse": lambda a: a.to_sparse_csr(),
    "float32 read exactly": lambda a: a.float().double().float(),
    "bare": Bare,
    "jacobian": lambda a: Jacobian(lambda x: x @ a.T, torch.zeros(a.shape[1], dtype=F64)),
    "scipy": lambda a: scipy.sparse.linalg.aslinearoperator(a.numpy()),
    "scipy sparse": lambda a: scipy.sparse.linalg.aslinearoperator(scipy.sparse.csr_matrix(a.numpy())),
}


@pytest.mark.parametrize("dense_up_to", [0, 2048])
@pytest.mark.parametrize("kind", OPERATORS)
def test_every_object_with_two_products_is_taken(kind, dense_up_to):
    matrix = oracles.matrix_with([2.0, 1.0, 0.5, 0.25], 8, 6, seed=7)[:, :4]
    found = extreme_singular_values(OPERATORS[kind](matrix), dense_up_to=dense_up_to)
    truth = torch.linalg.svdvals(matrix)
    rtol = 1e-7 if "32" in kind else 1e-12
    assert abs(found.largest - float(truth[0])) <= rtol * float(truth[0])
    assert abs(found.smallest - float(truth[-1])) <= 10 * rtol * float(truth[0])
    assert found.largest_converged


def test_complex_maps_have_real_singular_values():
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(3, 2, 3, generator=generator, dtype=torch.complex64)
    operator = ToeplitzConv(weight, (2, 9), padding=1)
    truth = torch.linalg.svdvals(operator.to(torch.complex128).dense())
    for dense_up_to in (0, 2048):
        found = extreme_singular_values(operator, dense_up_to=dense_up_to)
        assert abs(found.largest - float(truth[0])) < 1e-12
        assert abs(found.smallest - float(truth[-1])) < 1e-6 * float(truth[-1])
        assert all(found.converged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_a_convolution_of_any_dtype_is_read_exactly(dtype):
    torch.manual_seed(9)
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, dtype=dtype)
    truth = torch.linalg.svdvals(oracles.matrix_of(nn.Conv2d.double(layer), (4, 8, 8)))
    found = extreme_singular_values(ToeplitzConv(layer.to(dtype), (4, 8, 8)))
    assert abs(found.largest - float(truth[0])) <= 1e-12 * float(truth[0])
    assert abs(found.smallest - float(truth[-1])) <= 1e-6 * float(truth[-1])
    assert all(found.converged)
    largest = extreme_singular_values(ToeplitzConv(layer, (4, 8, 8)), which="largest")
    assert abs(largest.largest - float(truth[0])) <= 1e-6 * float(truth[0])


def test_products_in_float32_show_no_more_than_float32():
    """The same convolution through a Jacobian in float32: the largest to 1e-5, and no claim at 1e-9."""
    torch.manual_seed(10)
    layer = tnn.WeightNormConv2d(2, 3, 3, padding=1)
    operator = Jacobian(lambda x: layer(x.unsqueeze(0)), torch.zeros(2, 5, 5))
    truth = torch.linalg.svdvals(ToeplitzConv(layer, (2, 5, 5)).to(F64).dense().detach())
    for dense_up_to in (0, 2048):
        found = extreme_singular_values(operator, tol=1e-5, dense_up_to=dense_up_to)
        assert abs(found.largest - float(truth[0])) <= 1e-5 * float(truth[0])
        assert found.largest_converged
        assert not any(extreme_singular_values(operator, tol=1e-9, dense_up_to=dense_up_to).converged)


def test_golub_kahan_alone_claims_no_smallest_of_a_large_convolution():
    """Nor does a map that doesn't tell it is a convolution; its blocks have the value that Golub-Kahan misses."""
    torch.manual_seed(11)
    operator = ToeplitzConv(nn.Conv2d(8, 8, 3, padding=1), (8, 12, 12)).to(F64)  # 1,152 unknowns
    truth = torch.linalg.svdvals(operator.dense().detach())
    found = extreme_singular_values(Bare(operator.dense().detach()), most_products=400, dense_up_to=1000)
    assert found.method == "golub-kahan"
    assert found.largest_converged
    assert abs(found.largest - float(truth[0])) <= 1e-6 * float(truth[0])
    assert not found.smallest_converged
    assert found.smallest > 2 * float(truth[-1])  # what a missing flag would have called exact
    assert found.residuals[0] > 1e-3 * found.smallest
    assert 300 < found.products <= 400
    whole = extreme_singular_values(operator)
    assert whole.method == "block inverse"
    assert all(whole.converged)
    assert abs(whole.smallest - float(truth[-1])) <= 1e-6 * float(truth[-1])
    assert abs(whole.largest - float(truth[0])) <= 1e-6 * float(truth[0])


def random_convolution(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Of any geometry and padding; every fifth with most of its entries zero, so that many are singular."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    arguments, sizes = oracles.random_geometry(rng, rng.choice((1, 2, 2, 3)))
    conv = oracles.CONVOLUTIONS[len(sizes)](**arguments, bias=False, dtype=F64)
    if seed % 5 == 4:
        conv.weight.data *= torch.rand_like(conv.weight) < 0.3
    return conv, (conv.in_channels, *sizes)


def test_the_ends_of_any_convolution_are_those_of_its_dense_matrix(monkeypatch):
    """Every claim holds; what is not claimed is singular; never below the truth. With slabs of a row or two."""
    monkeypatch.setattr(slabs, "LEAST_BLOCK", 6)
    claims, methods = {True: 0, False: 0}, set()
    for seed in range(120):
        conv, shape = random_convolution(seed)
        truth = torch.linalg.svdvals(oracles.matrix_of(conv, shape))
        low, high = float(truth[-1]), float(truth[0])
        found = extreme_singular_values(ToeplitzConv(conv, shape), dense_up_to=0)
        noise = 1e-13 * high
        assert found.largest_converged
        assert abs(found.largest - high) <= 1e-6 * high
        assert found.smallest >= low - noise, seed
        if found.smallest_converged:
            assert abs(found.smallest - low) <= 1e-6 * low + noise, (seed, found)
        else:
            assert low < 1e-7 * high, (seed, found)
        claims[found.smallest_converged] += 1
        methods.add(found.method)
    assert claims[True] > 90
    assert claims[False] > 3
    assert methods >= {"block inverse", "fourier", "kernel", "counting"}


@pytest.mark.parametrize("name", ["random", "identity and noise", "identity", "transposed", "float32"])
def test_the_smallest_value_is_found_where_others_lie_beside_it(name):
    """To 1e-6 of LAPACK's, square and clustered; an isometry has all of them there."""
    torch.manual_seed(1)
    conv = nn.Conv2d(6, 6, 3, padding=1, bias=False, dtype=F64)
    if name.startswith("identity"):
        conv.weight.data *= 0.0 if name == "identity" else 0.3
        conv.weight.data[range(6), range(6), 1, 1] += 1.0
    if name == "transposed":
        plain, conv = conv, nn.ConvTranspose2d(6, 6, 3, padding=1, bias=False, dtype=F64)
        conv.weight.data.copy_(plain.weight.data)
    truth = torch.linalg.svdvals(oracles.matrix_of(conv, (6, 9, 8)))
    operator = ToeplitzConv(conv, (6, 9, 8))
    if name == "float32":
        operator = operator.to(torch.float32)
        truth = torch.linalg.svdvals(oracles.matrix_of(conv.float().double(), (6, 9, 8)))
    found = extreme_singular_values(operator, dense_up_to=0, tol=1e-7)
    assert (found.method, found.smallest_converged) == ("block inverse", True)
    assert abs(found.smallest / float(truth[-1]) - 1) < 1e-9
    assert found.residuals[0] <= 1e-7 * found.smallest


RESNET = [(4, 4, 16, 1), (4, 8, 16, 2), (8, 8, 8, 1), (8, 16, 8, 2), (16, 16, 4, 1), (16, 32, 4, 2), (32, 32, 2, 1)]
if os.environ.get("SPECTRUM_LARGE"):  # minutes: dense matrices of up to 4,096 rows, which LAPACK takes ten seconds for
    RESNET += [(64, 64, 8, 1), (16, 16, 16, 1), (128, 256, 4, 2), (256, 256, 4, 1)]


@pytest.mark.parametrize(("channels", "out", "n", "stride"), RESNET)
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_layers_of_a_narrow_resnet_agree_with_their_dense_svd(channels, out, n, stride, kernel):
    torch.manual_seed(n)
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    truth = torch.linalg.svdvals(oracles.matrix_of(conv.double(), (channels, n, n)))
    found = extreme_singular_values(ToeplitzConv(conv, (channels, n, n)), dense_up_to=0)
    assert all(found.converged)
    if kernel == 1 and stride == 2:  # three of four inputs are not read, half as many values as rows
        assert (found.smallest, found.method) == (0.0, "kernel")
        assert float(truth[-1]) < 1e-15
    else:
        assert abs(found.smallest - float(truth[-1])) <= 1e-6 * float(truth[-1])
    assert abs(found.largest - float(truth[0])) <= 1e-6 * float(truth[0])


def test_a_wrong_inverse_is_not_believed(monkeypatch):
    """The residual is measured with products of the map: an inverse of another convolution ends in no claim."""
    torch.manual_seed(2)
    operator = ToeplitzConv(nn.Conv2d(5, 5, 3, padding=1, dtype=F64), (5, 8, 8))
    truth = float(torch.linalg.svdvals(operator.dense().detach())[-1])
    other = pseudo_inverse(operator.geometry, torch.randn(5, 5, 3, 3, dtype=F64))
    monkeypatch.setattr(spectrum, "pseudo_inverse", lambda *arguments: other)
    found = extreme_singular_values(operator, dense_up_to=0)
    assert not found.smallest_converged
    assert found.smallest > truth * (1 + 1e-6)
    assert found.residuals[0] > 1e-3 * found.smallest


def test_an_ill_conditioned_convolution_is_measured_or_not_claimed():
    """Kernel 1, c, 1 with c near 2 cos(pi / 33): down to the level of rounding, where no claim is made."""
    claims = []
    for digits in range(2, 17):
        kernel = torch.tensor([[[1.0, -2 * math.cos(math.pi / 33) * (1 + 10.0**-digits), 1.0]]], dtype=F64)
        operator = ToeplitzConv(kernel, (1, 32), padding=1)
        truth = min(abs(float(kernel[0, 0, 1]) + 2 * math.cos(math.pi * k / 33)) for k in range(1, 33))
        found = extreme_singular_values(operator, dense_up_to=0)
        claims.append(found.smallest_converged)
        assert found.smallest >= truth - 1e-14
        assert abs(found.smallest - truth) <= 1e-14 + 1e-6 * truth
    assert claims[:6] == [True] * 6  # down to 1e-7
    assert not any(claims[10:])


def test_the_pseudo_inverse_is_that_of_the_dense_matrix(monkeypatch):
    monkeypatch.setattr(slabs, "LEAST_BLOCK", 8)
    cases = [
        ((4, 4, 3, 3), (4, 6, 5), {"padding": 1}, Lu),
        ((4, 4, 5, 3), (4, 7, 5), {"padding": (2, 1)}, Lu),
        ((8, 2, 2, 2), (2, 6, 6), {"stride": 2}, Lu),
        ((4, 2, 3), (4, 50), {"padding": 1, "groups": 2}, Lu),
        ((4, 4, 3, 3), (4, 6, 5), {"padding": 1, "padding_mode": "reflect"}, Lu),
        ((8, 4, 3, 3), (4, 6, 6), {"padding": 1, "stride": 2}, Gram),
        ((4, 8, 3, 3), (8, 4, 5), {"padding": 1}, Gram),
        ((8, 4, 3, 3), (4, 4, 5), {"padding": 1}, Gram),
    ]
    for shape, image, arguments, kind in cases:
        kernel = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=F64)
        operator = ToeplitzConv(kernel, image, **arguments)
        inverse, truth = pseudo_inverse(operator.geometry, kernel), torch.linalg.pinv(operator.dense())
        u, v = (torch.randn(n, dtype=F64) for n in operator.shape)
        assert isinstance(inverse.inverse, kind)
        assert len(inverse.cut.outputs) > 1
        assert inverse.error < 1e-8
        assert (inverse.mv(u) - truth @ u).norm() <= 1e-8 * (truth @ u).norm()
        assert (inverse.rmv(v) - truth.T @ v).norm() <= 1e-8 * (truth.T @ v).norm()


def test_what_takes_too_much_memory_is_left_to_golub_kahan(monkeypatch):
    monkeypatch.setattr(block_inverse, "MOST_BYTES", 1000)
    torch.manual_seed(0)
    operator = ToeplitzConv(nn.Conv2d(4, 4, 3, padding=1), (4, 12, 12))
    found = extreme_singular_values(operator, dense_up_to=0, most_products=60)
    assert (found.method, found.smallest_converged) == ("golub-kahan", False)


def test_the_parameter_jacobian_is_taken_too():
    layer = tnn.EntryNormConv1d(2, 3, 3, dtype=F64)
    operator = ConvParameterJacobian(layer, torch.randn(4, 2, 8, dtype=F64, generator=torch.Generator().manual_seed(0)))
    truth = torch.linalg.svdvals(operator.dense().detach())
    for dense_up_to in (0, 2048):
        found = extreme_singular_values(operator, dense_up_to=dense_up_to)
        assert abs(found.largest - float(truth[0])) <= 1e-6 * float(truth[0])
        assert abs(found.smallest - float(truth[-1])) <= 1e-6 * float(truth[-1])


@pytest.mark.parametrize("exponent", [-1060, -700, -300, 300, 700, 1000])
@pytest.mark.parametrize("dense_up_to", [0, 2048])
def test_entries_of_any_size_neither_overflow_nor_vanish(exponent, dense_up_to):
    matrix = torch.from_numpy(np.ldexp(oracles.matrix_with([1.0, 0.5, 0.25], 6, 3, seed=12).numpy(), exponent))
    found = extreme_singular_values(matrix, dense_up_to=dense_up_to, tol=1e-4)
    rtol = 1e-3 if exponent < -1000 else 1e-9  # denormal entries have few digits
    assert abs(found.largest / math.ldexp(1.0, exponent) - 1) < rtol
    assert abs(found.smallest / math.ldexp(0.25, exponent) - 1) < rtol
    assert all(found.converged) or exponent < -1000


@pytest.mark.parametrize("dense_up_to", [0, 2048])
def test_a_zero_map_has_singular_values_zero(dense_up_to):
    found = extreme_singular_values(torch.zeros(4, 7), dense_up_to=dense_up_to)
    assert (found.smallest, found.largest, found.residuals, found.converged) == (0.0, 0.0, (0.0, 0.0), (True, True))


def test_the_products_are_counted_and_the_same_seed_gives_the_same():
    matrix = torch.randn(80, 60, dtype=F64, generator=torch.Generator().manual_seed(13))
    bare = Bare(matrix)
    found = extreme_singular_values(bare, dense_up_to=0)
    assert found.products == bare.calls
    assert found == extreme_singular_values(matrix, dense_up_to=0)
    dense = Bare(matrix)
    assert extreme_singular_values(dense).products == dense.calls == 60
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.largest = 0.0


def test_the_callers_graph_and_random_state_are_left_alone():
    layer = nn.Conv1d(1, 1, 3)
    state = torch.get_rng_state()
    found = extreme_singular_values(ToeplitzConv(layer, (1, 9)), dense_up_to=0)
    assert torch.equal(state, torch.get_rng_state())
    assert isinstance(found, Extremes)
    assert isinstance(found.largest, float)
    assert layer.weight.grad is None


class Wrong(Bare):
    def mv(self, v):
        return torch.ones(3, dtype=F64)


class Integers(Bare):
    dtype = torch.int64


BAD = {
    "a module": (
        lambda: extreme_singular_values(nn.Linear(2, 2)),
        TypeError,
        "Linear has neither mv and rmv nor matvec",
    ),
    "an array": (lambda: extreme_singular_values(np.eye(2)), TypeError, "Pass a matrix as a tensor"),
    "empty": (
        lambda: extreme_singular_values(torch.zeros(0, 3)),
        ValueError,
        r"both at least 1, is needed, got \(0, 3\)",
    ),
    "a vector": (lambda: extreme_singular_values(torch.zeros(3)), ValueError, r"got \(3,\)"),
    "integers": (lambda: extreme_singular_values(torch.eye(2).long()), TypeError, "must be floats, got torch.int64"),
    "an integer map": (lambda: extreme_singular_values(Integers(torch.eye(2))), TypeError, "must be floats"),
    "meta": (lambda: extreme_singular_values(torch.eye(2, device="meta")), ValueError, "on the meta device"),
    "nan": (lambda: extreme_singular_values(torch.eye(2) / 0), ValueError, "NaN or infinite. Check its weights"),
    "half overflows": (
        lambda: extreme_singular_values(Jacobian(lambda x: 6e4 * (x + x), torch.zeros(4, dtype=torch.float16))),
        ValueError,
        "scale them if torch.float16 overflows",
    ),
    "lengths": (
        lambda: extreme_singular_values(Wrong(torch.eye(2))),
        ValueError,
        "gave 3 numbers, and the map's shape",
    ),
    "tol": (lambda: extreme_singular_values(torch.eye(2), tol=0.0), ValueError, "tol must be between 0 and 1, got 0.0"),
    "tol nan": (lambda: extreme_singular_values(torch.eye(2), tol=math.nan), ValueError, "tol must be between"),
    "which": (lambda: extreme_singular_values(torch.eye(2), which="middle"), ValueError, "one of both, largest, small"),
    "budget": (lambda: extreme_singular_values(torch.eye(2), most_products=7), ValueError, "at least 8, four of them"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case):
    make, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        make()
