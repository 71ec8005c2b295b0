"""Bad input: each kind gets an error that names the place, and the model stays as it was."""

import functools
import os

import pytest
import torch
from odd_blocks import (
    ActivatesInPlace,
    AddsByName,
    AnotherBlockInTraining,
    BothLinear,
    Conv2d,
    DependsOnData,
    DependsOnMode,
    DropsByFunction,
    EndsInActivation,
    Gated,
    Norm2d,
    NormBehind,
    PostWithFront,
    Scaled,
    SharedNorm,
    Twice,
    TwoInputs,
    WithoutNorm,
    WithParameter,
)
from small_resnets import PostActBlock, PreActBlock, SmallResNet
from test_convert_state import same, snapshot
from torch import nn

import trainable_nn as tnn
from trainable_nn.convert import Plan, Recipe
from trainable_nn.convert.blocks import Anatomy, Call
from trainable_nn.convert.walk import survey
from trainable_nn.errors import ConversionError


def refused(model, *arguments, match: str, **options) -> None:
    """Both plan and convert_model raise, with these words, and change nothing."""
    before = snapshot(model)
    for run in (tnn.plan, tnn.convert_model, functools.partial(tnn.convert_model, inplace=True)):
        with pytest.raises(ConversionError, match=match):
            run(model, *arguments, **options)
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Twice, "it adds 2 times, and a residual block adds once"),
        (NormBehind, "something other than an activation follows the addition"),
        (Scaled, "its addition is scaled"),
        (BothLinear, "both sides of its addition could be the skip"),
        (DependsOnData, "torch.fx cannot follow it .*control flow"),
        (DependsOnMode, "its forward asks for self.training"),
        (DropsByFunction, r"more than a chain of known steps \(dropout\)"),
        (AnotherBlockInTraining, "it is another block in training than in evaluation"),
        (EndsInActivation, "its branch ends in an activation"),
        (WithoutNorm, "its branch has no norm"),
        (SharedNorm, "bn1 is applied more than once"),
        (Gated, "more than a chain of known steps"),
        (WithParameter, "parameters or buffers of its own"),
        (TwoInputs, "its forward takes more than one input"),
    ],
)
def test_a_block_that_no_rule_covers_is_named_with_its_path_and_the_way_out(kind, words):
    model = nn.Sequential(PostActBlock(4, 4), nn.Sequential(kind(4, 4)))
    refused(model, match=rf"^1\.0: {kind.__name__} .*{words}.*keep=\('1\.0',\)\.$")
    converted = tnn.convert_model(model, keep=("1.0",))
    assert type(converted[1][0]) is kind


@pytest.mark.parametrize(
    "kind", [DependsOnMode, DropsByFunction, EndsInActivation, WithoutNorm, SharedNorm, Gated, WithParameter, TwoInputs]
)
def test_what_only_the_move_cannot_do_is_accepted_without_it(kind):
    converted = tnn.convert_model(nn.Sequential(kind(4, 4)), Recipe(preactivation=False))
    assert type(converted[0]) is kind  # an identity shortcut: nothing to add, so the block is as it was
    assert [step.path for step in converted.conversion_report.steps] == ["0"]


def test_an_addition_by_name_is_one_too():
    assert [step.changes for step in tnn.plan(nn.Sequential(AddsByName(4, 8))).steps] == [True]


def test_an_orthogonal_skip_is_refused_where_the_raw_input_cannot_be_read():
    orthogonal = Recipe(skip="orthogonal", preactivation=False)
    refused(nn.Sequential(ActivatesInPlace(4, 8)), orthogonal, match=r"^0: .*relu works in place on the block's input")
    refused(nn.Sequential(PostWithFront(4, 8)), orthogonal, match=r"^0: .*its shortcut does not read the block's input")
    refused(nn.Sequential(PostWithFront(4, 8)), match=r"^0: .*something stands between its input and its skip")


def test_the_whole_message_of_a_block_that_adds_twice():
    with pytest.raises(ConversionError) as caught:
        tnn.plan(nn.Sequential(Twice(4, 4)))
    assert str(caught.value) == (
        "0: Twice adds two paths like a residual block, but it adds 2 times, and a residual block adds once. "
        "Leave it unchanged with keep=('0',)."
    )


@pytest.mark.parametrize(("name", "layer"), [("conv2", Conv2d(8, 8, 3, 1, 1)), ("bn1", Norm2d(8)), ("bn2", Norm2d(8))])
def test_a_subclassed_layer_in_a_branch_that_moves_is_refused(name, layer):
    model = SmallResNet(PostActBlock)
    setattr(model.layer1[1], name, layer)
    refused(model, match=rf"layer1\.1: .*{name} is a {type(layer).__name__}, a subclass of .* that no rule covers")


def test_a_subclassed_layer_in_a_shortcut_is_refused_and_in_a_branch_that_stays_kept():
    model = SmallResNet(PreActBlock)
    model.layer2[0].conv1 = Conv2d(8, 16, 3, 2, 1)
    assert type(tnn.convert_model(model).layer2[0].conv1) is Conv2d
    model.layer2[0].shortcut[0] = Conv2d(8, 16, 1, 2)
    refused(model, match=r"layer2\.0: .*shortcut\.0 is a Conv2d, a subclass of Conv2d that no rule covers")


def test_an_active_parametrization_is_named_with_its_removal():
    model = SmallResNet(PreActBlock)
    nn.utils.parametrizations.weight_norm(model.layer2[0].shortcut[0])
    with pytest.raises(
        ConversionError, match=r"shortcut\.0 has an active parametrization; call .*remove_parametrizations"
    ):
        tnn.convert_model(model)
    nn.utils.parametrize.remove_parametrizations(model.layer2[0].shortcut[0], "weight")
    tnn.convert_model(model)


@pytest.mark.parametrize(
    ("projection", "words"),
    [
        (nn.Conv2d(8, 4, 1), "never drops them, got 8 channels in and 4 out"),
        (nn.Conv2d(8, 16, 3), "another image size than the pooled path"),
    ],
)
def test_a_projection_without_a_pooled_form_is_refused(projection, words):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep = nn.Sequential(nn.ReLU(), projection)
            self.skip = projection.__class__(
                **{n: getattr(projection, n) for n in ("in_channels", "out_channels", "kernel_size")}
            )

        def forward(self, x):
            return self.deep(x) + self.skip(x)

    refused(nn.Sequential(Block()), match=rf"^0: .*{words}.*keep=\('0',\)")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["layer2.0.conv1.weight", "linear.bias", "layer1.0.bn1.running_var"])
def test_weights_that_are_not_finite_are_refused(value, key):
    model = SmallResNet(PreActBlock)
    with torch.no_grad():
        model.state_dict()[key].view(-1)[0] = value
    with pytest.raises(ConversionError, match=rf"^{key}: the weight holds NaN or infinite values"):
        tnn.convert_model(model)
    if key.startswith("layer2.0"):
        tnn.convert_model(model, keep=("layer2.0",))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
def test_integer_and_complex_weights_are_refused(dtype):
    model = SmallResNet(PreActBlock)
    model.layer2[0].conv1.weight = nn.Parameter(torch.zeros(16, 8, 3, 3, dtype=dtype), requires_grad=False)
    refused(model, match=rf"^layer2\.0\.conv1\.weight: the weight has dtype {dtype}")


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())])
def test_a_model_without_a_residual_block_is_refused(model):
    refused(model, match="no residual block was found")


@pytest.mark.parametrize("kind", [PreActBlock, PostActBlock])
@pytest.mark.parametrize("outer", [lambda m: m, nn.Sequential], ids=["itself", "inside"])
def test_a_converted_model_is_refused(kind, outer):
    refused(outer(tnn.convert_model(SmallResNet(kind))), match="SmallResNet is already converted")


def test_a_model_that_holds_our_blocks_is_refused():
    converted = tnn.convert_model(SmallResNet(PreActBlock))
    refused(
        nn.Sequential(converted.layer2, PreActBlock(16, 16)),
        match=r"0\.0\.shortcut\.0: PooledConv2d is already converted",
    )


def test_what_is_no_module_is_refused():
    with pytest.raises(ConversionError, match="must be a torch.nn.Module, got dict"):
        tnn.convert_model({})
    with pytest.raises(ConversionError, match="got type. Call it to make one"):
        tnn.plan(SmallResNet)


def test_keep_paths_that_do_not_exist_are_named():
    refused(SmallResNet(PreActBlock), keep=("layer2.0", "layer9"), match="keep: SmallResNet has no module at 'layer9'")
    refused(SmallResNet(PreActBlock), keep="layer2.0", match=r"Write keep=\('layer2\.0',\)")
    refused(SmallResNet(PreActBlock), keep=("",), match="no module at ''")


def test_keep_inside_a_block_that_moves_is_refused():
    refused(SmallResNet(PostActBlock), keep=("layer1.0.bn2",), match=r"layer1\.0: .*keep names bn2, which goes")


def test_wrapped_models_are_refused_with_the_way_to_unwrap():
    model = SmallResNet(PreActBlock)
    refused(nn.DataParallel(model), match=r"DataParallel wraps a model\. Convert its \.module")
    refused(nn.Sequential(nn.DataParallel(model)), match=r"^0: DataParallel wraps")
    with pytest.raises(ConversionError, match=r"OptimizedModule wraps a model\. Convert its \._orig_mod"):
        tnn.convert_model(torch.compile(model))


def test_a_distributed_model_is_refused(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{os.fspath(tmp_path)}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(SmallResNet(PreActBlock))
        with pytest.raises(ConversionError, match=r"DistributedDataParallel wraps a model\. Convert its \.module"):
            tnn.convert_model(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_compiled_in_place_is_refused():
    model = SmallResNet(PreActBlock)
    model.layer1.compile()
    with pytest.raises(ConversionError, match=r"^layer1: Sequential was compiled in place"):
        tnn.convert_model(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_scripted_model_is_refused():
    traced = torch.jit.trace(SmallResNet(PreActBlock).eval(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ConversionError, match="is scripted and has no Python code to rewrite"):
        tnn.convert_model(traced)


def test_a_lazy_parameter_is_refused():
    model = SmallResNet(PreActBlock)
    model.linear = nn.LazyLinear(3)
    with pytest.raises(ConversionError, match=r"^linear\.weight: the parameter has no shape yet"):
        tnn.convert_model(model)


def test_a_sample_for_a_meta_model_or_of_the_wrong_shape_is_refused():
    with torch.device("meta"):
        model = SmallResNet(PreActBlock)
    with pytest.raises(ConversionError, match="sample_input: a model on the meta device computes no values"):
        tnn.plan(model, sample_input=torch.zeros(1, 3, 8, 8))
    refused(
        SmallResNet(PreActBlock), sample_input=torch.zeros(1, 4, 8, 8), match="sample_input: SmallResNet fails on it"
    )
    refused(SmallResNet(PreActBlock), sample_input=torch.full((1, 3, 8, 8), torch.nan), match="not finite on it")


def test_a_block_alone_cannot_be_replaced_in_place():
    block = PostActBlock(4, 8, 2)
    with pytest.raises(ConversionError, match="the model itself is the block, so inplace=True cannot replace it"):
        tnn.convert_model(block, inplace=True)
    assert tnn.convert_model(block)(torch.zeros(2, 4, 4, 4)).shape == (2, 8, 2, 2)


def test_unknown_recipes_and_options_are_named():
    model = SmallResNet(PreActBlock)
    refused(model, "provable", match="'provable'(: the first layer is dense| builds a new network)")
    refused(model, "papre", match="no recipe is named 'papre'; there is 'paper'")
    refused(model, None, match="no recipe is named None")
    with pytest.raises(ConversionError, match="skip must be one of conv, paper, orthogonal, got 'haar'"):
        Recipe(skip="haar")
    with pytest.raises(ConversionError, match="preactivation must be True or False, got 'no'"):
        Recipe(preactivation="no")
    with pytest.raises(ConversionError, match="unknown field 'depth'"):
        Recipe.from_dict({"name": "paper", "depth": 3})
    with pytest.raises(ConversionError, match="not a plan that to_dict wrote"):
        Plan.from_dict({"recipe": {"name": "paper"}})


def test_an_adapter_describes_a_block_that_cannot_be_traced():
    model = nn.Sequential(DependsOnData(4, 4))
    anatomy = Anatomy((), (Call("conv1"), Call("bn1")), (), (Call(activation=nn.ReLU),), raw=True)
    found = survey(model, (), {"odd_blocks.DependsOnData": lambda block: anatomy})
    assert [(block.paths, block.anatomy) for block in found.blocks] == [(("0",), anatomy)]
