"""Plain layers turned into normalised ones: the function stays, or the reason is named."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from layer_table import LAYERS, layers
from torch import nn

import trainable_nn as tnn
from trainable_nn.errors import ConversionError

F64 = torch.float64


class TestFromModule:
    @layers
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
    def test_the_effective_weight_is_the_old_weight_to_rounding(self, layer, dtype):
        plain_type, arguments, _ = LAYERS[layer]
        plain = plain_type(*arguments, dtype=F64)
        plain.weight.data.uniform_(-0.95, 0.95)
        plain.to(dtype)
        ours = layer.from_module(plain, eps=0.5, gain=12.0)
        assert (ours.eps, ours.gain) == (0.5, 12.0)
        difference = (ours.effective_weight().double() - plain.weight.double()).abs().max()
        assert difference <= 4 * torch.finfo(dtype).eps and torch.equal(ours.bias, plain.bias)

    def test_a_leak_reaches_every_weight(self):
        plain = nn.Linear(4, 6, dtype=F64)
        plain.weight.data.mul_(1e4)
        for leak in (1.0, 1e-3, 1e-9):
            ours = tnn.EntryNormLinear.from_module(plain, leak=leak)
            torch.testing.assert_close(ours.effective_weight(), plain.weight, rtol=1e-13, atol=1e-13)

    def test_geometry_mode_layout_and_gradients_are_kept(self):
        options = {"stride": (2, 1), "padding": (1, 0), "dilation": 2, "groups": 2, "padding_mode": "reflect"}
        plain = nn.Conv2d(4, 6, 3, **options).to(memory_format=torch.channels_last).eval()
        plain.bias.requires_grad_(False)
        for cls in (tnn.EntryNormConv2d, tnn.WeightNormConv2d):
            ours = cls.from_module(plain, gain=2.0)
            assert ours.weight.is_contiguous(memory_format=torch.channels_last) and not ours.training
            assert ours.weight.requires_grad and not ours.bias.requires_grad
            assert ours.weight.data_ptr() != plain.weight.data_ptr() and ours.bias.data_ptr() != plain.bias.data_ptr()
            x = torch.randn(2, 4, 9, 9)
            torch.testing.assert_close(ours(x), plain(x))
        assert tnn.EntryNormConv2d.from_module(nn.Conv2d(2, 2, 3, bias=False, padding="same")).bias is None

    def test_the_first_numbers_of_the_generator_are_not_used_up(self):
        plain, state = nn.Linear(3, 3), torch.get_rng_state()
        tnn.EntryNormLinear.from_module(plain)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("cls, what", [(tnn.EntryNormLinear, "entry (1, 2)"), (tnn.WeightNormLinear, "row 1")])
    def test_a_weight_out_of_range_is_named_with_the_gain_that_does(self, cls, what):
        plain = nn.Linear(4, 3, dtype=F64)
        plain.weight.data.zero_()[1, 2] = -5.0
        with pytest.raises(ConversionError) as caught:
            cls.from_module(plain)
        kind = "absolute value" if cls is tnn.EntryNormLinear else "length"
        assert str(caught.value) == (
            f"{cls.__name__}.from_module: {what} of the weight has {kind} 5, and gain=1 reaches only what is below it. "
            f"Use gain=6.3, or nearest=True for the nearest weight in range."
        )
        torch.testing.assert_close(cls.from_module(plain, gain=6.3).effective_weight(), plain.weight)
        close = cls.from_module(plain, nearest=True).effective_weight()
        torch.testing.assert_close(close, plain.weight / 5)

    def test_nearest_changes_only_what_is_out_of_range(self):
        plain = nn.Linear(4, 3, dtype=F64)
        plain.weight.data[0] = torch.tensor([3.0, 0.5, -4.0, 0.1])
        entries = tnn.EntryNormLinear.from_module(plain, nearest=True).effective_weight()
        torch.testing.assert_close(entries, plain.weight.clamp(-1, 1))
        rows = tnn.WeightNormLinear.from_module(plain, nearest=True).effective_weight()
        torch.testing.assert_close(rows[1:], plain.weight[1:])
        torch.testing.assert_close(rows[0], F.normalize(plain.weight[0], dim=0))

    def test_a_layer_that_would_lose_something_is_refused(self):
        class Scaled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        patched = nn.Linear(2, 2)
        patched.forward = lambda x: x
        integers = nn.Linear(2, 2)
        integers.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
        nan = nn.Linear(2, 2)
        nan.weight.data[0, 0] = math.nan
        refused = {
            "forward of its own": [Scaled(2, 2), patched, tnn.EntryNormLinear(2, 2)],
            "remove the parametrisation": [nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))],
            "run one forward pass": [nn.LazyLinear(2)],
            "only real floats": [nn.Linear(2, 2, dtype=torch.complex64), integers],
            "NaN or infinite": [nan],
            "meta device": [nn.Linear(2, 2, device="meta")],
            r"a plain torch.nn.Linear is needed": [nn.Conv1d(2, 2, 1), nn.Bilinear(2, 2, 2)],
        }
        for words, modules in refused.items():
            for module in modules:
                with pytest.raises(ConversionError, match=f"EntryNormLinear.from_module: .*{words}"):
                    tnn.EntryNormLinear.from_module(module)

    def test_a_dtype_that_cannot_hold_the_free_weight_is_named(self):
        with pytest.raises(ConversionError, match="torch.float16 cannot hold the free weight for eps=1e-30"):
            tnn.EntryNormLinear.from_module(nn.Linear(3, 3).half(), eps=1e-30)

    def test_a_subclass_that_only_adds_attributes_is_taken(self):
        class Named(nn.Linear):
            name = "head"

        plain = Named(3, 3)
        torch.testing.assert_close(tnn.EntryNormLinear.from_module(plain).effective_weight(), plain.weight)


class TestParametrizations:
    @pytest.mark.parametrize(
        "build",
        [
            lambda: tnn.parametrizations.EntryNorm(0.5, gain=1.5),
            lambda: tnn.parametrizations.EntryNorm(leak=0.1),
            lambda: tnn.parametrizations.WeightNorm(0.5, gain=2.5),
            lambda: tnn.parametrizations.WeightNorm(gain=2.5, dim=1),
            lambda: tnn.parametrizations.WeightNorm(gain=9.0, dim=None),
        ],
    )
    def test_registering_keeps_the_weight_and_training_moves_the_free_one(self, build):
        layer = nn.Linear(4, 6, dtype=F64)
        before = copy.deepcopy(layer.weight.data)
        nn.utils.parametrize.register_parametrization(layer, "weight", build())
        torch.testing.assert_close(layer.weight, before, rtol=1e-12, atol=1e-12)
        layer(torch.ones(1, 4, dtype=F64)).sum().backward()
        assert layer.parametrizations.weight.original.grad.abs().max() > 0
        layer.weight = before / 2
        torch.testing.assert_close(layer.weight, before / 2, rtol=1e-12, atol=1e-12)

    def test_the_constants_reach_the_map_and_the_repr(self):
        w = torch.randn(3, 4, dtype=F64)
        entry, row = (
            tnn.parametrizations.EntryNorm(0.5, gain=2.0, leak=0.1),
            tnn.parametrizations.WeightNorm(0.5, dim=1),
        )
        torch.testing.assert_close(entry(w), tnn.functional.entry_norm(w, 0.5, gain=2.0, leak=0.1))
        torch.testing.assert_close(row(w), tnn.functional.weight_norm(w, 0.5, 1))
        assert repr(entry) == "EntryNorm(eps=0.5, gain=2, leak=0.1, nearest=False)"
        assert repr(row) == "WeightNorm(eps=0.5, gain=1, dim=1, nearest=False)"

    def test_a_weight_out_of_range_is_refused_unless_the_nearest_is_wanted(self):
        with pytest.raises(ConversionError, match="EntryNorm: entry"):
            tnn.parametrizations.EntryNorm().right_inverse(torch.full((2, 2), 3.0))
        near = tnn.parametrizations.WeightNorm(nearest=True)
        torch.testing.assert_close(near(near.right_inverse(torch.tensor([[3.0, 4.0]]))), torch.tensor([[0.6, 0.8]]))
