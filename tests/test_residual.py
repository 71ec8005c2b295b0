"""The bounded residual block: its bound holds for all weights, and what nothing bounds is refused by name."""

import copy
import itertools
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
from trainable_nn.modules.preactivation import PreActivationBlock
from trainable_nn.modules.residual import SPENT, WAIT, smooth_maximum_with_one

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
    if kind == "plain":
        convs = (nn.Conv2d(2, 4, 3, padding=1), tnn.FlooredBatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
        return nn.Sequential(tnn.FlooredBatchNorm2d(2), nn.GELU(), *convs), None, (2, 4, 3)
    if kind == "transposed":
        up = nn.ConvTranspose1d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        return (
            nn.Sequential(nn.Conv1d(4, 4, 2, 2), nn.LayerNorm(3, eps=0.3), up, nn.GroupNorm(2, 4, eps=0.5)),
            None,
            (4, 6),
        )
    if kind == "sums":
        unit = PreActivationBlock(
            {"norm": nn.SiLU(), "conv": nn.Linear(5, 5), "side": nn.Linear(5, 5)},
            before=["norm"], branch=["conv"], shortcut=["side"],
        )  # fmt: skip
        return nn.Sequential(unit, nn.Tanh(), nn.Linear(5, 5, bias=False)), None, (5,)
    inner = tnn.SpectrallyBoundedResidual(nn.Sequential(tnn.WeightNormLinear(5, 5), nn.SiLU()), bound=0.5)
    return nn.Sequential(inner, nn.Flatten(), tnn.EntryNormLinear(5, 5)), None, (5,)


KINDS = ["linear", "one layer", "downsampling", "pooled", "plain", "transposed", "sums", "nested"]


def block_of(kind: str, **options) -> tuple[tnn.SpectrallyBoundedResidual, tuple[int, ...]]:
    branch, skip, shape = branch_of(kind)
    return tnn.SpectrallyBoundedResidual(branch, skip, **options).double(), shape


def shortening(block: nn.Module, x: torch.Tensor) -> float:
    """The largest singular value of the Jacobian of the whole batch, scale * branch, through torch's own autograd."""
    twin = copy.deepcopy(block).double()  # batch statistics of the original stay
    with torch.no_grad():
        scale = twin.scale
    jacobian = torch.autograd.functional.jacobian(lambda z: scale * twin.branch(z), x.double())
    return oracles.norm_of(jacobian.reshape(-1, x.numel()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bound", [0.2, 0.9])
def test_the_branch_stays_below_the_bound_for_weights_of_every_size(kind, bound):
    block, shape = block_of(kind, bound=bound)
    start = copy.deepcopy(block)
    for scale in (1.0, 0.1, 30.0, 1e6, 0.0):
        for p, p0 in zip(block.parameters(), start.parameters()):
            p.data.copy_(scale * p0)  # past every version counter
        stale = block.certified_bound()  # before any forward pass
        x = torch.randn(2, *shape, dtype=F64)
        assert shortening(block, x) <= stale * (1 + 1e-12) and stale <= bound
        block(x)
        certified, anywhere = block.certified_bound(shape), block.certified_bound()
        assert shortening(block, x) <= certified * (1 + 1e-12) and certified <= anywhere <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_the_branch_is_not_much_shorter_than_it_may_be(kind):
    """After a certificate the proof says at least 0.6 of the bound; and a linear branch reaches what is proved."""
    block, _ = block_of(kind, bound=0.5)
    for p in block.branch.parameters():
        p.data.mul_(3)
    assert 0.6 * 0.5 <= block.certify() <= 0.5


def test_a_convolution_reaches_what_is_certified():
    torch.manual_seed(0)
    block = tnn.SpectrallyBoundedResidual(nn.Conv2d(3, 3, 3, padding=1), bound=0.5).double()
    block.branch.weight.data.mul_(5)
    block.certify()
    true = block.scale.item() * oracles.norm_of(oracles.matrix_of(block.branch, (3, 8, 8)))
    assert 0.95 * block.certified_bound((3, 8, 8)) <= true <= block.certified_bound((3, 8, 8)) <= 0.5


def sabotaged(block: nn.Module) -> nn.Module:
    """The same block with the error of those who fill a bound from an under-estimate: anchors of 3 power iterations."""
    for anchor in block._anchors.values():
        matrix = anchor.weight.flatten(1).double()
        v = torch.ones(matrix.shape[1], dtype=F64)
        for _ in range(3):
            v = torch.nn.functional.normalize(matrix.T @ (matrix @ v), dim=0)
        anchor.bound.fill_(float((matrix @ v).norm()))  # and of the kernel as a matrix, as torch's spectral_norm
    block.tightness.mul_(0.3)
    return block


def test_the_law_catches_an_under_estimate():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    conv.weight.data.add_(0.5)  # a smooth kernel: its norm as a matrix is far below the convolution's
    block = tnn.SpectrallyBoundedResidual(conv, bound=0.9).double()
    x = torch.randn(1, 4, 5, 5, dtype=F64)
    assert shortening(block, x) <= block.certified_bound() * (1 + 1e-12)
    assert shortening(sabotaged(block), x) > 1.2 * block.certified_bound()


def train(block: nn.Module, shape: tuple[int, ...], steps: int, rate: float):
    """Steps on a loss that grows with the output's size, so weights are driven apart; yields a batch after each."""
    optimiser = torch.optim.SGD(block.parameters(), lr=rate)
    for _ in range(steps):
        x = torch.randn(2, *shape, dtype=next(block.parameters()).dtype)
        optimiser.zero_grad()
        (block(x) - 3 * x.flip(-1)).square().sum().backward()
        optimiser.step()
        yield x


def diverges(block: nn.Module, shape: tuple[int, ...], rate: float) -> bool:
    """Whether the same branch without a scale grows past all floats, or a thousandfold, at this rate."""
    free = nn.Sequential(Added(copy.deepcopy(block.branch))).double()
    start = max(float(p.detach().abs().max()) for p in free.parameters())
    for _ in train(free, shape, 60, rate):
        size = max(float(p.detach().abs().max()) for p in free.parameters())
        if not size < 1e3 * start:
            return True
    return False


class Added(nn.Module):
    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


@pytest.mark.parametrize("kind, rate", [("convolutions", 0.1), ("plain", 0.3)])
def test_over_300_steps_at_a_rate_that_diverges_the_measured_never_exceeds_the_certified(kind, rate):
    torch.manual_seed(0)
    if kind == "convolutions":
        layers = (nn.Conv1d(2, 4, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv1d(4, 2, 3, padding=1))
        block, shape = tnn.SpectrallyBoundedResidual(nn.Sequential(*layers), bound=0.9).double(), (2, 5)
        assert diverges(block, shape, rate)
    else:
        block, shape = block_of(kind)
    start, moved = copy.deepcopy(block), 0.0
    for step, x in enumerate(train(block, shape, 300, rate)):
        certified = block.certified_bound()
        assert 0.0 < certified <= 0.9
        if step % 10 == 0 or step < 10:
            assert shortening(block, x) <= certified * (1 + 1e-12)
            assert shortening(block.eval(), x) <= block.certified_bound() * (1 + 1e-12) <= 0.9 * (1 + 1e-12)
            block.train()
        moved = max(moved, *(float((p - q).detach().norm()) for p, q in zip(block.parameters(), start.parameters())))
    assert moved > 1.0 and 3 <= block._certificates < 30
    other = copy.deepcopy(start)
    other.load_state_dict(block.state_dict())
    assert shortening(other.eval(), x) <= other.certified_bound() * (1 + 1e-12) <= 0.9 * (1 + 1e-12)
    torch.testing.assert_close(other(x), block.eval()(x), rtol=0.1, atol=0.1)
    folded = tnn.fold(block)
    torch.testing.assert_close(folded(x), block(x), rtol=1e-12, atol=1e-12)
    identity = torch.eye(x.numel(), dtype=F64)
    jacobian = torch.autograd.functional.jacobian(folded, x).reshape(x.numel(), -1) - identity
    assert oracles.norm_of(jacobian) <= block.certified_bound() * (1 + 1e-10)


def test_under_autocast_the_bound_is_of_the_rounded_weights():
    """With weights that 8 bits round to more: 1 + 2^-8 - 2^-20 becomes 1 + 2^-7."""
    block = tnn.SpectrallyBoundedResidual(nn.Conv2d(3, 3, 3, padding=1, bias=False), bound=0.9)
    for _ in range(3):
        block.branch.weight.data.normal_().mul_(2.0)
        with torch.no_grad():
            block(torch.randn(1, 3, 5, 5))
    block.branch.weight.data.copy_(torch.where(torch.rand(3, 3, 3, 3) < 0.2, 0.5, 1 + 2.0**-8 + 2.0**-20))
    block.certify()
    with torch.autocast("cpu", torch.bfloat16):
        inside, scale = block.certified_bound(), block.scale.item()
    rounded = nn.Conv2d(3, 3, 3, padding=1, bias=False).double()
    rounded.weight.data.copy_(block.branch.weight.detach().bfloat16())
    true = oracles.norm_of(oracles.matrix_of(rounded, (3, 9, 9)))
    exact = oracles.norm_of(oracles.matrix_of(copy.deepcopy(block.branch).double(), (3, 9, 9)))
    assert true > exact * (1 + 2.0**-9)  # rounding went up, so reading the weights as they are would be false
    assert scale * true <= inside <= 0.9
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(2, 3, 5, 5)).isfinite().all()


def test_under_autocast_a_normalised_layer_s_supremum_is_not_enough():
    """Its weight stays below gain, and rounds to gain."""
    block = tnn.SpectrallyBoundedResidual(tnn.EntryNormLinear(1, 1, gain=1.0, bias=False), bound=0.9)
    block.branch.weight.data.fill_(30.0)
    assert block.branch.operator_norm_supremum() < 1 + 1e-6 and block.branch.effective_weight().item() < 0.9995
    block.branch.gain = 1.0 + 2.0**-8 + 2.0**-10  # rounds to 1 + 2^-7
    block.branch.weight.data.fill_(1e4)
    supremum = block.branch.operator_norm_supremum()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = block.branch(torch.ones(1, 1)).item()
        part = block._bounds().proved.item()
    assert supremum < rounded == 1 + 2.0**-7 <= part


def test_a_file_carries_the_function_and_a_plain_branch_s_file_loads_too():
    block, shape = block_of("plain")
    for _ in train(block, shape, 20, 0.05):
        pass
    block.certify()
    other, _ = block_of("plain")
    other.load_state_dict(block.state_dict())
    x = torch.randn(2, *shape, dtype=F64)
    assert torch.equal(other.eval()(x), block.eval()(x))
    third, _ = block_of("plain")
    state = {name: value for name, value in block.state_dict().items() if name != "tightness"}
    third.load_state_dict(state, strict=True)
    assert third.tightness != 1.0 and third._ratio() <= SPENT
    with pytest.raises(RuntimeError, match="Missing key"):
        third.load_state_dict({"tightness": torch.ones(())})


def test_a_wrong_tightness_in_a_file_changes_the_branch_and_never_the_bound():
    block, shape = block_of("plain")
    for value in (1e-30, 0.0, -3.0, 1e-6, 5.0, 1.0):
        state = {**block.state_dict(), "tightness": torch.tensor(value)}
        block.load_state_dict(state)
        block.tightness.fill_(value)
        x = torch.randn(2, *shape, dtype=F64)
        assert shortening(block, x) <= block.certified_bound() * (1 + 1e-12) <= 0.9 * (1 + 1e-12)


def test_other_parameters_in_a_functional_call_have_their_own_scale():
    block, shape = block_of("linear")
    x = torch.randn(2, *shape, dtype=F64)
    huge = {name: 40 * p.detach() for name, p in block.named_parameters()}
    with torch.no_grad():
        inside = torch.func.vmap(lambda p: torch.func.functional_call(block, p, (x,)), in_dims=0)
        outputs = inside({name: torch.stack([p, 40 * p]) for name, p in block.named_parameters()})
        twin = copy.deepcopy(block)
        twin.load_state_dict({**block.state_dict(), **huge})
        twin._anchors, twin.tightness = copy.deepcopy(block._anchors), block.tightness.clone()
        twin.tight = False  # reads the anchors that are there
        torch.testing.assert_close(outputs[0], block(x))
        torch.testing.assert_close(outputs[1], twin(x))


def test_the_derivative_has_the_scale_s_part():
    """By differences of the whole block, on both sides of where the proof shows; and without it the gradient is wrong."""
    block, shape = block_of("sums")
    names = [name for name, _ in block.named_parameters()]
    x = torch.randn(2, *shape, dtype=F64)
    for away in (0.0, 0.3, 2.0):
        weights = [(p.detach() + away * torch.randn_like(p)).requires_grad_() for p in block.parameters()]
        f = lambda *p: torch.func.functional_call(block, dict(zip(names, p)), (x,))
        block.tight = False  # the anchors stay while differences are taken
        assert torch.autograd.gradcheck(f, weights, fast_mode=True)
        assert torch.autograd.gradgradcheck(f, weights, fast_mode=True)
        whole = torch.autograd.grad(f(*weights).sum(), weights)
        block.freeze()
        without = torch.autograd.grad(f(*weights).sum(), weights)
        del block._frozen
        assert max(float((a - b).abs().max()) for a, b in zip(whole, without)) > 1e-3


def test_a_layer_that_is_applied_twice_counts_twice():
    layer = nn.Linear(4, 4)
    layer.weight.data.mul_(4)
    twice = tnn.SpectrallyBoundedResidual(nn.Sequential(layer, nn.Identity(), layer), bound=0.9).double()
    x = torch.randn(1, 4, dtype=F64)
    assert shortening(twice, x) <= twice.certified_bound() <= 0.9
    norm = oracles.norm_of(layer.weight)
    assert read(nn.Sequential(layer, layer), any_weights=False) >= norm**2 > 1.5 * norm


@pytest.mark.parametrize("change", ["stride", "padding_mode", "replaced"])
def test_a_branch_whose_geometry_changes_is_bounded_anew(change):
    torch.manual_seed(0)
    block = tnn.SpectrallyBoundedResidual(nn.Sequential(nn.Conv1d(2, 2, 3, padding=2, padding_mode="circular")))
    block = block.double()
    block.branch[0].weight.data.fill_(1.0)
    block.certify()
    if change == "stride":
        block.branch[0].dilation = (2,)
    elif change == "padding_mode":
        block.branch[0].padding_mode, block.branch[0]._reversed_padding_repeated_twice = "replicate", [2, 2]
    else:
        block.branch[0] = nn.Conv1d(2, 2, 5, padding=2).double()
    x = torch.randn(1, 2, 6, dtype=F64)
    assert shortening(block, x) <= block.certified_bound() * (1 + 1e-12) <= 0.9


def test_without_tightness_the_block_is_one_fixed_function():
    torch.manual_seed(0)
    block = tnn.SpectrallyBoundedResidual(
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), tight=False
    ).double()
    length = math.prod(1.1 * float(layer.weight.detach().norm()) for layer in (block.branch[0], block.branch[2]))
    h = smooth_maximum_with_one(torch.tensor(length / 0.9, dtype=F64), 0.5)
    assert block.scale.item() == pytest.approx((1 - 2.0**-18) / h.item(), rel=1e-9)
    for _ in train(block, (4,), 20, 0.1):
        assert block._certificates == 0 and block.tightness == 1.0 and block.certified_bound() <= 0.9


def test_certificates_wait_and_come_at_once_where_there_is_none():
    block, shape = block_of("plain")
    made = []
    for _ in train(block, shape, 40, 1e-2):
        block.branch[2].weight.data.mul_(1.5 if len(made) % 2 else 1 / 1.5)
        made.append(block._certificates)
    assert made[-1] - 1 <= 6 and WAIT == 100  # after 2, 4, 8, ... passes: not one for each of the 40
    block._anchors = {}
    block(torch.randn(2, *shape, dtype=F64))
    assert block._certificates == made[-1] + 1


def test_the_smooth_maximum_is_above_both_equal_below_and_three_times_differentiable():
    for start in (0.5, 0.95):
        r = torch.cat([torch.linspace(0, 3, 30001, dtype=F64), torch.logspace(0, 300, 61, dtype=F64)])
        h = smooth_maximum_with_one(r, start)
        assert (h >= r.clamp(min=1.0) * (1 - 2.0**-52)).all() and (h[r <= start] == 1.0).all()
        assert (h <= r.clamp(min=1.0) * (1 + (1 - start) / 4)).all()
        t = torch.tensor([start - 1e-9, start + 1e-9, 1.0, 1e200, 2 * start], dtype=F64, requires_grad=True)
        slope = smooth_maximum_with_one(t, start)
        derivatives = []
        for _ in range(3):
            (slope,) = torch.autograd.grad(slope.sum(), t, create_graph=True)
            derivatives.append(slope.detach())
        assert torch.isfinite(derivatives[0]).all() and all(
            (d[:2].abs() < 1e-3 / (1 - start)).all() for d in derivatives[:2]
        )


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
    assert tnn.SpectrallyBoundedResidual(tnn.WeightNormLinear(4, 1, gain=0.3)).scale == 1.0 - 2.0**-18
    assert tnn.SpectrallyBoundedResidual(nn.Sigmoid()).scale == 1.0 - 2.0**-18
    assert tnn.SpectrallyBoundedResidual(nn.LeakyReLU(9.0), bound=0.9).scale == pytest.approx(0.1, rel=0.01)


REFUSED = {
    "branch.1.0": (nn.Sequential(nn.ReLU(), nn.Sequential(nn.PReLU())), "use LeakyReLU or SmoothReLU"),
    "branch": (nn.Bilinear(3, 3, 3), "add a rule for it"),
    "branch.0": (nn.Sequential(nn.BatchNorm2d(3)), "use FlooredBatchNorm2d.from_module on it"),
    "branch.2": (nn.Sequential(nn.Tanh(), nn.Tanh(), nn.SyncBatchNorm(3)), "use FlooredBatchNorm1d, 2d or 3d"),
    "branch.0.1": (nn.Sequential(nn.Sequential(nn.ReLU(), nn.LayerNorm(3, eps=0.0))), "has no finite bound"),
    "branch.0.skip": (
        nn.Sequential(tnn.SpectrallyBoundedResidual(nn.ReLU(), nn.InstanceNorm1d(3))),
        "use FlooredBatch",
    ),
    "branch.1": (nn.Sequential(nn.ReLU(), nn.Softplus(threshold=2)), "use Softplus0"),
    "branch.3": (nn.Sequential(*[nn.ZeroPad1d(1)] * 3, nn.CELU(-1.0)), "has no finite bound"),
}


@pytest.mark.parametrize("path", REFUSED)
def test_what_nothing_bounds_is_refused_by_path_with_the_way_out(path):
    branch, way_out = REFUSED[path]
    with pytest.raises(UnboundedError, match=f"^{path}: .*{way_out}"):
        tnn.SpectrallyBoundedResidual(branch)


@pytest.mark.parametrize(
    "layer, way_out",
    [
        (nn.Conv2d(3, 3, 3), "use EntryNormConv2d or WeightNormConv2d"),
        (nn.Linear(3, 3), "use EntryNormLinear or WeightNormLinear"),
        (nn.ConvTranspose1d(3, 3, 3), "as large as it likes"),
        (tnn.EntryNormLinear(3, 3, leak=0.1), "leak=0.1 its weight is unbounded"),
        (tnn.FlooredBatchNorm2d(3), "has no finite bound"),
    ],
    ids=str,
)
def test_what_only_its_present_weights_bound_is_refused_where_every_weight_is_meant(layer, way_out):
    with pytest.raises(UnboundedError, match=way_out):
        read(layer)
    assert math.isfinite(read(layer, any_weights=False))


def test_an_unknown_subclass_and_a_patched_forward_are_refused_and_not_assumed():
    class Steep(nn.ReLU):
        def forward(self, x):
            return 9 * super().forward(x)

    patched = nn.ReLU()
    patched.forward = lambda x: 9 * x
    parametrised = tnn.EntryNormLinear(3, 3)
    nn.utils.parametrize.register_parametrization(parametrised, "weight", nn.Identity())
    hooked = nn.utils.weight_norm(nn.Linear(3, 3))
    for module in (Steep(), patched, parametrised, hooked, nn.PReLU(), nn.Bilinear(2, 2, 2)):
        with pytest.raises(UnboundedError, match="nothing bounds"):
            tnn.SpectrallyBoundedResidual(module)


def test_a_rule_of_the_user_s_own_is_used():
    class Doubling(nn.Module):
        def forward(self, x):
            return 2 * x

    block = tnn.SpectrallyBoundedResidual(Doubling(), bound=0.5, rules={Doubling: Slope(2.0)})
    assert block.scale == pytest.approx(0.25, rel=0.01) and 0.495 <= block.certified_bound() <= 0.5


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
    assert block.scale == pytest.approx(0.2, rel=0.01)
    assert 0.792 <= block.certified_bound() <= 0.8
    assert block.eval().certified_bound() == pytest.approx(0.2, rel=0.01)


def test_a_branch_that_changed_is_told_of_by_the_certificate_and_still_moves():
    block, _ = block_of("linear")
    block.branch[1] = nn.PReLU()
    assert block.float().branch[1].weight.dtype == torch.float32
    for call in (block.certified_bound, block.certify, lambda: block(torch.ones(1, 5))):
        with pytest.raises(UnboundedError, match="^branch.1: "):
            call()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_never_end_in_a_bound(value):
    block, shape = block_of("plain")
    block.branch[2].weight.data[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="NaN, infinite"):
        block.certified_bound()
    with pytest.raises(ValueError, match="NaN or infinite"):
        block.certify()
    block(torch.ones(2, *shape, dtype=F64))
    with torch.device("meta"):
        ghost = tnn.SpectrallyBoundedResidual(nn.Conv2d(3, 3, 3, padding=1))
    with pytest.raises(ValueError, match="meta device"):
        ghost.certified_bound()


def test_sixteen_bits_leave_the_anchors_as_they_are_and_a_pickle_keeps_the_rules():
    block, _ = block_of("linear")
    scale = block.scale.item()
    before = [anchor.weight.clone() for anchor in block._anchors.values()]
    assert block.half().scale.item() == pytest.approx(scale, rel=0.01)
    assert all(
        torch.equal(a.weight, b) for a, b in zip(block._anchors.values(), before)
    )  # a rounded anchor proves nothing
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


def test_adaptive_pools_enclose_their_dense_matrices_and_slopes():
    rng, seen = random.Random(1), {"Avg": 0.0, "Max": 0.0}
    for _ in range(60):
        axes = rng.choice((1, 2))
        out, sizes = ([rng.randint(1, 5) for _ in range(axes)] for _ in range(2))
        shape = (1, *sizes)
        for kind, known in itertools.product(seen, (None, shape)):
            pool = getattr(nn, f"Adaptive{kind}Pool{axes}d")(out[0] if axes == 1 else tuple(out))
            bound = read(pool, input_shape=known)
            true = oracles.norm_of(oracles.jacobian_of(pool, torch.randn(shape, dtype=F64)))
            assert true <= bound * (1 + 1e-14), (pool, shape)
            seen[kind] = max(seen[kind], true / bound) if bound > 1 else seen[kind]
    assert min(seen.values()) > 0.99
    assert read(nn.AdaptiveAvgPool2d((None, 1))) == 1.0


def test_a_normalisation_joins_the_layer_before_it():
    """||diag(gamma / floor) W|| where gamma undoes the rows' lengths: the product of the two norms is 10 times that."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 4, 1).double(), tnn.FlooredBatchNorm2d(4, floor=0.5).double()
    with torch.no_grad():
        conv.weight.mul_(torch.tensor([0.1, 1.0, 10.0, 1.0]).reshape(4, 1, 1, 1))
        norm.weight.copy_(torch.tensor([10.0, 1.0, 0.1, 1.0]))
    matrix = conv.weight.detach()[:, :, 0, 0]
    joined = oracles.norm_of(norm.weight[:, None] * matrix) / 0.5
    both = read(nn.Sequential(conv, norm), any_weights=False)
    assert joined <= both <= 1.01 * joined
    assert oracles.norm_of(matrix) * 10.0 / 0.5 > 10 * both
    apart = read(nn.Sequential(conv, nn.Tanh(), norm), any_weights=False)
    assert apart >= oracles.norm_of(matrix) * 20.0 * (1 - 1e-12)


def test_a_normalisation_of_another_axis_joins_nothing():
    """A linear layer acts on the last axis, and batch normalisation of (N, C, L) on the one before."""
    linear, norm = nn.Linear(3, 3, bias=False).double(), tnn.FlooredBatchNorm1d(3, eps=1e-30, floor=0.5).double()
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor([1.0, 1e-3, 1e-3])))
        norm.weight.copy_(torch.tensor([1e-3, 1.0, 1.0]))
    branch = nn.Sequential(linear, norm)
    x = 1e-3 * torch.randn(2, 3, 3, dtype=F64)
    jacobian = torch.autograd.functional.jacobian(branch, x).reshape(18, 18)
    assert 1.9 <= oracles.norm_of(jacobian) <= read(branch, any_weights=False) * (1 + 1e-12)
    assert oracles.norm_of(norm.weight[:, None] * linear.weight) / 0.5 < 0.01  # what joining them would claim


def test_shapes_are_followed_through_the_branch():
    convs = nn.Sequential(nn.AvgPool1d(2), tnn.EntryNormConv1d(1, 1, 5, padding=2), nn.Tanh())
    whole, short = (read(convs, input_shape=shape) for shape in (None, (1, 4)))
    assert short < whole and read(convs, input_shape=(1, 40)) == whole
    with pytest.raises(ValueError, match="too few axes"):
        read(convs[1], input_shape=())
