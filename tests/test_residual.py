"""The bounded residual block: its bound holds for all weights, and what nothing bounds is refused by name."""

import copy
import math
import pickle
import random

import oracles
import pytest
import torch
from torch import nn

import trainable_nn as tnn
from trainable_nn.errors import UnboundedError
from trainable_nn.modules.lipschitz import RULES, Reading, Slope, lipschitz_bound

F64 = torch.float64


def branch_of(kind: str) -> tuple[nn.Module, nn.Module | None, tuple[int, ...]]:
    """A branch, a skip that fits, and the shape of one sample."""
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(tnn.EntryNormLinear(5, 7), tnn.GELU1(), tnn.WeightNormLinear(7, 5)), None, (5,)
    if kind == "one layer":
        return tnn.WeightNormLinear(5, 5), None, (5,)
    if kind == "downsampling":
        convs = (
            tnn.WeightNormConv2d(2, 4, 3, stride=2, padding=1),
            tnn.Tanh(),
            tnn.EntryNormConv2d(4, 4, 2, padding="same"),
        )
        return nn.Sequential(*convs), tnn.OrthogonalDownsample2d(2, 4), (2, 6, 4)
    if kind == "pooled":
        layers = (tnn.WeightNormConv1d(2, 3, 3, padding=1), nn.LeakyReLU(2.0), nn.AvgPool1d(3, 1, 1), nn.Mish())
        return nn.Sequential(*layers, tnn.EntryNormConv1d(3, 2, 1)), None, (2, 7)
    inner = tnn.SpectrallyBoundedResidual(nn.Sequential(tnn.WeightNormLinear(5, 5), nn.SiLU()), bound=0.5)
    return nn.Sequential(inner, nn.Flatten(), tnn.EntryNormLinear(5, 5)), None, (5,)


KINDS = ["linear", "one layer", "downsampling", "pooled", "nested"]


def block_of(kind: str, **options) -> tuple[tnn.SpectrallyBoundedResidual, tuple[int, ...]]:
    branch, skip, shape = branch_of(kind)
    return tnn.SpectrallyBoundedResidual(branch, skip, **options).double(), shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bound", [0.2, 0.9])
def test_the_branch_stays_below_the_bound_for_weights_of_every_size(kind, bound):
    block, shape = block_of(kind, bound=bound)
    start = copy.deepcopy(block)
    for scale in (0.1, 1.0, 30.0, 1e6):
        for p, p0 in zip(block.parameters(), start.parameters()):
            p.data.copy_(scale * p0)
        certified, anywhere = block.certified_bound(shape), block.certified_bound()
        for x in torch.randn(3, *shape, dtype=F64):
            true = oracles.norm_of(oracles.jacobian_of(lambda z: block.scale * block.branch(z), x))
            assert true <= certified * (1 + 1e-14) and certified <= anywhere <= bound


def test_equal_saturated_weights_come_close_to_the_bound():
    """The supremum is not idle: this branch reaches its bound, so a larger factor would break it."""
    block, _ = block_of("one layer", bound=0.9)
    block.branch.weight.data.fill_(1e9)
    assert 0.9 * (1 - 1e-6) <= block.scale * oracles.norm_of(block.branch.effective_weight()) <= 0.9


@pytest.mark.parametrize("kind", ["linear", "downsampling"])
def test_the_singular_values_of_the_block_stay_around_one_while_it_trains(kind):
    block, shape = block_of(kind, bound=0.6)
    optimiser = torch.optim.SGD(block.parameters(), lr=5.0)
    for _ in range(5):
        optimiser.zero_grad()
        block(torch.randn(4, *shape, dtype=F64)).square().sum().neg().backward()
        optimiser.step()
        singular = torch.linalg.svdvals(oracles.jacobian_of(block, torch.randn(shape, dtype=F64)))
        assert 0.4 - 1e-12 <= singular.min() and singular.max() <= 1.6 + 1e-12


def test_an_unbounded_branch_would_leave_that_range():
    plain = nn.Linear(5, 5, dtype=F64)
    plain.weight.data.mul_(10)
    assert oracles.norm_of(torch.eye(5, dtype=F64) + plain.weight) > 1.6


@pytest.mark.parametrize("kind", KINDS)
def test_the_block_is_the_skip_plus_the_scaled_branch(kind):
    block, shape = block_of(kind)
    x = torch.randn(2, *shape, dtype=F64)
    kept = x if block.skip is None else block.skip(x)
    torch.testing.assert_close(block(x), kept + block.scale * block.branch(x), rtol=1e-14, atol=1e-14)


def test_a_branch_that_is_short_already_is_not_scaled():
    assert tnn.SpectrallyBoundedResidual(tnn.WeightNormLinear(4, 1, gain=0.5)).scale == 1.0
    assert tnn.SpectrallyBoundedResidual(tnn.WeightNormLinear(4, 4, gain=2.0), bound=0.8).scale == pytest.approx(0.2)


REFUSED = {
    "branch.1.0": (
        nn.Sequential(nn.ReLU(), nn.Sequential(nn.Conv2d(3, 3, 3))),
        "Use EntryNormConv2d or WeightNormConv2d",
    ),
    "branch": (nn.Linear(3, 3), "Use EntryNormLinear or WeightNormLinear instead"),
    "branch.0": (nn.Sequential(nn.BatchNorm2d(3)), "normalised layers do without"),
    "branch.2": (
        nn.Sequential(nn.Tanh(), nn.Tanh(), tnn.EntryNormLinear(3, 3, leak=0.1)),
        "leak=0.1 its weight is unb",
    ),
    "branch.0.branch.1": (
        nn.Sequential(tnn.SpectrallyBoundedResidual(nn.Sequential(nn.ReLU(), nn.ReLU()))),
        "Use EntryNormLinear",
    ),
    "branch.0.skip": (nn.Sequential(tnn.SpectrallyBoundedResidual(nn.ReLU(), nn.Linear(3, 3))), "Use EntryNormLinear"),
    "branch.1": (nn.Sequential(nn.ReLU(), nn.Softplus(threshold=2)), "use Softplus0"),
    "branch.3": (nn.Sequential(*[nn.ZeroPad1d(1)] * 3, nn.CELU(-1.0)), "has no finite bound"),
}
REFUSED["branch.0.branch.1"][0][0].branch[1] = nn.Linear(3, 3)


@pytest.mark.parametrize("path", REFUSED)
def test_what_nothing_bounds_is_refused_by_path_with_the_way_out(path):
    branch, way_out = REFUSED[path]
    with pytest.raises(UnboundedError, match=f"^{path}: .*{way_out}"):
        tnn.SpectrallyBoundedResidual(branch)


def test_an_unknown_subclass_and_a_patched_forward_are_refused_and_not_assumed():
    class Steep(nn.ReLU):
        def forward(self, x):
            return 9 * super().forward(x)

    patched = nn.ReLU()
    patched.forward = lambda x: 9 * x
    parametrised = tnn.EntryNormLinear(3, 3)
    nn.utils.parametrize.register_parametrization(parametrised, "weight", nn.Identity())
    for module in (Steep(), patched, parametrised, nn.PReLU(), nn.Bilinear(2, 2, 2)):
        with pytest.raises(UnboundedError, match="nothing bounds"):
            tnn.SpectrallyBoundedResidual(module)


def test_a_rule_of_the_user_s_own_is_used():
    class Doubling(nn.Module):
        def forward(self, x):
            return 2 * x

    block = tnn.SpectrallyBoundedResidual(Doubling(), bound=0.5, rules={Doubling: Slope(2.0)})
    assert block.scale == pytest.approx(0.25) and 0.499999 <= block.certified_bound() <= 0.5


@pytest.mark.parametrize("bound", [0.0, 1.0, -0.5, math.nan])
def test_a_bound_that_leaves_no_margin_is_refused(bound):
    with pytest.raises(ValueError, match="bound must be above 0 and below 1"):
        tnn.SpectrallyBoundedResidual(nn.Tanh(), bound=bound)


def test_a_branch_that_overwrites_the_input_is_refused():
    for branch in (
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Identity(), nn.ELU(inplace=True), tnn.WeightNormLinear(2, 2)),
    ):
        with pytest.raises(ValueError, match="works in place on the block's input"):
            tnn.SpectrallyBoundedResidual(branch)
    with pytest.raises(ValueError, match="^skip: ReLU works in place"):
        tnn.SpectrallyBoundedResidual(nn.Tanh(), nn.ReLU(inplace=True))
    later = nn.Sequential(tnn.WeightNormLinear(2, 2), nn.ReLU(inplace=True))
    assert tnn.SpectrallyBoundedResidual(later)(torch.ones(1, 2)).shape == (1, 2)


def test_outputs_of_two_shapes_are_refused_and_not_broadcast():
    with pytest.raises(ValueError, match=r"skip gives shape \(2, 4\) and the branch \(2, 1\)"):
        tnn.SpectrallyBoundedResidual(tnn.WeightNormLinear(4, 1))(torch.zeros(2, 4))


def test_dropout_counts_by_its_training_factor_for_the_scale_and_by_its_mode_afterwards():
    block = tnn.SpectrallyBoundedResidual(nn.Sequential(nn.Tanh(), nn.Dropout(0.75)), bound=0.8)
    assert block.scale == pytest.approx(0.2)
    assert block.certified_bound() == pytest.approx(0.8) and block.eval().certified_bound() == pytest.approx(0.2)


def test_a_branch_that_changed_is_told_of_by_the_certificate_and_still_moves():
    block, _ = block_of("linear")
    block.branch[1] = nn.Linear(7, 7)
    assert block.float().branch[1].weight.dtype == torch.float32
    with pytest.raises(UnboundedError, match="^branch.1: "):
        block.certified_bound()


def test_sixteen_bits_leave_more_room_and_a_pickle_keeps_the_rules():
    block, _ = block_of("linear")
    scale = block.scale
    assert 0.9 * scale < block.half().scale < scale
    assert pickle.loads(pickle.dumps(block)).certified_bound() == block.certified_bound()


SLOPES = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.LeakyReLU(-3.0), nn.ELU(2.0), nn.CELU(0.5), nn.SELU(), nn.GELU(),
    nn.SiLU(), nn.Mish(), nn.Tanh(), nn.Sigmoid(), nn.Hardsigmoid(), nn.Hardswish(), nn.Hardtanh(-2, 3),
    nn.Softplus(), nn.Softplus(3.0), nn.Softsign(), nn.LogSigmoid(), nn.Tanhshrink(), nn.Softshrink(), nn.Identity(),
    nn.GELU("tanh"), tnn.SoftSign(),
    *(cls() for cls in (tnn.Softplus0, tnn.SmoothReLU, tnn.Tanh, tnn.GELU1, tnn.SiLU1, tnn.Erf1, tnn.Arctan, tnn.ISRU)),
]  # fmt: skip


def read(module: nn.Module, **reading) -> float:
    return lipschitz_bound(module, Reading("m", **{"any_weights": True, **reading}), RULES)


@pytest.mark.parametrize("module", SLOPES, ids=str)
def test_the_slope_of_every_listed_activation_is_enclosed_tightly(module):
    z = torch.cat([torch.linspace(-40, 40, 80001, dtype=F64), torch.tensor([-1e4, 1e4], dtype=F64)]).requires_grad_()
    slope = torch.autograd.grad(module(z).sum(), z)[0].abs().max()
    assert (1 - 1e-5) * read(module) <= slope <= read(module)


def test_pools_enclose_their_dense_matrices_and_slopes():
    rng, dims = random.Random(0), {1: (1, 9), 2: (1, 6, 5), 3: (1, 5, 5, 5)}
    seen = 0.0
    for _ in range(150):
        axes = rng.choice((1, 2, 2, 3))
        kernel = tuple(rng.randint(1, 3) for _ in range(axes))
        options = {"stride": tuple(rng.randint(1, 3) for _ in range(axes)), "ceil_mode": rng.choice((True, False))}
        options["padding"] = tuple(rng.randint(0, k // 2) for k in kernel)
        average = {"count_include_pad": rng.choice((True, False))}
        average |= {"divisor_override": rng.choice((None, 2))} if axes > 1 else {}
        pool = getattr(nn, f"AvgPool{axes}d")(kernel, **options, **average)
        true = oracles.norm_of(oracles.matrix_of(pool, dims[axes]))
        assert true <= read(pool) * (1 + 1e-14), pool
        seen = max(seen, true / read(pool))
        pool = getattr(nn, f"MaxPool{axes}d")(kernel, **options, dilation=tuple(rng.randint(1, 2) for _ in kernel))
        x = torch.randn(dims[axes], dtype=F64)
        assert oracles.norm_of(oracles.jacobian_of(pool, x)) <= read(pool) * (1 + 1e-14), pool
    assert seen > 0.99
    assert read(nn.AvgPool2d(2)) == 0.5  # the true factor, not 1


def test_shapes_are_followed_through_the_branch():
    convs = nn.Sequential(nn.AvgPool1d(2), tnn.EntryNormConv1d(1, 1, 5, padding=2), nn.Tanh())
    whole, short = (read(convs, input_shape=shape) for shape in (None, (1, 4)))
    assert short < whole and read(convs, input_shape=(1, 40)) == whole
    with pytest.raises(ValueError, match="too few axes"):
        read(convs[1], input_shape=())
