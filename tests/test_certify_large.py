"""What lets a certificate reach networks of full size: each shortcut against the same bound taken the long way."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from regularity_networks import network
from torch import nn

import trainable_nn as tnn
from trainable_nn import modules
from trainable_nn.certify import first_sigma, held, measure, seen, self_check
from trainable_nn.certify.first_sigma import FirstSigma
from trainable_nn.certify.problem import problem_of
from trainable_nn.certify.ray import Ray
from trainable_nn.certify.regularity import PreparedNetwork, first_layer, network_regularity, residual_structure, sweep
from trainable_nn.certify.regularity import network as networks
from trainable_nn.errors import CertificateError
from trainable_nn.modules.shortcut import PooledConv2d

F64 = torch.float64
quiet = lambda what, done, total: None


@pytest.fixture
def without_jacobians(monkeypatch):
    """Every network counts as wide: two samples a piece at most, and no Jacobian of a stretch is kept."""
    monkeypatch.setattr(sweep, "MOST_JACOBIAN", 0)
    monkeypatch.setattr(networks, "MOST_NUMBERS", 1)


@pytest.mark.parametrize("seed", [3, 5, 8, 11, 20])
def test_a_wide_network_gives_up_its_values_and_keeps_its_bounds(seed, without_jacobians):
    model, inputs = network(seed)
    prepared = PreparedNetwork(model, inputs)
    for radius in (0.0, 0.1, 1.0, math.inf):
        fresh, again = network_regularity(model, inputs, radius=radius), prepared.on_ball(radius)
        for name in ("jacobian", "jacobian_lipschitz", "value"):
            assert getattr(again, name) == getattr(fresh, name)
        np.testing.assert_array_equal(again.Q, fresh.Q)
        assert [dataclasses.astuple(row) for row in again.layers] == [dataclasses.astuple(row) for row in fresh.layers]
    assert all(graph.nodes[0].value.is_meta for graph in prepared._graphs)


def test_a_narrow_network_keeps_what_its_jacobians_are_made_of():
    model, inputs = network(3)
    prepared = PreparedNetwork(model, inputs)
    prepared.on_ball(0.1)
    assert not prepared._graphs[0].nodes[0].value.is_meta


def entry_first(units: int, d: int, leak: float) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(tnn.EntryNormLinear(d, units, eps=0.5, leak=leak, dtype=F64))


@pytest.mark.parametrize("radius", [0.0, 0.3, 2.0, math.inf])
def test_one_gram_matrix_for_all_units_is_below_each_of_theirs(radius, monkeypatch):
    first, x = first_layer(entry_first(7, 6, 0.05)), torch.randn(4, 6, dtype=F64).numpy()
    by_units = FirstSigma(first, x)
    assert by_units.is_by_units and by_units.lengths.shape == (7, 6)
    exact = by_units.squared_at_least(radius)
    monkeypatch.setattr(first_sigma, "MOST_WORK", 0.0)
    monkeypatch.setattr(first_sigma, "BLOCK", 12)  # two rows at a time
    shared = FirstSigma(first, x)
    assert not shared.is_by_units and shared.lengths.shape == (1, 6)
    assert 0.0 < shared.squared_at_least(radius) <= exact * (1 + 1e-12)
    w = np.abs(first.weight.detach().numpy()) + (0.0 if math.isinf(radius) else radius)
    slopes = 0.5 * (0.5 + w**2) ** -1.5 + 0.05 if math.isfinite(radius) else np.full_like(w, 0.05)
    truth = min(np.linalg.eigvalsh((x * s**2) @ x.T + 1.0)[0] for s in slopes)
    assert exact == pytest.approx(truth, rel=1e-9)


def test_a_row_normalised_first_layer_needs_its_longest_row_alone():
    torch.manual_seed(0)
    first = first_layer(nn.Sequential(tnn.WeightNormLinear(5, 3, bias=False, eps=0.7, dtype=F64)))
    x = torch.randn(4, 5, dtype=F64).numpy()
    longest = float(first.weight.detach().norm(dim=1).max())
    truth = (0.7 * (0.7 + (longest + 0.2) ** 2) ** -1.5) ** 2 * np.linalg.eigvalsh(x @ x.T)[0]
    assert FirstSigma(first, x).squared_at_least(0.2) == pytest.approx(truth, rel=1e-9)


def test_the_row_says_where_units_share_a_gram_matrix(monkeypatch):
    monkeypatch.setattr(first_sigma, "MOST_WORK", 0.0)
    model = nn.Sequential(*entry_first(5, 6, 0.5), nn.Tanh(), nn.Linear(5, 1, dtype=F64))
    found = tnn.certify(model, torch.randn(3, 6, dtype=F64), torch.randn(3, 1, dtype=F64))
    [row] = [row for row in found.hypotheses if row.name == "the first layer's units one by one"]
    assert (row.path, row.holds, row.grade) == ("0", False, "") and row.value > 0


def test_held_weights_give_the_same_bits_and_go_at_the_end(monkeypatch):
    monkeypatch.setattr(held, "MANY", 1)
    monkeypatch.setattr(held, "MANY_OF_SPECTRAL", 1)
    torch.manual_seed(0)
    spectral = modules.SpectralNormConv2d(2, 3, 3, padding=1, dtype=F64)
    model = nn.Sequential(spectral, nn.Flatten(), tnn.EntryNormLinear(48, 4, leak=0.1, dtype=F64))
    x = torch.randn(5, 2, 4, 4, dtype=F64)
    plain = model(x)
    with held.weights_held(), held.with_held_weights(model) as inside:
        assert torch.equal(inside(x), plain)
        model[2].weight.data.zero_()
        assert torch.equal(inside(x), plain)  # it was not computed again
        with held.with_held_weights(model, moving=("2.weight",)):
            pass
    assert "forward" not in vars(model[2]) and not torch.equal(model(x), plain)


def test_weights_that_move_are_not_held(monkeypatch):
    monkeypatch.setattr(held, "MANY", 1)
    model = nn.Sequential(tnn.EntryNormLinear(3, 2, dtype=F64))
    with held.weights_held(), held.with_held_weights(model, moving=("0.weight",)):
        assert "forward" not in vars(model[0])
        with held.with_held_weights(model):
            assert "forward" in vars(model[0])
    assert "forward" not in vars(model[0])


def test_a_certificate_with_held_weights_is_the_one_without(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(tnn.EntryNormLinear(6, 4, leak=0.5), tnn.Tanh(), tnn.WeightNormLinear(4, 2)).double()
    x, y = torch.randn(3, 6, dtype=F64), torch.randn(3, 2, dtype=F64)
    before = tnn.certify(model, x, y)
    monkeypatch.setattr(held, "MANY", 1)
    assert tnn.certify(model, x, y) == before


def test_the_work_of_a_backward_pass_counts_the_layers_behind_a_parameter():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 5), nn.Tanh())
    layers = seen.see(model, torch.randn(2, 2, 4, 4))
    assert layers[0].work == 16 * 3 * 2 * 9 and layers[2].work == 48 * 5
    assert seen.backward_work(layers, ["2.bias"]) == 2 * (48 * 5 + 5)
    assert seen.backward_work(layers, ["0.weight", "2.bias"]) > 2 * 16 * 54
    assert seen.backward_work(layers, ["nowhere.weight"]) == 0.0


def test_passes_that_are_too_dear_leave_the_last_layers_jacobian():
    """64 channels of 64 pixels before a linear layer: the budget holds every row, and not every pass."""
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 32, 3, padding=1), *(nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(3))]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2)).double()
    problem = problem_of(model, torch.randn(8, 1, 16, 16, dtype=F64), None, "mse")
    whole = measure.jacobian_extremes(problem, 2**30, quiet)
    assert whole.source == "exact Gram matrix of all parameters"
    last = measure.jacobian_extremes(problem, 2**20, quiet)
    assert last.largest is None and "last 66 of" in last.source
    features = torch.cat([model[:-1](problem.inputs), torch.ones(8, 1, dtype=F64)], 1)
    assert last.smallest == pytest.approx(float(torch.linalg.svdvals(features)[-1]), rel=1e-6)
    assert last.smallest <= whole.smallest * (1 + 1e-9)


def test_batch_norm_says_whether_its_batch_is_degenerate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double().train()

    def row(count: int):
        x = torch.randn(count, 4, dtype=F64)
        rows = tnn.certify(model, x, torch.randn(count, 1, dtype=F64)).hypotheses
        return x, *[r for r in rows if r.name == "a batch covariance that is not degenerate"]

    _, few = row(4)
    assert not few.holds and few.path == "1" and few.value == 0.0 and "Use at least 5 independent samples" in few.remedy
    x, many = row(9)
    truth = float(np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[0])
    assert many.holds and many.value == pytest.approx(truth, rel=1e-9) and many.bound < many.value
    assert not [r for r in tnn.certify(model.eval(), x, None).hypotheses if "degenerate" in r.name]


def test_a_near_duplicate_is_named_and_bounds_lambda():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(4, 3, dtype=F64)
    x[3] = x[1] + 1e-4
    found = tnn.certify(model, x, None)
    [row] = [row for row in found.hypotheses if row.name == "samples well apart"]
    assert (row.holds, row.grade, row.kind) == (False, "", "measured") and row.remedy.startswith("Samples 1 and 3 are")
    assert row.value == pytest.approx(1e-4 * math.sqrt(3), rel=1e-9)
    rows = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)).flatten())(dict(model.named_parameters()))
    difference = sum(float((r[1] - r[3]).square().sum()) for r in rows.values())
    assert 0 < found.lambda_lower <= difference / 2
    [row] = [row for row in tnn.certify(model, x[:3], None).hypotheses if row.name == "samples well apart"]
    assert row.holds


def test_a_channel_without_variance_is_named():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 1)).double().train()
    model[0].weight.data[1].zero_()
    found = tnn.certify(model, torch.randn(3, 1, 2, 2, dtype=F64), torch.randn(3, 1, dtype=F64))
    [row] = [r for r in found.hypotheses if r.name == "batch variances that are not degenerate"]
    assert not row.holds and row.path == "1" and row.remedy.startswith("Channel 1 of what 1 normalises is the same")


def test_a_drawn_direction_contradicts_a_bound_that_is_too_small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2)).double()
    problem = problem_of(model, torch.randn(4, 3, dtype=F64), None, "mse")
    layers = seen.see(problem.model, problem.inputs)
    norm = float(torch.linalg.matrix_norm(torch.cat([problem.inputs, torch.ones(4, 1, dtype=F64)], 1), 2))
    self_check.check_by_draw(problem, layers, norm, None)
    with pytest.raises(CertificateError, match="a fault of this package"):
        self_check.check_by_draw(problem, layers, norm / 50, torch.Generator().manual_seed(1))


def test_the_pooled_path_keeps_apart_what_it_pools_in_whole_windows():
    conv = PooledConv2d(2, 2, 1, stride=2, bias=False).double()
    conv.weight.requires_grad_(False).mul_(0.1)
    model = nn.Sequential(nn.Linear(16, 16), nn.Unflatten(1, (2, 2, 4)), conv).double()
    [_, layer] = residual_structure(model, torch.randn(2, 16, dtype=F64))
    dense = torch.func.jacrev(lambda x: conv(x[None])[0].flatten())(torch.zeros(2, 2, 4, dtype=F64)).flatten(1)
    assert layer.skip == "pooled path" and layer.sigma == pytest.approx(1.0, abs=1e-12)
    assert layer.sigma - layer.rho <= float(torch.linalg.svdvals(dense)[-1])


def test_the_paper_s_shortcut_is_not_said_to_miss_what_its_pooled_path_reads():
    """A 1x1 convolution of stride 2 reads a quarter of the pixels whatever its weights; with the pooled path all count."""
    torch.manual_seed(0)
    names, ranks = [], []
    for kind in (nn.Conv2d, PooledConv2d):
        shortcut = kind(2, 4, 1, stride=2, bias=False)
        model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), shortcut, nn.Flatten(), nn.Linear(16, 1)).double()
        found = tnn.certify(model, torch.randn(2, 1, 4, 4, dtype=F64), torch.randn(2, 1, dtype=F64))
        names.append({row.name for row in found.hypotheses if row.path == "1"})
        dense = torch.func.jacrev(lambda x, f=shortcut: f(x[None])[0].flatten())(torch.zeros(2, 4, 4, dtype=F64))
        ranks.append(int(torch.linalg.matrix_rank(dense.flatten(1))))
    impossible = "a skip whose singular values are 1"
    assert ranks == [8, 16]
    assert impossible in names[0] and impossible not in names[1]


def test_the_remainder_along_a_ray_passes_a_readout_with_entries_of_both_signs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), modules.OrthogonalReadout((8,), 4)).double()
    assert float(model[2].kernel.min()) < 0
    x = torch.randn(5, 3, dtype=F64)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    away = {name: 0.5 * torch.randn_like(p) for name, p in start.items()}
    ray = Ray(model, x)
    found = ray.along(away)
    assert float(found.r.min()) >= 0
    for u in torch.linspace(0.05, 1.0, 20, dtype=F64):
        y = torch.func.functional_call(model, {n: start[n] + u * away[n] for n in start}, (x,))
        error = (y - found.c0 - u * (found.c1 + u * found.c2)).abs()
        assert (error <= found.r * u**ray.order + 1e-13).all()
