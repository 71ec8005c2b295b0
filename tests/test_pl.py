"""Trajectory theorems, costs and data conditions: each statement against gradient descent or dense linear algebra."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from trainable_nn.theory.costs import Cost, cost_for, cross_entropy, mse
from trainable_nn.theory.pl import (
    Descent,
    Gap,
    Sigma,
    a_posteriori,
    descend,
    descend_with,
    loss_smoothness,
    sigma_from_layers,
)
from trainable_nn.theory.samples import (
    covariance_at_least,
    independence,
    nearest_pair,
    weighted_gram_at_least,
)

seeds = st.integers(0, 2**31 - 1)


class Quadratic:
    """F_k(theta) = a_k . theta + theta^T B_k theta / 2: DF is known, and Lipschitz with (sum ||B_k||^2)^(1/2)."""

    def __init__(self, seed: int, outputs: int, inputs: int, curvature: float) -> None:
        g = torch.Generator().manual_seed(seed)
        self.a = torch.randn(outputs, inputs, generator=g, dtype=torch.float64)
        b = torch.randn(outputs, inputs, inputs, generator=g, dtype=torch.float64)
        self.b = curvature * (b + b.mT) / 2
        self.target = torch.randn(outputs, generator=g, dtype=torch.float64)
        self.lipschitz = float(sum(torch.linalg.matrix_norm(m, 2) ** 2 for m in self.b)) ** 0.5 * (1 + 1e-12)

    def __call__(self, theta):
        return self.a @ theta + torch.einsum("kij,i,j->k", self.b, theta, theta) / 2

    def jacobian(self, theta):
        return self.a + self.b @ theta

    def constants(self, radius):
        return self.norm + self.lipschitz * radius, self.lipschitz

    @property
    def norm(self):
        return float(torch.linalg.matrix_norm(self.a, 2)) * (1 + 1e-12)

    @property
    def sigma(self):
        return float(torch.linalg.svdvals(self.a)[-1]) * (1 - 1e-12)


def descent_of(problem, cost, start, goal=0.0) -> Descent | Gap:
    excess = float(cost.value(problem(start), problem.target)) * (1 + 1e-12)
    return descend(cost, excess, problem.sigma, 0.0, problem.constants, goal)


def run(problem, cost, descent, steps):
    """Losses and distances of plain gradient descent."""
    theta = torch.zeros(problem.a.shape[1], dtype=torch.float64)
    losses, distances = [], []
    for _ in range(steps):
        z = problem(theta).requires_grad_()
        loss = cost.value(z, problem.target)
        losses.append(float(loss.detach()))
        distances.append(float(theta.norm()))
        (grad,) = torch.autograd.grad(loss, z)
        theta = theta - descent.step_size * (problem.jacobian(theta).T @ grad)
    return losses, distances


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 4), st.floats(0.0, 0.02))
def test_descent_on_a_ball_keeps_its_rate_and_its_radius(seed, outputs, curvature):
    problem = Quadratic(seed, outputs, 12, curvature)
    cost = mse(outputs)
    descent = descent_of(problem, cost, torch.zeros(12, dtype=torch.float64))
    if isinstance(descent, Gap):
        assert descent.reached < descent.needed
        return
    losses, distances = run(problem, cost, descent, 60)
    assert 0 < descent.rate < 1 and descent.radius > 0
    for t, (loss, distance) in enumerate(zip(losses, distances)):
        assert distance <= descent.radius * (1 + 1e-12)
        assert loss <= losses[0] * descent.rate**t * (1 + 1e-9) + 1e-25
        assert loss <= descent.excess_after(t) * (1 + 1e-9) + 1e-25


def test_most_generated_balls_close_and_some_do_not():
    """The property above is about both outcomes."""
    cost, zero = mse(3), torch.zeros(12, dtype=torch.float64)
    flat = [descent_of(Quadratic(seed, 3, 12, 0.002), cost, zero) for seed in range(10)]
    curved = [descent_of(Quadratic(seed, 3, 12, 3.0), cost, zero) for seed in range(10)]
    assert all(isinstance(d, Descent) for d in flat) and all(isinstance(d, Gap) for d in curved)


def with_step(problem, outputs, factor) -> Descent | Gap:
    """The step ``factor`` * 2 / (L at the start)."""
    cost = mse(outputs)
    excess = float(cost.value(problem(torch.zeros(12, dtype=torch.float64)), problem.target)) * (1 + 1e-12)
    step = factor * 2.0 / loss_smoothness(cost, excess, *problem.constants(0.0))
    return descend_with(step, cost, excess, problem.sigma, 0.0, problem.constants)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 4), st.floats(0.0, 0.004), st.floats(0.02, 0.98))
def test_a_given_step_keeps_the_rate_and_the_radius_that_are_proved_of_it(seed, outputs, curvature, factor):
    problem = Quadratic(seed, outputs, 12, curvature)
    descent = with_step(problem, outputs, factor)
    if isinstance(descent, Gap):
        assert descent.share >= 2 or descent.reached < descent.needed
        return
    assert 0 < descent.share < 2 and descent.step_size * descent.smoothness <= descent.share * (1 + 1e-12)
    losses, distances = run(problem, mse(outputs), descent, 60)
    assert 0 < descent.rate < 1
    for t, (loss, distance) in enumerate(zip(losses, distances)):
        proved = losses[0] * descent.rate**t
        assert distance <= descent.radius * (1 + 1e-12)
        rounded = 1e-14 * math.sqrt(proved)  # residuals are differences of numbers of order 1
        assert loss <= proved * (1 + 1e-9) + rounded + 1e-25


@pytest.mark.parametrize("factor", [0.05, 0.5, 0.9])
def test_a_given_step_closes_where_df_hardly_moves(factor):
    for seed in range(5):
        descent = with_step(Quadratic(seed, 3, 12, 1e-4), 3, factor)
        assert isinstance(descent, Descent) and descent.share == pytest.approx(2 * factor, rel=0.05)


def test_a_step_of_2_over_l_is_not_proved_and_does_not_fall():
    """For a linear map L is the curvature itself: at 2 / L the residual along the top direction only turns its sign."""
    half = Cost("half", lambda z, y: (z - y).square().sum() / 2, smoothness=1.0, pl=2.0)
    ask = lambda step: descend_with(step, half, 8.0, 0.5, 0.0, lambda r: (3.0, 0.0))
    assert isinstance(ask(0.99 * 2 / 9), Descent) and ask(0.99 * 2 / 9).step_size == 0.99 * 2 / 9
    gap = ask(2 / 9)
    assert isinstance(gap, Gap) and gap.share >= 2
    for step, falls in ((0.99 * 2 / 9, True), (2 / 9, False)):
        residual = torch.tensor([3.0, 0.0], dtype=torch.float64)
        after = residual - step * torch.tensor([9.0, 0.25], dtype=torch.float64) * residual  # J J^T = diag(9, 1/4)
        assert bool(after.norm() < residual.norm() * (1 - 1e-9)) == falls
    for step in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive and finite"):
            ask(step)


def test_proposition_r_is_the_case_of_one_constant():
    """THEORY 4: for l = |r|^2 / 2 with sigma constant, R = 2 |r_0| / sigma, eta = 1 / L, rate 1 - eta sigma^2."""
    half = Cost("half", lambda z, y: (z - y).square().sum() / 2, smoothness=1.0, pl=2.0)
    descent = descend(half, 8.0, 0.5, 0.5, lambda r: (3.0, 0.0))  # |r_0| = 4
    assert descent.share == 1.0
    assert descent.radius == pytest.approx(2 * 4 / 0.5, rel=1e-9)
    assert descent.step_size == pytest.approx(1 / 9, rel=1e-12)
    assert descent.rate == pytest.approx(1 - 0.25 / 9, rel=1e-12)


def test_a_ball_closes_where_a_constant_sigma_would_not():
    """sigma_0^2 = 6 L |r_0| is below the 8 of II.4.1 item 4; the integral needs 4 (and 2 for short steps)."""
    half = Cost("half", lambda z, y: (z - y).square().sum() / 2, smoothness=1.0, pl=2.0)
    closes = lambda squares: isinstance(descend(half, 0.5, 1.0, 0.0, lambda r: (1.0, 1.0 / squares)), Descent)
    assert closes(6.0) and closes(2.2) and not closes(1.99)


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_cross_entropy_falls_as_its_recursion_says(seed):
    """Linear logits on independent samples: 1 / loss grows by the gain a step, and the path stays in the ball."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 10, generator=g, dtype=torch.float64)
    y = torch.randint(3, (4,), generator=g)
    singular = torch.linalg.svdvals(x)
    cost = cross_entropy(4, 3)
    w = torch.randn(3, 10, generator=g, dtype=torch.float64)
    start, losses = w.clone(), []
    excess = float(F.cross_entropy(x @ w.T, y))
    descent = descend(cost, excess, 0.0, float(singular[-1]), lambda r: (float(singular[0]), 0.0), goal=excess / 20)
    for t in range(300):
        w.requires_grad_()
        loss = F.cross_entropy(x @ w.T, y)
        (grad,) = torch.autograd.grad(loss, w)
        losses.append(float(loss.detach()))
        assert float(loss) <= descent.excess_after(t) * (1 + 1e-12) or float(loss) <= descent.goal
        if float(loss) > descent.goal:
            assert float((w - start).detach().norm()) <= descent.radius
            assert float(grad.norm()) ** 2 >= descent.domination * float(loss) ** 2
        w = (w - descent.step_size * grad).detach()
    assert descent.rate is None and losses[-1] < losses[0]
    assert descent.excess_after(descent.steps_to(descent.goal)) <= descent.goal * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 6), st.integers(2, 7), st.floats(0.1, 12.0))
def test_constants_of_cross_entropy_hold_at_random_logits(seed, samples, classes, scale):
    g = torch.Generator().manual_seed(seed)
    z = (scale * torch.randn(samples, classes, generator=g, dtype=torch.float64)).requires_grad_()
    y = torch.randint(classes, (samples,), generator=g)
    cost = cross_entropy(samples, classes)
    loss = cost.value(z, y)
    (grad,) = torch.autograd.grad(loss, z)
    squared, e = float(grad.square().sum()), float(loss)
    assert squared >= cost.pl_squared(e) * e * e * (1 - 1e-12)
    assert squared <= cost.gradient_at_most(e) ** 2 * (1 + 1e-12)
    hessian = torch.autograd.functional.hessian(lambda v: cost.value(v, y), z.detach()).reshape(z.numel(), -1)
    assert float(torch.linalg.eigvalsh(hessian)[-1]) <= cost.smoothness * (1 + 1e-12)


def test_the_lower_bound_of_cross_entropy_is_reached_for_two_equal_wrong_classes():
    """K = 2 and one sample: |grad|^2 = 2 (1 - p)^2, so only 1 - e^(-c) >= k c is lost, and nothing at c = E."""
    z, y = torch.tensor([[0.0, 3.0]], dtype=torch.float64, requires_grad=True), torch.tensor([0])
    cost = cross_entropy(1, 2)
    loss = cost.value(z, y)
    (grad,) = torch.autograd.grad(loss, z)
    e = float(loss)
    assert float(grad.square().sum()) == pytest.approx(cost.pl_squared(e) * e * e, rel=1e-12)


def test_mse_states_torchs_constants():
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 5, dtype=torch.float64)
    cost = mse(15)
    loss = cost.value(z, y)
    (grad,) = torch.autograd.grad(loss, z)
    assert float(grad.square().sum()) == pytest.approx(cost.pl * float(loss), rel=1e-12)
    assert float(grad.norm()) == pytest.approx(cost.gradient_at_most(float(loss)), rel=1e-12)
    hessian = torch.autograd.functional.hessian(lambda v: cost.value(v, y), z.detach()).reshape(15, 15)
    assert float(torch.linalg.eigvalsh(hessian)[-1]) == pytest.approx(cost.smoothness, rel=1e-12)


def test_targets_that_torch_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"outputs' shape \(4, 1\)"):
        cost_for("mse", torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(ValueError, match="one-hot"):
        cost_for("mse", torch.zeros(4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="-100 to 1, where 0 to 2"):
        cost_for("cross_entropy", torch.zeros(2, 3), torch.tensor([-100, 1]))
    with pytest.raises(ValueError, match="'hinge' is unknown"):
        cost_for("hinge", torch.zeros(2), torch.zeros(2))
    with pytest.raises(TypeError, match="got a int"):
        cost_for(3, torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="exceeds 2 \\* smoothness"):
        Cost("wrong", F.mse_loss, smoothness=1.0, pl=3.0)


def test_sigma_integral_is_the_area_under_its_lower_bound():
    sigma = Sigma(2.0, 0.5, 0.25)
    distances = np.linspace(0.0, 7.0, 70_001)
    area = np.trapezoid(np.maximum(0.25, 2.0 - 0.5 * distances), distances)
    assert sigma.integral(7.0) == pytest.approx(area, rel=1e-6) and sigma.integral(7.0) <= area * (1 + 1e-9)
    assert sigma.at(7.0) == 0.25 and sigma.at(1.0) == pytest.approx(1.5)
    assert Sigma(0.0, 1.0, 0.5).integral(4.0) == pytest.approx(2.0)


@given(st.floats(0.1, 2.0), st.lists(st.tuples(st.floats(0.9, 1.1), st.floats(0.0, 0.8)), max_size=6))
def test_layers_multiply_downwards(first, steps):
    exact = first * math.prod(sigma - rho for sigma, rho in steps)
    bound = sigma_from_layers(first, steps)
    assert exact * (1 - 1e-13) <= bound <= exact


def test_a_layer_without_margin_leaves_nothing():
    assert sigma_from_layers(1.0, [(1.0, 0.5), (1.0, 1.0)]) == 0.0
    assert sigma_from_layers(1.0, [(1.0, math.inf)]) == 0.0


def test_smoothness_of_the_loss_is_what_its_two_terms_say():
    cost = mse(4)  # smoothness 1/2, |grad| = (e)^(1/2)
    assert loss_smoothness(cost, 9.0, 2.0, 0.0) == pytest.approx(2.0)
    assert loss_smoothness(cost, 9.0, 2.0, 5.0) == pytest.approx(2.0 + 3.0 * 5.0)


def test_a_posteriori_multiplies_what_each_step_proves():
    steps = [(0.1, 10.0, 1.0), (0.2, 5.0, 0.5)]
    assert a_posteriori(4.0, steps) == pytest.approx(4.0 * (1 - 0.05) * (1 - 0.05))
    with pytest.raises(ValueError, match="not below 2 / L"):
        a_posteriori(1.0, [(0.5, 4.0, 1.0)])


# data


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 6), st.integers(1, 8), st.booleans())
def test_independence_is_below_the_least_singular_value_of_the_samples(seed, n, d, bias):
    x = np.random.default_rng(seed).standard_normal((n, d))
    full = np.concatenate([x, np.ones((n, 1))], 1) if bias else x
    exact = math.sqrt(max(np.linalg.eigvalsh(full @ full.T)[0], 0.0))
    found = independence(x, bias=bias)
    assert found.value <= exact * (1 + 1e-6) + 1e-7
    assert found.holds == (n <= d + bias) and (not found.holds or found.value >= exact * (1 - 1e-6) - 1e-6)


def test_samples_that_repeat_in_float32_are_dependent_up_to_noise():
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    x[2] = x[1] + x[0]
    assert not independence(x, roundoff=2.0**-24).holds
    assert independence(x + 1e-3 * np.eye(3, 5), roundoff=2.0**-24).holds


def test_nearest_pair_is_found_under_cancellation():
    x = np.random.default_rng(1).standard_normal((40, 6)) + 1e4
    x[31] = x[7] + 1e-9
    pair = nearest_pair(x)
    assert (pair.first, pair.second) == (7, 31) and pair.distance == pytest.approx(np.linalg.norm(x[7] - x[31]))
    assert nearest_pair(x[:1]) is None


def test_covariance_needs_more_samples_than_inputs():
    rng = np.random.default_rng(2)
    assert not covariance_at_least(rng.standard_normal((5, 5))).holds
    x = rng.standard_normal((30, 5))
    exact = np.linalg.eigvalsh(np.cov(x.T, bias=True))[0]
    assert covariance_at_least(x).value == pytest.approx(exact, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(seeds, st.booleans())
def test_weighted_gram_is_the_first_layers_dense_jacobian(seed, bias):
    rng = np.random.default_rng(seed)
    x, slopes = rng.standard_normal((4, 6)), rng.uniform(0.1, 1.0, (3, 6))
    blocks = [np.concatenate([x * s, np.ones((4, 1))], 1) if bias else x * s for s in slopes]
    exact = min(np.linalg.svd(b, compute_uv=False)[-1] ** 2 for b in blocks)
    bound = weighted_gram_at_least(x, slopes, bias=bias)
    assert exact * (1 - 1e-6) - 1e-10 <= bound <= exact * (1 + 1e-12)
    coarse = independence(x).value ** 2 * slopes.min() ** 2
    assert bias or bound >= coarse * (1 - 1e-9)


def test_more_samples_than_inputs_give_nothing():
    assert weighted_gram_at_least(np.random.default_rng(0).standard_normal((7, 6)), np.ones((1, 6))) == 0.0


@pytest.mark.parametrize("bad", [np.empty((0, 3)), np.array([[1.0, np.nan]])], ids=["empty", "nan"])
def test_data_without_values_is_refused(bad):
    for check in (independence, nearest_pair, covariance_at_least):
        with pytest.raises(ValueError, match="Give at least one sample|not finite"):
            check(bad)
