"""What certify, certify_path and certified descent grant to blocks whose scale follows their weights, kept by torch's descent."""

import copy

import pytest
import torch
from provable_nets import readout, trained
from regularity_networks import ACTIVATIONS, F64
from test_certify_path import keeps_its_promises
from torch import nn
from torch.nn import functional as F

import trainable_nn as tnn
from trainable_nn import modules
from trainable_nn.certify.problem import problem_of
from trainable_nn.errors import CertificateError
from trainable_nn.modules.residual import LASTING, hold_scales, slack_of


def provable(tight, blocks=2, leak=0.5, seed=0, spread=0.3, bound=0.4, width=6):
    generator = torch.Generator().manual_seed(seed)
    layers = [tnn.EntryNormLinear(6, width, bias=False, leak=leak, dtype=F64)]
    for k in range(blocks):
        branch = nn.Sequential(nn.Linear(width, width, dtype=F64), ACTIVATIONS[k % 5]())
        for p in branch.parameters():
            p.data.copy_(spread * torch.randn(p.shape, generator=generator, dtype=F64))
        layers.append(modules.SpectrallyBoundedResidual(branch, bound=bound, tight=tight))
    layers[0].weight.data.copy_(spread * torch.randn(width, 6, generator=generator, dtype=F64))
    x, y = (torch.randn(3, n, generator=generator, dtype=F64) for n in (6, 2))
    return nn.Sequential(*layers, readout(width, 2, generator)), x, 0.3 * y


def descends(net, x, y, certificate, steps=60):
    """Torch's own gradient descent against rate, radius and the bound of every loss; the scale is never set anew."""
    optimizer = torch.optim.SGD(trained(net), lr=certificate.step_size)
    start = torch.cat([p.detach().flatten() for p in trained(net)])
    before = [float(b) for name, b in net.named_buffers() if name.endswith("tightness")]
    for t in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        here = torch.cat([p.detach().flatten() for p in trained(net)])
        assert float(loss.detach()) <= certificate.predicted_loss(t) * (1 + 1e-9) + 1e-26
        assert float((here - start).norm()) <= certificate.radius * (1 + 1e-9)
        if t % 20 == 0:
            rows = [torch.autograd.grad(e, trained(net), retain_graph=True) for e in net(x).flatten()]
            values = torch.linalg.svdvals(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
            assert float(values[-1]) ** 2 >= certificate.lambda_lower * (1 - 1e-9)
        optimizer.step()
    assert [float(b) for name, b in net.named_buffers() if name.endswith("tightness")] == before


@pytest.mark.parametrize("seed", range(3))
def test_with_tight_false_a_leaky_first_layer_grants_a_global_certificate_that_is_kept(seed):
    net, x, y = provable(tight=False, seed=seed)
    certificate = tnn.certify(net, x, y)
    assert certificate.grade == "global" and certificate.step_size > 0, certificate.explain()
    rows = [row for row in certificate.hypotheses if row.name == "every step keeps its input apart" and row.path in ("1", "2")]
    assert [row.holds for row in rows] == [True, True]
    assert all(row.value == pytest.approx(1 - 0.4) for row in rows)
    descends(net, x, y, certificate)
    assert tnn.verify(certificate, *provable(tight=False, seed=seed)) is None


@pytest.mark.parametrize(("tight", "seed"), [(False, 0), (False, 1), (True, 0), (True, 3)])
def test_a_constant_step_along_its_path_ends_in_a_ball_that_is_kept(tight, seed):
    net, x, y = provable(tight=tight, seed=seed, leak=0.0)
    path = tnn.certify_path(net, x, y)
    assert path.grade == "ball", path.explain()
    keeps_its_promises(path, net, x, y)
    assert tnn.verify(path, *provable(tight=tight, seed=seed, leak=0.0)) is None


def test_where_a_tight_network_has_no_ball_its_slack_is_named():
    net, x, y = provable(tight=True, seed=0)
    found = tnn.certify(net, x, y)
    rows = [row for row in found.failing if row.name == "slack that lasts on the ball"]
    assert found.grade == "measured" and [row.path for row in rows] == ["1", "2"]
    assert all(row.remedy.endswith("Build it with tight=False, which never does.") for row in rows)
    assert [row.value for row in rows] == list(slack_of(net).values())


def test_free_weights_in_a_branch_that_is_followed_are_no_complaint_and_frozen_ones_are():
    net, x, y = provable(tight=True, seed=0)
    bounded = lambda: {row.path for row in tnn.certify(net, x, y).hypotheses if row.name == "bounded weights"}
    assert bounded() == set()
    net[2].freeze()
    assert bounded() == {"2.branch.0"}


def test_large_normalised_layers_in_a_branch_are_certified():
    """More than 2^14 entries of a Schatten norm: their P(w) is kept for the whole certificate, elsewhere."""
    torch.manual_seed(0)
    branch = nn.Sequential(tnn.SpectralNormLinear(130, 130), tnn.Tanh())
    block = modules.SpectrallyBoundedResidual(branch, tight=False)
    net = nn.Sequential(nn.Linear(4, 130), block, nn.Linear(130, 1)).double()
    found = tnn.certify(net, torch.randn(2, 4, dtype=F64), torch.zeros(2, 1, dtype=F64))
    assert found.grade == "measured" and found.lambda_lower > 0
    assert all(row.holds for row in found.hypotheses if row.name == "bounded derivatives")


def test_near_its_minimum_a_tight_network_has_a_ball_that_is_kept():
    net, x, y = provable(tight=True, seed=1)
    optimizer = torch.optim.SGD(trained(net), lr=0.3)
    for _ in range(400):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    for block in net:
        if isinstance(block, modules.SpectrallyBoundedResidual):
            block.certify()
    for _ in range(400):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    certificate = tnn.certify(net, x, y)
    assert certificate.grade in ("ball", "global"), certificate.explain()
    descends(net, x, y, certificate)


def test_a_path_on_which_the_slack_is_spent_is_refused_by_its_step():
    net, x, y = provable(tight=True, seed=2, leak=0.0, spread=0.05)
    path = tnn.certify_path(net, x, 30 * y, step_size=0.05, steps=400)
    assert not path.holds and path.steps > 0 and " is spent (V / (t S) is " in path.reason, path.reason
    held = hold_scales(copy.deepcopy(net))
    optimizer = torch.optim.SGD(trained(held), lr=0.05)
    for t in range(path.steps + 1):
        assert all(slack <= LASTING for slack in slack_of(held).values()) == (t < path.steps)
        optimizer.zero_grad()
        F.mse_loss(held(x), 30 * y).backward()
        optimizer.step()


def test_a_path_that_starts_with_its_slack_spent_says_so_in_its_rows():
    net, x, y = provable(tight=True, seed=0)
    net[1].branch[0].weight.data.fill_(0.2)
    path = tnn.certify_path(net, x, y)
    [row] = [row for row in path.arrival.hypotheses if row.name == "layers with known constants"]
    assert not path.holds and path.steps == 0 and row.path == "1" and "Call certify() on the block first" in row.remedy
    assert tnn.verify(path, net, x, y) is None


def test_certified_descent_lowers_the_loss_at_every_step_of_a_network_that_follows_its_weights():
    net, x, y = provable(tight=False, seed=1)
    optimizer = torch.optim.SGD(trained(net), lr=1.0)
    schedule = tnn.optim.CertifiedDescent(optimizer, net, x, y)
    for _ in range(6):
        optimizer.zero_grad()
        before = F.mse_loss(net(x), y)
        before.backward()
        assert schedule.history[-1].way == "ball" and schedule.history[-1].step_size > 0
        bound = schedule.loss_at_most
        optimizer.step()
        after = float(F.mse_loss(net(x), y).detach())
        assert after <= bound * (1 + 1e-12) and bound < float(before.detach())
        schedule.step()


def test_certified_descent_takes_the_steps_that_the_slack_allows_and_then_says_why_not():
    net, x, y = provable(tight=True, seed=1)
    optimizer = torch.optim.SGD(trained(net), lr=1.0)
    schedule = tnn.optim.CertifiedDescent(optimizer, net, x, y)
    assert 0 < schedule.history[-1].step_size
    for block in net:
        if isinstance(block, modules.SpectrallyBoundedResidual):
            block.branch[0].weight.data.mul_(3.0).add_(0.5)
    with pytest.raises(CertificateError, match="no step is proved for this network.*the slack of this"):
        schedule.step()


def test_the_copy_that_is_certified_proves_nothing_anew():
    net, x, y = provable(tight=True)
    for block in net:
        if isinstance(block, modules.SpectrallyBoundedResidual):
            block.branch[0].weight.data.mul_(0.2).add_(0.3)
    twin = problem_of(net, x, y, "mse").model
    assert [float(b) for b in twin.buffers()] == [float(b) for b in net.buffers()]
    assert slack_of(twin) == slack_of(net)
