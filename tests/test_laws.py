"""One table: every module obeys every law, and every law catches a module that breaks it."""

import copy
import io
import pickle

import oracles
import pytest
import torch
from law_cases import CASES, COUNTEREXAMPLES, IMAGES, Case
from torch import nn
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call, grad, jvp, vmap

import trainable_nn as tnn

F64 = torch.float64
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
TOLERANCE = {F64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.01}


def built(case: Case, dtype: torch.dtype = F64) -> nn.Module:
    torch.manual_seed(1)
    return case.build().to(dtype)


def samples(case: Case, dtype: torch.dtype = F64, count: int = 3) -> torch.Tensor:
    return torch.randn(count, *case.shape, generator=torch.Generator().manual_seed(2), dtype=F64).to(dtype)


def assert_near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert a.shape == b.shape
    difference, scale = (a.double() - b.double()).abs().max(), b.double().abs().max()
    assert difference <= tolerance * (1 + scale)  # false for NaN


def parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(module(x).double().sin().sum(), [x, *module.parameters()]))


def the_bound_encloses_the_truth(case: Case) -> None:
    module = built(case)
    start = parameters(module)
    for scale in (0.0, 0.3, 1.0, 100.0):
        for name, p in module.named_parameters():
            p.data.copy_(scale * start[name])
        for x in (0.0 * samples(case)[0], *samples(case), 0.01 * samples(case)[0]):
            true = oracles.norm_of(oracles.jacobian_of(module, x))
            assert true <= case.bound(module) * (1 + 1e-14)


def state_dict_keeps_torch_s_keys(case: Case) -> None:
    module, other = built(case), case.build().double()
    assert tuple(module.state_dict()) == case.keys
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other(samples(case)), module(samples(case)))


def a_deep_copy_is_equal_and_apart(case: Case) -> None:
    module = built(case)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(samples(case)), module(samples(case)))
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in module.parameters()}


def a_pickle_is_equal(case: Case) -> None:
    module = built(case)
    assert torch.equal(pickle.loads(pickle.dumps(module))(samples(case)), module(samples(case)))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(samples(case)), module(samples(case)))


def a_module_built_on_meta_can_be_filled(case: Case) -> None:
    module = built(case, torch.float32)
    with torch.device("meta"):
        ghost = case.build()
    assert all(t.is_meta for t in (*ghost.parameters(), *ghost.buffers()))
    assert ghost(samples(case).to("meta", torch.float32)).shape == module(samples(case).float()).shape
    ghost.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(ghost(samples(case).float()), module(samples(case).float()))


def every_dtype_moves_and_agrees(case: Case) -> None:
    module = built(case)
    for dtype, tolerance in TOLERANCE.items():
        moved = copy.deepcopy(module).to(dtype)
        y = moved(samples(case, dtype))
        assert y.dtype == dtype and {p.dtype for p in moved.parameters()} <= {dtype}
        assert_near(y, module(samples(case)), tolerance)
        x = samples(case, dtype).requires_grad_()
        assert torch.autograd.grad(moved(x).sum(), x)[0].dtype == dtype


def every_device_moves_and_agrees(case: Case) -> None:
    for device in (*DEVICES, "meta"):
        moved = built(case, torch.float32).to(device)
        y = moved(samples(case, torch.float32).to(device))
        assert y.device.type == device and {t.device.type for t in (*moved.parameters(), *moved.buffers())} <= {device}
    for device in DEVICES:
        moved = built(case, torch.float32).to(device)
        assert_near(moved(samples(case, torch.float32).to(device)).cpu(), built(case)(samples(case)), 1e-3)


def channels_last_is_kept(case: Case) -> None:
    layout = torch.channels_last if len(case.shape) == 3 else torch.channels_last_3d
    module, x = built(case, torch.float32), samples(case, torch.float32)  # torch's float64 Conv3d loses the layout
    moved = copy.deepcopy(module).to(memory_format=layout)
    y = moved(x.to(memory_format=layout))
    assert y.is_contiguous(memory_format=layout) and not y.is_contiguous()
    assert all(p.is_contiguous(memory_format=layout) for p in moved.parameters() if p.dim() == len(case.shape) + 1)
    assert_near(y, module(x), 1e-5)
    for ours, plain in zip(gradients(moved, x.to(memory_format=layout)), gradients(module, x)):
        assert_near(ours, plain, 1e-5)


def autocast_agrees_to_8_bits(case: Case) -> None:
    module, x = built(case, torch.float32), samples(case, torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        inside = torch.autograd.grad(y.float().sin().sum(), [x, *module.parameters()])
    assert_near(y, module(x), 0.04)
    for ours, plain in zip(inside, gradients(module, x)):
        assert ours.dtype == torch.float32
        assert_near(ours, plain, 0.04)


def it_compiles_to_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    module = built(case)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_near(compiled(samples(case)), module(samples(case)))
    for ours, plain in zip(gradients(compiled, samples(case)), gradients(module, samples(case))):
        assert_near(ours, plain)


def it_compiles_for_every_batch_size(case: Case) -> None:
    torch._dynamo.reset()
    module = built(case)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")  # floats are symbols too
    for count in (3, 5):
        assert_near(compiled(samples(case, count=count)), module(samples(case, count=count)))


def it_exports(case: Case) -> None:
    module = built(case).eval()
    any_batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (samples(case),), dynamic_shapes=any_batch)
    for count in (3, 5):
        assert_near(program.module()(samples(case, count=count)), module(samples(case, count=count)))


def gradients_of_samples_agree_under_vmap(case: Case) -> None:
    module, x = built(case), samples(case)

    def loss(p, sample):
        return functional_call(module, p, (sample[None],)).sin().sum()

    together = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(parameters(module), x)
    for i, sample in enumerate(x):
        sample = sample.clone().requires_grad_()
        alone = torch.autograd.grad(module(sample[None]).sin().sum(), [*module.parameters(), sample])
        for ours, plain in zip([*together[0].values(), together[1]], alone):
            assert_near(ours[i], plain)


def forward_mode_agrees_with_reverse_mode(case: Case) -> None:
    module, x = built(case), samples(case, count=1)
    dense = oracles.jacobian_of(module, x[0])
    direction = samples(case)[1:2]
    tangent = jvp(module, (x,), (direction,))[1]
    assert_near(tangent.flatten(), dense @ direction.flatten())
    start = parameters(module)
    along = {name: torch.randn_like(p) for name, p in start.items()}
    value = lambda p: functional_call(module, p, (x,)).sin().sum()
    slope, reverse = jvp(value, (start,), (along,))[1] if start else x.new_zeros(()), grad(value)(start)
    assert_near(slope, sum(((reverse[n] * along[n]).sum() for n in start), x.new_zeros(())))


def second_derivatives_agree_with_differences(case: Case) -> None:
    module, names = built(case), list(parameters(built(case)))
    inputs = [
        samples(case, count=1).requires_grad_(),
        *(p.clone().requires_grad_() for p in parameters(module).values()),
    ]
    f = lambda x, *p: functional_call(module, dict(zip(names, p)), (x,))
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def training_mode_changes_nothing(case: Case) -> None:
    module = built(case)
    assert torch.equal(module.train()(samples(case)), module.eval()(samples(case)))
    assert module.training is False


def zero_weights_give_finite_values_and_slopes(case: Case) -> None:
    module = built(case)
    for p in module.parameters():
        p.data.zero_()
    assert torch.isfinite(module(samples(case))).all() and torch.isfinite(module(0 * samples(case))).all()
    assert all(torch.isfinite(g).all() for g in gradients(module, 0 * samples(case)))


def repr_says_the_constants(case: Case) -> None:
    said = repr(built(case))
    assert type(built(case)).__name__ in said and all(part in said for part in case.says)


LAWS = {
    "the bound encloses the truth": the_bound_encloses_the_truth,
    "state_dict keeps torch's keys": state_dict_keeps_torch_s_keys,
    "a deep copy is equal and apart": a_deep_copy_is_equal_and_apart,
    "a pickle is equal": a_pickle_is_equal,
    "a module built on meta can be filled": a_module_built_on_meta_can_be_filled,
    "every dtype moves and agrees": every_dtype_moves_and_agrees,
    "every device moves and agrees": every_device_moves_and_agrees,
    "channels last is kept": channels_last_is_kept,
    "autocast agrees to 8 bits": autocast_agrees_to_8_bits,
    "it compiles to one graph": it_compiles_to_one_graph,
    "it compiles for every batch size": it_compiles_for_every_batch_size,
    "it exports": it_exports,
    "gradients of samples agree under vmap": gradients_of_samples_agree_under_vmap,
    "forward mode agrees with reverse mode": forward_mode_agrees_with_reverse_mode,
    "second derivatives agree with differences": second_derivatives_agree_with_differences,
    "training mode changes nothing": training_mode_changes_nothing,
    "zero weights give finite values and slopes": zero_weights_give_finite_values_and_slopes,
    "repr says the constants": repr_says_the_constants,
}
TABLE = [(case, law) for law in LAWS for case in (IMAGES if law == "channels last is kept" else CASES)]


@pytest.mark.parametrize("case, law", TABLE, ids=lambda name: name)
def test_the_module_obeys_the_law(case, law):
    LAWS[law](CASES[case])


CAUGHT_BY = {  # the other laws catch theirs by an assertion of their own
    "a deep copy is equal and apart": (RuntimeError, "deepcopy protocol"),
    "a pickle is equal": (RuntimeError, "Serialization of parametrized modules"),
    "every dtype moves and agrees": (RuntimeError, "same dtype"),
    "autocast agrees to 8 bits": (RuntimeError, "same dtype"),
    "it compiles to one graph": (Exception, "data-dependent"),
    "it compiles for every batch size": (Exception, "isfinite"),
    "it exports": (Exception, "data-dependent"),
    "gradients of samples agree under vmap": (RuntimeError, "data-dependent control flow"),
    "forward mode agrees with reverse mode": (NotImplementedError, "forward AD"),
    "second derivatives agree with differences": (GradcheckError, "Jacobian mismatch"),
}


@pytest.mark.parametrize("law", LAWS)
def test_the_law_catches_a_module_that_breaks_it(law):
    kind, words = CAUGHT_BY.get(law, (AssertionError, None))
    with pytest.raises(kind, match=words):
        LAWS[law](COUNTEREXAMPLES[law])


def test_the_inductor_compiles_a_network_to_one_graph():
    layers = (tnn.EntryNormLinear(6, 5, leak=0.1), tnn.SmoothReLU(), tnn.WeightNormLinear(5, 3), tnn.GELU1())
    whole = Case(lambda: nn.Sequential(*layers), (6,))
    torch._dynamo.reset()
    module = built(whole)
    compiled = torch.compile(module, fullgraph=True)
    assert_near(compiled(samples(whole)), module(samples(whole)))
    for ours, plain in zip(gradients(compiled, samples(whole)), gradients(module, samples(whole))):
        assert_near(ours, plain)


@pytest.mark.parametrize("layer", [tnn.EntryNormLinear, tnn.WeightNormLinear])
def test_layers_with_different_constants_share_one_compiled_function(layer):
    """After the first change the compiler holds the constants as symbols."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda module, x: module(x), fullgraph=True, backend="aot_eager")
    for eps, gain in ((1.0, 1.0), (0.5, 2.0), (0.1, 3.0), (7.0, 0.3)):
        case = Case(lambda: layer(6, 4, eps=eps, gain=gain), (6,))  # noqa: B023
        module = built(case)
        assert_near(compiled(module, samples(case)), module(samples(case)))
