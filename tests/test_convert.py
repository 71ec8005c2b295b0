"""Conversion of whole networks, against re-implementations of the paper's networks."""

import json

import paper_oracle
import pytest
import torch
from paper_oracle import basic_block, bottleneck
from real_models import needs_real_models, on_meta, timm_model, torchvision_model
from small_resnets import PostActBlock, PreActBlock, SmallResNet, distance, filled, images
from torch import nn

import trainable_nn as tnn
from trainable_nn.convert import Plan, Recipe
from trainable_nn.errors import ConversionError

EXACT = 1e-12  # float64, a few hundred roundings
ORIGINAL_NAMES = {"front": "bn1", "inner": "bn2", "projection": "shortcut.0"}
MOVED_NAMES = {"front": "norm", "inner": "bn1", "last": "bn2", "projection": "downsample.0"}
TIMM_V2_NAMES = {"front": "norm1", "inner": "norm2", "last": "norm3", "projection": "downsample.conv"}


def small_oracle(state, x, names, add_pooled=True):
    """SmallResNet with pre-activation blocks."""
    x = torch.nn.functional.conv2d(x, state["conv1.weight"], padding=1)
    for key, stride in (("layer1.0", 1), ("layer1.1", 1), ("layer2.0", 2), ("layer2.1", 1)):
        x = basic_block(state, key, x, stride, names=names, add_pooled=add_pooled)
    return x.mean(dim=(2, 3)) @ state["linear.weight"].T + state["linear.bias"]


def test_a_preactivation_network_becomes_the_papers_with_the_same_weights():
    model = filled(SmallResNet(PreActBlock))
    converted = tnn.convert_model(model)
    x = images(2, 3, 16, 16)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(converted.state_dict().values(), model.state_dict().values()))
    assert distance(converted(x), small_oracle(model.state_dict(), x, ORIGINAL_NAMES)) < EXACT


def test_the_oracle_without_the_pooled_path_is_the_original_and_differs():
    model = filled(SmallResNet(PreActBlock))
    x = images(2, 3, 16, 16)
    plain = small_oracle(model.state_dict(), x, ORIGINAL_NAMES, add_pooled=False)
    assert distance(model(x), plain) < EXACT
    assert distance(tnn.convert_model(model)(x), plain) > 0.01


def test_a_postactivation_network_moves_to_the_papers_blocks():
    model = filled(SmallResNet(PostActBlock))
    converted = tnn.convert_model(model)
    x = images(2, 3, 16, 16)
    names = {"front": "norm", "inner": "bn1", "projection": "shortcut.0"}
    assert distance(converted(x), small_oracle(converted.state_dict(), x, names)) < EXACT
    survivors = {key for key in model.state_dict() if key in converted.state_dict()}
    assert {"layer2.0.conv1.weight", "layer2.0.bn1.weight", "layer2.0.shortcut.0.weight"} <= survivors
    assert all(torch.equal(model.state_dict()[key], converted.state_dict()[key]) for key in survivors)


def test_without_preactivation_only_projections_gain_a_pooled_path():
    model = filled(SmallResNet(PostActBlock))
    converted = tnn.convert_model(model, Recipe(preactivation=False))
    assert list(converted.state_dict()) == list(model.state_dict())
    x = images(2, 8, 8, 8)
    block, plain = converted.layer2[0], model.layer2[0]
    branch = plain.bn2(plain.conv2(torch.relu(plain.bn1(plain.conv1(x)))))
    expected = torch.relu(branch + plain.shortcut(x) + paper_oracle.pooled(x, 16, 2))
    assert distance(block(x), expected) < EXACT
    assert distance(converted.layer1(x), model.layer1(x)) == 0


def test_skip_conv_gives_the_plain_preactivation_network():
    model = filled(SmallResNet(PreActBlock))
    x = images(2, 3, 16, 16)
    assert torch.equal(tnn.convert_model(model, Recipe(skip="conv"))(x), model(x))
    moved = tnn.convert_model(filled(SmallResNet(PostActBlock)), Recipe(skip="conv"))
    names = {"front": "norm", "inner": "bn1", "projection": "shortcut.0"}
    assert distance(moved(x), small_oracle(moved.state_dict(), x, names, add_pooled=False)) < EXACT


@pytest.mark.parametrize("kind", [PreActBlock, PostActBlock])
def test_skip_orthogonal_reads_the_raw_input_and_replaces_the_projection(kind):
    converted = tnn.convert_model(filled(SmallResNet(kind)), Recipe(skip="orthogonal"))
    block = converted.layer2[0]
    x = images(1, 8, 4, 4)
    skip = tnn.OrthogonalDownsample2d(8, 16, 2, dtype=torch.float64)
    front, inner = (block.norm, block.bn1) if kind is PostActBlock else (block.bn1, block.bn2)
    branch = block.conv2(torch.relu(inner(block.conv1(torch.relu(front(x))))))
    assert distance(block(x), skip(x) + branch) < EXACT
    assert not any("shortcut" in key for key in converted.state_dict())
    nn.init.zeros_(block.conv2.weight)
    jacobian = torch.autograd.functional.jacobian(block, x).reshape(64, 128)
    torch.testing.assert_close(torch.linalg.svdvals(jacobian), torch.ones(64, dtype=torch.float64))


def test_the_plan_tells_what_survives_and_goes_to_json_and_back():
    model = filled(SmallResNet(PostActBlock))
    plan = tnn.plan(model, sample_input=images(2, 3, 16, 16))
    step = next(step for step in plan.steps if step.path == "layer2.0")
    assert "layer2.0.shortcut.0.weight" in step.kept
    assert "layer2.0.norm.weight" in step.new
    assert {"layer2.0.bn2.weight", "layer2.0.shortcut.1.running_var"} <= set(step.dropped)
    converted = tnn.convert_model(model)
    before, after = set(model.state_dict()), set(converted.state_dict())
    assert {key for s in plan.steps for key in s.dropped} == before - after
    assert {key for s in plan.steps for key in s.new} == after - before
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert all(step.path in str(plan) for step in plan.steps)


def test_the_report_is_the_plan_with_the_measured_change():
    model = filled(SmallResNet(PreActBlock))
    x = images(2, 3, 16, 16)
    converted = tnn.convert_model(model, sample_input=x)
    assert converted.conversion_report == tnn.plan(model, sample_input=x)
    assert converted.conversion_report.function_change == pytest.approx(distance(converted(x), model(x)), rel=1e-12)
    assert tnn.convert_model(model).conversion_report.function_change is None


def test_keep_leaves_a_path_and_says_so():
    model = filled(SmallResNet(PreActBlock))
    converted = tnn.convert_model(model, keep=("layer2.0",))
    assert torch.equal(converted(images(1, 3, 8, 8)), model(images(1, 3, 8, 8)))
    step = next(step for step in converted.conversion_report.steps if step.path == "layer2.0")
    assert (step.changes, step.reason) == (False, "keep names it")


def test_keep_can_leave_only_the_shortcut_of_a_block():
    model = filled(SmallResNet(PostActBlock))
    block = tnn.convert_model(model, keep=("layer2.0.shortcut",)).layer2[0]
    x = images(1, 8, 4, 4)
    u = torch.relu(block.norm(x))
    expected = block.conv2(torch.relu(block.bn1(block.conv1(u)))) + model.layer2[0].shortcut(u)
    assert distance(block(x), expected) < EXACT


def test_a_nested_residual_is_searched_for_blocks():
    class Global(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(PreActBlock(4, 8, 1), nn.Conv2d(8, 4, 1))

        def forward(self, x):
            return x + self.body(x)

    converted = tnn.convert_model(Global())
    assert isinstance(converted.body[0].shortcut[0], nn.Conv2d)
    assert [step.path for step in converted.conversion_report.steps if step.changes] == ["body.0"]


TORCHVISION = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "resnext50_32x4d"]
TIMM = ["resnet18", "resnet26d", "resnet50", "resnetv2_50", "seresnet18", "resnetaa50"]


@needs_real_models
@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.parametrize("options", [{}, {"preactivation": False}, {"skip": "conv"}, {"skip": "orthogonal"}], ids=str)
def test_every_torchvision_resnet_is_converted_at_each_of_its_blocks(name, options):
    model = on_meta(torchvision_model, name)
    converted = tnn.convert_model(model, Recipe(**options))
    projections = 3 if name in ("resnet18", "resnet34") else 4
    blocks = sum(len(layer) for layer in (model.layer1, model.layer2, model.layer3, model.layer4))
    steps = converted.conversion_report.steps
    assert len(steps) == blocks
    assert sum(step.changes for step in steps) == (projections if options == {"preactivation": False} else blocks)
    assert converted(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 1000)


@needs_real_models
@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("options", [{}, {"preactivation": False}, {"skip": "conv"}, {"skip": "orthogonal"}], ids=str)
def test_every_timm_resnet_is_converted_at_each_of_its_blocks(name, options):
    model = on_meta(timm_model, name)
    converted = tnn.convert_model(model, Recipe(**options))
    steps = converted.conversion_report.steps
    blocks = [p for p, m in model.named_modules() if type(m).__name__.endswith(("BasicBlock", "Bottleneck"))]
    assert sorted(step.path for step in steps) == sorted(blocks)
    assert converted(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 1000)


@needs_real_models
@pytest.mark.parametrize(
    ("name", "depths", "block"),
    [("resnet18", (2, 2, 2, 2), basic_block), ("resnext50_32x4d", (3, 4, 6, 3), bottleneck)],
)
def test_a_converted_torchvision_network_computes_the_papers(name, depths, block):
    converted = filled(tnn.convert_model(torchvision_model(name, num_classes=7)))
    x = images(1, 3, 64, 64)
    expected = paper_oracle.torchvision_resnet(converted.state_dict(), x, depths, block, MOVED_NAMES)
    assert distance(converted(x), expected) < EXACT


@needs_real_models
def test_a_converted_timm_preactivation_network_computes_the_papers_and_keeps_its_keys():
    model = filled(timm_model("resnetv2_50", num_classes=7))
    converted = tnn.convert_model(model)
    x = images(1, 3, 64, 64)
    assert list(converted.state_dict()) == list(model.state_dict())
    expected = paper_oracle.timm_resnetv2(model.state_dict(), x, (3, 4, 6, 3), TIMM_V2_NAMES)
    assert distance(converted(x), expected) < EXACT


@needs_real_models
def test_squeeze_excitation_and_stochastic_depth_stay_in_the_branch():
    model = filled(timm_model("seresnet18", num_classes=7, drop_path_rate=0.1, drop_block_rate=0.1))
    block, old = tnn.convert_model(model).layer3[1], model.layer3[1]
    x = images(1, 256, 4, 4)
    u = torch.relu(block.norm(x))
    expected = old.se(old.conv2(torch.relu(old.bn1(old.conv1(u))))) + x
    assert distance(block(x), expected) < EXACT
    assert type(block.drop_path).__name__ == "DropPath"


@needs_real_models
def test_the_pooled_path_of_an_averaging_shortcut_takes_its_whole_stride():
    model = filled(timm_model("resnet26d", num_classes=7))
    converted = tnn.convert_model(model, Recipe(preactivation=False))
    x = images(1, 256, 6, 6)
    expected = model.layer2[0].downsample(x) + paper_oracle.pooled(x, 512, 2)
    assert distance(converted.layer2[0].downsample(x), expected) < EXACT
    assert list(converted.state_dict()) == list(model.state_dict())


@needs_real_models
def test_a_subclassed_projection_is_refused_and_a_kept_one_left():
    model = on_meta(timm_model, "resnetv2_50x1_bit")
    with pytest.raises(
        ConversionError, match=r"stages.0.blocks.0: .*StdConv2d, a subclass of Conv2d that no rule covers"
    ):
        tnn.plan(model)


@needs_real_models
def test_a_network_with_group_normalisation_gets_group_normalisation_in_front():
    model = tnn.convert_model(on_meta(timm_model, "resnet50_gn"))
    norm = model.layer3[0].norm
    assert (type(norm), norm.num_groups, norm.num_channels) == (nn.GroupNorm, 32, 512)


class Block1d(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv1d(inputs, outputs, 3, stride, 1), nn.BatchNorm1d(outputs, affine=False), nn.Tanh(),
            nn.Conv1d(outputs, outputs, 3, 1, 1), nn.BatchNorm1d(outputs, eps=1e-3), nn.Dropout(0.1),
        )  # fmt: skip
        self.projection = nn.Conv1d(inputs, outputs, 1, stride)
        self.act = nn.Tanh()

    def forward(self, x):
        return self.act(self.branch(x) + self.projection(x))


def test_a_one_dimensional_network_moves_with_its_own_projection_and_has_no_pooled_form():
    model = nn.Sequential(Block1d(4, 8, 2)).double().eval()
    block, old = tnn.convert_model(model, Recipe(skip="conv"))[0], model[0]
    x = images(2, 4, 9)
    u = torch.tanh(block.norm(x))
    expected = old.branch[:4](u) + old.projection(u)
    assert distance(block(x), expected) < EXACT
    assert (type(block.norm), block.norm.eps, block.norm.num_features) == (nn.BatchNorm1d, 1e-3, 4)
    with pytest.raises(
        ConversionError, match=r"^0: .*the pooled shortcut is for nn.Conv2d, and projection is a Conv1d"
    ):
        tnn.convert_model(model)


@pytest.mark.parametrize("kind", [PreActBlock, PostActBlock])
def test_a_recipe_that_changes_nothing_moves_nothing_and_says_so(kind):
    x = images(2, 3, 8, 8)
    plan = tnn.plan(filled(SmallResNet(kind)), Recipe(skip="conv", preactivation=False), sample_input=x)
    assert plan.function_change == 0.0
    assert not any(step.changes for step in plan.steps)
    title = "SmallResNet by recipe 'paper' (skip='conv', preactivation=False): 0 of 4 paths change."
    assert str(plan).splitlines()[0] == title
    assert str(plan).splitlines()[-1] == "On the sample input the outputs move by 0 times their norm."
