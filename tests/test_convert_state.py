"""What a conversion leaves as it was: the input model, weights, modes, hooks, sharing, random generators."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_resnets import PostActBlock, PreActBlock, SmallResNet, distance, filled, images
from torch import nn

import trainable_nn as tnn
from trainable_nn.convert import Recipe
from trainable_nn.errors import ConversionError
from trainable_nn.modules.preactivation import PreActivationBlock
from trainable_nn.modules.shortcut import PooledConv2d, PooledSequential

KINDS = pytest.mark.parametrize("kind", [PreActBlock, PostActBlock])
OURS = (PooledConv2d, PooledSequential, PreActivationBlock)


def snapshot(model: nn.Module) -> tuple:
    """All that a conversion must not change, by value and by identity."""
    modules = [(path, id(module), type(module), module.training) for path, module in model.named_modules()]
    tensors = {name: (id(p), p._version, p.clone()) for name, p in (*model.named_parameters(), *model.named_buffers())}
    return modules, tensors, torch.get_rng_state()


def same(one: tuple, two: tuple) -> bool:
    return (
        one[0] == two[0]
        and all(
            a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(one[1].values(), two[1].values(), strict=True)
        )
        and torch.equal(one[2], two[2])
    )


@KINDS
@pytest.mark.parametrize("sample", [None, images(2, 3, 8, 8, dtype=torch.float32)], ids=["plain", "measured"])
def test_the_input_model_and_the_random_generator_stay_as_they_were(kind, sample):
    model = SmallResNet(kind).train()
    before = snapshot(model)
    converted = tnn.convert_model(model, sample_input=sample)
    tnn.plan(model, sample_input=sample)
    assert same(before, snapshot(model))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in converted.parameters()}


class Remembers(PreActBlock):
    """Writes into itself whenever it runs: a cache, an attribute and a buffer."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.cache, self.last = {}, None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        self.cache["x"] = self.last = x
        return super().forward(x)


def test_a_block_that_writes_into_itself_does_not_notice_the_plan():
    model = nn.Sequential(Remembers(4, 8, 2))
    converted = tnn.convert_model(model, sample_input=images(1, 4, 4, 4, dtype=torch.float32))
    for block in (model[0], converted[0]):
        assert (block.cache, block.last, block.calls.item()) == ({}, None, 0.0)
    assert converted.conversion_report.function_change > 0


class Tosses(PostActBlock):
    def forward(self, x):
        return x if torch.rand(()) < 0.5 else super().forward(x)


def test_a_block_that_draws_random_numbers_is_refused_and_draws_none():
    model = nn.Sequential(Tosses(4, 4))
    before = torch.get_rng_state()
    with pytest.raises(ConversionError, match=r"^0: Tosses could be .*draws random numbers outside its layers"):
        tnn.plan(model)
    assert torch.equal(before, torch.get_rng_state())


@KINDS
def test_inplace_rewrites_the_model_and_keeps_its_parameters(kind):
    model = filled(SmallResNet(kind))
    expected = tnn.convert_model(model)
    parameters = dict(model.named_parameters())
    assert tnn.convert_model(model, inplace=True) is model
    x = images(2, 3, 8, 8)
    assert torch.equal(model(x), expected(x))
    assert all(parameters[name] is p for name, p in model.named_parameters() if name in parameters)
    assert model.conversion_report == expected.conversion_report


@pytest.mark.parametrize("inplace", [False, True])
def test_an_error_in_a_late_block_leaves_everything_untouched(inplace):
    model = SmallResNet(PostActBlock)
    model.layer2[1].bn2 = nn.LayerNorm(4)
    before = snapshot(model)
    with pytest.raises(ConversionError, match=r"layer2\.1: PostActBlock .*LayerNorm"):
        tnn.convert_model(model, inplace=inplace)
    assert same(before, snapshot(model))


@KINDS
def test_modes_gradients_dtype_and_memory_format_are_kept(kind):
    model = SmallResNet(kind).to(torch.bfloat16).to(memory_format=torch.channels_last)
    model.layer2[0].shortcut.eval()
    model.layer2[0].conv1.weight.requires_grad_(False)
    model.layer2[0].shortcut[0].weight.requires_grad_(False)
    if kind is PostActBlock:
        model.layer1[1].bn2.eval().requires_grad_(False)
    converted = tnn.convert_model(model)
    assert not converted.layer2[0].shortcut[0].training
    assert converted.layer2[0].training
    assert not converted.layer2[0].conv1.weight.requires_grad
    assert not converted.layer2[0].shortcut[0].weight.requires_grad
    assert {p.dtype for p in converted.parameters()} == {torch.bfloat16}
    for name, parameter in converted.named_parameters():
        assert parameter.dim() < 4 or parameter.is_contiguous(memory_format=torch.channels_last), name
    if kind is PostActBlock:
        assert (converted.layer1[1].norm.training, converted.layer1[1].norm.weight.requires_grad) == (False, False)
        assert (converted.layer1[0].norm.training, converted.layer1[0].norm.weight.requires_grad) == (True, True)


@KINDS
def test_hooks_of_replaced_modules_still_run_and_their_handles_still_remove_them(kind):
    model = SmallResNet(kind)
    calls = []
    watched = {"block": model.layer2[0], "skip": model.layer2[0].shortcut[0]}
    handles = []
    for name, module in watched.items():
        handles.append(module.register_forward_hook(lambda m, i, o, name=name: calls.append(("after", name))))
        handles.append(module.register_forward_pre_hook(lambda m, i, name=name: calls.append(("before", name))))
        handles.append(module.register_full_backward_hook(lambda m, i, o, name=name: calls.append(("back", name))))
    tnn.convert_model(model, inplace=True)
    model(images(2, 3, 8, 8, dtype=torch.float32)).sum().backward()
    assert set(calls) == {(when, name) for when in ("before", "after", "back") for name in watched}
    calls.clear()
    for handle in handles:
        handle.remove()
    model(images(2, 3, 8, 8, dtype=torch.float32))
    assert calls == []


def test_the_hook_of_a_norm_that_goes_is_mentioned():
    model = SmallResNet(PostActBlock)
    model.layer1[0].bn2.register_forward_hook(lambda m, i, o: None)
    assert "layer1.0.bn2: it goes, and its hooks with it." in tnn.plan(model).notes


@KINDS
def test_a_shared_block_stays_one_and_is_listed_once(kind):
    block = kind(4, 4)
    model = nn.Sequential(block, kind(4, 8, 2), nn.Sequential(nn.Conv2d(8, 4, 1), block))
    converted = tnn.convert_model(model)
    assert converted[0] is converted[2][1]
    step = converted.conversion_report.steps[0]
    assert (step.path, step.also) == ("0", ("2.1",))
    assert len(converted.conversion_report.steps) == 2


@KINDS
def test_a_shared_shortcut_stays_one(kind):
    first, second = kind(4, 8, 2), kind(4, 8, 2)
    second.shortcut = first.shortcut
    converted = tnn.convert_model(nn.ModuleDict({"a": first, "b": second}))
    assert converted["a"].shortcut is converted["b"].shortcut
    assert isinstance(converted["a"].shortcut[0], PooledConv2d)


def test_a_tied_weight_stays_tied():
    model = SmallResNet(PreActBlock)
    model.layer2[1].conv1.weight = model.layer2[1].conv2.weight
    converted = tnn.convert_model(model)
    assert converted.layer2[1].conv1.weight is converted.layer2[1].conv2.weight


def test_a_shortcut_shared_with_a_kept_block_is_refused():
    model = nn.ModuleDict({"a": PreActBlock(4, 8, 2), "b": PreActBlock(4, 8, 2)})
    model["b"].shortcut = model["a"].shortcut
    with pytest.raises(ConversionError, match=r"a\.shortcut\.0: the module also stands at b\.shortcut\.0"):
        tnn.convert_model(model, keep=("b",))


def test_a_shortcut_shared_with_a_branch_is_refused():
    model = nn.Sequential(PreActBlock(4, 8, 2), nn.Sequential(PreActBlock(8, 8), nn.Conv2d(8, 4, 1)))
    model.append(model[0].shortcut[0])
    with pytest.raises(ConversionError, match=r"0\.shortcut\.0: the module also stands at 2,"):
        tnn.convert_model(model)


@KINDS
@pytest.mark.parametrize("options", [{}, {"skip": "orthogonal"}, {"preactivation": False}], ids=str)
def test_copies_pickles_and_state_dicts_carry_the_conversion(kind, options):
    converted = tnn.convert_model(filled(SmallResNet(kind)), Recipe(**options))
    x = images(2, 3, 8, 8)
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(twin(x), converted(x))
        assert twin.conversion_report == converted.conversion_report
    fresh = tnn.convert_model(SmallResNet(kind).double().eval(), Recipe(**options))
    fresh.load_state_dict(converted.state_dict())
    assert torch.equal(fresh(x), converted(x))
    assert not any("report" in key for key in converted.state_dict())


def test_an_old_style_weight_norm_hook_goes_on_working():
    model = SmallResNet(PreActBlock)
    projection = model.layer2[0].shortcut[0]
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(projection)
    tnn.convert_model(model, inplace=True)
    with torch.no_grad():
        model.layer2[0].shortcut[0].weight_g.mul_(0.0)
    x = images(1, 8, 4, 4, dtype=torch.float32)
    pooled = model.layer2[0].shortcut(x)
    assert pooled[:, 4:12].abs().min() > 0
    assert pooled[:, :4].abs().max() == 0


def test_a_converted_model_trains_and_compiles_whole():
    for kind in (PreActBlock, PostActBlock):
        model = tnn.convert_model(SmallResNet(kind))
        x, y = images(8, 3, 8, 8, dtype=torch.float32), torch.arange(8) % 5
        compiled = torch.compile(copy.deepcopy(model).eval(), fullgraph=True, backend="aot_eager")
        assert distance(compiled(x), copy.deepcopy(model).eval()(x)) < 1e-5
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert all(p.grad is not None for p in model.parameters())


@KINDS
def test_a_meta_model_is_planned_and_converted(kind):
    with torch.device("meta"):
        model = SmallResNet(kind)
    converted = tnn.convert_model(model)
    assert all(p.is_meta for p in converted.parameters())
    real = tnn.convert_model(SmallResNet(kind))
    assert converted.conversion_report == real.conversion_report
    converted.load_state_dict(real.state_dict(), assign=True)
    x = images(2, 3, 8, 8, dtype=torch.float32)
    assert torch.equal(converted.eval()(x), real.eval()(x))


def test_running_statistics_do_not_move_when_the_change_is_measured():
    model = SmallResNet(PostActBlock).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tnn.convert_model(model, sample_input=images(4, 3, 8, 8, dtype=torch.float64), inplace=True)
    kept = {name: buffer for name, buffer in model.named_buffers() if name in before}
    assert kept
    assert all(torch.equal(before[name], buffer) for name, buffer in kept.items())
    assert model.training


def test_the_original_is_not_kept_alive_by_the_converted():
    model = SmallResNet(PostActBlock)
    probe = model.layer2[0].conv1.weight
    converted = tnn.convert_model(model, Recipe(skip="orthogonal"))
    del model
    gc.collect()
    assert not any(isinstance(r, nn.Module) or r is converted for r in gc.get_referrers(probe))
