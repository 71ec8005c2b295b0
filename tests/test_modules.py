"""Normalised layers: what they compute, what every argument does, what they bound."""

import inspect
import math
import random

import oracles
import pytest
import torch
from layer_table import LAYERS, layers
from torch import nn

import trainable_nn as tnn

F64 = torch.float64
LINEAR_CHANGES = [{"bias": False}, {"eps": 0.01}, {"gain": 2.0}, {"leak": 0.5}, {"dtype": torch.float32}]
CONV_CHANGES = LINEAR_CHANGES + [
    {"stride": 2},
    {"padding": 1},
    {"padding": "same"},
    {"dilation": 2},
    {"groups": 2},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "replicate"},
]


def make(cls, **options):
    torch.manual_seed(0)
    return cls(*LAYERS[cls][1], **{"dtype": F64, **options})


def sample(cls, count: int = 2) -> torch.Tensor:
    return torch.randn(count, *LAYERS[cls][2], generator=torch.Generator().manual_seed(1), dtype=F64)


def formula(layer) -> torch.Tensor:
    """P(w) as the papers write it, in float64."""
    w = layer.weight.detach().double()
    if "EntryNorm" in type(layer).__name__:
        return layer.gain * w / torch.sqrt(layer.eps + w**2) + layer.leak * w
    squares = (w**2).flatten(1).sum(1).reshape(-1, *[1] * (w.dim() - 1))
    return layer.gain * w / torch.sqrt(layer.eps + squares)


def plain_twin(layer, **options) -> nn.Module:
    plain_type, arguments, _ = LAYERS[type(layer)]
    twin = plain_type(*arguments, **{"dtype": F64, **options})
    twin.weight.data.copy_(formula(layer))
    if twin.bias is not None:
        twin.bias.data.copy_(layer.bias.data)
    return twin


def changes_of(cls) -> list[dict]:
    known = inspect.signature(cls).parameters
    changes = LINEAR_CHANGES if LAYERS[cls][0] is nn.Linear else CONV_CHANGES
    return [change for change in changes if set(change) <= set(known)]


@layers
def test_a_layer_is_torch_s_own_with_the_papers_weight_for_every_argument(layer):
    for change in [{}, *changes_of(layer)]:
        ours = make(layer, **change)
        plain = {name: value for name, value in change.items() if name not in ("eps", "gain", "leak")}
        twin, x = plain_twin(ours, **plain), sample(layer).to(ours.weight.dtype)
        tolerance = 1e-12 if ours.weight.dtype == F64 else 1e-5
        torch.testing.assert_close(ours(x), twin(x), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ours.effective_weight(), twin.weight, rtol=tolerance, atol=tolerance)


@layers
def test_every_constructor_argument_reaches_the_function(layer):
    base = make(layer)(sample(layer))
    names = set()
    for change in changes_of(layer):
        y = make(layer, **change)(sample(layer).to(change.get("dtype", F64)))
        assert y.shape != base.shape or y.dtype != base.dtype or not torch.allclose(y, base), change
        names |= set(change)
    sizes = {"in_features", "out_features", "in_channels", "out_channels", "kernel_size"}
    assert names | sizes | {"device"} >= set(inspect.signature(layer).parameters)
    assert make(layer, device="meta").weight.is_meta
    assert inspect.signature(layer).parameters["eps"].kind is inspect.Parameter.KEYWORD_ONLY


@layers
def test_a_layer_starts_from_torch_s_own_initial_weights(layer):
    plain_type, arguments, _ = LAYERS[layer]
    ours = make(layer)
    torch.manual_seed(0)
    plain = plain_type(*arguments, dtype=F64)
    assert isinstance(ours, plain_type)
    assert torch.equal(ours.weight, plain.weight) and torch.equal(ours.bias, plain.bias)
    ours.weight.data.zero_()
    torch.manual_seed(0)
    ours.reset_parameters()
    assert torch.equal(ours.weight, plain.weight)


@layers
@pytest.mark.parametrize("bad", [{"eps": 0.0}, {"eps": -1.0}, {"eps": math.nan}, {"gain": 0.0}, {"gain": math.inf}])
def test_constants_that_normalise_nothing_are_refused(layer, bad):
    with pytest.raises(ValueError, match=f"{layer.__name__}: {next(iter(bad))} must be"):
        make(layer, **bad)


def test_a_negative_leak_is_refused():
    with pytest.raises(ValueError, match="EntryNormConv2d: leak must be at least 0"):
        make(tnn.EntryNormConv2d, leak=-0.1)


@pytest.mark.parametrize("cls", [tnn.EntryNormLinear, tnn.WeightNormLinear])
def test_empty_layers_behave_as_torch_s(cls):
    with pytest.warns(UserWarning, match="zero-element"):
        ours = cls(0, 3)
    assert torch.equal(ours(torch.zeros(2, 0)), ours.bias.expand(2, 3))
    assert ours.operator_norm_bound() == ours.operator_norm_supremum() == 0.0
    with pytest.warns(UserWarning, match="zero-element"):
        assert cls(3, 0)(torch.zeros(2, 3)).shape == (2, 0)


class TestBounds:
    @pytest.mark.parametrize("kind", ["EntryNormConv", "WeightNormConv"])
    @pytest.mark.parametrize("axes, count", [(1, 60), (2, 60), (3, 25)])
    def test_bound_and_supremum_enclose_dense_norms_for_random_geometries(self, kind, axes, count):
        rng = random.Random(axes)
        torch.manual_seed(axes)
        for _ in range(count):
            arguments, sizes = oracles.random_geometry(rng, axes)
            options = {"eps": rng.choice((0.01, 1.0)), "gain": rng.choice((0.5, 2.0)), "bias": False, "dtype": F64}
            conv = getattr(tnn, f"{kind}{axes}d")(**arguments, **options)
            conv.weight.data.mul_(10.0 ** rng.randint(-2, 3))
            true = oracles.norm_of(oracles.matrix_of(conv, (conv.in_channels, *sizes)))
            here, anywhere = conv.operator_norm_bound(sizes), conv.operator_norm_bound()
            assert true * (1 - 1e-14) <= here <= min(anywhere, conv.operator_norm_supremum(sizes)), arguments
            assert anywhere <= conv.operator_norm_supremum(), arguments

    @pytest.mark.parametrize("cls", [tnn.EntryNormLinear, tnn.WeightNormLinear])
    @pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
    def test_a_linear_layer_s_bound_is_tight(self, cls, scale, dtype):
        layer = make(cls, dtype=dtype)
        layer.weight.data.mul_(scale)
        true = oracles.norm_of(layer.effective_weight())
        assert true <= layer.operator_norm_bound() <= 1.002 * true

    @pytest.mark.parametrize("cls", [tnn.EntryNormLinear, tnn.WeightNormLinear])
    @pytest.mark.parametrize("dtype", [torch.float32, F64])
    def test_the_bound_covers_the_exact_weight_too(self, cls, dtype):
        for scale in (1e-3, 0.1, 1.0, 10.0, 1e6):
            layer = make(cls, dtype=dtype, eps=0.7, gain=1.3)
            layer.weight.data.mul_(scale)
            assert oracles.norm_of(formula(layer)) <= layer.operator_norm_bound()

    @layers
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
    def test_the_supremum_covers_the_rounding_of_saturated_weights_in_every_dtype(self, layer, dtype):
        saturated = make(layer, dtype=dtype, gain=1.1)
        saturated.weight.data.fill_(6e4)
        matrix = saturated.effective_weight().double().flatten(1)
        factor = saturated._geometry_factor(None)
        assert oracles.norm_of(matrix) * factor <= saturated.operator_norm_supremum()
        assert saturated.operator_norm_supremum() <= 1.02 * oracles.norm_of(matrix) * factor

    def test_groups_count_by_their_maximum_and_not_by_their_product(self):
        conv = tnn.EntryNormConv2d(2, 2, 1, groups=2, bias=False, dtype=F64)
        conv.weight.data.copy_(torch.tensor([3.0, 0.01]).reshape(2, 1, 1, 1))
        true = 3.0 / math.sqrt(10.0)
        assert true <= conv.operator_norm_bound() <= 1.001 * true

    def test_with_a_leak_there_is_a_bound_but_no_supremum(self):
        layer = make(tnn.EntryNormLinear, leak=0.1)
        true = oracles.norm_of(layer.effective_weight())
        assert layer.operator_norm_supremum() == math.inf and true <= layer.operator_norm_bound() <= 1.002 * true

    def test_a_kernel_s_norm_alone_is_no_bound_of_its_convolution(self):
        conv = tnn.EntryNormConv2d(1, 1, 3, padding=1, bias=False, dtype=F64)
        conv.weight.data.fill_(1.0)
        true = oracles.norm_of(oracles.matrix_of(conv, (1, 8, 8)))
        assert true > 2.5 * oracles.norm_of(conv.effective_weight().flatten(1))

    def test_weights_without_values_have_no_bound(self):
        with pytest.raises(ValueError, match="EntryNormLinear.operator_norm_bound: the weight is on the meta device"):
            tnn.EntryNormLinear(2, 2, device="meta").operator_norm_bound()
        broken = make(tnn.EntryNormLinear)
        broken.weight.data[0, 0] = math.nan
        with pytest.raises(ValueError, match="NaN or infinite"):
            broken.operator_norm_bound()
