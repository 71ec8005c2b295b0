"""Jacobians of convolutions, in their input and in their parameters, against dense matrices through torch's layers."""

import math
import random
import sys
from functools import partial

import numpy as np
import oracles
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import trainable_nn as tnn
from trainable_nn.linop import (
    ConvParameterJacobian,
    ParameterJacobian,
    ToeplitzConv,
    differentiable_norm_at_most,
    extreme_singular_values,
    operator_norm_at_most,
    operator_norms_at_most,
)

F64 = torch.float64
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def random_convolutions(count: int, seed: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Modules of random geometry with random weights, and the shape of a sample."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    made = []
    for i in range(count):
        axes = 1 + i % 3
        arguments, sizes = oracles.random_geometry(rng, axes)
        made.append((oracles.CONVOLUTIONS[axes](**arguments, dtype=F64), (arguments["in_channels"], *sizes)))
    return made


def random_transposed(count: int, seed: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    made = []
    while len(made) < count:
        layer, shape = _transposed(rng, 1 + len(made) % 3)
        try:
            empty = layer(torch.zeros(1, *shape, dtype=F64)).numel() == 0
        except RuntimeError:
            continue
        if not empty:
            made.append((layer, shape))
    return made


def _transposed(rng: random.Random, axes: int) -> tuple[nn.Module, tuple[int, ...]]:
    def draw(low, high):
        return tuple(rng.randint(low, high) for _ in range(axes))

    stride, dilation, groups = draw(1, 3), draw(1, 3), rng.choice((1, 1, 2))
    extra = tuple(rng.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation))
    shape = (groups * rng.randint(1, 2), *draw(1, {1: 8, 2: 5, 3: 3}[axes]))
    options = {"stride": stride, "dilation": dilation, "groups": groups, "output_padding": extra}
    kernel, padding = draw(1, 4 if axes < 3 else 3), draw(0, 2)
    make = TRANSPOSED[axes]
    return make(shape[0], groups * rng.randint(1, 2), kernel, padding=padding, **options, dtype=F64), shape


def parameter_matrix(layer: nn.Module, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    """d layer(x) / d(parameters of these names) by reverse mode, parameter by parameter."""
    parameters = dict(layer.named_parameters())
    outputs = layer(x).numel()

    def run(*values):
        return functional_call(layer, {**parameters, **dict(zip(names, values))}, (x,))

    parts = torch.autograd.functional.jacobian(run, tuple(parameters[n].detach() for n in names), vectorize=True)
    return torch.cat([part.reshape(outputs, -1) for part in parts], 1)


def assert_same_map(operator, dense: torch.Tensor, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(dense.shape[1], 3, generator=generator, dtype=F64)
    u = torch.randn(dense.shape[0], 3, generator=generator, dtype=F64)
    assert operator.shape == tuple(dense.shape)
    assert_close(operator.mv(v), dense @ v, **CLOSE)
    assert_close(operator.rmv(u), dense.T @ u, **CLOSE)
    assert_close(operator.mv(v[:, 0]), dense @ v[:, 0], **CLOSE)
    assert_close(operator.rmv(u[:, 0]), dense.T @ u[:, 0], **CLOSE)
    assert_close(operator.gram_mv(v, side="inputs"), dense.T @ (dense @ v), **CLOSE)
    assert_close(operator.gram_mv(u, side="outputs"), dense @ (dense.T @ u), **CLOSE)
    assert_close(operator.dense(), dense, **CLOSE)


def test_all_products_are_those_of_the_matrix_through_torchs_layer():
    for layer, shape in random_convolutions(360, seed=0):
        operator = ToeplitzConv(layer, shape)
        dense = oracles.matrix_of(layer, shape)
        assert_same_map(operator, dense)
        assert_close(operator.to_sparse().to_dense(), dense, **CLOSE)


def test_all_products_of_transposed_convolutions_are_those_of_the_matrix():
    for layer, shape in random_transposed(240, seed=1):
        operator = ToeplitzConv(layer, shape)
        dense = oracles.matrix_of(layer, shape)
        assert_same_map(operator, dense)
        assert_close(operator.to_sparse().to_dense(), dense, **CLOSE)
        assert operator.output_shape == layer(torch.zeros(1, *shape, dtype=F64)).shape[1:]


def test_the_random_geometries_hold_every_case():
    """What the two tests above go through, so that none of it passes for want of cases."""
    layers = [layer for layer, _ in random_convolutions(360, seed=0)]
    even_same = [m for m in layers if m.padding == "same" and any(k % 2 == 0 for k in m.kernel_size)]
    assert {m.padding_mode for m in layers} == {m.padding_mode for m in even_same} == set(oracles.MODES)
    assert any(m.groups > 1 and max(m.stride) > 2 and max(m.dilation) > 1 for m in layers)
    past = [m for m, _ in random_transposed(240, seed=1) if any(e >= s for e, s in zip(m.output_padding, m.stride))]
    assert len(past) > 20


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_adjoint_identity_holds_to_rounding(dtype):
    for layer, shape in random_convolutions(90, seed=2) + random_transposed(30, seed=3):
        operator = ToeplitzConv(layer.to(dtype), shape)
        v, u = (torch.randn(n, dtype=dtype) for n in reversed(operator.shape))
        gap = abs(float((u @ operator.mv(v) - operator.rmv(u) @ v).detach()))
        taps = layer.weight[0].numel() + operator.weight.shape[0]
        assert gap <= 4 * taps * torch.finfo(dtype).eps * float(u.norm() * v.norm() * layer.weight.detach().norm()) * 4


def test_a_symmetric_crop_is_not_the_adjoint_of_same_padding_with_an_even_kernel():
    """The laws above can fail: the transposed convolution that ignores which side is longer is another map."""
    layer = nn.Conv1d(1, 1, 4, padding="same", bias=False, dtype=F64)
    operator, u = ToeplitzConv(layer, (1, 6)), torch.randn(6, dtype=F64)
    wrong = torch.nn.functional.conv_transpose1d(u.reshape(1, 1, 6), layer.weight, padding=2, output_padding=0)
    assert wrong.numel() != 6 or not torch.allclose(wrong.flatten(), operator.rmv(u))
    naive = torch.nn.functional.conv_transpose1d(u.reshape(1, 1, 6), layer.weight)[0, 0, 2:8]
    assert not torch.allclose(naive, operator.rmv(u))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_the_adjoint_of_zero_padding_is_not_that_of_another_mode(mode):
    options = {"padding": 2, "padding_mode": mode}
    weight, u = torch.randn(1, 1, 3, dtype=F64), torch.randn(8, dtype=F64)
    right = ToeplitzConv(weight, (1, 6), **options)
    wrong = ToeplitzConv(weight, (1, 6), padding=2)
    assert not torch.allclose(right.rmv(u), wrong.rmv(u))


def test_a_kernel_with_arguments_is_the_same_map_as_the_module():
    layer = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, dtype=F64)
    options = {n: getattr(layer, n) for n in ("stride", "padding", "dilation", "groups")}
    by_hand = ToeplitzConv(layer.weight, (4, 5, 6), **options)
    assert_close(by_hand.dense(), ToeplitzConv(layer, (4, 5, 6)).dense())
    up = nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1, dtype=F64)
    by_hand = ToeplitzConv(up.weight, (2, 4), stride=2, output_padding=1, transposed=True)
    assert_close(by_hand.dense(), oracles.matrix_of(up, (2, 4)))


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_the_gram_products_take_the_side_that_they_say(side):
    layer = nn.Conv1d(2, 3, 3, dtype=F64)
    x = torch.randn(2, 2, 7, dtype=F64)
    for operator, own in ((ToeplitzConv(layer, (2, 7)), "inputs"), (ConvParameterJacobian(layer, x), "outputs")):
        vector = torch.randn(operator.shape[1 if own == "inputs" else 0], dtype=F64)
        assert_close(operator.gram_mv(vector), operator.gram_mv(vector, side=own))
        assert operator.shape[0] != operator.shape[1]
        other = torch.randn(operator.shape[1 if side == "inputs" else 0], dtype=F64)
        assert operator.gram_mv(other, side=side).shape == other.shape
        with pytest.raises(ValueError, match=r"gram_mv: side must be 'inputs'"):
            operator.gram_mv(vector, side="left")


def test_vmap_goes_through_vectors_and_weights():
    for layer, shape in random_convolutions(36, seed=4) + random_transposed(12, seed=5):
        operator = ToeplitzConv(layer, shape)
        v = torch.randn(5, operator.shape[1], dtype=F64)
        u = torch.randn(5, operator.shape[0], dtype=F64)
        assert_close(torch.func.vmap(operator.mv)(v), operator.mv(v.T).T, **CLOSE)
        assert_close(torch.func.vmap(operator.rmv)(u), operator.rmv(u.T).T, **CLOSE)
        weights = torch.randn(3, *layer.weight.shape, dtype=F64)
        apply = partial(product_of, layer, shape)
        one_by_one = torch.stack([apply(w, z) for w, z in zip(weights, v)])
        assert_close(torch.func.vmap(apply)(weights, v[:3]), one_by_one, **CLOSE)


def product_of(layer: nn.Module, shape: tuple[int, ...], weight: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    names = ("stride", "padding", "dilation", "groups", "padding_mode", "transposed", "output_padding")
    return ToeplitzConv(weight, shape, **{name: getattr(layer, name) for name in names}).mv(v)


@pytest.mark.parametrize("mode", oracles.MODES)
@pytest.mark.parametrize("product", ["mv", "rmv", "gram_mv"])
def test_products_are_differentiable_twice_in_kernel_and_vector(mode, product):
    torch.manual_seed(0)
    weight = torch.randn(2, 1, 2, 2, dtype=F64, requires_grad=True)

    def apply(w, z):
        operator = ToeplitzConv(w, (2, 3, 2), padding="same", groups=2, padding_mode=mode)
        return getattr(operator, product)(z)

    vector = torch.randn(12, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(apply, (weight, vector))
    assert torch.autograd.gradgradcheck(apply, (weight, vector))


NORMALISED = {
    "entry_norm": lambda: tnn.EntryNormConv2d(2, 4, 3, padding=1, groups=2, eps=0.3, gain=1.5, dtype=F64),
    "leaky": lambda: tnn.EntryNormConv1d(2, 3, 2, padding="same", padding_mode="reflect", leak=0.2, dtype=F64),
    "weight_norm": lambda: tnn.WeightNormConv2d(3, 2, (2, 3), stride=2, eps=0.5, gain=2.0, dtype=F64),
    "weight_norm_3d": lambda: tnn.WeightNormConv3d(1, 2, 2, padding=1, padding_mode="circular", bias=False, dtype=F64),
}
SHAPES = {"entry_norm": (2, 4, 5), "leaky": (2, 6), "weight_norm": (3, 5, 5), "weight_norm_3d": (1, 3, 2, 3)}


@pytest.fixture(params=NORMALISED)
def normalised(request):
    torch.manual_seed(1)
    layer = NORMALISED[request.param]()
    return layer, torch.randn(2, *SHAPES[request.param], dtype=F64)


def test_a_normalised_layer_acts_by_its_effective_weight(normalised):
    layer, x = normalised
    assert_same_map(ToeplitzConv(layer, x.shape[1:]), oracles.matrix_of(layer, x.shape[1:]))
    plain = ToeplitzConv(layer.weight, x.shape[1:], **{n: getattr(layer, n) for n in ("stride", "padding", "groups")})
    assert plain.shape != ToeplitzConv(layer, x.shape[1:]).shape or not torch.allclose(
        plain.dense(), ToeplitzConv(layer, x.shape[1:]).dense()
    )


def test_the_parameter_jacobian_goes_through_the_normalisation(normalised):
    """Equation (21) of paper A, with the bias; and the kernel's Jacobian alone is another matrix."""
    layer, x = normalised
    names = ["weight", "bias"] if layer.bias is not None else ["weight"]
    dense = parameter_matrix(layer, x, names)
    own = ConvParameterJacobian(layer, x, bias=layer.bias is not None)
    assert_same_map(own, dense)
    options = {n: getattr(layer, n) for n in ("stride", "padding", "dilation", "groups", "padding_mode")}
    kernel = ConvParameterJacobian(layer.effective_weight(), x, **options)
    assert not torch.allclose(kernel.dense(), dense[:, : kernel.shape[1]])


def test_the_parameter_jacobian_of_plain_layers_is_that_of_the_matrix():
    for layer, shape in random_convolutions(90, seed=6) + random_transposed(60, seed=7):
        x = torch.randn(2, *shape, dtype=F64)
        dense = parameter_matrix(layer, x, ["weight", "bias"])
        assert_same_map(ConvParameterJacobian(layer, x, bias=True, chunk_size=5), dense)
        kernel = ConvParameterJacobian(layer, x)
        assert_close(kernel.dense(), dense[:, : layer.weight.numel()], **CLOSE)


@pytest.mark.parametrize("kind", ["weight_norm", "entry_norm"])
def test_the_parameter_jacobian_goes_through_parametrisations(kind):
    torch.manual_seed(2)
    layer = nn.Conv1d(2, 3, 3, dtype=F64)
    if kind == "weight_norm":
        nn.utils.parametrizations.weight_norm(layer)  # two parameters: lengths, then directions
    else:
        nn.utils.parametrize.register_parametrization(layer, "weight", tnn.parametrizations.EntryNorm(nearest=True))
    x = torch.randn(2, 2, 6, dtype=F64)
    names = [name for name, _ in layer.named_parameters() if name != "bias"]
    assert_same_map(ConvParameterJacobian(layer, x), parameter_matrix(layer, x, names))
    assert_same_map(ToeplitzConv(layer, (2, 6)), oracles.matrix_of(layer, (2, 6)))


def test_the_joint_products_are_torchs_forward_and_reverse_mode(normalised):
    layer, x = normalised
    operator = ConvParameterJacobian(layer, x)
    run = lambda w, z: functional_call(layer, {"weight": w}, (z,))
    dw, dx = torch.randn_like(layer.weight), torch.randn_like(x)
    y, tangent = torch.func.jvp(run, (layer.weight, x), (dw, dx))
    found = operator.joint_mv(dw.flatten(), dx.flatten())
    assert_close(found[0], y.flatten(), **CLOSE)
    assert_close(found[1], tangent.flatten(), **CLOSE)
    u = torch.randn_like(y)
    gradients = torch.func.vjp(run, layer.weight, x)[1](u)
    for mine, theirs in zip(operator.joint_rmv(u.flatten()), gradients):
        assert_close(mine, theirs.flatten(), **CLOSE)


def test_the_joint_products_take_columns_and_transposed_layers():
    for layer, shape in random_transposed(6, seed=8) + random_convolutions(6, seed=9):
        x = torch.randn(2, *shape, dtype=F64)
        operator = ConvParameterJacobian(layer, x, bias=True)
        dense = parameter_matrix(layer, x, ["weight", "bias"])
        along_x = torch.block_diag(*[oracles.matrix_of(layer, shape)] * 2)
        dw, dx = (torch.randn(n, 3, dtype=F64) for n in (dense.shape[1], x.numel()))
        y, tangent = operator.joint_mv(dw, dx)
        assert_close(y, layer(x).flatten(), **CLOSE)
        assert_close(tangent, dense @ dw + along_x @ dx, **CLOSE)
        u = torch.randn(dense.shape[0], 2, dtype=F64)
        for mine, theirs in zip(operator.joint_rmv(u), (dense.T @ u, along_x.T @ u)):
            assert_close(mine, theirs, **CLOSE)


def test_the_parameter_jacobian_is_differentiable_and_can_be_vmapped(normalised):
    layer, x = normalised
    operator = ConvParameterJacobian(layer, x)
    u = torch.randn(3, operator.shape[0], dtype=F64)
    v = torch.randn(3, operator.shape[1], dtype=F64)
    assert_close(torch.func.vmap(operator.rmv)(u), operator.rmv(u.T).T, **CLOSE)
    assert_close(torch.func.vmap(operator.mv)(v), operator.mv(v.T).T, **CLOSE)
    (by_product,) = torch.autograd.grad(operator.mv(v[0]).square().sum(), layer.weight)

    def by_torch(w):
        run = lambda z: functional_call(layer, {"weight": z}, (x,))
        return torch.func.jvp(run, (w,), (v[0].reshape(w.shape),))[1].square().sum()

    assert_close(by_product, torch.func.grad(by_torch)(layer.weight), **CLOSE)


def test_one_sample_needs_no_batch():
    layer = nn.Conv2d(2, 3, 2, dtype=F64)
    x = torch.randn(2, 4, 4, dtype=F64)
    one, batch = ConvParameterJacobian(layer, x), ConvParameterJacobian(layer, x.unsqueeze(0))
    assert (one.output_shape, batch.output_shape) == ((3, 3, 3), (1, 3, 3, 3))
    assert_close(one.dense(), batch.dense())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64, torch.complex128])
@pytest.mark.parametrize("mode", oracles.MODES)
def test_every_dtype_of_torchs_convolution_is_computed_in(dtype, mode):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)
    layer = nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode=mode, bias=False, dtype=dtype)
    operator = ToeplitzConv(layer, (2, 3, 4))
    wide = torch.complex128 if dtype.is_complex else F64
    dense = operator.to(wide).dense()
    v, u = draw(24, 3), draw(36, 2)
    rtol = 8 * torch.finfo(dtype).eps
    for mine, exact in ((operator.mv(v), dense @ v.to(wide)), (operator.rmv(u), dense.mH @ u.to(wide))):
        assert mine.dtype == dtype
        assert float((mine.to(wide) - exact).norm()) <= rtol * float(dense.norm() * exact.norm())
    assert_close(operator.mv(v), layer(v.T.reshape(3, 2, 3, 4)).flatten(1).T)
    assert_close(operator.to_sparse().to_dense().to(wide), dense, rtol=rtol, atol=rtol)


def test_memory_formats_change_nothing():
    layer = nn.Conv2d(4, 6, 3, padding=1, dtype=F64)
    expected = oracles.matrix_of(layer, (4, 5, 6))
    assert_same_map(ToeplitzConv(layer.to(memory_format=torch.channels_last), (4, 5, 6)), expected)
    x = torch.randn(2, 4, 5, 6, dtype=F64).to(memory_format=torch.channels_last)
    assert_same_map(ConvParameterJacobian(layer, x), parameter_matrix(layer, x, ["weight"]))
    v = torch.randn(7, 120, dtype=F64)
    assert_close(ToeplitzConv(layer, (4, 5, 6)).mv(v.T), expected @ v.T, **CLOSE)  # columns of another stride


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_scipy_gets_the_same_operator(dtype):
    layer = nn.Conv1d(2, 3, 3, stride=2, dtype=dtype)
    for operator in (ToeplitzConv(layer, (2, 7)), ConvParameterJacobian(layer, torch.randn(2, 7, dtype=dtype))):
        linear, dense = operator.to_scipy(), operator.dense().detach().double().numpy()
        assert linear.dtype == (np.float64 if dtype is F64 else np.float32)
        np.testing.assert_allclose(linear @ np.eye(dense.shape[1], dtype=linear.dtype), dense, rtol=1e-12, atol=1e-12)
        ones = np.ones(dense.shape[0], dtype=linear.dtype)
        np.testing.assert_allclose(linear.T @ ones, dense.T @ ones, rtol=4 * torch.finfo(dtype).eps, atol=0.05)


def test_without_scipy_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match=r"ToeplitzConv\.to_scipy: scipy is needed, and it isn't installed"):
        ToeplitzConv(torch.ones(1, 1, 2), (1, 3)).to_scipy()


def test_the_sparse_matrix_has_a_limit_and_holds_only_its_taps():
    operator = ToeplitzConv(torch.randn(3, 2, 3, 3, dtype=F64), (2, 8, 8), padding=1)
    sparse = operator.to_sparse()
    assert (sparse.layout, sparse.dtype) == (torch.sparse_csr, F64)
    assert sparse._nnz() == 3 * 2 * (3 * 8 - 2) ** 2  # each axis loses one tap at both ends
    v = torch.randn(128, dtype=F64)
    assert_close(sparse @ v, operator.mv(v), **CLOSE)
    with pytest.raises(ValueError, match=r"about 3456 entries, and the limit is 3455. Use mv and rmv"):
        operator.to_sparse(most_entries=3455)


def test_only_the_kernels_device_is_used():
    """Under another default device each index and each temporary would land there, and meta tensors can't be read."""
    layer = nn.Conv2d(2, 3, 2, padding="same", padding_mode="replicate", dtype=F64)
    x, dense = torch.randn(1, 2, 4, 3, dtype=F64), oracles.matrix_of(layer, (2, 4, 3))
    v, u = torch.randn(24, dtype=F64), torch.randn(36, dtype=F64)
    with torch.device("meta"):
        operator, parameter = ToeplitzConv(layer, (2, 4, 3)), ConvParameterJacobian(layer, x, bias=True)
        found = (operator.mv(v), operator.rmv(u), operator.dense(), operator.to_sparse().to_dense())
        own = parameter.dense()
        extremes = [extreme_singular_values(operator, dense_up_to=n) for n in (0, 100)]
    for mine, exact in zip(found, (dense @ v, dense.T @ u, dense, dense)):
        assert_close(mine, exact, **CLOSE)
    assert_close(own, parameter_matrix(layer, x, ["weight", "bias"]), **CLOSE)
    assert all(abs(e.largest - oracles.norm_of(dense)) < 1e-9 for e in extremes)


def test_no_columns_give_no_columns():
    layer = nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular", dtype=F64)
    for operator in (ToeplitzConv(layer, (1, 4)), ConvParameterJacobian(layer, torch.ones(1, 4, dtype=F64))):
        outputs, inputs = operator.shape
        assert operator.mv(torch.zeros(inputs, 0, dtype=F64)).shape == (outputs, 0)
        assert operator.rmv(torch.zeros(outputs, 0, dtype=F64)).shape == (inputs, 0)


def test_it_says_what_it_is():
    layer = nn.ConvTranspose1d(2, 1, 2)
    assert repr(ToeplitzConv(layer, (2, 3))) == "ToeplitzConv(4 x 6, transposed, (2, 3) -> (1, 4), torch.float32, cpu)"


class Squared(nn.Conv1d):
    def forward(self, x):
        return super().forward(x) ** 2


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Conv1d(2, 3, 3))


ONES = torch.ones(3, 2, 3)
BAD = {
    "a matrix": (lambda: ToeplitzConv(torch.ones(3, 2), (2, 5)), ValueError, "two axes of channels followed by 1, 2"),
    "an empty kernel": (lambda: ToeplitzConv(torch.ones(3, 2, 0), (2, 5)), ValueError, r"is empty.*No axis may be 0"),
    "integers": (lambda: ToeplitzConv(ONES.long(), (2, 5)), TypeError, "weight must have floats, got torch.int64"),
    "nan": (lambda: ToeplitzConv(ONES * math.nan, (2, 5)), ValueError, "NaN or infinite. Replace them first"),
    "infinite": (lambda: ToeplitzConv(ONES / 0, (2, 5)), ValueError, "NaN or infinite"),
    "meta": (lambda: ToeplitzConv(nn.Conv1d(2, 3, 3, device="meta"), (2, 5)), ValueError, "on the meta device"),
    "lazy": (lambda: ToeplitzConv(nn.LazyConv1d(3, 3), (2, 5)), ValueError, "no weight yet. Run it on one batch"),
    "a linear layer": (lambda: ToeplitzConv(nn.Linear(2, 3), (2,)), TypeError, "got Linear. Pass the layer itself"),
    "another forward": (lambda: ToeplitzConv(Squared(2, 3, 3), (2, 5)), TypeError, "Squared has a forward of its own"),
    "older hooks": (lambda: ToeplitzConv(old_weight_norm(), (2, 5)), TypeError, "a hook replaces at each call"),
    "both": (
        lambda: ToeplitzConv(nn.Conv1d(2, 3, 3), (2, 5), stride=2),
        ValueError,
        "stride was given beside a Conv1d",
    ),
    "with a batch": (
        lambda: ToeplitzConv(ONES, (1, 2, 5)),
        ValueError,
        r"one sample.*got \(1, 2, 5\). Leave the batch",
    ),
    "a number": (lambda: ToeplitzConv(ONES, 5), ValueError, r"got \(5,\). Leave the batch out"),
    "no pixels": (lambda: ToeplitzConv(ONES, (2, 0)), ValueError, "all at least 1"),
    "channels": (lambda: ToeplitzConv(ONES, (3, 5)), ValueError, r"reads 2 channels, and input_shape \(3, 5\) has 3"),
    "groups": (lambda: ToeplitzConv(ONES, (4, 5), groups=2), ValueError, "groups must divide 3"),
    "stride": (lambda: ToeplitzConv(ONES, (2, 5), stride=0), ValueError, "stride must be an integer of at least 1"),
    "paddings": (lambda: ToeplitzConv(ONES, (2, 5), padding=(1, 1)), ValueError, "must be an integer of at least 0"),
    "a word": (
        lambda: ToeplitzConv(ONES, (2, 5), padding="full"),
        ValueError,
        "if not 'same' or 'valid', must be an integer of at least 0 or 1 of them, got 'full'",
    ),
    "same, stride": (lambda: ToeplitzConv(ONES, (2, 5), padding="same", stride=2), ValueError, "needs stride 1"),
    "mode": (lambda: ToeplitzConv(ONES, (2, 5), padding_mode="mirror"), ValueError, "must be one of zeros, reflect"),
    "reach": (
        lambda: ToeplitzConv(ONES, (2, 3), padding=3, padding_mode="reflect"),
        ValueError,
        r"reaches at most \(2,\) pixels, got \(\(3, 3\),\)",
    ),
    "too small": (lambda: ToeplitzConv(ONES, (2, 2)), ValueError, r"gives an output of sizes \(0,\)"),
    "output_padding": (lambda: ToeplitzConv(ONES, (2, 5), output_padding=1), ValueError, "belongs to transposed"),
    "much of it": (
        lambda: ToeplitzConv(ONES, (3, 5), transposed=True, output_padding=1),
        ValueError,
        "less than the stride or the dilation",
    ),
    "transposed, same": (
        lambda: ToeplitzConv(ONES, (3, 5), transposed=True, padding="same"),
        ValueError,
        "takes padding in numbers and padding_mode 'zeros'",
    ),
    "another length": (
        lambda: ToeplitzConv(ONES, (2, 5)).mv(torch.ones(9)),
        ValueError,
        r"ToeplitzConv.mv: a vector \(10",
    ),
    "another dtype": (
        lambda: ToeplitzConv(ONES, (2, 5)).rmv(torch.ones(9, dtype=F64)),
        TypeError,
        "Convert the vector",
    ),
    "no tensor": (lambda: ToeplitzConv(ONES, (2, 5)).mv(np.ones(10)), TypeError, "a tensor is needed, got ndarray"),
    "x of a matrix": (
        lambda: ConvParameterJacobian(ONES, torch.ones(4)),
        ValueError,
        r"x must be \(batch, channels, 1",
    ),
    "x of nan": (lambda: ConvParameterJacobian(ONES, torch.ones(2, 4) / 0), ValueError, "the input has entries that"),
    "no batch": (lambda: ConvParameterJacobian(ONES, torch.ones(0, 2, 4)), ValueError, "the input is empty"),
    "x's dtype": (lambda: ConvParameterJacobian(ONES, torch.ones(2, 4, dtype=F64)), TypeError, "Convert the input"),
    "complex": (lambda: ConvParameterJacobian(ONES.cfloat(), torch.ones(2, 4)), TypeError, "the weight must be real"),
    "chunks": (
        lambda: ConvParameterJacobian(ONES, torch.ones(2, 4), chunk_size=0),
        ValueError,
        "chunk_size must be at",
    ),
    "columns": (
        lambda: ConvParameterJacobian(ONES, torch.ones(2, 4)).joint_mv(torch.ones(18, 2), torch.ones(8, 3)),
        ValueError,
        "dw and dx need as many columns",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case):
    make, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        make()


def test_autocast_takes_no_digits_from_a_map_or_a_bound():
    torch.manual_seed(0)
    layer, x = tnn.WeightNormConv2d(4, 6, 3, padding=1).requires_grad_(False), torch.randn(2, 4, 5, 5)
    map_, own = ToeplitzConv(layer, x.shape[1:]), ConvParameterJacobian(layer, x)
    v, u, dw, dx = (torch.randn(n) for n in (map_.shape[1], own.shape[0], own.shape[1], x.numel()))
    columns = torch.randn(map_.shape[1], 3)
    numbers = {
        "mv": lambda: map_.mv(columns),
        "rmv": lambda: map_.rmv(u[: map_.shape[0]]),
        "gram_mv": lambda: map_.gram_mv(v),
        "dense": map_.dense,
        "sparse": lambda: map_.to_sparse().to_dense(),
        "parameters": lambda: own.mv(dw),
        "parameters, transpose": lambda: own.gram_mv(u),
        "joint_mv": lambda: torch.cat(own.joint_mv(dw, dx)),
        "joint_mv, columns": lambda: torch.cat([part.flatten() for part in own.joint_mv(dw[:, None], dx[:, None])]),
        "joint_tangent": lambda: own.joint_tangent(dw, dx),
        "joint_rmv": lambda: torch.cat(own.joint_rmv(u)),
        "network": lambda: ParameterJacobian(nn.Sequential(nn.Conv2d(4, 2, 1, bias=False)), x).rmv(u[:100]),
        "largest": lambda: torch.tensor(extreme_singular_values(map_).largest),
        "bound": lambda: torch.tensor(operator_norm_at_most(layer, x.shape[1:])),
        "bounds": lambda: torch.tensor(operator_norms_at_most(nn.Sequential(layer), x)[0].norm_at_most),
        "differentiable bound": lambda: differentiable_norm_at_most(layer, x.shape[1:]),
    }
    for name, number in numbers.items():
        torch.manual_seed(1)
        exact = number()
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(1)
            found = number()
            rounded = torch.conv2d(x, layer.effective_weight())
        assert rounded.dtype == torch.bfloat16  # autocast was on
        assert found.dtype == exact.dtype and torch.equal(found, exact), name
