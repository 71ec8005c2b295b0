"""CertifiedLR and certified descent: the loss falls at each step, and other optimisers are told what they lose."""

import os
import warnings

import pytest
import torch
from provable_nets import provable_net, reference_problem, trained
from test_certify import LOSSES, generated
from torch import nn
from torch.nn import functional as F

import trainable_nn as tnn
from trainable_nn.certify.ray import Ray
from trainable_nn.errors import CertificateError
from trainable_nn.optim import CertifiedDescent, CertifiedLR, LostGuaranteeWarning
from trainable_nn.theory import Cost

PROBLEMS = int(os.environ.get("TRAINABLE_NN_PROBLEMS", "12"))


def follow(net, x, y, loss="mse", steps=12):
    """Losses before each step and after the last, and the scheduler."""
    optimizer = torch.optim.SGD(trained(net), lr=1.0)
    descent = CertifiedDescent(optimizer, net, x, y, loss=loss)
    measure = LOSSES.get(loss) if isinstance(loss, str) else loss.value
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = measure(net(x), y)
        value.backward()
        losses.append(float(value.detach()))
        optimizer.step()
        descent.step()
    return [*losses, float(measure(net(x), y).detach())], descent


@pytest.mark.parametrize("seed", range(PROBLEMS))
def test_certified_descent_falls_at_every_step_by_what_it_proved(seed):
    net, x, y, loss = generated(seed)
    losses, descent = follow(net, x, y, loss)
    for step, before, after in zip(descent.history, losses, losses[1:]):
        if before > 1e-20:  # above the rounding of the outputs
            assert step.step_size > 0 and step.way == "ray"
            assert after <= step.loss_at_most < step.loss <= before * (1 + 1e-12)
    product = 1.0
    for step in descent.history:
        product *= step.rate
    assert descent.guarantee == product
    assert losses[-1] <= losses[0] * product / descent.history[-1].rate * (1 + 1e-12) or losses[-1] < 1e-20


@pytest.mark.parametrize("strength", [0.5, 0.9])
def test_certified_descent_trains_the_reference_problem(strength):
    net, x, y = reference_problem(4, strength)
    losses, descent = follow(net, x, y, steps=14)
    assert losses[-1] < losses[0] / 30 and descent.guarantee < 0.2


def test_a_step_proves_nothing_for_a_larger_one():
    """The proved loss is a bound at the chosen step; four times the step does not keep it."""
    net, x, y = reference_problem(2, 0.5)
    descent = CertifiedDescent(torch.optim.SGD(trained(net), lr=1.0), net, x, y)
    step = descent.history[0]
    start = [p.detach().clone() for p in trained(net)]
    F.mse_loss(net(x), y).backward()
    found = []
    for factor in (1.0, 12.0):
        with torch.no_grad():
            for p, s in zip(trained(net), start):
                p.copy_(s - factor * step.step_size * p.grad)
            found.append(float(F.mse_loss(net(x), y)))
    assert found[0] <= step.loss_at_most < found[1]


# Taylor models


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("length", [0.05, 0.6, 4.0])
def test_taylor_models_enclose_the_outputs_along_the_ray(seed, length):
    net, x, _, _ = generated(seed)
    g = torch.Generator().manual_seed(seed)
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    direction = {n: length * torch.randn(net.get_parameter(n).shape, generator=g, dtype=torch.float64) for n in names}
    model = Ray(net, x).along(direction)
    for u in (0.1, 0.37, 0.8, 1.0):
        moved = {n: net.get_parameter(n).detach() + u * direction[n] for n in names}
        exact = torch.func.functional_call(net, moved, (x,)).detach()
        error = (exact - model.at(u)).abs()
        assert bool((error <= model.r * u**3 * (1 + 1e-9) + 1e-13 * (1 + exact.abs())).all())


def test_taylor_coefficients_are_the_derivatives():
    """So the remainder is of third order: a model of half the length has an eighth of it, or less."""
    net, x, _ = reference_problem(2, 0.5)
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    direction = {n: 0.05 * torch.randn_like(net.get_parameter(n)) for n in names}
    f = lambda u: torch.func.functional_call(
        net, {n: net.get_parameter(n).detach() + u * direction[n] for n in names}, (x,)
    )
    model = Ray(net, x).along(direction)
    first = lambda u: torch.func.jvp(f, (u,), (torch.ones_like(u),))[1]
    zero = torch.zeros((), dtype=torch.float64)
    second = torch.func.jvp(first, (zero,), (torch.ones_like(zero),))[1]
    torch.testing.assert_close(model.c1, first(zero), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.c2, second / 2, rtol=1e-8, atol=1e-12)
    half = Ray(net, x).along({n: d / 2 for n, d in direction.items()})
    assert float(half.r.norm()) < float(model.r.norm()) / 8 * 1.05


def test_convolutions_biases_and_skips_have_taylor_models():
    torch.manual_seed(0)
    options = {"dtype": torch.float64}
    branch = nn.Sequential(tnn.Softplus0(), tnn.EntryNormConv2d(2, 4, 3, stride=2, padding=1, **options))
    skip = tnn.OrthogonalDownsample2d(2, 4, **options)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, **options),
        tnn.ContractiveResidual(branch, skip, strength=0.5),
        tnn.WeightNormConv2d(4, 3, 2, groups=1, **options),
        nn.AvgPool2d(3),
        nn.Flatten(),
        nn.Linear(3, 2, **options),
    )
    x = torch.randn(2, 1, 8, 8, **options)
    direction = {n: 0.2 * torch.randn_like(p) for n, p in net.named_parameters()}
    model = Ray(net, x).along(direction)
    for u in (0.3, 1.0):
        moved = {n: p.detach() + u * direction[n] for n, p in net.named_parameters()}
        error = (torch.func.functional_call(net, moved, (x,)) - model.at(u)).abs().detach()
        assert bool((error <= model.r * u**3 * (1 + 1e-9) + 1e-13).all()) and float(error.max()) > 1e-9


def schatten_net():
    """Schatten-normalised layers, dense and convolutions with groups, and an activation that is C^1 only."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64}
    first = nn.Sequential(tnn.SpectralNormConv2d(4, 4, 3, padding=1, **options), tnn.SoftSign())
    second = nn.Sequential(tnn.Tanh(), tnn.SpectralNormConv2d(4, 4, 3, padding=1, groups=2, power=4, **options))
    blocks = [tnn.ContractiveResidual(branch, strength=0.9) for branch in (first, second)]
    head = tnn.SpectralNormLinear(64, 3, **options)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, **options), *blocks, nn.Flatten(), head)


@pytest.mark.parametrize("length", [0.001, 0.1])
def test_schatten_norms_and_softsign_have_models_of_second_order(length):
    net, x = schatten_net(), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    direction = {n: length * torch.randn_like(p) for n, p in net.named_parameters()}
    ray = Ray(net, x)
    model = ray.along(direction)
    assert ray.order == 2
    for u in (0.2, 0.7, 1.0):
        moved = {n: p.detach() + u * direction[n] for n, p in net.named_parameters()}
        error = (torch.func.functional_call(net, moved, (x,)) - model.at(u)).abs().detach()
        assert bool((error <= model.r * u**2 * (1 + 1e-9) + 1e-13).all()) and float(error.max()) > 1e-9


def test_certified_descent_of_schatten_norms():
    net, x = schatten_net(), torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses, descent = follow(net, x, torch.ones(3, 3, dtype=torch.float64), steps=3)
    assert all(after <= step.loss_at_most < step.loss for step, after in zip(descent.history, losses[1:]))


def test_a_layer_without_a_taylor_rule_takes_the_ball():
    """Batch normalisation couples the samples: descent is proved from the second derivative's bound instead."""
    options = {"dtype": torch.float64}
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4, **options), nn.BatchNorm1d(4, eps=0.5, **options), nn.Linear(4, 2, **options))
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses, descent = follow(net, x, torch.ones(6, 2, dtype=torch.float64), steps=3)
    assert {step.way for step in descent.history} == {"ball"}
    assert all(after <= step.loss_at_most < step.loss for step, after in zip(descent.history, losses[1:]))


def test_a_kink_has_no_certified_step():
    net = nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), nn.ReLU(), nn.Linear(4, 1, dtype=torch.float64))
    x = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(CertificateError, match="SmoothReLU"):
        CertifiedDescent(torch.optim.SGD(net.parameters(), lr=1.0), net, x, x[:, :1])


def test_the_minimum_has_a_step_of_zero():
    net, x, _ = reference_problem(2, 0.5)
    descent = CertifiedDescent(torch.optim.SGD(trained(net), lr=1.0), net, x, net(x).detach())
    assert descent.history[0].step_size == 0.0 or descent.history[0].loss < 1e-25


def test_a_users_cost_has_certified_steps():
    huber = Cost("huber", lambda z, y: F.huber_loss(z, y, reduction="sum"), smoothness=1.0)
    net, x, y = reference_problem(2, 0.5)
    losses, descent = follow(net, x, y, loss=huber, steps=3)
    assert losses[0] > losses[1] > losses[2] > losses[3] and descent.loss_at_most < losses[2]


# the constant step


def small():
    g = torch.Generator().manual_seed(4)
    net = provable_net(5, 4, 2, 1, spread=0.2, strength=0.3)
    return net, *(torch.randn(2, n, generator=g, dtype=torch.float64) for n in (5, 2))


def test_certified_lr_sets_the_step_and_tells_the_loss():
    net, x, y = small()
    certificate = tnn.certify(net, x, y)
    optimizer = torch.optim.SGD([{"params": trained(net)[:1]}, {"params": trained(net)[1:]}], lr=7.0)
    schedule = CertifiedLR(optimizer, certificate)
    assert [group["lr"] for group in optimizer.param_groups] == [certificate.step_size] * 2
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
        schedule.step()
        assert float(F.mse_loss(net(x), y).detach()) <= schedule.predicted_loss
    assert schedule.last_epoch == 5 and schedule.lost is None
    assert schedule.predicted_loss == certificate.predicted_loss(5)
    assert "certificate" not in schedule.state_dict()


def test_a_certificate_without_a_step_makes_no_schedule():
    net, x, _ = small()
    with pytest.raises(CertificateError, match="Give targets"):
        CertifiedLR(torch.optim.SGD(trained(net), lr=1.0), tnn.certify(net, x))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda p: torch.optim.Adam(p), "Adam does not move along the gradient"),
        (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), "momentum=0.9"),
        (lambda p: torch.optim.SGD(p, lr=1.0, weight_decay=0.1), "weight_decay=0.1"),
        (lambda p: torch.optim.SGD(p, lr=1.0, maximize=True), "maximize=True"),
        (lambda p: torch.optim.RMSprop(p), "RMSprop"),
    ],
)
def test_another_rule_is_told_what_it_loses(build, words):
    net, x, y = small()
    certificate = tnn.certify(net, x, y)
    with pytest.warns(LostGuaranteeWarning, match=words):
        schedule = CertifiedLR(build(trained(net)), certificate)
    assert schedule.predicted_loss is None and "neither the fall of the loss" in schedule.lost
    with pytest.warns(LostGuaranteeWarning, match=words):
        descent = CertifiedDescent(build(trained(net)), net, x, y)
    assert descent.guarantee is None and descent.loss_at_most is None and descent.history[0].step_size > 0


def test_a_parameter_that_is_left_out_is_named():
    net, x, y = small()
    with pytest.warns(LostGuaranteeWarning, match=r"1.branch.0.weight requires gradients"):
        CertifiedDescent(torch.optim.SGD(trained(net)[:1], lr=1.0), net, x, y)


def test_plain_descent_warns_of_nothing():
    net, x, y = small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        follow(net, x, y, steps=2)
