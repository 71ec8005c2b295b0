"""What rounding has done to a tangent kernel: the proved bound against 50 digits, and that each part of it counts."""

import copy
import importlib
import json

import numpy as np
import pytest
import torch
from kernel_oracle import ACTIVATIONS, Network, distance, exact_jacobian, knows, spectral_distance
from mpmath import mpf
from regularity_networks import Block, Truth, Twice, network
from torch import nn

import trainable_nn as tnn
from trainable_nn import modules
from trainable_nn.certify.entries import ASSUMED, PROVED, Entries
from trainable_nn.certify.kernel_error import jacobian_error_at_most, states
from trainable_nn.certify.kernel_error.activations import past_threshold, rounded
from trainable_nn.certify.kernel_error.outputs import errors_on_balls
from trainable_nn.certify.kernel_error.states import U
from trainable_nn.certify.measure import extremes_of
from trainable_nn.certify.regularity.network import read_graph
from trainable_nn.certify.regularity.rules import RULES
from trainable_nn.cli import main
from trainable_nn.cli.ntk import _below
from trainable_nn.errors import UnboundedError
from trainable_nn.linop import kernel_extremes, ntk
from trainable_nn.linop.gram import contract as contraction
from trainable_nn.linop.gram.contract import WAYS
from trainable_nn.modules.floored import FlooredBatchNorm2d

F64 = torch.float64
PACKAGE = "trainable_nn.certify.kernel_error"
SEEDS = [seed for seed in range(160) if knows(network(seed)[0])]


def jacobian_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """By torch.func, in float64."""
    truth = Truth(model, x)
    return truth.jacobian(truth.theta).detach()


def dense(activation: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 4), copy.deepcopy(activation), nn.Linear(4, 2)), (3,)


def convolutional(layer, activation: nn.Module, **options) -> tuple[nn.Module, tuple[int, ...]]:
    first, second = layer(1, 2, 3, padding=1, **options), layer(2, 2, 2, stride=2, **options)
    end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    return nn.Sequential(first, activation, second, activation, end), (1, 4, 4)


def residual(layer) -> tuple[nn.Module, tuple[int, ...]]:
    blocks = [Block(nn.Sequential(modules.SmoothReLU(), layer(3, 3)), 0.5) for _ in range(3)]
    return nn.Sequential(layer(2, 3), *blocks, nn.Linear(3, 1)), (2,)


def pooled(first: nn.Module, pool: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), first, pool, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)), (1, 4, 4)


def normalised(norm: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    first = nn.Linear(2, 4) if len(shape) == 1 else nn.Conv2d(2, 4, 2)
    return nn.Sequential(first, norm, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)), shape


def far_mean(norm: nn.Module) -> nn.Module:
    norm.running_mean.uniform_(-3, 3)
    norm.running_var.uniform_(0.2, 2.0)
    return norm.eval()


CASES = {
    **{f"dense, {kind.__module__.split('.')[0]} {kind.__name__}": lambda kind=kind: dense(kind()) for kind in ACTIVATIONS},
    "dense, gelu tanh": lambda: dense(nn.GELU(approximate="tanh")),
    "dense, softplus of beta 3": lambda: dense(nn.Softplus(beta=3.0)),
    "convolution": lambda: convolutional(nn.Conv2d, nn.Tanh()),
    "convolution, circular": lambda: convolutional(nn.Conv2d, nn.GELU(), padding_mode="circular"),
    "convolution, entry norm": lambda: convolutional(tnn.EntryNormConv2d, modules.GELU1(), leak=0.1),
    "convolution, weight norm": lambda: convolutional(tnn.WeightNormConv2d, modules.Softplus0()),
    "convolution, relu": lambda: convolutional(nn.Conv2d, nn.ReLU()),
    "max pooling": lambda: pooled(nn.Tanh(), nn.MaxPool2d(2)),
    "max pooling that overlaps, after relu": lambda: pooled(nn.ReLU(), nn.MaxPool2d(3, 1)),
    "residual": lambda: residual(nn.Linear),
    "residual, entry norm": lambda: residual(tnn.EntryNormLinear),
    "residual, weight norm": lambda: residual(tnn.WeightNormLinear),
    "residual, spectral norm": lambda: residual(tnn.SpectralNormLinear),
    "one layer twice": lambda: (nn.Sequential(nn.Linear(2, 3), Twice(nn.Linear(3, 3), nn.Tanh())), (2,)),
    "batch norm, evaluated": lambda: normalised(far_mean(nn.BatchNorm1d(4)), (2,)),
    "batch norm of images, evaluated": lambda: normalised(far_mean(nn.BatchNorm2d(4)), (2, 3, 3)),
    "batch norm": lambda: normalised(nn.BatchNorm1d(4, track_running_stats=False), (2,)),
    "floored batch norm": lambda: normalised(FlooredBatchNorm2d(4, smooth=True, track_running_stats=False), (2, 3, 3)),
    "layer norm": lambda: normalised(nn.LayerNorm(4), (2,)),
    "group norm": lambda: normalised(nn.GroupNorm(2, 4), (2, 3, 3)),
}


def build(case: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(len(case))
    model, shape = CASES[case]()
    x = torch.randn(3, *shape)
    model(x)  # lazy layers look
    model = model.double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.7)
    return model, x.double()


@pytest.mark.parametrize("case", CASES)
def test_the_bound_holds_the_error_in_50_digits_and_is_small(case):
    model, x = build(case)
    found, kernel, exact = tnn.kernel_error_at_most(model, x), ntk(model, x), exact_jacobian(model, x)
    size = float(torch.linalg.matrix_norm(kernel, 2))
    error = spectral_distance(kernel, exact @ exact.T)
    print(f"{case}: error {error:.2e}, bound {found.kernel:.2e}, bound / ||K|| {found.kernel / size:.2e}")
    assert distance(jacobian_of(model, x), exact) <= found.jacobian
    assert error <= found.kernel
    assert found.kernel <= 1e-9 * size


POINTS = [sign * size for size in np.geomspace(1e-9, 900, 150) for sign in (-1.0, 1.0)] + [0.0, -20.0, 19.99, 20.01, 40.5]
SMOOTH = [kind for kind in ACTIVATIONS if kind not in (nn.ReLU, nn.LeakyReLU, nn.SELU, nn.Hardswish)]


@pytest.mark.parametrize("activation", [*(kind() for kind in SMOOTH), nn.GELU(approximate="tanh"), nn.Softplus(beta=0.3)], ids=str)
def test_each_activation_and_its_slope_err_by_no_more_than_its_numbers(activation):
    z = torch.tensor(POINTS, dtype=F64, requires_grad=True)
    value = activation(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    step = read_graph(activation, z.detach()[None], RULES).nodes[-1].step
    own, still = rounded(step), torch.zeros(1, dtype=F64)
    jump = past_threshold(step, z.detach(), still)
    jump = np.zeros(len(z)) if jump is None else jump.numpy()
    for k, point in enumerate(POINTS):
        truth = ACTIVATIONS[type(activation)](mpf(point), activation)
        size = abs(point)
        off = abs(mpf(float(value[k].detach())) - truth[0]), abs(mpf(float(slope[k])) - truth[1])
        assert off[0] <= U * (own.value_slope * size + own.value) + jump[k] / getattr(activation, "beta", 1.0) + 2.0**-1000
        assert off[1] <= U * float(own.slope_error(torch.tensor(size, dtype=F64))) + jump[k] + 2.0**-1000


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["residual", "convolution", "convolution, relu"])
def test_every_way_of_the_products_stays_within_the_bound(case, way, monkeypatch):
    monkeypatch.setattr(contraction, "cheapest", lambda factors, block, trace: way)
    model, x = build(case)
    kernel, exact = ntk(model, x), exact_jacobian(model, x)
    assert spectral_distance(kernel, exact @ exact.T) <= tnn.kernel_error_at_most(model, x, kernel).kernel


@pytest.mark.parametrize("seed", SEEDS[:40])
def test_random_networks_of_large_weights_and_inputs_never_leave_the_bound(seed):
    model, x = network(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6.0)
    x = 8.0 * x
    exact = exact_jacobian(model, x)
    assert distance(jacobian_of(model, x), exact) <= jacobian_error_at_most(model, x).jacobian


@pytest.mark.parametrize("seed", SEEDS)
def test_random_networks_never_leave_the_bound(seed):
    model, x = network(seed)
    found = tnn.kernel_error_at_most(model, x)
    exact = exact_jacobian(model, x)
    assert distance(jacobian_of(model, x), exact) <= found.jacobian
    assert spectral_distance(ntk(model, x), exact @ exact.T) <= found.kernel


def eight_blocks(width: int = 24) -> nn.Module:
    torch.manual_seed(0)
    blocks = [Block(nn.Sequential(nn.Tanh(), nn.Linear(width, width)), 0.3) for _ in range(8)]
    return nn.Sequential(nn.Linear(6, width), *blocks, nn.Linear(width, 2)).double()


def test_eight_residual_blocks_have_a_bound_far_below_the_kernel():
    model, x = eight_blocks(), torch.randn(12, 6, dtype=F64)
    kernel = ntk(model, x)
    found = tnn.kernel_error_at_most(model, x, kernel)
    ratio = found.kernel / float(torch.linalg.matrix_norm(kernel, 2))
    print(f"bound / ||K|| = {ratio:.2e}")
    assert ratio < 1e-10


def extended_jacobian(model: nn.Sequential, x: torch.Tensor) -> np.ndarray:
    """Of ``eight_blocks``, (outputs, parameters), in 80 bits: forward and back by hand, matrix by matrix."""
    wide = lambda t: t.detach().numpy().astype(np.longdouble)
    first, *blocks, last = model
    rows = []
    for sample in wide(x):
        value, kept = wide(first.weight) @ sample + wide(first.bias), []
        for block in blocks:
            phi = np.tanh(value)
            kept.append(phi)
            layer = block.branch[1]
            value = value + np.longdouble(block.scale) * (wide(layer.weight) @ phi + wide(layer.bias))
        for k in range(len(last.weight)):
            g, parts = wide(last.weight)[k], [np.eye(len(last.weight), dtype=np.longdouble)[k]]
            parts.append(np.outer(parts[0], value).ravel())
            for block, phi in zip(reversed(blocks), reversed(kept)):
                h = np.longdouble(block.scale) * g
                parts += [h, np.outer(h, phi).ravel()]
                g = g + (wide(block.branch[1].weight).T @ h) * (1 - phi**2)
            parts += [g, np.outer(g, sample).ravel()]
            rows.append(np.concatenate(parts[::-1]))
    return np.stack(rows)


def test_a_network_of_five_thousand_weights_is_held_against_80_bits():
    model, x = eight_blocks(), torch.randn(12, 6, dtype=F64)
    exact, computed = extended_jacobian(model, x), jacobian_of(model, x).numpy()
    error = float(np.sqrt(np.square(computed - exact).sum()))
    kernel_error = float(np.linalg.norm((ntk(model, x).numpy() - exact @ exact.T).astype(np.float64), 2))
    found = tnn.kernel_error_at_most(model, x)
    print(f"Jacobian: error {error:.2e}, bound {found.jacobian:.2e}; kernel: {kernel_error:.2e}, {found.kernel:.2e}")
    assert 0 < error <= found.jacobian < 1e4 * error
    assert 0 < kernel_error <= found.kernel < 1e5 * kernel_error


def perturbed(model: nn.Module, relative: float) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1 + relative * torch.randn_like(p).sign())
    return twin


@pytest.mark.parametrize("case", ["residual", "residual, entry norm", "convolution, weight norm", "layer norm"])
def test_a_kernel_of_weights_that_are_off_by_a_little_leaves_the_bound(case):
    """The law can fail: a relative 1e-9 in the weights is no rounding."""
    model, x = build(case)
    found, exact = tnn.kernel_error_at_most(model, x), exact_jacobian(model, x)
    off = perturbed(model, 1e-9)
    assert distance(jacobian_of(off, x), exact) > found.jacobian
    assert spectral_distance(ntk(off, x), exact @ exact.T) > found.kernel


def test_a_perturbation_of_1e_12_is_seen_in_a_small_network():
    model, x = build("residual")
    found, exact = tnn.kernel_error_at_most(model, x), exact_jacobian(model, x)
    assert distance(jacobian_of(perturbed(model, 1e-12), x), exact) > found.jacobian


def cancelling(scale: float = 1e8) -> tuple[nn.Module, torch.Tensor]:
    """tanh of scale (x_1 - x_2) for nearly equal x: what rounds is scale x, and DF never sees it."""
    first = nn.Linear(2, 1, bias=False).double()
    first.weight.data = torch.tensor([[1.1, -1.1]], dtype=F64) * scale
    first.requires_grad_(False)
    x = torch.rand(4, 1, dtype=F64, generator=torch.Generator().manual_seed(0)) + torch.tensor([[0.0, 1.0]], dtype=F64) / scale
    return nn.Sequential(first, nn.Tanh(), nn.Linear(1, 1, bias=False).double()), x


def test_where_large_weights_cancel_the_assumption_of_before_is_wrong_and_the_bound_holds():
    model, x = cancelling()
    computed, exact = jacobian_of(model, x), exact_jacobian(model, x)
    error, found = distance(computed, exact), jacobian_error_at_most(model, x)
    assumed = Entries().of_jacobian(*computed.shape, float(computed.norm())).taken
    print(f"error {error:.2e}, assumed before {assumed:.2e}, proved {found.jacobian:.2e}")
    assert assumed < error <= found.jacobian
    assert found.jacobian < 1e3 * error


def test_without_the_first_layers_rounding_the_bound_would_be_wrong():
    model, x = cancelling()
    error = distance(jacobian_of(model, x), exact_jacobian(model, x))
    last = nn.Sequential(*model[1:])  # the same, were its input exact
    assert jacobian_error_at_most(last, model[0](x).detach()).jacobian < error


def test_a_softplus_past_its_threshold_counts_its_jump():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1), nn.Softplus(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(20.5)
    x = torch.tensor([[0.0], [0.25]], dtype=F64)
    error = distance(jacobian_of(model, x), exact_jacobian(model, x))
    found = jacobian_error_at_most(model, x).jacobian
    assert 1e-10 < error <= found < 1e-7


def test_an_entry_on_a_kink_within_its_error_counts_both_slopes():
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0]]))
        model[2].weight.fill_(3.0)
    near = torch.tensor([[1.0 / 3, 1.0 / 3]], dtype=F64)
    assert jacobian_error_at_most(model, near).jacobian >= 3 * float(near.norm())
    assert jacobian_error_at_most(model, near + torch.tensor([[0.0, 1e-3]], dtype=F64)).jacobian < 1e-12


def test_a_window_whose_entries_are_within_their_errors_may_have_either_as_its_largest():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.MaxPool1d(2), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.1, 0.2], [0.2, 0.1]]))
        model[2].weight.fill_(3.0)
    near = torch.tensor([[1.0 / 3, 1.0 / 3]], dtype=F64)
    assert jacobian_error_at_most(model, near).jacobian >= 3 * 2**0.5 * float(near.norm())
    assert jacobian_error_at_most(model, near + torch.tensor([[0.0, 1e-3]], dtype=F64)).jacobian < 1e-12


def test_a_kernel_in_float32_is_held_against_float64():
    model, x = build("residual, weight norm")
    single = copy.deepcopy(model).float()
    kernel = ntk(single, x.float())
    found, exact = tnn.kernel_error_at_most(single, x.float(), kernel), exact_jacobian(single.double(), x.float().double())
    error = spectral_distance(kernel, exact @ exact.T)
    assert 1e-9 * float(kernel.norm()) < error <= found.kernel < 1e-4 * float(kernel.norm())


@pytest.mark.parametrize("case", ["residual", "convolution, entry norm", "batch norm"])
def test_the_smallest_eigenvalue_is_proved_with_the_entries_error(case):
    model, x = build(case)
    kernel, exact = ntk(model, x), exact_jacobian(model, x)
    found = tnn.kernel_error_at_most(model, x, kernel)
    truth = float(np.linalg.eigvalsh((exact @ exact.T).astype(np.float64))[0])
    size = float(kernel.norm())
    ends = kernel_extremes(kernel, error=found.kernel)
    assert ends.smallest_at_least <= truth + 1e-15 * size and ends.largest_at_least > 0
    least = found.smallest_at_least(kernel_extremes(kernel).smallest_at_least)
    assert truth - 1e-9 * size <= least <= truth + 1e-15 * size


class Following(Network):
    """With the scale a(theta) of unfrozen blocks, by its formula, for branches of tanh and dense layers."""

    def run(self, m, x):
        if type(m) is tnn.SpectrallyBoundedResidual and "_frozen" not in vars(m):
            return x + self.run(m.branch, x) * self._scale(m)
        return super().run(m, x)

    def _scale(self, m):
        r = mpf(float(m.tightness)) / mpf(m.bound)
        for layer in m.branch:
            if isinstance(layer, nn.Linear):
                r = r * ((self.weight(layer) ** 2).sum() + mpf(1e-24)) ** (mpf(1) / 2) * mpf(1.1)
        a = (1 - mpf(2) ** -18) * (1 - mpf(2) ** -52)
        if r.v <= mpf(1) / 2:
            return a
        z = (r - mpf(1) / 2) * mpf(2)
        return (1 + z * (mpf(1) / 2) - z * (1 + z**3) ** (-mpf(1) / 3) * (mpf(1) / 2)) ** -1 * a


def following(layer, scale: float, tight: bool) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    blocks = [
        modules.SpectrallyBoundedResidual(nn.Sequential(nn.Tanh(), layer(3, 3), nn.Tanh(), layer(3, 3)), bound=0.6, tight=tight)
        for _ in range(2)
    ]
    model = nn.Sequential(nn.Linear(2, 3), *blocks, nn.Linear(3, 2)).double()
    with torch.no_grad():
        for block in blocks:
            for p in block.branch.parameters():
                p.mul_(scale)
            block.certify()
    return modules.residual.hold_scales(model), torch.randn(3, 2, dtype=F64)


LAYERS = [nn.Linear, tnn.EntryNormLinear, tnn.WeightNormLinear, tnn.SpectralNormLinear]


@pytest.mark.parametrize("tight", [False, True], ids=["one function", "tight"])
@pytest.mark.parametrize("scale", [0.3, 0.75, 1.5, 40.0])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_a_scale_that_follows_its_weights_stays_within_the_bound(layer, scale, tight):
    model, x = following(layer, scale, tight)
    exact = Following(model).jacobian(x)
    found, kernel = tnn.kernel_error_at_most(model, x), ntk(model, x)
    error, size = distance(jacobian_of(model, x), exact), float(torch.linalg.matrix_norm(kernel, 2))
    print(f"{layer.__name__} {scale} {tight}: error {error:.2e}, bound {found.jacobian:.2e}, scale {float(model[1].scale.detach()):.3g}")
    assert error <= found.jacobian <= 1e-10 * size**0.5
    assert spectral_distance(kernel, exact @ exact.T) <= found.kernel


@pytest.mark.parametrize("scale", [0.75, 1.5, 40.0])
def test_outputs_of_a_following_scale_stay_within_their_bound_here_and_on_a_ball(scale):
    model, x = following(nn.Linear, scale, False)
    here, near = errors_on_balls(model, x, (0.0, 0.05))
    with torch.no_grad():
        far = perturbed(model, 0.05 / (1 + float(sum(p.square().sum() for p in model.parameters())) ** 0.5))
        for net, bound in ((model, here), (far, near)):
            oracle = Following(net)
            truth = np.array([n.v for n in oracle.run(net, oracle.constants(x.numpy())).ravel()], dtype=object)
            assert distance(net(x).flatten(), truth) <= bound <= 1e-10
    assert here <= near


def test_a_following_scale_that_is_off_by_a_little_leaves_the_bound():
    """The law can fail: 1e-11 in the tightness, which is no weight, moves rows by more than rounding may."""
    model, x = following(nn.Linear, 1.5, False)
    found, exact = jacobian_error_at_most(model, x), Following(model).jacobian(x)
    with torch.no_grad():
        for block in model[1:3]:
            block.tightness = block.tightness.double() * (1 - 1e-11)
    assert distance(jacobian_of(model, x), exact) > found.jacobian


def test_a_following_scale_at_rest_has_rows_of_the_branch_alone():
    model, x = following(nn.Linear, 0.01, False)
    assert all(float(block.scale.detach()) == 1 - 2.0**-18 for block in model[1:3])
    assert jacobian_error_at_most(model, x).jacobian < 1e-12


def test_some_parameters_alone_have_a_smaller_bound():
    model, x = eight_blocks(), torch.randn(5, 6, dtype=F64)
    names = [name for name, _ in model.named_parameters()][-2:]
    last, whole = jacobian_error_at_most(model, x, names=names), jacobian_error_at_most(model, x)
    assert 0 < last.jacobian < whole.jacobian and last.columns < whole.columns


def test_pieces_of_the_batch_give_what_the_whole_gives(monkeypatch):
    model, x = eight_blocks(), torch.randn(7, 6, dtype=F64)
    whole = jacobian_error_at_most(model, x)
    monkeypatch.setattr(importlib.import_module(f"{PACKAGE}.pieces"), "MOST_NUMBERS", 1)
    parts = jacobian_error_at_most(model, x)
    assert parts.jacobian == pytest.approx(whole.jacobian, rel=1e-4)
    assert parts.factors == pytest.approx(whole.factors, rel=1e-4)


def test_a_network_whose_rounding_may_reach_its_values_is_given_up_where_that_is_asked():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(12)]).double()
    for p in model.parameters():
        nn.init.normal_(p, std=3.0)
    x = torch.randn(2, 8, dtype=F64)
    assert jacobian_error_at_most(model, x, most=1e-6).jacobian > 0
    with pytest.raises(UnboundedError, match=r"^[0-9]+: rounding is bounded by no less than .* of the values here"):
        jacobian_error_at_most(model, x, most=1e-14)


def test_a_step_without_a_rule_is_named_with_its_path(monkeypatch):
    monkeypatch.delitem(importlib.import_module(f"{PACKAGE}.kinks").CURVED, "Hardswish")
    model = nn.Sequential(nn.Linear(2, 2), nn.Hardswish(), nn.Linear(2, 1)).double()
    with pytest.raises(UnboundedError) as caught:
        tnn.kernel_error_at_most(model, torch.randn(2, 2, dtype=F64))
    assert str(caught.value) == (
        "1: nothing bounds the rounding of Hardswish and its slope. Use ReLU, LeakyReLU, or a smooth activation."
    )


def test_a_kernel_of_another_size_is_refused():
    with pytest.raises(ValueError, match="this network at these inputs has one of shape"):
        tnn.kernel_error_at_most(eight_blocks().float(), torch.randn(3, 6), torch.eye(4))


def certificate(activation: nn.Module) -> tnn.Certificate:
    torch.manual_seed(0)
    model = nn.Sequential(tnn.EntryNormLinear(4, 64), activation, nn.Linear(64, 1))
    x = torch.randn(4, 4)
    return tnn.certify(model, x, model(x).detach() + 1e-3)


def test_a_certificate_says_that_the_rounding_is_proved():
    found = certificate(nn.Tanh())
    (row,) = [r for r in found.hypotheses if r.name == PROVED]
    assert found.grade == "ball" and row.kind == "proved" and 0 < row.value < 1e-10
    assert not any("assumed" in note for note in found.notes)


def test_a_certificate_that_rests_on_an_assumed_rounding_says_so(monkeypatch):
    monkeypatch.setattr(importlib.import_module(f"{PACKAGE}.rules"), "rounded", _refuse)
    found = certificate(nn.Tanh())
    (row,) = [r for r in found.hypotheses if r.name == ASSUMED]
    assert found.grade == "ball" and (row.kind, row.path) == ("measured", "1")
    assert "The rounding of DF's entries is assumed, not proved: 1: no rule." in found.explain()
    assert any("assumed" in note for note in found.notes)


def _refuse(step):
    raise UnboundedError(f"{step.path}: no rule.")


SOURCE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, end="Tanh"):
        super().__init__(nn.Flatten(), nn.Linear(64, 20), getattr(nn, end)(), nn.Linear(20, 10))
"""


def printed(capsys, tmp_path, monkeypatch, *options: str) -> dict:
    """What trainable-nn ntk --json says of a small network."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(SOURCE)
    main(["ntk", "net.py:Net", "--images", "5", "--steps", "1", "--json", *options])
    return json.loads(capsys.readouterr().out)


def test_the_command_ntk_proves_lambda_with_the_entries_rounding(capsys, tmp_path, monkeypatch):
    found = printed(capsys, tmp_path, monkeypatch)
    assert 0 < found["rounding"]["jacobian"] < 1e-9 and found["unproved"] == ""
    assert found["extremes"]["error"] == found["rounding"]["kernel"]
    least = found["eigenvalues"][0]
    assert least * (1 - 1e-6) < found["smallest_at_least"] <= least * (1 + 1e-12)


def test_the_proved_lambda_is_printed_with_digits_that_are_not_above_it():
    assert _below(1.4611399) == "1.46113" and _below(0.0) == "0" and _below(-1.0000001) == "-1.00001"


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--float32"], "it was computed in float32"), (["--model-arg", "end=Hardswish"], "2: nothing bounds the rounding of Hardswish")],
)
def test_the_command_ntk_says_where_the_rounding_is_an_estimate(options, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.delitem(importlib.import_module(f"{PACKAGE}.kinks").CURVED, "Hardswish")
    found = printed(capsys, tmp_path, monkeypatch, *options)
    assert found["rounding"] is None and found["unproved"].startswith(reason)
    assert found["smallest_at_least"] == found["extremes"]["smallest_at_least"]


def test_extremes_without_a_proof_take_what_they_took():
    jacobian = torch.randn(3, 50, dtype=F64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(jacobian)
    low, high = extremes_of(jacobian)
    assert low <= float(values[-1]) <= low * (1 + 1e-9) and float(values[0]) <= high <= float(values[0]) * (1 + 1e-9)


def test_gamma_is_above_the_sum_of_roundings():
    assert states.gamma(3) >= 3 * 2.0**-53 and states.gamma(2.0**20) < 2.0**-32
