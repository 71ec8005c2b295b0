"""The recipe "provable": the form of the theorems, measured on dense Jacobians; and everything it refuses."""

import math

import oracles
import pytest
import torch
from real_models import needs_real_models, timm_model, torchvision_model
from torch import nn

import trainable_nn as tnn
from trainable_nn.convert import ProvableRecipe, provable
from trainable_nn.demo.resnet import PreActBlock, PreActResNet18
from trainable_nn.errors import ConversionError
from trainable_nn.functional.readout import readout_kernel

F64 = torch.float64


def sample(count=3, channels=1, size=16):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(4), dtype=F64)


def network(**options):
    torch.manual_seed(0)
    return PreActResNet18(2, 1, 5).double(), provable(**options)


def converted(**options):
    model, recipe = network(**options)
    return tnn.convert_model(model, recipe, sample_input=sample())


def layers_and_inputs(model, x):
    """Every residual layer behind the first one, with one sample that goes into it."""
    found, hooks = [], []
    for path, module in model.named_modules():
        if isinstance(module, (tnn.ContractiveResidual, tnn.SpectrallyBoundedResidual)):
            hooks.append(module.register_forward_pre_hook(lambda m, a, path=path: found.append((path, m, a[0][0].detach()))))
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def large_weights(model):
    """Random weights of every size; the guarantee is for all of them."""
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(index)
        scale = (0.01, 1.0, 100.0)[index % 3]
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=F64))


@pytest.mark.parametrize(
    "activation, weights",
    [("gelu", "spectral"), ("gelu", "weight"), *((name, "spectral") for name in ("silu", "tanh", "softplus", "smooth_relu", "keep"))],
)
def test_every_layer_behind_the_first_has_singular_values_from_1_minus_strength_to_1_plus_strength(activation, weights):
    model = converted(weights=weights, activation=activation, strength=0.8)
    for change in (lambda m: None, large_weights):
        change(model)
        layers = layers_and_inputs(model, sample(1))
        assert len(layers) == 9
        for path, layer, x in layers[4:]:  # the first ones are wide; their kinds are there again
            values = torch.linalg.svdvals(oracles.jacobian_of(layer, x))
            assert len(values) == min(math.prod(layer(x[None]).shape), x.numel())
            assert 0.2 * (1 - 1e-9) <= float(values.min()) and float(values.max()) <= 1.8 * (1 + 1e-9), path


def test_the_branches_are_as_strong_as_the_bound_says_for_the_worst_weights():
    """A branch that did next to nothing would obey the law as well; at large weights of rank one it comes near."""
    block = tnn.ContractiveResidual(tnn.SpectralNormLinear(6, 6, bias=False).double(), strength=0.8)
    block.branch.weight.data.copy_(1e4 * torch.outer(torch.ones(6, dtype=F64), torch.arange(1.0, 7.0, dtype=F64)))
    jacobian = oracles.jacobian_of(block, torch.zeros(6, dtype=F64)) - torch.eye(6, dtype=F64)
    assert 0.75 < oracles.norm_of(jacobian) <= 0.8


def test_a_bound_for_one_shape_is_not_lent_to_another():
    layer = tnn.ContractiveResidual(tnn.WeightNormConv2d(2, 2, 3, padding=1), input_shape=(2, 1, 1))
    assert layer(torch.zeros(3, 2, 1, 1)).shape == (3, 2, 1, 1)
    with pytest.raises(ValueError, match=r"holds for samples of shape \(2, 1, 1\) only"):
        layer(torch.zeros(3, 2, 4, 4))


def test_the_skips_have_all_singular_values_1_on_the_output_side():
    for path, layer, x in layers_and_inputs(converted(), sample(1)):
        skip = layer.skip
        if skip is not None:
            matrix = oracles.jacobian_of(skip, x)
            gram = matrix @ matrix.T
            assert torch.allclose(gram, torch.eye(len(gram), dtype=F64), atol=1e-12), path


def test_dimensions_never_grow_behind_the_first_layer():
    model, sizes = converted(), []
    x = model.first(sample(1))
    for part in list(model)[1:-1]:
        for block in part:
            sizes.append(x[0].numel())
            x = block(x)
    sizes += [x[0].numel(), model.head(x)[0].numel()]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 5


def test_the_least_singular_value_of_the_network_is_above_the_bound_of_theorem_4_7():
    """sigma(DF) >= sigma(X) min P'(w) prod (1 - strength), against the dense parameter Jacobian; N = 2 samples."""
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1, dtype=F64), Tail(2))
    x = sample(2, size=8)
    model = tnn.convert_model(plain, provable(strength=0.5, leak=0.3, bias=False), sample_input=x)
    names, values = zip(*[(n, p.detach()) for n, p in model.named_parameters()], strict=True)
    jacobian = torch.func.jacrev(lambda *p: torch.func.functional_call(model, dict(zip(names, p, strict=True)), (x,)).flatten(),
                                 tuple(range(len(values))))(*values)  # fmt: skip
    dense = torch.cat([block.flatten(1) for block in jacobian], 1)
    slope = 0.3 + float(((1 + model.first.affine.weight.detach() ** 2) ** -1.5).min())
    least = float(torch.linalg.svdvals(dense)[-1])
    bound = float(torch.linalg.svdvals(x.flatten(1))[-1]) * slope * 0.5**2
    assert 0.0 < bound <= least
    assert least < 1e3 * bound  # and the bound is about this number, not about 0


class Tail(nn.Module):
    """One block and a head, as a network would have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = PreActBlock(width, width).double()
        self.fc = nn.Linear(width, 2, dtype=F64)

    def forward(self, x):
        return self.fc(self.block(x).mean((2, 3)))


def test_the_report_says_what_is_kept_and_what_the_first_layer_costs():
    model, recipe = network()
    report = tnn.convert_model(model, recipe, sample_input=sample()).conversion_report
    text = str(report)
    assert "EntryNormLinear 256 -> 512" in text and "1 MiB" in text and "at most 256 of them" in text
    assert report.recipe.input_shape == (1, 16, 16) and report.function_change > 0.0
    steps = {step.path: step for step in report.steps}
    assert steps["layer2.0"].kept == ("layer2.0.conv1.weight", "layer2.0.conv2.weight")
    named = [key for step in report.steps for key in (*step.kept, *step.dropped)]
    assert sorted(named) == sorted(model.state_dict())  # each key is told of, once
    assert tnn.Plan.from_dict(report.to_dict()) == report


def test_kept_weights_are_the_original_s_and_keep_their_direction():
    model, recipe = network()
    new = tnn.convert_model(model, recipe, sample_input=sample())
    old, effective = model.layer1[0].conv1.weight, new.layer1[0].branch.conv1.effective_weight()
    assert torch.equal(new.layer1[0].branch.conv1.weight, old)
    assert torch.allclose(effective / effective.norm(), old / old.norm(), atol=1e-12)


def test_plan_gives_the_report_and_leaves_the_model_alone():
    model, recipe = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    planned = tnn.plan(model, recipe, sample_input=sample())
    assert planned.steps == tnn.convert_model(model, recipe, sample_input=sample()).conversion_report.steps
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_trains_and_gradients_reach_every_parameter():
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    x, y = sample(8), torch.arange(8) % 5
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_it_is_saved_and_read_back_from_the_original_alone(tmp_path):
    model, recipe = network()
    new = tnn.convert_model(model, recipe, sample_input=sample())
    tnn.save(new, tmp_path / "a.safetensors")
    again = tnn.load(tmp_path / "a.safetensors", PreActResNet18(2, 1, 5).double())
    assert torch.equal(again(sample()), new(sample()))
    assert again.conversion_report.recipe == new.conversion_report.recipe


@pytest.mark.parametrize("weights", ["spectral", "weight"])
def test_fold_gives_plain_layers_with_the_same_outputs(weights):
    new = converted(weights=weights)
    folded = tnn.fold(new)
    assert torch.allclose(folded(sample()), new(sample()), atol=1e-12)
    assert not [m for m in folded.modules() if type(m).__module__.startswith("trainable_nn.")]
    torch.export.export(folded, (sample(),))


def test_device_dtype_and_mode_are_the_original_s():
    model = PreActResNet18(2, 1, 5).eval()
    new = tnn.convert_model(model, "provable", sample_input=sample().float())
    assert not new.training and {p.dtype for p in new.parameters()} == {torch.float32}
    on_meta = tnn.convert_model(model.to("meta"), provable(input_shape=(1, 16, 16)))
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}


def test_a_floored_norm_stays_in_the_branch_and_the_bound_holds():
    model = converted(norm="floored", strength=0.8)
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count("FlooredBatchNorm2d") == 16 and "measured" in " ".join(model.conversion_report.notes)
    model.eval()
    for path, layer, x in layers_and_inputs(model, sample(1))[3:-1]:
        kept = torch.zeros_like(x[None]) if layer.skip is None else layer.skip(x[None])
        jacobian = oracles.jacobian_of(layer, x)
        skip = torch.eye(x.numel(), dtype=F64) if layer.skip is None else oracles.jacobian_of(layer.skip, x)
        assert oracles.norm_of(jacobian - skip) <= 0.8 * (1 + 1e-9), path
        assert kept.shape == layer(x[None]).shape


@pytest.mark.parametrize("outputs, channels, pixels", [(3, 5, 4), (5, 5, 1), (7, 3, 4), (12, 3, 4)])
def test_the_readout_s_rows_are_orthonormal(outputs, channels, pixels):
    kernel = readout_kernel(outputs, channels, pixels)
    assert torch.allclose(kernel @ kernel.T, torch.eye(outputs, dtype=F64), atol=1e-13)
    means = kernel[: min(outputs, channels)].reshape(-1, channels, pixels)
    assert torch.allclose(means, means.mean(2, keepdim=True).expand_as(means), atol=1e-15)


def test_the_readout_refuses_more_outputs_than_inputs_and_another_shape():
    with pytest.raises(ValueError, match="from 1 to 6 outputs"):
        tnn.OrthogonalReadout((3, 2), 7)
    with pytest.raises(ValueError, match=r"\(N, 3, 2\) is needed"):
        tnn.OrthogonalReadout((3, 2), 2)(torch.zeros(1, 2, 3))


@pytest.mark.parametrize(
    "option, value",
    [("leak", -0.1), ("leak", math.nan), ("strength", 1.0), ("strength", 0.0), ("activation", "relu"), ("norm", "batch"),
     ("weights", "entry"), ("eps", 0.0), ("eps", math.nan), ("power", 3), ("power", 2.0), ("input_shape", (3, 8)), ("bias", None), ("name", "paper")],
)  # fmt: skip
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ConversionError):
        ProvableRecipe(**{option: value})


@pytest.mark.parametrize("weights, layers", [("spectral", tnn.SpectralNormConv2d), ("weight", tnn.WeightNormConv2d)])
def test_the_constants_of_the_branches_are_the_recipes(weights, layers, tmp_path):
    plain, x = PreActResNet18(2, 1, 5), sample().float()
    recipe = provable(weights=weights, eps=0.01, power=64)
    network = tnn.convert_model(plain, recipe, sample_input=x)
    found = [m for m in network.modules() if isinstance(m, (layers, tnn.SpectralNormLinear, tnn.WeightNormLinear))]
    assert len(found) == 17 and {m.eps for m in found} == {0.01} and network.first.affine.eps == 1.0
    if weights == "spectral":
        assert {m.power for m in found} == {64}
        usual = tnn.convert_model(plain, provable(eps=0.01), sample_input=x)
        tighter = [a.operator_norm_bound((2, 8, 8)) for a in (network.layer1[0].branch.conv1, usual.layer1[0].branch.conv1)]
        assert tighter[0] > 1.02 * tighter[1]  # nearer to its gain
    tnn.save(network, tmp_path / "network.safetensors")
    assert torch.equal(tnn.load(tmp_path / "network.safetensors", plain)(x), network(x))


def refused(model, recipe="provable", match="", **options):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConversionError, match=match):
        tnn.convert_model(model, recipe, **options)
    assert all(torch.allclose(value, before[name], 0, 0, equal_nan=True) for name, value in model.state_dict().items())


def test_each_obstacle_is_named():
    model = PreActResNet18(2, 1, 5)
    x = sample().float()
    refused(model, match="sample_input")
    refused(model, sample_input=sample(3, 2).float(), match="does not run on an input")
    refused(model, sample_input=x, keep=("layer1",), match="without keep")
    refused(model, sample_input=x, inplace=True, match="inplace=True cannot hold")
    refused(model, provable(most_bytes=1000), sample_input=x, match="most_bytes=1000")
    refused(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), sample_input=x, match="no residual block")
    refused(PreActResNet18(2, 1, 300), sample_input=x, match="300 outputs from 64 features")
    refused(nn.Sequential(PreActBlock(1, 2, 1), PreActBlock(2, 4, 1), nn.Flatten()), sample_input=x, match="may not grow")
    refused(nn.Sequential(PreActBlock(1, 1), nn.AvgPool2d(1), PreActBlock(1, 1), nn.Flatten()), sample_input=x,
            match="not the output of 0")  # fmt: skip
    refused(nn.Sequential(PreActBlock(1, 1)), sample_input=x, match=r"must be \(N, classes\)")
    shared = PreActBlock(1, 1)
    refused(nn.Sequential(shared, shared, nn.Flatten()), sample_input=x, match="more than once")
    model.layer1[0].conv1.weight.data[0, 0, 0, 0] = math.nan
    refused(model, sample_input=x, match="NaN")


@needs_real_models
@pytest.mark.parametrize(
    "name, shape", [("resnet18", (3, 32, 32)), ("resnet34", (3, 28, 28)), ("resnet50", (3, 64, 64)), ("resnext50_32x4d", (3, 32, 32))]
)
def test_real_networks_have_a_plan_with_the_memory_of_their_first_layer(name, shape):
    model = torchvision_model(name, num_classes=10).to("meta")
    report = tnn.plan(model, provable(input_shape=shape))
    blocks = {"resnet18": 8, "resnet34": 16, "resnet50": 16, "resnext50_32x4d": 16}[name]
    assert len(report.steps) == blocks + 2 and "iB" in report.notes[0]
    new = tnn.convert_model(model, provable(input_shape=shape))
    assert new(torch.empty(2, *shape, device="meta")).shape == (2, 10)


@needs_real_models
def test_a_real_resnet18_runs_forward_and_backward():
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    new = tnn.convert_model(torchvision_model("resnet18", num_classes=10), "provable", sample_input=x)
    new(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in new.parameters())


@needs_real_models
def test_attention_in_a_branch_is_refused_by_its_path():
    with pytest.raises(ConversionError, match=r"layer1\.0.*(SEModule|attention|rebuilt)"):
        tnn.convert_model(timm_model("seresnet18", num_classes=10), provable(input_shape=(3, 32, 32)))
