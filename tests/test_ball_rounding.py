"""Certified steps by a ball: DF g and the loss after the step, against 50 digits."""

import numpy as np
import pytest
import torch
from kernel_oracle import exact, exact_jacobian, knows
from mpmath import mp
from regularity_networks import network
from test_outputs_rounding import exact_mse
from test_ray_rounding import exact_outputs, stored
from torch import nn

import trainable_nn as tnn
from trainable_nn.certify import slope_along
from trainable_nn.certify.kernel_error import JacobianError
from trainable_nn.certify.outputs_along import AlongBall
from trainable_nn.certify.problem import problem_of
from trainable_nn.certify.slope_along import proved_slope
from trainable_nn.certify.step import certified_step, gradient_of

F64 = torch.float64
STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
KINKS = (nn.MaxPool2d, nn.ReLU)


def of_statistics(seed: int) -> bool:
    model, _ = network(seed)
    kinds = [type(m) for m in model.modules()]
    return knows(model) and any(issubclass(k, STATISTICS) for k in kinds) and not any(k in KINKS for k in kinds)


FLAT = (115, 156)  # the gradient is 0: what is normalised is one number
SEEDS = [seed for seed in range(160) if of_statistics(seed) and seed not in FLAT]


def problem_for(seed: int):
    model, x = network(seed)
    outputs = model(x).detach()
    return problem_of(model, x, torch.randn(outputs.shape, generator=torch.Generator().manual_seed(seed), dtype=F64), "mse")


def off(slope: torch.Tensor, problem, gradient) -> float:
    g = np.concatenate([exact(gradient[name].numpy()).ravel() for name in problem.parameters])
    truth = exact_jacobian(problem.model, problem.inputs) @ g
    return mp.sqrt(sum((exact(slope.flatten().numpy()) - truth) ** 2))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_slope_is_off_by_no_more_than_is_proved(seed):
    problem = problem_for(seed)
    gradient = gradient_of(problem)
    slope, bound = proved_slope(problem, gradient)
    assert off(slope, problem, gradient) <= bound <= 1e-6 * float(sum(g.norm() for g in gradient.values()))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_loss_in_50_digits_after_a_step_by_a_ball_is_below_its_bound(seed):
    problem = problem_for(seed)
    gradient = gradient_of(problem)
    step = certified_step(problem, gradient)
    direction, y = {name: -g for name, g in gradient.items()}, problem.targets
    assert (step.way, step.rounding) == ("ball", "proved") and step.step_size > 0
    assert step.loss <= exact_mse(exact_outputs(problem.model, problem.inputs, {}, 0), y)
    after = exact_outputs(problem.model, problem.inputs, direction, step.step_size)
    kept = exact_outputs(stored(problem.model, direction, step.step_size), problem.inputs, {}, 0)
    assert max(exact_mse(after, y), exact_mse(kept, y)) <= step.loss_at_most < step.loss


def cancelling():
    """Large values cancel before a slope that is then off by what they round."""
    first = nn.Linear(2, 2).double()
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.1e8, -1.1e8], [1.3e8, -1.3e8]]))
        first.bias.zero_()
    first.weight.requires_grad_(False)
    net = nn.Sequential(first, tnn.Tanh(), nn.LayerNorm(2, eps=0.5).double())
    x = torch.rand(4, 1, dtype=F64, generator=torch.Generator().manual_seed(0)) + torch.tensor([[0.0, 1e-8]], dtype=F64)
    return problem_of(net, x, torch.ones(4, 2, dtype=F64), "mse")


def test_without_the_jacobians_own_rounding_the_slope_would_leave_its_bound(monkeypatch):
    problem = cancelling()
    gradient = gradient_of(problem)
    slope, bound = proved_slope(problem, gradient)
    error = off(slope, problem, gradient)
    assert error <= bound <= 1e4 * error
    monkeypatch.setattr(slope_along, "jacobian_error_at_most", lambda *a, **k: JacobianError(0.0, 1, 0.0, 1))
    assert error > proved_slope(problem, gradient)[1]


def test_the_assumption_of_before_would_have_been_too_little_there():
    problem = cancelling()
    gradient = gradient_of(problem)
    along = AlongBall(problem, gradient)
    assert off(along.slope, problem, gradient) > 2.0**-40 * float(along.slope.norm())
