"""Floored batch normalisation: torch's own above the floor, and never steeper than |gamma| / floor."""

import copy
import math

import oracles
import pytest
import torch
from torch import nn

import trainable_nn as tnn
from trainable_nn.errors import ConversionError

F64 = torch.float64
KINDS = {
    tnn.FlooredBatchNorm1d: (nn.BatchNorm1d, (4, 3)),
    tnn.FlooredBatchNorm2d: (nn.BatchNorm2d, (3, 3, 2, 2)),
    tnn.FlooredBatchNorm3d: (nn.BatchNorm3d, (2, 3, 1, 2, 2)),
}
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def pair(kind, **options) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """Torch's layer, ours made from it, and a batch of standard deviations 0.01, 0.4 and 5."""
    torch.manual_seed(0)
    plain, shape = KINDS[kind]
    theirs = plain(3, **options).double()
    for p in theirs.parameters():
        nn.init.normal_(p)
    x = torch.randn(shape, dtype=F64) * torch.tensor([0.01, 0.4, 5.0]).reshape(1, 3, *[1] * (len(shape) - 2))
    return theirs, kind.from_module(theirs, floor=0.5), x


def batch_jacobian(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of the whole batch at once; on a copy, whose running statistics move."""
    layer = copy.deepcopy(layer)
    return torch.autograd.functional.jacobian(layer, x).reshape(x.numel(), x.numel())


@kinds
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=str
)
def test_above_the_floor_it_is_torch_s_layer_to_the_last_bit(kind, options):
    theirs, ours, x = pair(kind, **options)
    ours.floor = 1e-3
    assert list(ours.state_dict()) == list(theirs.state_dict()) and isinstance(ours, type(theirs))
    for mode in (True, True, False):
        ours.train(mode), theirs.train(mode)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        assert torch.equal(ours(a), theirs(b))
        ours(a).sin().sum().backward(), theirs(b).sin().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


@kinds
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_no_batch_makes_it_steeper_than_gamma_over_the_floor(kind, smooth, training):
    _, ours, x = pair(kind)
    ours.smooth = smooth
    ours.train(training)
    bound = ours.weight.abs().max().item() / ours.floor
    steepest = 0.0
    for scale in (0.0, 1e-6, 0.1, 0.7, 1.0, 1.3, 3.0, 100.0):
        ours.running_var.copy_(scale**2 * torch.tensor([1e-4, 0.16, 25.0]))
        steepest = max(steepest, oracles.norm_of(batch_jacobian(ours, scale * x)))
        assert steepest <= bound * (1 + 1e-12)
    assert steepest >= 0.9 * bound  # the bound is reached, so a lower one would be false


def test_torch_s_own_layer_breaks_that_bound():
    theirs, ours, x = pair(tnn.FlooredBatchNorm2d)
    assert oracles.norm_of(batch_jacobian(theirs, 1e-3 * x)) > 50 * ours.weight.abs().max().item() / ours.floor


@pytest.mark.parametrize("smooth", [False, True])
def test_it_is_the_formula_and_its_denominator_never_below_the_floor(smooth):
    layer = tnn.FlooredBatchNorm1d(1, eps=1e-30, affine=False, floor=0.5, smooth=smooth).double()
    for s in (1e-3, 0.2, 0.49, 0.51, 0.9, 1.1, 7.0):
        x = torch.tensor([[s], [-s]], dtype=F64)
        m = max(s, 0.5) if not smooth else s if s >= 1.0 else 0.5 + s**2 / 2.0
        assert m >= max(s, 0.5) and layer(x)[0, 0].item() == pytest.approx(s / m, rel=1e-14)


def test_the_smooth_form_has_a_lipschitz_slope_and_the_other_a_kink():
    def slope(s: float, smooth: bool) -> float:
        layer = tnn.FlooredBatchNorm1d(1, eps=1e-30, affine=False, floor=0.5, smooth=smooth).double()
        t = torch.tensor(s, dtype=F64, requires_grad=True)
        (slope,) = torch.autograd.grad(layer(torch.stack([t, -t]).reshape(2, 1))[0, 0], t)
        return float(slope)

    step = 1e-7
    assert abs(slope(1.0 + step, True) - slope(1.0 - step, True)) < 10 * step
    assert abs(slope(0.5 + step, False) - slope(0.5 - step, False)) > 1.9
    assert slope(0.3, True) != 0.0


@pytest.mark.parametrize("smooth", [False, True])
def test_derivatives_agree_with_differences_on_both_sides_of_the_floor(smooth):
    layer = tnn.FlooredBatchNorm2d(3, floor=0.5, smooth=smooth, track_running_stats=False).double()
    x = pair(tnn.FlooredBatchNorm2d)[2].requires_grad_()
    f = lambda x, weight, bias: torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
    inputs = [x, torch.randn(3, dtype=F64, requires_grad=True), torch.randn(3, dtype=F64, requires_grad=True)]
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "rows of one pixel": lambda x: x.flatten(2).movedim(2, 1).flatten(0, 1)[:, :, None, None],
}


def by_operations(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The formula, by torch's differentiable operations."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    axes = [0, 2, 3]
    centred = wide - wide.mean(axes, keepdim=True)
    s = (centred.square().mean(axes, keepdim=True) + layer.eps).sqrt()
    f = layer.floor
    m = (
        torch.where(s < 2 * f, f + s * s / (4 * f), s)
        if layer.smooth
        else torch.maximum(s, torch.tensor(f, dtype=s.dtype))
    )
    shape = (1, -1, 1, 1)
    y = centred / m
    return y if layer.weight is None else y * layer.weight.reshape(shape) + layer.bias.reshape(shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_the_fast_pass_is_the_formula_with_its_gradients(options, smooth, layout, dtype):
    parameters = torch.float64 if dtype == F64 else torch.float32
    layer = tnn.FlooredBatchNorm2d(3, floor=0.5, smooth=smooth, dtype=parameters, **options)
    for p in layer.parameters():
        nn.init.normal_(p)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == F64 else {"rtol": 1e-4, "atol": 1e-4}
    tolerance = tolerance if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 2e-2}
    x = layout(pair(tnn.FlooredBatchNorm2d)[2].repeat(3, 1, 2, 1).add(0.3).to(dtype))

    def results(f, x: torch.Tensor) -> list[torch.Tensor]:
        leaf = x.detach().clone().requires_grad_()
        y = f(leaf)
        return [y, *torch.autograd.grad(y.to(parameters).sin().sum(), [leaf, *layer.parameters()])]

    for scale in (1.0, 1e-3, 100.0):  # some channels, all and none below the floor
        for ours, theirs in zip(results(layer, scale * x), results(lambda x: by_operations(layer, x), scale * x)):
            torch.testing.assert_close(ours.double(), theirs.double(), **tolerance)


def test_what_comes_out_does_not_depend_on_the_batch_before():
    torch.manual_seed(0)
    layer, twin = tnn.FlooredBatchNorm2d(3), nn.BatchNorm2d(3)
    spread = torch.tensor([0.1, 1.0, 2.0]).reshape(1, 3, 1, 1)
    batches = [torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5) * spread]
    for index in (0, 1, 1, 0, 0, 1, 0):
        x = batches[index]
        expected = copy.deepcopy(layer)
        expected._was_below = not layer._was_below
        y, other, _ = layer(x), expected(x), twin(x)
        assert torch.equal(y, other) and torch.equal(layer.running_var, twin.running_var)
        assert torch.equal(layer.running_mean, twin.running_mean) and layer._was_below == (index == 1)


def test_a_layer_that_trains_reads_its_input_as_often_as_torch_s():
    """No pass over the whole batch beside torch's statistics, its transform and its backward."""
    x, layer = (1e-2 * torch.randn(4, 3, 8, 8)).requires_grad_(), tnn.FlooredBatchNorm2d(3)
    layer(x)  # from the second batch on
    with torch.profiler.profile(record_shapes=True) as profile:
        layer(x).backward(torch.randn(4, 3, 8, 8))
    kernels = {e.key for e in profile.key_averages(group_by_input_shape=True) if [4, 3, 8, 8] in e.input_shapes}
    ignored = {"aten::detach", "detach", "aten::empty_like", "aten::randn", "aten::normal_", "aten::view_as"}
    passes = {k for k in kernels - ignored if k.startswith("aten::")}
    assert passes == {"aten::batch_norm_update_stats", "aten::native_batch_norm", "aten::native_batch_norm_backward"}


def test_one_value_for_each_channel_is_refused_in_training_as_torch_does():
    layer = tnn.FlooredBatchNorm2d(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.zeros(1, 3, 1, 1))
    assert layer.eval()(torch.zeros(1, 3, 1, 1)).shape == (1, 3, 1, 1)
    with pytest.raises(ValueError, match="expected 4D"):
        layer(torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_their_dtype(dtype):
    _, ours, x = pair(tnn.FlooredBatchNorm2d)
    expected = ours(x)
    for module in (copy.deepcopy(ours).float(), copy.deepcopy(ours).to(dtype)):
        y = module(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.03)


def test_it_folds_to_torch_s_layer_in_evaluation_and_not_in_training():
    _, ours, x = pair(tnn.FlooredBatchNorm2d)
    ours(x)
    model = nn.Sequential(ours, tnn.FlooredBatchNorm2d(3, affine=False, smooth=True).double()).eval()
    folded = tnn.fold(model)
    assert [type(m) for m in folded] == [nn.BatchNorm2d] * 2 and torch.equal(folded(x), model(x))
    with pytest.raises(ConversionError, match=r"Call eval\(\)"):
        tnn.fold(model.train())


@pytest.mark.parametrize("floor", [0.0, -1.0, math.inf, math.nan])
def test_a_floor_that_is_none_is_refused(floor):
    with pytest.raises(ValueError, match="floor must be above 0 and finite"):
        tnn.FlooredBatchNorm2d(3, floor=floor)


def test_only_torch_s_own_layer_is_taken_over():
    for wrong in (nn.BatchNorm1d(3), nn.SyncBatchNorm(3), nn.LazyBatchNorm2d(), nn.Conv2d(3, 3, 1)):
        with pytest.raises(ConversionError, match="needed a torch.nn.BatchNorm2d"):
            tnn.FlooredBatchNorm2d.from_module(wrong)
    assert "floor=0.5" in repr(tnn.FlooredBatchNorm2d(3)) and "smooth=True" in repr(
        tnn.FlooredBatchNorm1d(2, smooth=True)
    )


@pytest.mark.parametrize("whole", [True, False], ids=["itself", "within a model"])
def test_torch_s_conversion_to_synchronised_layers_refuses_to_drop_the_floor(whole):
    layer = tnn.FlooredBatchNorm2d(3, floor=0.25)
    model = layer if whole else nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.BatchNorm2d(3), layer))
    with pytest.raises(ConversionError, match="found a FlooredBatchNorm2d of 3 channels, whose floor 0.25 it would drop"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3)), nn.SyncBatchNorm)  # torch's own: as ever


def test_quantisation_may_set_its_attribute_and_copies_keep_it():
    layer = tnn.FlooredBatchNorm1d(3)
    assert not hasattr(layer, "qconfig")
    layer.qconfig = "some"
    assert copy.deepcopy(layer).qconfig == layer.qconfig == "some"
