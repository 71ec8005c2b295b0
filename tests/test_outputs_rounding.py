"""The rounding of outputs and loss: proved bounds against 50 digits, on balls of weights too, and what certificates say of it."""

import copy
import dataclasses
import importlib

import numpy as np
import pytest
import torch
from kernel_oracle import Network, exact, knows
from mpmath import mp, mpf
from provable_nets import provable_net
from regularity_networks import network
from torch import nn
from torch.nn import functional as F

import trainable_nn as tnn
from trainable_nn.certify.entries import LOSS_ASSUMED, LOSS_PROVED
from trainable_nn.certify.kernel_error import OutputsAlong, outputs, outputs_error_at_most
from trainable_nn.certify.kernel_error.outputs import FORWARD, errors_on_balls
from trainable_nn.certify.kernel_error.walk import values_of
from trainable_nn.certify.path import walk
from trainable_nn.certify.problem import ASSUMED, loss_between, problem_of
from trainable_nn.certify.regularity.network import read_graph
from trainable_nn.certify.regularity.rules import RULES
from trainable_nn.errors import CertificateError, UnboundedError
from trainable_nn.theory import Cost
from trainable_nn.theory.costs import cross_entropy, mse

F64 = torch.float64
SEEDS = [seed for seed in range(120) if knows(network(seed)[0])]


def exact_outputs(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    """In 50 digits, of mpf."""
    still = copy.deepcopy(model).requires_grad_(False)
    oracle = Network(still)
    return np.frompyfunc(lambda n: n.v, 1, 1)(oracle.run(still, oracle.constants(x.numpy())))


def away(computed: torch.Tensor, truth: np.ndarray) -> float:
    return float(mp.sqrt(sum((exact(computed.detach().numpy()) - truth).ravel() ** 2)))


def cancelling(scale: float = 1e8) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """x -> h_1 - h_2 for large and nearly equal h: what rounds is h, and the outputs never show its size."""
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(scale * torch.tensor([[0.1, 0.2, 0.3], [0.25, 0.15, 0.2]]))
        net[0].bias.copy_(torch.tensor([0.5, 0.25]))
        net[1].weight.copy_(torch.tensor([[1.0, -1.0]]))
    x = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0.7, 0.7, 0.7], [0.9, 0.9, 0.9]], dtype=F64)
    return net, x, torch.tensor([[0.0], [1.0], [-0.5]], dtype=F64)


def exact_mse(outputs: np.ndarray, targets: torch.Tensor):
    return sum((outputs - exact(targets.numpy())).ravel() ** 2) / targets.numel()


def test_where_large_values_cancel_the_enclosure_of_before_misses_the_loss_and_the_proved_one_holds_it():
    net, x, y = cancelling()
    problem, truth = problem_of(net, x, y, "mse"), exact_mse(exact_outputs(net, x), y)
    low, high = loss_between("here", problem.cost, problem.outputs, y)  # 2^-44, as it was
    print(f"exact {float(truth)!r}, before [{low!r}, {high!r}], now [{problem.loss_at_least!r}, {problem.initial_loss!r}]")
    assert not low <= truth <= high
    assert problem.loss_at_least <= truth <= problem.initial_loss
    assert problem.initial_loss - problem.loss_at_least < 1e-5
    assert away(problem.outputs, exact_outputs(net, x)) <= problem.outputs_error < 1e3 * away(problem.outputs, exact_outputs(net, x))
    assert problem.outputs_error > 100 * ASSUMED * float(problem.outputs.norm())


def test_the_certificate_of_that_network_says_that_its_loss_is_proved():
    net, x, y = cancelling()
    found = tnn.certify(net, x, y)
    (row,) = [row for row in found.hypotheses if row.name == LOSS_PROVED]
    assert row.kind == "proved" and row.value > 1e-9
    assert exact_mse(exact_outputs(net, x), y) <= found.initial_loss


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_outputs_of_random_networks_never_leave_the_bound(seed, scale):
    model, x = network(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
        error, bound = away(model(x), exact_outputs(model, x)), outputs_error_at_most(model, x)
    assert error <= bound
    assert bound <= 1e-8 * max(1.0, float(model(x).detach().norm()))


def moved(model: nn.Module, radius: float, seed: int) -> nn.Module:
    """All trained parameters by this much together, in a drawn direction."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    held = [p for p in twin.parameters() if p.requires_grad]
    with torch.no_grad():
        steps = [torch.randn(p.shape, generator=generator, dtype=F64) for p in held]
        length = float(torch.stack([s.norm() for s in steps]).norm())
        for p, s in zip(held, steps):
            p.add_(s, alpha=radius * (1 - 1e-12) / length)
    return twin


def values_at(model: nn.Module, x: torch.Tensor):
    graph = read_graph(model, x, RULES)
    return graph, 1 if any(node.step.mixes_samples for node in graph.nodes) else len(x)


ANEW = {(0.3, 34)}  # a block may set its scale anew on this ball, and no other network and ball here is refused


@pytest.mark.parametrize("radius", [1e-3, 0.3])
@pytest.mark.parametrize("seed", range(60))
def test_on_a_ball_no_value_moves_and_no_bound_grows_by_more_than_is_proved(seed, radius):
    model, x = network(seed)
    graph, samples = values_at(model, x)
    try:
        here = values_of(graph, samples, radius, FORWARD)
    except UnboundedError as refused:
        assert (radius, seed) in ANEW and "set its scale anew" in str(refused)
        return
    assert (radius, seed) not in ANEW and all(np.isfinite(v.error).all() for v in here)
    other = moved(model, radius, seed)
    there, _ = values_at(other, x)
    bounds = values_of(there, samples, 0.0, FORWARD)
    for node, value, end, bound in zip(graph.nodes, here, there.nodes, bounds):
        gone = (end.value - node.value).reshape(samples, -1).norm(dim=1).numpy()
        assert (gone <= value.moved * (1 + 1e-9) + 1e-13 * value.norm).all(), node.step.path
        assert (bound.norm <= value.norm * (1 + 1e-6)).all(), node.step.path
        assert (bound.error <= value.error * (1 + 1e-6)).all(), node.step.path


@pytest.mark.parametrize("seed", SEEDS[:20])
def test_networks_on_the_ball_never_leave_its_bound(seed):
    model, x = network(seed)
    _, bound = errors_on_balls(model, x, (0.0, 0.05))
    other = moved(model, 0.05, seed)
    assert away(other(x), exact_outputs(other, x)) <= bound


def test_a_ball_of_radius_0_has_the_bound_of_its_centre_and_a_larger_one_a_larger_bound():
    model, x = network(SEEDS[0])
    at, small, large = errors_on_balls(model, x, (0.0, 1e-9, 0.1))
    assert at <= small <= at * (1 + 1e-3) and small < large


def path_problem():
    g = torch.Generator().manual_seed(1)
    net = provable_net(5, 4, 1, 2, strength=0.5, leak=0.0, bias=True, seed=1)
    return net, torch.randn(2, 5, generator=g, dtype=F64), 0.5 * torch.randn(2, 1, generator=g, dtype=F64)


def test_along_a_path_few_walks_are_needed_and_each_holds_where_the_weights_are(monkeypatch):
    net, x, y = path_problem()
    problem, kept = problem_of(net, x, y, "mse"), []
    along = OutputsAlong(problem.model, problem.inputs)
    for _ in range(300):
        error = along.at_now()
        kept.append((error, outputs_error_at_most(problem.model, problem.inputs)))
        loss = F.mse_loss(problem.model(problem.inputs), problem.targets)
        gradient = torch.autograd.grad(loss, [p for p in problem.model.parameters() if p.requires_grad])
        with torch.no_grad():
            for p, g in zip((p for p in problem.model.parameters() if p.requires_grad), gradient):
                p.add_(g, alpha=-0.1)
    assert all(here <= error * (1 + 1e-6) for error, here in kept)
    assert max(error / here for error, here in kept) < 20
    assert along.walks <= 10


def test_weights_that_leave_the_ball_are_walked_again():
    net, x, _ = path_problem()
    along = OutputsAlong(net, x)
    first = along.at_now()
    assert along.at_now() == first and along.walks == 1
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(30.0)
    assert along.at_now() >= outputs_error_at_most(net, x) and along.walks == 2


def test_a_path_says_that_its_losses_are_proved_and_they_hold_in_fifty_digits():
    net, x, y = path_problem()
    path = tnn.certify_path(net, x, y)
    assert path.holds and [r.kind for r in path.arrival.hypotheses if r.name == LOSS_PROVED] == ["proved"]
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=path.step_size)
    for bound in path.losses[: 1 + min(path.steps, 40)]:
        truth = exact_mse(exact_outputs(net, x), y)
        assert truth <= bound <= float(truth) * (1 + 1e-9)
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()


def refuse(step):
    raise UnboundedError(f"{step.path}: no rule.")


def test_a_path_without_rules_says_in_its_arrival_that_the_loss_is_assumed(monkeypatch):
    monkeypatch.setattr(importlib.import_module("trainable_nn.certify.kernel_error.rules"), "rounded", refuse)
    path = tnn.certify_path(*path_problem())
    (row,) = [r for r in path.arrival.hypotheses if r.name == LOSS_ASSUMED]
    assert path.holds and row.kind == "measured" and "no rule" in row.remedy


def test_a_path_that_is_assumed_on_the_way_alone_says_so_at_its_arrival(monkeypatch):
    net, x, y = path_problem()
    problem = problem_of(net, x, y, "mse")
    monkeypatch.setattr(OutputsAlong, "_prove", lambda self: refuse(next(iter(read_graph(net, x, RULES).nodes)).step))
    path = walk(problem, 0.1, 3, 2**24, lambda *a: None)
    (row,) = [r for r in path.arrival.hypotheses if r.name in (LOSS_ASSUMED, LOSS_PROVED)]
    assert row.name == LOSS_ASSUMED and any("assumed" in note for note in path.arrival.notes)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e5])
@pytest.mark.parametrize("entries", [1, 7, 3000])
def test_the_mean_square_errs_by_no_more_than_it_states(entries, size):
    g = torch.Generator().manual_seed(entries)
    z, y = (size * torch.randn(entries, 1, generator=g, dtype=F64) for _ in range(2))
    cost = mse(entries)
    value = float(cost.value(z, y))
    error = abs(mpf(value) - exact_mse(exact(z.numpy()), y))
    assert error <= cost.rounding_at_most(z, y, value) <= (entries + 9) * 2.0**-53 * value


@pytest.mark.parametrize("size", [1e-3, 1.0, 40.0, 1e6])
@pytest.mark.parametrize("shape", [(1, 2), (5, 10), (40, 3), (4, 3, 6)])
def test_cross_entropy_errs_by_no_more_than_it_states(shape, size):
    g = torch.Generator().manual_seed(sum(shape))
    z = size * torch.randn(*shape, generator=g, dtype=F64)
    y = torch.randint(shape[1], (shape[0], *shape[2:]), generator=g)
    cost = cross_entropy(y.numel(), shape[1])
    value = float(cost.value(z, y))
    rows, labels = z.movedim(1, -1).reshape(-1, shape[1]).tolist(), y.flatten().tolist()
    with mp.workdps(60):
        each = [mp.log(sum(mp.exp(mpf(v) - mpf(row[k])) for v in row)) for row, k in zip(rows, labels)]
        error = abs(mpf(value) - sum(each) / len(each))
    bound = cost.rounding_at_most(z, y, value)
    assert error <= bound <= 1e-10 * max(size, 1.0)
    assert bound < 1e-13 * max(size, 1.0) or z.numel() > 20


def test_a_cost_of_ones_own_has_a_proved_loss_where_it_states_its_rounding():
    net, x, y = cancelling()
    half = Cost("half", lambda z, t: (z - t).square().sum() / 2, smoothness=1.0, pl=2.0)
    stated = dataclasses.replace(half, rounding=lambda z, t, value: 16 * 2.0**-53 * value)
    kinds = {}
    for name, cost in (("half", half), ("stated", stated)):
        found = tnn.certify(net, x, y, loss=cost)
        (row,) = [row for row in found.hypotheses if row.name in (LOSS_PROVED, LOSS_ASSUMED)]
        kinds[name] = (row.kind, row.name == LOSS_PROVED, "states no rounding" in row.remedy)
        assert exact_mse(exact_outputs(net, x), y) * 3 / 2 <= found.initial_loss
    assert kinds == {"half": ("measured", False, True), "stated": ("proved", True, False)}


def certified(activation: nn.Module) -> tuple[tnn.Certificate, tuple]:
    torch.manual_seed(0)
    model = nn.Sequential(tnn.EntryNormLinear(4, 64), activation, nn.Linear(64, 1))
    x = torch.randn(4, 4)
    y = model(x).detach() + 1e-3
    return tnn.certify(model, x, y), (model, x, y)


def test_a_ball_that_rests_on_an_assumed_loss_says_so_in_a_row_and_a_note(monkeypatch):
    monkeypatch.setattr(importlib.import_module("trainable_nn.certify.kernel_error.rules"), "rounded", refuse)
    found, _ = certified(nn.Tanh())
    (row,) = [r for r in found.hypotheses if r.name == LOSS_ASSUMED]
    assert found.grade == "ball" and (row.kind, row.path, row.value) == ("measured", "1", None)
    assert "The rounding of outputs and loss is assumed, not proved: 1: no rule." in found.explain()


def test_a_ball_with_a_proved_loss_has_no_note_of_it():
    found, _ = certified(nn.Tanh())
    assert found.grade == "ball" and not any("outputs and loss" in note for note in found.notes)


def test_a_certificate_from_before_the_proof_is_refused_with_the_reason():
    found, arguments = certified(nn.Tanh())
    before = tuple(row for row in found.hypotheses if row.name != LOSS_PROVED)
    with pytest.raises(CertificateError, match="when the loss was enclosed by an assumption, which fails where large values cancel"):
        tnn.verify(dataclasses.replace(found, hypotheses=before), *arguments)
    tnn.verify(found, *arguments)


def test_a_path_from_before_the_proof_is_refused_with_the_reason():
    net, x, y = path_problem()
    path = tnn.certify_path(net, x, y)
    tnn.verify(path, net, x, y)
    rows = tuple(row for row in path.arrival.hypotheses if row.name != LOSS_PROVED)
    before = dataclasses.replace(path, arrival=dataclasses.replace(path.arrival, hypotheses=rows))
    with pytest.raises(CertificateError, match="when the loss was enclosed by an assumption"):
        tnn.verify(before, net, x, y)


def test_without_targets_nothing_is_said_of_a_loss():
    net, x, _ = cancelling()
    assert not any("loss" in row.name for row in tnn.certify(net, x).hypotheses)


def test_a_network_whose_norms_multiply_to_nothing_useful_is_left_to_the_assumption():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(40)]).double()
    x, scale = torch.randn(2, 8, dtype=F64), 3.0
    for p in model.parameters():
        nn.init.normal_(p, std=scale)
    with torch.no_grad():
        for layer in model[::2]:  # a contraction follows each expansion, which no product of norms sees
            layer.weight.copy_(torch.diag(torch.tensor([1e4] + [1e-4] * 7, dtype=F64)))
        for layer in model[1::2]:
            layer.weight.copy_(torch.diag(torch.tensor([1e-4] + [1e4] * 7, dtype=F64)))
    with pytest.raises(UnboundedError, match="^the model: rounding of its outputs is bounded by no less than"):
        outputs_error_at_most(model, x)
    problem = problem_of(model, x, torch.zeros(2, 8, dtype=F64), "mse")
    assert problem.outputs_error is None and isinstance(problem.refused, UnboundedError)


def test_pieces_of_the_batch_give_what_the_whole_gives(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(7, 6, dtype=F64)
    whole = errors_on_balls(model, x, (0.0, 0.1))
    monkeypatch.setattr(importlib.import_module("trainable_nn.certify.kernel_error.pieces"), "MOST_NUMBERS", 1)
    assert errors_on_balls(model, x, (0.0, 0.1)) == pytest.approx(whole, rel=1e-4)
