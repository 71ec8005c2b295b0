"""The ends of a kernel's spectrum and what is proved of them; the parameter Jacobian as an operator; the prediction."""

import math

import mpmath
import numpy as np
import pytest
import torch
from oracles import matrix_with
from small_resnets import PostActBlock, PreActBlock, SmallResNet, filled
from test_ntk import CASES, build, dense_jacobian
from torch import Tensor, nn

import trainable_nn as tnn
from trainable_nn.linop import ParameterJacobian, kernel_extremes, noise_floor, ntk
from trainable_nn.linop.data_spectrum import least_eigenvalue_at_least
from trainable_nn.theory import predict_training


def symmetric_with(eigenvalues: list[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues, to rounding."""
    n = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    matrix = q * torch.tensor(eigenvalues, dtype=torch.float64) @ q.T
    return (matrix + matrix.T) / 2


class Products:
    """A kernel that is known by its products alone, which are counted."""

    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, kernel: Tensor) -> None:
        self.kernel, self.shape, self.count = kernel, (len(kernel), 10**9), 0

    def gram_mv(self, v: Tensor) -> Tensor:
        self.count += 1
        return self.kernel @ v


# of a ResNet-18 of width 16 at 100 images of noise with 10 outputs: eigenvalue number i over the smallest
RANKS = (0, 1, 2, 5, 10, 50, 100, 300, 500, 900, 980, 989)
BULK = (1.0, 1.0076, 1.0131, 1.051, 1.081, 1.251, 1.419, 2.134, 2.931, 7.10, 18.1, 36.95)


def kernel_like_spectrum(n: int, condition: float) -> list[float]:
    """That bulk, and ten outliers, one for the mean of each output, up to the condition number."""
    bulk = np.interp(np.linspace(0, 989, n - 10), RANKS, BULK).tolist()
    return bulk + [condition * (0.4 + 0.6 * i / 9) for i in range(10)]


# proved bounds


def exact_eigenvalues(matrix: Tensor) -> list:
    mpmath.mp.dps = 60
    return sorted(mpmath.eigsy(mpmath.matrix(matrix.tolist()), eigvals_only=True))


@pytest.mark.parametrize("seed", range(6))
def test_bounds_enclose_the_eigenvalues_of_fifty_digits(seed):
    spread = [10.0 ** (-3 * seed * i / 7) for i in range(8)]
    matrix = symmetric_with([(-1 if seed == 5 and i == 0 else 1) * s for i, s in enumerate(spread)], seed)
    exact, found = exact_eigenvalues(matrix), kernel_extremes(matrix)
    assert mpmath.mpf(found.smallest_at_least) <= exact[0] <= mpmath.mpf(found.smallest_at_most)
    assert mpmath.mpf(found.largest_at_least) <= exact[-1] <= mpmath.mpf(found.largest_at_most)
    size = float(matrix.abs().max())
    assert found.smallest_at_most - found.smallest_at_least <= 1e-10 * size  # and they are of use
    assert found.largest_at_most - found.largest_at_least <= 1e-10 * size


def test_a_lower_bound_does_not_come_from_a_guess_that_is_too_high():
    matrix = symmetric_with([0.5, 1.0, 2.0, 40.0])
    for guess in (0.5, 0.7, 3.0, 100.0, -5.0):
        bound = least_eigenvalue_at_least(matrix, guess)
        assert bound <= float(exact_eigenvalues(matrix)[0])


def test_a_singular_kernel_is_never_proved_definite():
    for seed in range(5):
        matrix = symmetric_with([0.0, 1e-3, 1.0, 7.0, 100.0], seed)
        assert kernel_extremes(matrix).smallest_at_least <= 0.0


def test_bounds_allow_for_the_error_of_the_entries():
    matrix = symmetric_with([1.0, 2.0, 5.0])
    other = matrix + symmetric_with([-0.1, 0.05, 0.1], 3)
    values, found = torch.linalg.eigvalsh(other), kernel_extremes(matrix, error=0.1)
    assert found.smallest_at_least <= values[0] and values[-1] <= found.largest_at_most
    assert found.smallest_at_least == pytest.approx(0.9, abs=1e-9) and found.largest_at_most == pytest.approx(5.1)


# products alone


def test_a_thousand_rows_at_condition_4e4_take_less_than_200_products():
    matrix = symmetric_with(kernel_like_spectrum(1000, 4e4))
    kernel = Products(matrix)
    found = kernel_extremes(kernel)
    smallest, largest = (float(v) for v in torch.linalg.eigvalsh(matrix)[[0, -1]])
    assert found.converged == (True, True) and found.products == kernel.count <= 200
    assert abs(found.smallest / smallest - 1) <= 1e-6 and abs(found.largest / largest - 1) <= 1e-9
    assert found.smallest >= smallest * (1 - 1e-9)  # a Ritz value, from above
    assert all(math.isnan(v) for v in (found.smallest_at_least, found.smallest_at_most, found.largest_at_most))


def test_restarts_reach_the_same_ends_in_less_room():
    matrix = symmetric_with(kernel_like_spectrum(300, 1e3))
    found = kernel_extremes(Products(matrix), basis=40, most_products=2000)
    values = torch.linalg.eigvalsh(matrix)
    assert found.converged == (True, True)
    assert found.smallest == pytest.approx(float(values[0]), rel=1e-5)
    assert found.largest == pytest.approx(float(values[-1]), rel=1e-9)


def test_what_has_not_converged_says_so():
    matrix = symmetric_with([10.0 ** (-6 * i / 399) for i in range(400)])
    found = kernel_extremes(Products(matrix), most_products=30)
    assert found.converged[0] is False and found.products <= 30
    assert found.smallest > 1.5e-6


def test_a_small_space_is_exhausted():
    found = kernel_extremes(Products(torch.eye(5, dtype=torch.float64) * 3))
    assert found.smallest == pytest.approx(3) and found.largest == pytest.approx(3)
    found = kernel_extremes(Products(torch.diag(torch.tensor([1.0, 1.0, 4.0, 4.0]).double())))
    assert (found.smallest, found.largest) == (pytest.approx(1), pytest.approx(4))


def test_more_outputs_than_parameters_leave_a_null_space():
    model, x = nn.Linear(2, 3).double(), torch.randn(5, 2, dtype=torch.float64)
    found = kernel_extremes(ParameterJacobian(model, x))
    assert (found.smallest, found.smallest_at_least, found.method) == (0.0, 0.0, "counting")
    jacobian = torch.cat(list(dense_jacobian(model, x).values()), 1)
    assert found.largest == pytest.approx(float(torch.linalg.svdvals(jacobian)[0]) ** 2)


def test_both_routes_of_a_jacobian_agree_with_its_singular_values():
    model = filled(SmallResNet(PreActBlock, 3, 3))
    jacobian = ParameterJacobian(model, torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double())
    values = torch.linalg.svdvals(torch.cat(list(dense_jacobian(model, jacobian.x).values()), 1))
    by_kernel, by_products = kernel_extremes(jacobian), kernel_extremes(jacobian, dense_up_to=0)
    assert (by_kernel.method, by_products.method) == ("dense", "lanczos")
    for found in (by_kernel, by_products):
        assert found.singular_values == (pytest.approx(float(values[-1])), pytest.approx(float(values[0])))
    assert by_kernel.smallest_at_least <= float(values[-1]) ** 2 <= by_kernel.smallest_at_most * (1 + 1e-12)
    assert by_kernel.condition_number == pytest.approx(float(values[0] / values[-1]) ** 2)


def test_a_rank_deficient_network_stays_above_minus_the_noise_floor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6))
    x = torch.randn(40, 1, 6, 6)[torch.arange(80) % 40]  # each sample twice: half of the eigenvalues are 0
    kernel = ntk(model, x)
    values, floor = torch.linalg.eigvalsh(kernel), noise_floor(kernel, torch.float32)
    assert values[0] >= -floor and values[239] <= floor < 1e-3 * values[-1]
    assert kernel_extremes(kernel, error=floor).smallest_at_least <= 0


BAD = {
    "unsymmetric": (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), ValueError, "not symmetric; entries differ by up to 2"),
    "no matrix": (torch.ones(3), ValueError, "a matrix"),
    "empty": (torch.ones(0, 0), ValueError, "n at least 1"),
    "integers": (torch.eye(3, dtype=torch.int64), TypeError, "must have floats"),
    "nan": (torch.eye(3) * torch.nan, ValueError, "NaN or infinite"),
    "a list": ([[1.0]], TypeError, "a matrix or a ParameterJacobian"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_kernel_is_refused(name):
    kernel, error, words = BAD[name]
    with pytest.raises(error, match=words):
        kernel_extremes(kernel)


@pytest.mark.parametrize("option", ({"tol": 0.0}, {"basis": 3}, {"most_products": 1}, {"error": -1.0}))
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        kernel_extremes(torch.eye(3), **option)


# the operator


@pytest.mark.parametrize("name", CASES)
def test_products_of_the_jacobian_are_those_of_the_dense_one(name):
    model, x = build(name)
    jacobian, dense = ParameterJacobian(model, x), torch.cat(list(dense_jacobian(model, x).values()), 1)
    assert jacobian.shape == dense.shape
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(jacobian.shape[1], 3, generator=draw, dtype=torch.float64)
    u = torch.randn(jacobian.shape[0], 2, generator=draw, dtype=torch.float64)
    for columns in (v, v[:, 0]):
        torch.testing.assert_close(jacobian.mv(columns), dense @ columns, rtol=1e-9, atol=1e-10)
    for columns in (u, u[:, 0]):
        torch.testing.assert_close(jacobian.rmv(columns), dense.T @ columns, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(jacobian.gram_mv(columns), dense @ (dense.T @ columns), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(jacobian.gram_mv(v[:, 0], side="inputs"), dense.T @ (dense @ v[:, 0]), rtol=1e-9, atol=1e-9)


def test_the_operator_leaves_the_model_alone_and_speaks_scipy():
    model, x = build("batch norm, training")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    jacobian = ParameterJacobian(model, x)
    operator, dense = jacobian.to_scipy(), jacobian.dense()
    u = torch.randn(jacobian.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(operator.rmatvec(u.numpy())), dense.T @ u, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    parts = jacobian.split(dense[0])
    assert list(parts) == [name for name, _ in model.named_parameters()]
    assert torch.equal(parts["4.bias"], torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_the_operator_refuses_what_it_cannot_take():
    model, x = build("linear")
    jacobian = ParameterJacobian(model, x)
    with pytest.raises(ValueError, match="ParameterJacobian.mv: a vector"):
        jacobian.mv(torch.ones(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="Convert the vector"):
        jacobian.mv(torch.ones(jacobian.shape[1]))
    with pytest.raises(ValueError, match="at least one sample"):
        ParameterJacobian(model, x[:0])
    with pytest.raises(ValueError, match="no parameter requires"):
        ParameterJacobian(nn.Tanh(), x)


# the prediction


def test_the_prediction_is_exact_for_a_linear_model_with_torchs_loss():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(5, 3).double(), torch.randn(5, 2).double()
    prediction = predict_training(ntk(model, x), model(x) - y)
    for share in (0.3, 0.9, 1.02):
        step, measured = share * prediction.largest_stable_step, []
        weights = torch.cat([model.weight, model.bias[:, None]], 1).detach().T
        rows = torch.cat([x, torch.ones(5, 1, dtype=torch.float64)], 1)
        for _ in range(30):
            residual = rows @ weights - y
            measured.append(float(residual.square().mean()))
            weights = weights - step * 2 / y.numel() * rows.T @ residual  # by hand: torch's mean over all numbers
        predicted = prediction.predict_loss(range(30), step)
        torch.testing.assert_close(predicted, torch.tensor(measured, dtype=torch.float64), rtol=1e-8, atol=1e-14)
    assert measured[-1] > measured[-2]  # just above the largest stable step the loss grows


def test_a_nonlinear_network_follows_it_at_first_order():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 1).double()
    prediction = predict_training(ntk(model, x), model(x) - y)
    errors = []
    for share in (0.1, 0.05):
        step = share * prediction.largest_stable_step
        parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
        named = dict(zip([n for n, _ in model.named_parameters()], parameters))
        loss = nn.functional.mse_loss(torch.func.functional_call(model, named, (x,)), y)
        moved = {n: p - step * g for (n, p), g in zip(named.items(), torch.autograd.grad(loss, parameters))}
        after = float(nn.functional.mse_loss(torch.func.functional_call(model, moved, (x,)), y).detach())
        assert after < float(loss.detach())
        errors.append(abs(prediction.predict_loss(1, step) - after))
    assert errors[1] < 0.35 * errors[0]  # quadratic in the step


def test_dimension_condition_rate_and_losses_of_a_known_spectrum():
    prediction = predict_training(torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([2.0, 1.0]), loss="half_square")
    assert prediction.largest_stable_step == pytest.approx(2 / 3)
    assert prediction.condition_number == pytest.approx(3)
    assert prediction.effective_dimension() == pytest.approx(16 / 10)
    assert prediction.effective_dimension(1.0) == pytest.approx(0.5 + 0.75)
    assert prediction.predict_loss(1, 0.5) == pytest.approx(0.5 * (4 * 0.25 + 0.25))
    assert prediction.rate(0.5) == pytest.approx(0.25)
    mean = predict_training(torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([2.0, 1.0]))
    assert mean.largest_stable_step == pytest.approx(2 / 3) and mean.predict_loss(0) == pytest.approx(2.5)
    with pytest.raises(ValueError, match="residual of n numbers"):
        predict_training(torch.eye(2), torch.ones(3))
    with pytest.raises(ValueError, match="steps must be at least 0"):
        mean.predict_loss(-1)


# the whole network


def test_a_sum_over_layers_bounds_lambda_from_below():
    """Paper A, proposition 4.6's spirit: each layer's part is positive semidefinite, so none can lower lambda(DF)."""
    model = filled(SmallResNet(PostActBlock, 3, 3))
    parts = ntk(model, torch.randn(4, 3, 8, 8, dtype=torch.float64), by_layer=True)
    whole = sum(parts.values())
    least = float(torch.linalg.eigvalsh(whole)[0])
    for part in parts.values():
        values = torch.linalg.eigvalsh(part)
        assert values[0] >= -noise_floor(part, torch.float64) and values[0] <= least * (1 + 1e-9)


def test_it_holds_for_a_matrix_of_known_singular_values():
    """F(w) = A w has DF = A for every w."""
    a = matrix_with([3.0, 2.0, 0.5], 3, 5, seed=0)

    class Applied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(5, 1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    found = kernel_extremes(ntk(Applied(), a))
    assert found.singular_values == (pytest.approx(0.5, rel=1e-12), pytest.approx(3.0, rel=1e-12))
    assert tnn.linop.ntk is ntk
