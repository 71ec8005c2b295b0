"""fold: plain torch layers only, the same outputs, and files that other programs read."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from paper_oracle import pooled
from real_models import needs_real_models, timm_model, torchvision_model
from small_resnets import PostActBlock, PreActBlock, SmallResNet, distance, filled, images
from torch import nn

import trainable_nn as tnn
from trainable_nn.convert import Recipe
from trainable_nn.demo.resnet import PreActResNet18
from trainable_nn.errors import ConversionError
from trainable_nn.modules.preactivation import PreActivationBlock
from trainable_nn.modules.shortcut import PooledConv2d, PooledSequential

FLOAT32 = 1e-6  # the promise of fold, relative, in L2
OPTIONS = [{}, {"preactivation": False}, {"skip": "orthogonal"}, {"skip": "conv"}]
ACTIVATIONS = [
    tnn.Softplus0, tnn.SmoothReLU, tnn.Tanh, tnn.GELU1, tnn.SiLU1, tnn.Erf1, tnn.Arctan, tnn.SoftSign, tnn.ISRU
]  # fmt: skip


def types_of_ours(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if any("trainable_nn" in b.__module__ for b in type(m).__mro__)]


def check(model: nn.Module, x: torch.Tensor, tolerance: float) -> nn.Module:
    """Fold, compare, and return the folded model."""
    folded = tnn.fold(model)
    assert types_of_ours(folded) == []
    assert distance(folded(x), model(x)) <= tolerance
    return folded


@pytest.mark.parametrize("kind", [PreActBlock, PostActBlock])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_small_converted_network_folds(kind, options, mode):
    model = tnn.convert_model(filled(SmallResNet(kind)), Recipe(**options)).train(mode)
    twin = copy.deepcopy(model)
    folded = check(model, images(3, 3, 8, 8), 1e-14)
    assert distance(folded.float()(images(3, 3, 8, 8).float()), twin.float()(images(3, 3, 8, 8).float())) < FLOAT32
    assert not hasattr(folded, "conversion_report")


@needs_real_models
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["resnet26d", "resnetv2_50d", "seresnet18"])
def test_a_converted_timm_network_folds(name, options):
    torch.manual_seed(0)
    model = tnn.convert_model(timm_model(name, num_classes=10), Recipe(**options)).eval()
    size = 64 if options.get("skip") == "orthogonal" else 65
    check(model, images(1, 3, size, size, dtype=torch.float32), FLOAT32)


@needs_real_models
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_a_converted_torchvision_network_folds_on_an_odd_size(name):
    torch.manual_seed(0)
    model = tnn.convert_model(torchvision_model(name, num_classes=10)).eval()
    check(model, images(1, 3, 75, 61, dtype=torch.float32), FLOAT32)


def test_the_network_of_the_demo_folds_and_keeps_its_own_blocks():
    model = tnn.convert_model(PreActResNet18(width=4)).eval()
    folded = tnn.fold(model)
    x = images(2, 3, 16, 16, dtype=torch.float32)
    assert distance(folded(x), model(x)) < 1e-6
    assert not any(isinstance(module, PooledConv2d) for module in folded.modules())
    assert type(folded) is PreActResNet18


@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize(("kernel", "padding", "dilation"), [(1, 0, 1), (3, 1, 1), (3, 2, 2), ((1, 5), (0, 2), 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_pooled_convolution_folds_to_one_on_every_size(stride, kernel, padding, dilation, groups):
    conv = PooledConv2d(4, 6, kernel, stride, padding, dilation, groups).double()
    folded = tnn.fold(conv)
    assert type(folded) is nn.Conv2d
    for height in range(1, 8):
        x = images(2, 4, height, 9 - height)
        torch.testing.assert_close(folded(x), conv(x), rtol=1e-13, atol=1e-13)


def test_the_kernel_of_a_folded_1x1_convolution_is_2s_minus_1():
    folded = tnn.fold(PooledConv2d(2, 4, 1, 3))
    assert (folded.kernel_size, folded.padding, folded.stride) == ((5, 5), (2, 2), (3, 3))
    assert folded.state_dict().keys() == {"weight", "bias"}


def test_a_folded_shortcut_without_its_pooled_path_would_be_noticed():
    conv = PooledConv2d(2, 4, 1, 2).double()
    x = images(1, 2, 4, 4)
    assert distance(tnn.fold(conv)(x) - pooled(x, 4, 2), conv(x)) > 0.1


@pytest.mark.parametrize("layer", ACTIVATIONS)
def test_activations_fold_to_the_same_function(layer):
    z = torch.cat([torch.linspace(-60, 60, 2001, dtype=torch.float64), torch.tensor([0.0, 1e-30, 1e30, -1e30])])
    folded = check(layer(), z, 1e-15)
    torch.testing.assert_close(folded(z), layer()(z), rtol=1e-14, atol=1e-16)
    assert torch.isfinite(folded(torch.tensor([3e38, -3e38]))).all()


NORMALISED = [
    (tnn.EntryNormLinear(6, 4, leak=0.1), (5, 6)),
    (tnn.WeightNormLinear(6, 4, bias=False), (5, 6)),
    (tnn.EntryNormConv1d(4, 6, 3, 2, 1, groups=2), (2, 4, 9)),
    (tnn.EntryNormConv2d(4, 6, 3, padding="same", padding_mode="circular", eps=0.5), (2, 4, 6, 6)),
    (tnn.EntryNormConv3d(2, 4, 3, gain=2.0), (1, 2, 5, 5, 5)),
    (tnn.WeightNormConv1d(4, 6, 3, dilation=2), (2, 4, 9)),
    (tnn.WeightNormConv2d(4, 6, 3, padding_mode="reflect", padding=1), (2, 4, 6, 6)),
    (tnn.WeightNormConv3d(2, 4, 3), (1, 2, 5, 5, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), NORMALISED, ids=lambda value: type(value).__name__)
def test_normalised_layers_fold_to_torchs_own_with_the_weight_that_acts(layer, shape):
    layer = copy.deepcopy(layer).eval()
    layer.weight.requires_grad_(False)
    folded = check(layer, images(*shape, dtype=torch.float32), FLOAT32)
    assert type(folded) is layer.plain_type
    assert torch.equal(folded.weight, layer.effective_weight())
    assert (folded.training, folded.weight.requires_grad, layer.bias is None) == (False, False, folded.bias is None)
    assert type(folded)(*([2] * (2 if shape == (5, 6) else 3))).__dict__.keys() == folded.__dict__.keys()


class HandMade(nn.Module):
    """A network with our layers where a user would put them, one of them twice."""

    def __init__(self):
        super().__init__()
        self.stem = tnn.EntryNormConv2d(3, 8, 3, padding=1)
        branch = nn.Sequential(tnn.WeightNormConv2d(8, 16, 3, 2, 1), tnn.SmoothReLU())
        self.block = tnn.SpectrallyBoundedResidual(branch, tnn.OrthogonalDownsample2d(8, 16, 2))
        self.act = tnn.Softplus0()
        inner = nn.Sequential(tnn.EntryNormConv2d(16, 16, 3, padding=1), tnn.ISRU())
        self.again = tnn.SpectrallyBoundedResidual(inner)
        self.head = tnn.EntryNormLinear(16, 5)

    def forward(self, x):
        x = self.act(self.block(self.act(self.stem(x))))
        return self.head(self.again(x).mean(dim=(2, 3)))


def test_a_hand_made_network_with_every_kind_of_layer_folds():
    torch.manual_seed(0)
    check(HandMade(), images(2, 3, 8, 8, dtype=torch.float32), FLOAT32)


def test_the_folded_model_is_independent_and_the_original_untouched():
    model = HandMade()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    x = images(2, 3, 8, 8, dtype=torch.float32)
    expected, folded = model(x), tnn.fold(model)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert torch.equal(model(x), expected)


def test_our_parametrizations_are_baked_in_and_others_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.uniform_(model[0].weight, -0.4, 0.4)
    nn.utils.parametrize.register_parametrization(model[0], "weight", tnn.parametrizations.EntryNorm())
    nn.utils.parametrizations.weight_norm(model[1])
    folded = check(model, images(3, 4, dtype=torch.float32), FLOAT32)
    assert type(folded[0]) is nn.Linear
    assert nn.utils.parametrize.is_parametrized(folded[1])


def test_sharing_modes_hooks_and_formats_are_kept():
    conv = PooledConv2d(2, 4, 1, 2).to(torch.bfloat16, memory_format=torch.channels_last)
    conv.weight.requires_grad_(False)
    calls = []
    conv.register_forward_hook(lambda module, inputs, output: calls.append(type(module)))
    folded = tnn.fold(nn.ModuleList([conv, conv.eval(), nn.Sequential(conv)]))
    assert folded[0] is folded[1] is folded[2][0]
    assert (folded[0].training, folded[2].training) == (False, True)
    assert (folded[0].weight.dtype, folded[0].weight.requires_grad) == (torch.bfloat16, False)
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    folded[0](torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16))
    assert calls == [nn.Conv2d]


def test_a_meta_model_folds_without_values():
    with torch.device("meta"):
        model = tnn.convert_model(SmallResNet(PostActBlock))
    folded = tnn.fold(model)
    assert types_of_ours(folded) == []
    assert folded(torch.zeros(2, 3, 8, 8, device="meta")).shape == (2, 5)


def test_a_plain_model_is_only_copied():
    model = SmallResNet(PreActBlock).eval()
    assert distance(check(model, images(1, 3, 8, 8, dtype=torch.float32), 0.0).linear.weight, model.linear.weight) == 0


class Doubled(tnn.EntryNormLinear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_of_our_layer_is_refused_with_its_path():
    with pytest.raises(ConversionError, match=r"^1: Doubled has code of its own above our layer"):
        tnn.fold(nn.Sequential(nn.Linear(2, 2), Doubled(2, 2)))
    with pytest.raises(ConversionError, match="fold: the model must be a torch.nn.Module, got list"):
        tnn.fold([])


def test_nested_paths_and_modes_survive_in_a_folded_block():
    layers = {"deep": nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), "skip": nn.Conv2d(2, 2, 1)}
    block = PreActivationBlock(layers, branch=("deep.0", "deep.1"), shortcut=("skip",)).eval()
    folded = check(block, images(2, 2, 4, 4, dtype=torch.float32), 0.0)
    assert set(folded.state_dict()) == set(block.state_dict())
    assert not any(module.training for module in folded.modules())


def test_a_pooled_sequence_folds_on_odd_sizes():
    layers = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)
    shortcut = PooledSequential(*layers, in_channels=3, out_channels=5, stride=2).double()
    for size in (1, 2, 5, 6):
        check(shortcut.eval(), images(2, 3, size, size + 1), 1e-14)


def test_a_folded_model_loads_where_this_package_is_not_installed(tmp_path):
    model = HandMade().eval()
    path = tmp_path / "folded.pt"
    torch.save([tnn.fold(model.block), images(1, 8, 4, 4, dtype=torch.float32)], path)
    code = (
        "import sys, torch; sys.modules['trainable_nn'] = None\n"
        f"model, x = torch.load({str(path)!r}, weights_only=False)\n"
        "print(model(x).double().abs().sum().item())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    expected = model.block(images(1, 8, 4, 4, dtype=torch.float32)).double().abs().sum().item()
    assert float(out.stdout) == pytest.approx(expected, rel=1e-6)
    assert b"trainable_nn" not in pickle.dumps(tnn.fold(model.block))


def export_cases() -> dict:
    torch.manual_seed(0)
    cases = {
        "preactivation": tnn.convert_model(SmallResNet(PostActBlock)),
        "postactivation": tnn.convert_model(SmallResNet(PostActBlock), Recipe(preactivation=False)),
        "orthogonal": tnn.convert_model(SmallResNet(PreActBlock), Recipe(skip="orthogonal")),
        "hand made": HandMade(),
        "activations": nn.Sequential(nn.Conv2d(3, 4, 1), *(layer() for layer in ACTIVATIONS)),
    }
    return {name: model.eval() for name, model in cases.items()}


@pytest.mark.parametrize(("name", "model"), export_cases().items(), ids=export_cases())
def test_a_folded_model_is_exported_by_torch_to_plain_operators(name, model):
    x = images(2, 3, 8, 8, dtype=torch.float32)
    program = torch.export.export(tnn.fold(model), (x,))
    assert distance(program.module()(x), model(x)) < FLOAT32
    assert not any("trainable_nn" in str(node.target) for node in program.graph.nodes)


def runs_in_onnx(model: nn.Module, x: torch.Tensor) -> float:
    """Distance of onnxruntime's outputs on the exported folded model."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    buffer = io.BytesIO()
    torch.onnx.export(tnn.fold(model), (x,), dynamo=True, verbose=False).save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return distance(torch.from_numpy(output), model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "model"), export_cases().items(), ids=export_cases())
def test_a_folded_model_runs_in_onnxruntime(name, model):
    assert runs_in_onnx(model, images(2, 3, 8, 8, dtype=torch.float32)) < FLOAT32


@needs_real_models
@pytest.mark.filterwarnings("ignore")
def test_a_converted_resnet18_runs_in_onnxruntime():
    torch.manual_seed(0)
    model = tnn.convert_model(torchvision_model("resnet18", num_classes=10)).eval()
    assert runs_in_onnx(model, images(1, 3, 64, 64, dtype=torch.float32)) < FLOAT32


def test_a_weight_that_is_computed_elsewhere_is_refused():
    by_parametrization, by_hook = PooledConv2d(2, 4, 1), PooledConv2d(2, 4, 1)
    nn.utils.parametrizations.weight_norm(by_parametrization)
    with pytest.raises(ConversionError, match=r"^0: ParametrizedPooledConv2d has an active parametrization"):
        tnn.fold(nn.Sequential(by_parametrization))
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(by_hook)
    with torch.no_grad():
        by_hook(images(1, 2, 2, 2, dtype=torch.float32))
    with pytest.raises(ConversionError, match=r"^0: a hook computes the weight of PooledConv2d"):
        tnn.fold(nn.Sequential(by_hook))
