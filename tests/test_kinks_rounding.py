"""Hardswish, SELU and ELU in float64, against 50 digits: their values, slopes, kinks, and the kernels of networks with them."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from kernel_oracle import ACTIVATIONS, distance, exact_jacobian
from mpmath import mpf
from test_kernel_error import cancelling, jacobian_of
from test_outputs_rounding import away, exact_outputs
from torch import nn

from trainable_nn.certify.kernel_error import jacobian_error_at_most, outputs_error_at_most, rules
from trainable_nn.certify.kernel_error.kinks import kinks_of
from trainable_nn.certify.regularity.network import read_graph
from trainable_nn.certify.regularity.rules import RULES

F64 = torch.float64
U = 2.0**-53
CURVED = [nn.Hardswish(), nn.SELU(), nn.ELU(0.3), nn.ELU(2.5), nn.ELU(-1.2), nn.SELU(inplace=True), nn.ELU(2.5, inplace=True)]
POINTS = [*(s * v for v in np.geomspace(1e-12, 900, 120) for s in (-1.0, 1.0)), *np.linspace(-3.5, 3.5, 140)]
POINTS += [float(np.nextafter(3.0 * s, t)) for s in (-1, 1) for t in (-9, 9)]


def step_of(activation: nn.Module, z: torch.Tensor):
    return read_graph(activation, z[None], RULES).nodes[-1].step


@pytest.mark.parametrize("activation", CURVED, ids=str)
def test_values_and_slopes_err_by_no_more_than_their_numbers(activation):
    z = torch.tensor(POINTS, dtype=F64)
    step, point = step_of(activation, z), z.clone().requires_grad_()
    kinks, value = kinks_of(step), step.function(point)
    (slope,) = torch.autograd.grad(value.sum(), point)
    for z, v, s in zip(POINTS, value.tolist(), slope.tolist(), strict=True):
        truth = ACTIVATIONS[type(activation)](mpf(z), activation)
        assert abs(truth[0] - mpf(v)) <= U * (16 * step.slope * abs(z) + kinks.value)
        assert abs(truth[1] - mpf(s)) <= U * kinks.slope_error


@pytest.mark.parametrize("activation", CURVED, ids=str)
def test_slopes_jump_at_the_kinks_and_bend_elsewhere_by_no_more_than_is_said(activation):
    kinks = kinks_of(step_of(activation, torch.zeros(1, dtype=F64)))
    slope = lambda z: ACTIVATIONS[type(activation)](mpf(z), activation)[1]
    for z in kinks.places:
        jump = abs(slope(mpf(z) + mpf(10) ** -20) - slope(mpf(z) - mpf(10) ** -20))
        assert 0.9 * kinks.jump <= jump <= kinks.jump
    ends = np.linspace(-4, 4, 400)
    apart = [(a, b) for a, b in zip(ends, ends[1:]) if not any(a <= z <= b for z in kinks.places)]
    bends = [abs(slope(a) - slope(b)) / mpf(b - a) for a, b in apart]
    assert 0.9 * kinks.curvature <= max(bends) <= kinks.curvature


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("activation", CURVED, ids=str)
def test_outputs_and_jacobians_of_networks_with_them_stay_within_their_bounds(activation, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), copy.deepcopy(activation), nn.Linear(4, 4), copy.deepcopy(activation), nn.Linear(4, 2))
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    x = torch.randn(4, 3, dtype=F64)
    assert away(model(x), exact_outputs(model, x)) <= outputs_error_at_most(model, x) <= 1e-11
    assert distance(jacobian_of(model, x), exact_jacobian(model, x)) <= jacobian_error_at_most(model, x).jacobian <= 1e-10


@pytest.mark.parametrize("activation", [nn.SELU(), nn.ELU(2.5), nn.Hardswish()], ids=str)
def test_without_their_curvature_the_bound_would_be_wrong_where_large_values_cancel(activation, monkeypatch):
    """Large inputs cancel to about -1.1, and the derivative in the bias is the slope there."""
    first, x = nn.Linear(2, 1).double(), cancelling()[1]
    first.weight = nn.Parameter(cancelling()[0][0].weight.detach(), requires_grad=False)
    nn.init.zeros_(first.bias)
    model = nn.Sequential(first, activation)
    error = distance(jacobian_of(model, x), exact_jacobian(model, x))
    assert error <= jacobian_error_at_most(model, x).jacobian <= 1e3 * error
    monkeypatch.setattr(rules, "kinks_of", lambda step: dataclasses.replace(kinks_of(step), curvature=0.0))
    assert jacobian_error_at_most(model, x).jacobian < error


def test_an_entry_on_their_kink_within_its_error_counts_both_slopes():
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.SELU(), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0]]))
        model[2].weight.fill_(3.0)
    near = torch.tensor([[1.0 / 3, 1.0 / 3]], dtype=F64)
    jump = 3 * 0.7 * float(near.norm())
    assert jacobian_error_at_most(model, near).jacobian >= jump
    assert jacobian_error_at_most(model, near + torch.tensor([[0.0, 1e-3]], dtype=F64)).jacobian < 1e-12
