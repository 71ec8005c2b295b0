"""The explicit rows of a convolution's weight, made whole or in parts, and their products."""

import math
import random

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from trainable_nn.certify.kernel_error.bound import ADDITIONS
from trainable_nn.linop import ntk
from trainable_nn.linop.gram import contract, inner
from trainable_nn.linop.gram.features import Factors
from trainable_nn.linop.gram.rows import tiles

GEOMETRIES = [(3, 1, 1, 1), (3, 2, 1, 1), (2, 3, 2, 2), (5, 1, 4, 1), (1, 2, 0, 1)]


def network(geometry: tuple[int, ...], outputs: int) -> nn.Module:
    """A convolution with few channels for its positions, and another number of taps on the second axis."""
    taps, stride, padding, dilation = geometry
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 2, (taps, 2), stride, padding, dilation)
    return nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, outputs))


def images(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(5, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def dense_kernel(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    rows = jacrev(lambda p: functional_call(model, p, (x,)).flatten())(parameters).values()
    return sum(r.flatten(1) @ r.flatten(1).T for r in rows)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rows_by_a_convolutions_own_pass_give_the_kernel(monkeypatch, geometry, outputs):
    """Whole, and one channel of the output at a time."""
    model, x = network(geometry, outputs), images(torch.float32)
    calls, whole = [], contract._cut

    def noted(*arguments):
        calls.append(whole(*arguments))
        return calls[-1]

    monkeypatch.setattr(contract, "cheapest", lambda *a: "explicit")
    monkeypatch.setattr(contract, "_cut", noted)
    expected = dense_kernel(model.double(), x.double())
    model.float()
    assert relative(ntk(model, x), expected) <= 1e-5
    monkeypatch.setattr(contract, "LEAST_WHOLE", 1)
    monkeypatch.setattr(contract, "ROWS", 4 * 5 * outputs * 3 * 2 * geometry[0])
    assert relative(ntk(model, x), expected) <= 1e-5
    if torch.backends.mkldnn.is_available():
        assert [(made, width) for made, width, _ in calls if made] == [(True, 2), (True, 1)]


@pytest.mark.parametrize("numbers", [1, 7, 10**6])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rows_in_parts_of_any_size_give_the_kernel(monkeypatch, geometry, numbers):
    model, x = network(geometry, 3).double(), images(torch.float64)
    monkeypatch.setattr(contract, "cheapest", lambda *a: "explicit")
    monkeypatch.setattr(contract, "PART", 8 * 5 * 3 * numbers)
    monkeypatch.setattr(contract, "LEAST", 2)
    monkeypatch.setattr(contract, "FEWEST", 1)
    assert relative(ntk(model, x), dense_kernel(model, x)) <= 1e-12


def test_the_products_of_a_row_are_as_few_as_the_bound_of_their_rounding_counts():
    draw = random.Random(0)
    most = 0.0
    for _ in range(3000):
        o, d, k = draw.choice((1, 3, 64, 129, 512, 3000)), draw.choice((1, 9, 64, 300, 1153)), draw.choice((1, 2, 10))
        groups, parts = draw.choice((1, 1, 4)), draw.choice((1, 3))
        like = lambda *_: torch.zeros(1, dtype=torch.float64)
        factors = Factors(None, like, groups, d * parts, o, 1, k, None, count_parts=parts)
        samples, workspace = draw.choice((1, 16, 128, 1000, 60000)), draw.choice((1, 2**20, 2**30))
        whole, width, depth = contract._cut(factors, samples, workspace)
        assert not whole
        sums = 0
        for w in tiles(0, o, width):
            for s in tiles(0, d, depth):
                sums += parts * math.ceil((w.stop - w.start) * (s.stop - s.start) * groups / inner.COLUMNS)
        columns = o * d * parts * groups
        allowed = o * parts + 8 + math.ceil(ADDITIONS * columns)
        assert sums <= allowed
        most = max(most, sums / allowed)
    assert most > 0.3  # the count is no idle one


@pytest.mark.parametrize("rows", [1, 7, 16, 23, 40, 64, 130, 520])
@pytest.mark.parametrize("columns", [700, inner.COLUMNS + 1])
def test_the_upper_half_of_a_square_is_that_of_float64(rows, columns):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    exact = x.double() @ x.double().T
    found = inner.own_products(x)
    assert found.dtype is torch.float64
    assert float((found - exact).triu().abs().max()) <= 1e-6 * float(exact.abs().max())


def test_a_square_in_float32_is_not_exact():  # the law above is not empty
    x = torch.randn(64, 700, generator=torch.Generator().manual_seed(0))
    assert (inner.own_products(x) - x.double() @ x.double().T).triu().abs().max() > 0
