"""The proved norm against 60 digits, and the Jacobian operator against dense matrices."""

import math

import mpmath as mp
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from trainable_nn.linop import Jacobian, matrix_norm_at_most

F64 = torch.float64


def exact_norm(matrix: torch.Tensor) -> mp.mpf:
    """The spectral norm of these very floats, in 60 digits."""
    with mp.workdps(60):
        rows = [[mp.mpf(float(x)) for x in row] for row in matrix.double()]
        return max(mp.svd_r(mp.matrix(rows), compute_uv=False))


def encloses(bound: float, matrix: torch.Tensor, rtol: float) -> bool:
    truth = exact_norm(matrix)
    return truth <= bound <= truth * (1 + mp.mpf(rtol))


def small_matrices(count: int) -> list[torch.Tensor]:
    torch.manual_seed(3)
    shapes = [(1, 1), (1, 5), (4, 1), (2, 2), (3, 5), (6, 4), (5, 5)]
    return [torch.randn(shapes[i % 7], dtype=F64) * 10.0 ** (i % 11 - 5) for i in range(count)]


def test_the_bound_encloses_the_exact_norm_within_a_thousandth():
    assert all(encloses(matrix_norm_at_most(w), w, 1.01e-3) for w in small_matrices(70))


def test_with_a_small_tolerance_the_bound_is_tight_to_rounding():
    assert all(encloses(matrix_norm_at_most(w, rtol=1e-13), w, 1e-11) for w in small_matrices(35))


def test_the_float_norm_of_lapack_is_no_upper_bound():
    """The law above can fail: rounding to nearest is below the truth for many of the same matrices."""
    below = [not exact_norm(w) <= oracles.norm_of(w) for w in small_matrices(70)]
    assert sum(below) >= 5


@seed(0)
@settings(max_examples=60, deadline=None)
@given(st.integers(-1074, 1020), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_the_bound_holds_from_denormals_to_the_largest_floats(exponent, rows, columns, number):
    torch.manual_seed(number)
    w = torch.rand(rows, columns, dtype=F64).mul(2).sub(1)
    w = torch.from_numpy(np.ldexp(w.numpy(), exponent))
    assert exact_norm(w) <= matrix_norm_at_most(w)


@pytest.mark.parametrize("largest", [torch.finfo(F64).max / 1.01, torch.finfo(torch.float32).max, 5e-324, 1e-310])
def test_extreme_entries_neither_overflow_nor_vanish(largest):
    w = torch.tensor([[largest, 0.0], [0.0, largest / 2]], dtype=F64)
    assert encloses(matrix_norm_at_most(w), w, 1.1e-3 if largest > 1e-300 else 1.01)
    mixed = torch.tensor([[largest, 1e-300], [1e-320, 1.0]], dtype=F64)
    assert exact_norm(mixed) <= matrix_norm_at_most(mixed)


def test_a_norm_past_the_largest_float_is_infinite():
    assert matrix_norm_at_most(torch.full((2, 2), torch.finfo(F64).max, dtype=F64)) == math.inf


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (4, 5)])
def test_zero_and_empty_matrices_have_norm_zero(shape):
    assert matrix_norm_at_most(torch.zeros(shape)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_every_float_dtype_is_read_exactly(dtype):
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)
    assert encloses(matrix_norm_at_most(w), w, 1.1e-3)


def test_a_random_square_matrix_is_bounded_within_a_hundredth():
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    truth = oracles.norm_of(w)
    assert truth * (1 - 1e-13) <= matrix_norm_at_most(w) <= truth * 1.01


@pytest.mark.parametrize("spectrum", [[1.0] * 40, [1.0] + [0.999] * 39, [3.0, 1e-9], [1.0, 0.5, 0.25]])
def test_a_flat_or_steep_spectrum_is_bounded_within_the_tolerance(spectrum):
    w = oracles.matrix_with(spectrum, 60, 45, seed=2)
    assert spectrum[0] * (1 - 1e-14) <= matrix_norm_at_most(w) <= spectrum[0] * (1 + 1.01e-3)


def test_fewer_steps_are_still_a_bound_but_not_as_tight():
    w = oracles.matrix_with([1.0] * 40, 60, 45, seed=2)
    loose, tight = (matrix_norm_at_most(w, rtol=r) for r in (0.5, 1e-4))
    assert 1 <= tight * (1 + 1e-14) < 1.0002 < loose <= 1.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_entries_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        matrix_norm_at_most(torch.tensor([[1.0, bad]]))


def test_integers_and_vectors_are_refused():
    with pytest.raises(TypeError, match="real floats"):
        matrix_norm_at_most(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="a matrix is needed"):
        matrix_norm_at_most(torch.ones(3))


class TestJacobian:
    A = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)

    @pytest.fixture(params=[(2, 4), (4,), (7, 4)], ids=str)
    def pair(self, request):
        x = torch.randn(request.param, generator=torch.Generator().manual_seed(1), dtype=F64)
        f = lambda z: torch.sin(z @ self.A.T).cumsum(-1) * z.sum()
        dense = torch.autograd.functional.jacobian(f, x).reshape(f(x).numel(), x.numel())
        return Jacobian(f, x, chunk_size=3), dense

    def test_all_products_are_those_of_the_dense_matrix(self, pair):
        operator, dense = pair
        right = torch.randn(dense.shape[1], 5, dtype=F64)
        left = torch.randn(dense.shape[0], 5, dtype=F64)
        close = {"rtol": 1e-12, "atol": 1e-12}
        assert operator.shape == tuple(dense.shape)
        torch.testing.assert_close(operator.dense(), dense, **close)
        torch.testing.assert_close(operator.mv(right), dense @ right, **close)
        torch.testing.assert_close(operator.mv(right[:, 0]), dense @ right[:, 0], **close)
        torch.testing.assert_close(operator.rmv(left), dense.T @ left, **close)
        torch.testing.assert_close(operator.gram_mv(left), dense @ (dense.T @ left), rtol=1e-12, atol=1e-10)
        assert operator.mv(right[:, :0]).shape == (dense.shape[0], 0)

    def test_scipy_gets_the_same_operator(self, pair):
        operator, dense = pair
        scipy_operator = operator.to_scipy()
        np.testing.assert_allclose(scipy_operator @ np.eye(dense.shape[1]), dense, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(scipy_operator.T @ np.ones(dense.shape[0]), dense.T.sum(1), rtol=1e-12, atol=1e-12)

    def test_a_transposed_matrix_would_be_noticed(self, pair):
        operator, dense = pair
        assert operator.dense().shape != dense.T.shape or not torch.allclose(operator.dense(), dense.T)

    def test_a_vector_of_another_length_is_refused(self, pair):
        operator, dense = pair
        with pytest.raises(ValueError, match=r"Jacobian.rmv: a vector"):
            operator.rmv(torch.zeros(dense.shape[0] + 1, dtype=F64))
        with pytest.raises(ValueError, match="chunk_size"):
            Jacobian(torch.sin, torch.zeros(2), chunk_size=0)
