"""certify_path: what it proves of a constant step holds of torch's own gradient descent and of 50 digits, and no more is proved."""

import dataclasses
import functools
import itertools
import json
import os

import mpmath
import pytest
import torch
from provable_nets import provable_net, reference_problem, trained
from torch import nn
from torch.nn import functional as F

import trainable_nn as tnn
from trainable_nn.errors import CertificateError
from trainable_nn.optim import CertifiedLR

PROBLEMS = int(os.environ.get("TRAINABLE_NN_PROBLEMS", "4"))  # the full sweep: TRAINABLE_NN_PROBLEMS=1000


def run(net, x, y, step, steps):
    """Loss and weights before each step of torch.optim.SGD and after the last."""
    optimizer = torch.optim.SGD(trained(net), lr=step)
    seen = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        weights = torch.cat([p.detach().flatten() for p in trained(net)])
        seen.append((float(loss.detach()), weights))
        optimizer.step()
    return seen


def smallest_singular(net, x):
    """Of DF, by torch.autograd one row at a time."""
    rows = [torch.autograd.grad(entry, trained(net), retain_graph=True) for entry in net(x).flatten()]
    return float(torch.linalg.svdvals(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))[-1])


def keeps_its_promises(path, net, x, y, further=40):
    seen = run(net, x, y, path.step_size, path.steps + further)
    arrived = seen[path.steps][1]
    for t, (loss, weights) in enumerate(seen):
        assert loss <= path.predicted_loss(t) * (1 + 1e-9) + 1e-26  # the run may round otherwise
        assert float((weights - seen[0][1]).norm()) <= path.radius * (1 + 1e-9)
        if t > 0 and loss > 1e-24:
            assert loss < seen[t - 1][0]
        if t > path.steps:
            assert float((weights - arrived).norm()) <= path.arrival.radius * (1 + 1e-9)
    assert smallest_singular(net, x) ** 2 >= path.lambda_lower > 0


def unleaky(seed):
    """No leak, so nothing holds over all weights: a problem whose ball does not close at the start."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda *options: options[int(torch.randint(len(options), (1,), generator=g))]
    samples, outputs = pick(2, 3), pick(1, 2)
    blocks = pick(1, 2) if PROBLEMS < 100 else pick(1, 2, 4, 8)
    net = provable_net(
        samples + 3,
        outputs + 3,
        outputs,
        blocks,
        strength=pick(0.25, 0.5, 0.9),
        leak=0.0,
        bias=pick(False, True),
        seed=seed,
    )
    draw = lambda n: torch.randn(samples, n, generator=g, dtype=torch.float64)
    return net, draw(samples + 3), 0.5 * draw(outputs)


@functools.cache
def path_of(seed):
    return tnn.certify_path(*unleaky(seed))


@pytest.mark.parametrize("seed", range(PROBLEMS))
def test_torchs_gradient_descent_keeps_what_a_path_promises(seed):
    net, x, y = unleaky(seed)
    path = path_of(seed)
    assert path.grade == "ball" and path.reason == "", path.explain()
    assert 0 < path.step_size * path.arrival.smoothness_upper < 2
    keeps_its_promises(path, net, x, y)


def test_a_reference_problem_has_a_step_within_100_of_the_largest_stable_one():
    net, x, y = reference_problem(4, 0.5)
    assert tnn.certify(net, x, y, budget=2**22).grade == "measured"  # no ball closes at the start
    path = tnn.certify_path(net, x, y)
    assert path.grade == "ball", path.explain()
    losses = [loss for loss, _ in run(net, x, y, 100 * path.step_size, 30)]
    assert any(after > before for before, after in itertools.pairwise(losses))  # so the largest stable step is below
    keeps_its_promises(path, *reference_problem(4, 0.5), further=60)


# fifty digits


def plain():
    """x -> V tanh(W x + b) + c, whose gradient is written out below."""
    torch.manual_seed(3)
    options = {"dtype": torch.float64}
    net = nn.Sequential(nn.Linear(3, 4, **options), tnn.Tanh(), nn.Linear(4, 1, **options))
    return net, torch.randn(2, 3, **options), torch.tensor([[0.3], [-0.4]], dtype=torch.float64)


class FiftyDigits:
    """The mean square loss of ``plain`` and its gradient descent, by mpmath alone."""

    def __init__(self, weights, x, y):
        self.x, self.y = x.tolist(), y.flatten().tolist()
        numbers = [mpmath.mpf(float(w)) for w in weights]
        self.W = [numbers[3 * i : 3 * i + 3] for i in range(4)]
        self.b, self.V, self.c = numbers[12:16], numbers[16:20], numbers[20]

    def _forward(self):
        for x, y in zip(self.x, self.y):
            h = [mpmath.tanh(sum(w * v for w, v in zip(row, x)) + b) for row, b in zip(self.W, self.b)]
            yield x, h, sum(v * u for v, u in zip(self.V, h)) + self.c - mpmath.mpf(y)

    def loss(self):
        return sum(r * r for _, _, r in self._forward()) / len(self.y)

    def step(self, eta):
        W, b, V, c = [list(row) for row in self.W], list(self.b), list(self.V), self.c
        for x, h, r in self._forward():
            scale = mpmath.mpf(eta) * 2 * r / len(self.y)
            c -= scale
            for i in range(4):
                back = scale * self.V[i] * (1 - h[i] ** 2)
                V[i], b[i] = V[i] - scale * h[i], b[i] - back
                W[i] = [w - back * v for w, v in zip(W[i], x)]
        self.W, self.b, self.V, self.c = W, b, V, c

    def flat(self):
        return [*(w for row in self.W for w in row), *self.b, *self.V, self.c]


def test_the_falls_and_the_ball_hold_in_fifty_digits():
    """Of the computed weights each loss is lower than the one before; from the last on, exact descent stays in the ball."""
    net, x, y = plain()
    path = tnn.certify_path(net, x, y)
    assert path.grade == "ball" and path.steps > 5, path.explain()
    seen = run(net, x, y, path.step_size, path.steps)
    with mpmath.workdps(50):
        before = mpmath.inf
        for bound, (_, weights) in zip(path.losses, seen):
            loss = FiftyDigits(weights, x, y).loss()
            assert loss < before and loss <= bound
            before = loss
        exact = FiftyDigits(seen[-1][1], x, y)
        start = exact.flat()
        for t in range(30):
            assert exact.loss() <= path.predicted_loss(path.steps + t)
            assert mpmath.sqrt(sum((a - b) ** 2 for a, b in zip(exact.flat(), start))) <= path.arrival.radius
            exact.step(path.step_size)
        assert exact.loss() < path.losses[-1] * path.rate**30


# what is refused


def test_a_step_that_raises_the_loss_is_refused_by_its_number():
    net, x, y = unleaky(0)
    path = tnn.certify_path(net, x, y, step_size=64 * path_of(0).step_size)
    assert path.grade == "measured" and path.step_size is path.rate is path.radius is None and path.too_long
    losses = [loss for loss, _ in run(net, x, y, path.tried, path.steps + 1)]
    assert losses[-1] > losses[-2] and f"step {path.steps + 1} raised the loss" in path.reason
    with pytest.raises(CertificateError, match="raised the loss"):
        CertifiedLR(torch.optim.SGD(trained(net), lr=1.0), path)


def test_near_the_minimum_a_step_is_refused_as_soon_as_eta_l_reaches_2():
    """There the largest stable step is 2 / lambda_max of the loss, to first order: the certificate ends at it."""
    net, x, y = unleaky(1)
    path = path_of(1)
    run(net, x, y, path.step_size, path.steps + 60)
    rows = [torch.autograd.grad(entry, trained(net), retain_graph=True) for entry in net(x).flatten()]
    top = float(torch.linalg.matrix_norm(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]), 2)) ** 2
    stable = 2 / (2 / y.numel() * top)
    assert tnn.certify_path(net, x, y, step_size=0.9 * stable, steps=0).grade == "ball"
    long = tnn.certify_path(net, x, y, step_size=1.01 * stable, steps=0)
    assert long.grade == "measured" and long.too_long and "2 / L" in long.explain()


def test_too_few_steps_prove_nothing_and_say_so():
    path = tnn.certify_path(*unleaky(2), steps=3)
    assert path.steps == 3 and path.grade == "measured" and "Allow more steps" in path.reason
    assert path.predicted_loss(1) is None and path.steps_to(1e-3) is None


def test_a_kink_ends_the_search_at_once():
    net = nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), nn.ReLU(), nn.Linear(4, 1, dtype=torch.float64))
    path = tnn.certify_path(net, torch.randn(2, 3, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64))
    assert path.steps == 0 and path.grade == "measured" and "SmoothReLU" in path.explain()


def test_samples_that_repeat_each_other_have_grade_none():
    net, x, y = unleaky(3)
    x[1] = x[0]
    path = tnn.certify_path(net, x, y)
    assert path.grade == "none" and path.steps == 0 and "Drop one of them" in path.explain()


def test_a_minimum_at_infinity_has_no_ball_to_end_in():
    net, x, _ = unleaky(4)
    net = nn.Sequential(*net, nn.Linear(net[-1].out_features, 2, dtype=torch.float64))
    path = tnn.certify_path(net, x, torch.zeros(len(x), dtype=torch.int64), loss="cross_entropy")
    assert path.grade == "measured" and path.steps == 0 and "at infinity" in path.reason


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"targets": None}, TypeError, "targets are needed"),
        ({"step_size": 0.0}, ValueError, "step_size must be positive"),
        ({"step_size": float("nan")}, ValueError, "step_size must be positive"),
        ({"steps": -1}, ValueError, "steps must be a whole number"),
        ({"steps": 2.5}, ValueError, "steps must be a whole number"),
        ({"budget": 0}, ValueError, "budget must be a positive"),
    ],
)
def test_bad_input_is_refused_in_words(options, error, words):
    net, x, y = unleaky(0)
    with pytest.raises(error, match=words):
        tnn.certify_path(net, x, options.pop("targets", y), **options)


# use


def test_a_run_of_ones_own_is_certified_at_its_end():
    """Training in float32 takes another path; where it ends, a path of no steps answers."""
    net, x, y = unleaky(3)
    step = path_of(3).step_size
    net, x, y = net.float(), x.float(), y.float()
    run(net, x, y, step, 1000)
    path = tnn.certify_path(net, x, y, step_size=step, steps=0)
    assert path.grade == "ball" and path.steps == 0, path.explain()
    assert path.radius == pytest.approx(path.arrival.radius, rel=1e-12)


def test_certified_lr_takes_a_path():
    net, x, y = unleaky(0)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    path = tnn.certify_path(net, x, y, steps=200)
    assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())
    optimizer = torch.optim.SGD(trained(net), lr=1.0)
    schedule = CertifiedLR(optimizer, path)
    for _ in range(4):
        assert optimizer.param_groups[0]["lr"] == path.step_size
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
        schedule.step()
        assert float(F.mse_loss(net(x), y).detach()) <= schedule.predicted_loss * (1 + 1e-9)


def test_numbers_follow_from_the_path():
    path = path_of(0)
    assert path.steps_to(path.losses[0]) == 0 and path.steps_to(path.losses[3]) == 3
    low = path.losses[-1] * 1e-3
    more = path.steps_to(low)
    assert more > path.steps and path.predicted_loss(more) <= low
    assert path.loss_curve([0, path.steps]) == [path.losses[0], path.losses[-1]]
    assert path.end <= path.distance <= path.path_length * (1 + 1e-9) and path.distance < path.radius
    with pytest.raises(ValueError, match="at least 0"):
        path.predicted_loss(-1)


def test_a_path_survives_text_and_edits_are_named():
    (net, x, y), path = unleaky(0), path_of(0)
    again = tnn.PathCertificate.from_json(path.to_json())
    assert again == path and again.explain() == path.explain()
    assert tnn.verify(again, net, x, y) is None
    lower = (*path.losses[:3], path.losses[3] * 0.9, *path.losses[4:])
    edits = {
        "losses[3]": {"losses": lower},
        "distance": {"distance": path.distance / 2},
        "row 'lambda_lower'": {"arrival": dataclasses.replace(path.arrival, lambda_lower=9.0)},
        "row 'grade'": {"tried": 100 * path.tried},
    }
    for words, edit in edits.items():
        with pytest.raises(CertificateError) as caught:
            tnn.verify(dataclasses.replace(path, **edit), net, x, y)
        assert words in str(caught.value)
    with pytest.raises(CertificateError, match="the inputs are not those"):
        tnn.verify(path, net, 2 * x, y)
    found = json.loads(path.to_json())
    for damage in ({"losses": []}, {"tried": "fast"}, {"more": 1}, {"trainable_nn path certificate": 7}):
        with pytest.raises(CertificateError):
            tnn.PathCertificate.from_json(json.dumps({**found, **damage}))


def test_what_a_path_assumes_of_rounding_is_said_in_words():
    path = path_of(0)
    assert "assumed" not in path.explain()
    note = "the rounding of outputs and loss is assumed, not proved."
    told = dataclasses.replace(path, arrival=dataclasses.replace(path.arrival, notes=(*path.arrival.notes, note)))
    assert f"Where it ends: {note}" in told.explain()
