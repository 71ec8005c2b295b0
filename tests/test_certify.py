"""certify: what it grants holds under gradient descent, and what it does not grant has a reason that is true."""

import dataclasses
import math
import os

import pytest
import torch
from provable_nets import ACTIVATIONS, provable_net, reference_problem, trained
from real_models import needs_real_models, torchvision_model
from torch import nn
from torch.nn import functional as F

import trainable_nn as tnn
from trainable_nn.certify.layers import layers_of
from trainable_nn.certify.measure import extremes_of
from trainable_nn.certify.problem import problem_of
from trainable_nn.errors import CertificateError
from trainable_nn.theory import Cost

PROBLEMS = int(os.environ.get("TRAINABLE_NN_PROBLEMS", "12"))  # the full sweep: TRAINABLE_NN_PROBLEMS=1000


def generated(seed: int):
    """A problem of the provable class: net, inputs, targets, loss."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda *options: options[int(torch.randint(len(options), (1,), generator=g))]
    samples, outputs = pick(1, 2, 3, 4), pick(1, 2, 3)
    inputs = samples + pick(0, 1, 4)
    width = outputs + pick(0, 1, 3)
    blocks = pick(0, 1, 1, 2, 3) if PROBLEMS < 100 else pick(0, 1, 2, 4, 8, 15)
    net = provable_net(
        inputs, width, outputs, blocks, strength=pick(0.1, 0.3, 0.5), leak=pick(0.25, 0.5, 1.0), eps=pick(0.5, 1.0, 2.0),
        bias=pick(False, True), activation=pick(*ACTIVATIONS), spread=pick(0.1, 0.5), seed=seed,
    )  # fmt: skip
    x = torch.randn(samples, inputs, generator=g, dtype=torch.float64)
    if outputs > 1 and pick(True, False):
        return net, x, torch.randint(outputs, (samples,), generator=g), "cross_entropy"
    return net, x, 0.5 * torch.randn(samples, outputs, generator=g, dtype=torch.float64), "mse"


FLOOR = 1e-30  # of a mean square of residuals of order 1, each rounded to 1e-16
LOSSES = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}


def descend(net, x, y, loss, step, steps, every):
    """Plain gradient descent; (t, loss, distance) each ``every`` steps."""
    start = [p.detach().clone() for p in trained(net)]
    optimizer = torch.optim.SGD(trained(net), lr=step)
    seen = []
    for t in range(steps + 1):
        optimizer.zero_grad()
        value = LOSSES[loss](net(x), y)
        value.backward()
        distance = sum(float((p.detach() - s).square().sum()) for p, s in zip(trained(net), start)) ** 0.5
        seen.append((t, float(value.detach()), distance))
        optimizer.step()
    return seen[::every]


def dense_jacobian(net, x):
    """d outputs / d parameters by torch.autograd, one row at a time."""
    rows = []
    for entry in net(x).flatten():
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(entry, trained(net), retain_graph=True)]))
    return torch.stack(rows)


@pytest.mark.parametrize("seed", range(PROBLEMS))
def test_descent_with_the_certified_step_keeps_every_promise(seed):
    net, x, y, loss = generated(seed)
    certificate = tnn.certify(net, x, y, loss=loss)
    assert certificate.grade == "global", certificate.explain()
    assert 0 < certificate.step_size * certificate.smoothness_upper < 2
    slope = sum(float(g.square().sum()) for g in torch.autograd.grad(LOSSES[loss](net(x), y), trained(net)))
    losses = descend(net, x, y, loss, certificate.step_size, 40, 1)
    before = math.inf
    for t, value, distance in losses:
        assert value <= before * (1 + 1e-14) + FLOOR
        assert distance <= certificate.radius * (1 + 1e-9)
        assert value <= certificate.predicted_loss(t) * (1 + 1e-12) + FLOOR
        before = value
    if certificate.rate is not None:
        assert losses[-1][1] <= losses[0][1] * certificate.rate**40 * (1 + 1e-12) + FLOOR
    fall = 40 * certificate.step_size * slope / losses[0][1]  # of the loss, relative and to first order
    assert losses[-1][1] < losses[0][1] or fall < 1e-13  # which float64 does not see
    sigma = torch.linalg.svdvals(dense_jacobian(net, x))[-1]  # at the end of the path
    assert float(sigma) ** 2 >= certificate.lambda_lower


def test_the_global_bound_of_lambda_holds_far_from_the_start():
    net = provable_net(4, 3, 2, 2, leak=0.4, strength=0.4)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    floor = layers_of(problem_of(net, x, None, "mse")).sigma_at_least(math.inf)
    alone = 0.4 * float(torch.linalg.svdvals(x)[-1]) * 0.6**2  # leak sigma(X) (1 - strength)^2
    assert 0 < alone * (1 - 1e-6) <= floor <= alone * (1 + 1e-4)
    for scale in (0.1, 1.0, 10.0, 1000.0):
        for seed in range(5):
            far = provable_net(4, 3, 2, 2, leak=0.4, strength=0.4, spread=scale, seed=seed)
            assert float(torch.linalg.svdvals(dense_jacobian(far, x))[-1]) >= floor


# the ball


def test_a_ball_closes_after_some_certified_steps_without_any_leak():
    """At the start nothing closes; near the minimum the path provably stays."""
    net, g = provable_net(8, 6, 2, 1, leak=0.0, seed=1), torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, n, generator=g, dtype=torch.float64) for n in (8, 2))
    before = tnn.certify(net, x, y)
    assert before.grade == "measured" and "No ball closes" in before.explain()
    optimizer = torch.optim.SGD(trained(net), lr=1.0)
    descent = tnn.optim.CertifiedDescent(optimizer, net, x, y)
    while descent.history[-1].loss > 3e-7:
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
        descent.step()
    certificate = tnn.certify(net, x, y)
    assert certificate.grade == "ball", certificate.explain()
    assert [row.name for row in certificate.failing] == ["a slope of the first layer's P with a lower bound everywhere"]
    truth = float(torch.linalg.svdvals(dense_jacobian(net, x))[-1]) ** 2
    assert truth / 30 <= certificate.lambda_lower <= truth
    for t, value, distance in descend(net, x, y, "mse", certificate.step_size, 60, 10):
        assert value <= certificate.predicted_loss(t) * (1 + 1e-9) and distance <= certificate.radius


def test_lambda_at_this_point_is_the_dense_one():
    net, x, _ = reference_problem(2, 0.5)
    certificate = tnn.certify(net, x)
    truth = float(torch.linalg.svdvals(dense_jacobian(net, x))[-1]) ** 2
    assert truth * (1 - 1e-6) <= certificate.lambda_lower <= truth
    assert certificate.grade == "measured" and certificate.step_size is None


def test_extremes_of_a_prescribed_spectrum_are_enclosed():
    g = torch.Generator().manual_seed(0)
    for smallest in (1.0, 1e-5, 1e-9, 0.0):
        q = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64))[0]
        p = torch.linalg.qr(torch.randn(40, 12, generator=g, dtype=torch.float64))[0]
        values = torch.linspace(1, 3, 12, dtype=torch.float64)
        values[0] = smallest
        low, high = extremes_of(q @ torch.diag(values) @ p.T)
        assert low <= smallest and 3.0 <= high <= 3.0 * (1 + 1e-9)
        assert low >= 0.98 * smallest or smallest < 1e-8
    assert extremes_of(torch.randn(5, 3, dtype=torch.float64))[0] == 0.0


# counterexamples: II.1.7 item 2


class Scalar(nn.Module):
    """F = p_1 x + c p_2 phi(p_3 p_1 x), N = d = 1, three entry-normalised weights."""

    def __init__(self, activation, leak, start):
        super().__init__()
        one = lambda leak: tnn.EntryNormLinear(1, 1, bias=False, leak=leak, dtype=torch.float64)
        branch = nn.Sequential(one(0.0), activation, one(0.0))
        self.net = nn.Sequential(one(leak), tnn.ContractiveResidual(branch, strength=0.9))
        with torch.no_grad():
            for p, value in zip(self.net.parameters(), (start[0], start[2], start[1])):
                p.fill_(value)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("activation", [tnn.SiLU1, tnn.Softplus0], ids=["silu", "softplus"])
def test_without_a_leak_descent_sticks_and_no_global_grade_is_given(activation):
    """Paper A's Theorem 5.1 is false as printed: F < 1 - c phi(-1) on {p1 > 0, p2 < 0, p3 < 0}, which is never left."""
    x = torch.ones(1, 1, dtype=torch.float64)
    stuck = Scalar(activation(), 0.0, (0.5, -0.5, -0.5))
    least = 1.0 - 0.9 * float(activation()(torch.tensor(-1.0, dtype=torch.float64)))
    reachable = 1.0 + 0.9 * float(activation()(torch.tensor(1.0, dtype=torch.float64)))
    target = (least + reachable) / 2
    y = torch.full((1, 1), target, dtype=torch.float64)
    certificate = tnn.certify(stuck, x, y)
    assert certificate.grade in ("measured", "none")
    assert any(row.path == "net.0" and "slope" in row.name for row in certificate.failing)
    for step in (0.1, 1.0):
        net = Scalar(activation(), 0.0, (0.5, -0.5, -0.5))
        assert descend(net, x, y, "mse", step, 300, 100)[-1][1] >= (target - least) ** 2 > 0.01
    free = Scalar(activation(), 0.0, (0.5, 0.5, 0.5))
    assert descend(free, x, y, "mse", 1.0, 600, 100)[-1][1] < (target - least) ** 2 / 10  # so the target is no excuse

    leaky = Scalar(activation(), 0.5, (0.5, -0.5, -0.5))
    certificate = tnn.certify(leaky, x, y)
    assert certificate.grade == "global", certificate.explain()
    assert descend(leaky, x, y, "mse", 0.1, 200, 100)[-1][1] < 1e-6


def attractor(leak, corner):
    """Two blocks Z + 0.95 tanh(en(W) Z / 2), N = d = 2, with P(w) near a corner of the cube."""
    entry = lambda gain, leak: tnn.EntryNormLinear(2, 2, bias=False, gain=gain, leak=leak, dtype=torch.float64)
    blocks = [nn.Sequential(entry(0.5, 0.0), tnn.Tanh()) for _ in range(2)]
    net = nn.Sequential(entry(1.0, leak), *[tnn.ContractiveResidual(block, strength=0.95) for block in blocks])
    with torch.no_grad():
        for w, p in zip(trained(net), corner):
            p = 0.9 * torch.tensor(p, dtype=torch.float64)
            w.copy_(p / (1 - p.square()).sqrt())
    return net


def test_cross_entropy_with_tanh_has_a_spurious_attractor_that_a_leak_removes():
    """Weights that run to infinity end in a corner of the open cube that is no minimum (found by random search)."""
    x, y = torch.eye(2, dtype=torch.float64), torch.tensor([0, 1])
    bad = [[[-0.627, 0.622], [-1.0, 1.0]], [[-0.912, -1.0], [1.0, 1.0]], [[-1.0, -1.0], [1.0, 1.0]]]
    good = [[[1.0, -1.0], [-1.0, 1.0]], [[1.0, -1.0], [-1.0, 1.0]], [[1.0, -1.0], [-1.0, 1.0]]]
    stuck = descend(attractor(0.0, bad), x, y, "cross_entropy", 1.0, 800, 400)
    assert stuck[-1][1] > 0.0526 > 5 * float(F.cross_entropy(attractor(0.0, good)(x), y).detach())
    assert tnn.certify(attractor(0.0, bad), x, y, loss="cross_entropy").grade == "measured"
    leaky = attractor(0.3, bad)
    assert tnn.certify(leaky, x, y, loss="cross_entropy").grade == "global"
    assert descend(leaky, x, y, "cross_entropy", 1.0, 400, 200)[-1][1] < 0.01


# each hypothesis, violated alone


def base(**options):
    net = provable_net(6, 5, 2, 1, spread=0.3, strength=0.3, **options)
    g = torch.Generator().manual_seed(5)
    return net, torch.randn(3, 6, generator=g, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)


def leaves_out(net, position, new):
    net[position] = new
    return net


def linear(n, m, **options):
    torch.manual_seed(0)
    return nn.Linear(n, m, dtype=torch.float64, **options)


class NoLowerBound:
    """A convex cost that states no lower bound of its gradient."""

    cost = Cost("huber", lambda z, y: F.huber_loss(z, y), smoothness=1.0)


def violations():
    """name -> (net, x, y, loss, row's name, path, a word of its remedy, the grade that is left)"""
    net, x, y = base()
    yield "nothing", (net, x, y, "mse", None, None, None, "global")
    yield (
        "leak",
        (base(leak=0.0)[0], x, y, "mse", "a slope of the first layer's P", "0", "leak > 0", ("measured", "ball")),
    )
    many = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    yield (
        "dependent samples",
        (net, many, torch.zeros(7, 2).double(), "mse", "linearly independent samples", "0", "at most 6", "measured"),
    )
    twice = x.clone()
    twice[2] = twice[0]
    yield "same samples", (net, twice, y, "mse", "distinct samples", "", "Samples 0 and 2", "none")
    branch = nn.Sequential(tnn.WeightNormLinear(5, 5, bias=False, dtype=torch.float64), nn.ReLU())
    kinked = leaves_out(base()[0], 1, tnn.ContractiveResidual(branch, strength=0.3))
    yield "kink", (kinked, x, y, "mse", "smooth activations", "1.branch.1", "SmoothReLU", "measured")

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(linear(5, 5), tnn.Tanh())

        def forward(self, x):
            return x + self.branch(x)

    yield (
        "unbounded branch",
        (
            leaves_out(base()[0], 1, Plain()),
            x,
            y,
            "mse",
            "bounded weights",
            "1.branch.0",
            "WeightNormLinear",
            ("measured", "ball"),
        ),
    )
    growing = nn.Sequential(base()[0][0], linear(5, 7, bias=False))
    growing[1].weight.requires_grad_(False)
    wide = torch.zeros(3, 7, dtype=torch.float64)
    yield (
        "dimensions grow",
        (growing, x, wide, "mse", "every step keeps its input apart", "1", "singular value", ("measured", "none")),
    )
    few = nn.Sequential(tnn.EntryNormLinear(6, 1, bias=False, leak=0.5, dtype=torch.float64), linear(1, 3, bias=False))
    few[1].weight.requires_grad_(False)
    yield (
        "few parameters",
        (
            few,
            x,
            torch.zeros(3, 3).double(),
            "mse",
            "as many trained parameters",
            "",
            "6 parameters cannot move 9",
            "none",
        ),
    )
    yield (
        "dropout",
        (
            leaves_out(base()[0], 2, nn.Sequential(nn.Dropout(0.3), base()[0][2])),
            x,
            y,
            "mse",
            "one fixed function",
            "2.0",
            "eval()",
            "none",
        ),
    )
    frozen = base()[0]
    frozen[0].weight.requires_grad_(False)
    yield (
        "frozen first layer",
        (
            frozen,
            x,
            y,
            "mse",
            "a first layer whose weights move every sample",
            "0",
            "must be trained",
            ("measured", "ball"),
        ),
    )
    yield "no targets", (net, x, None, "mse", "targets are given", "", "Give targets", "measured")
    yield (
        "cost without a bound",
        (net, x, y, NoLowerBound.cost, "a cost whose gradient is bounded below", "", "pl_squared", "measured"),
    )
    rows = leaves_out(base()[0], 0, tnn.WeightNormLinear(6, 5, bias=False, dtype=torch.float64))
    yield (
        "weight-normalised first layer",
        (rows, x, y, "mse", "a slope of the first layer's P", "0", "leak > 0", ("measured", "ball")),
    )


VIOLATIONS = dict(violations())


@pytest.mark.parametrize("name", VIOLATIONS)
def test_each_hypothesis_violated_alone_is_named_with_its_path_and_its_remedy(name):
    net, x, y, loss, row, path, remedy, grade = VIOLATIONS[name]
    certificate = tnn.certify(net, x, y, loss=loss)
    assert certificate.grade in (grade if isinstance(grade, tuple) else (grade,)), certificate.explain()
    if row is None:
        assert all(r.holds for r in certificate.hypotheses)
        return
    found = [r for r in certificate.hypotheses if not r.holds and r.name.startswith(row)]
    assert {r.path for r in found} == {path} and any(remedy in r.remedy for r in found), certificate.explain()
    assert all(r in certificate.failing and r.source for r in found) and remedy in certificate.explain()


def test_cross_entropy_converges_like_one_over_t_and_says_so():
    net, x, _ = base()
    y = torch.tensor([0, 1, 1])
    certificate = tnn.certify(net, x, y, loss="cross_entropy")
    assert certificate.grade == "global" and certificate.rate is None
    assert 0 < certificate.goal < certificate.initial_loss
    assert certificate.steps_to(certificate.goal) > 0 and certificate.steps_to(certificate.goal / 2) is None
    assert "1 / loss" in certificate.explain()
    without = tnn.certify(base(leak=0.0)[0], x, y, loss="cross_entropy")
    assert without.grade == "measured" and "minimum lies at infinity" in without.explain()


def test_a_users_cost_counts_with_its_own_constants():
    net, x, y = base()
    half = Cost("half", lambda z, t: (z - t).square().sum() / 2, smoothness=1.0, pl=2.0)
    mine, mean = tnn.certify(net, x, y, loss=half), tnn.certify(net, x, y)
    assert mine.grade == mean.grade == "global" and mine.loss == "half"
    assert mine.radius == pytest.approx(mean.radius, rel=1e-6)  # one path, and 3 times the gradient
    assert mine.step_size == pytest.approx(mean.step_size / 3, rel=1e-6)


# real networks


@needs_real_models
def test_a_stock_resnet18_is_explained_layer_by_layer():
    torch.manual_seed(0)
    net = torchvision_model("resnet18", num_classes=10)
    x, y = torch.randn(2, 3, 32, 32), torch.randint(10, (2,))
    certificate = tnn.certify(net, x, y, loss="cross_entropy", budget=2**22)
    assert certificate.grade in ("none", "measured")
    said = {(row.path, row.name): row.remedy for row in certificate.hypotheses if not row.holds}
    assert "kink" in said["layer3.0.relu", "smooth activations"]
    assert "OrthogonalDownsample2d" in said["maxpool", "every step keeps its input apart"]
    assert "rank is at most" in said["layer2.0.downsample.0", "a skip whose singular values are 1"]
    assert "training mode" in said["layer4.1.bn2", "every step keeps its input apart"]
    assert "dense EntryNormLinear" in said["conv1", "a first layer that can move every sample by itself"]
    assert "WeightNormConv2d" in said["layer1.0.conv1", "bounded weights"]
    assert ("fc", "bounded weights") in said
    text = certificate.explain()
    assert "Why not" in text and len(text.splitlines()) < 60
    for row in certificate.hypotheses:
        assert row.holds or not row.path or row.remedy


# input that nothing can be said of


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda n, x, y: (n, x.long(), y), TypeError, "inputs must be one float tensor"),
        (lambda n, x, y: (n, x[:0], y[:0]), ValueError, "N >= 1"),
        (lambda n, x, y: (n, x * math.nan, y), ValueError, "not finite"),
        (lambda n, x, y: (n, x, y[:, :1]), ValueError, "of the outputs' shape"),
        (lambda n, x, y: (n, x, y.tolist()), TypeError, "targets must be a tensor"),
        (lambda n, x, y: (TwoOutputs(), x, y), TypeError, "gave a tuple"),
        (lambda n, x, y: (n, x[:, :4], y), CertificateError, "did not run on a copy in float64"),
        (lambda n, x, y: (nn.LazyLinear(2), x, y), ValueError, "no values yet"),
        (lambda n, x, y: (n.to("meta"), x, y), ValueError, "no values yet"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_words(change, error, words):
    net, x, y = base()
    with pytest.raises(error, match=words):
        tnn.certify(*change(net, x, y))


def test_weights_that_are_not_finite_are_refused():
    net, x, y = base()
    net[0].weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match="0.weight holds values that are not finite"):
        tnn.certify(net, x, y)


def test_certify_leaves_the_model_alone():
    net, x, y = base()
    net.float().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    tnn.certify(net, x.float(), y.float())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training and all(p.dtype == torch.float32 and p.grad is None for p in net.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_a_small_budget_takes_the_last_layers_and_says_so():
    torch.manual_seed(0)
    net = nn.Sequential(linear(6, 50), tnn.Tanh(), linear(50, 2))
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    full, part = tnn.certify(net, x, y), tnn.certify(net, x, y, budget=8 * 8 * (102 + 16) + 100)
    assert "all parameters" in full.lambda_source and "last 102 of 452" in part.lambda_source
    features = torch.cat([net[1](net[0](x)), torch.ones(4, 1)], 1)
    exact = float(torch.linalg.svdvals(features)[-1]) ** 2
    assert exact * (1 - 1e-6) <= part.lambda_lower <= exact <= full.lambda_lower * (1 + 1e-9)


def test_rows_are_data():
    certificate = tnn.certify(*base())
    assert {f.name for f in dataclasses.fields(certificate.hypotheses[0])} >= {
        "name", "source", "path", "holds", "value", "bound", "kind", "remedy",
    }  # fmt: skip
    assert {row.kind for row in certificate.hypotheses} == {"proved", "measured"}
