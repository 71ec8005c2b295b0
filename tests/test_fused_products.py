"""The fused products of normalised convolutions against dense Jacobians by torch's own autograd, in float64."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close

import trainable_nn as tnn
from trainable_nn.linop import ConvParameterJacobian, ToeplitzConv
from trainable_nn.ops import convolution, native

F64 = torch.float64
OPS = torch.ops.trainable_nn
CONSTANTS = {"identity": [], "weight_norm": [0.3, 1.5], "entry_norm": [0.3, 1.5, 0.25]}
CONVOLUTIONS = {
    ("weight_norm", 1): tnn.modules.WeightNormConv1d,
    ("weight_norm", 2): tnn.modules.WeightNormConv2d,
    ("weight_norm", 3): tnn.modules.WeightNormConv3d,
    ("entry_norm", 1): tnn.modules.EntryNormConv1d,
    ("entry_norm", 2): tnn.modules.EntryNormConv2d,
    ("entry_norm", 3): tnn.modules.EntryNormConv3d,
    ("identity", 1): nn.Conv1d,
    ("identity", 2): nn.Conv2d,
    ("identity", 3): nn.Conv3d,
}
# (in, out, taps), arguments, sizes, batch; the last four take each way of convolving
GEOMETRIES = {
    "plain": ((2, 3, 3), {"padding": 1}, (5, 4, 3), 2),
    "stride and dilation": ((2, 4, 2), {"stride": 2, "dilation": 2, "padding": 1}, (7, 6, 5), 2),
    "groups": ((4, 6, 3), {"groups": 2, "padding": 2, "stride": 3}, (6, 7, 4), 1),
    "same, even taps": ((2, 3, 2), {"padding": "same"}, (4, 5, 3), 2),
    "circular": ((2, 2, 3), {"padding": 2, "padding_mode": "circular"}, (5, 4, 3), 2),
    "reflect, stride": ((2, 2, 2), {"padding": 1, "padding_mode": "reflect", "stride": 2}, (5, 4, 4), 1),
    "few pixels, matrices": ((2, 9, 3), {"stride": 2, "padding": 1}, (3, 2, 1), 2),
    "large kernel, one batch": ((9, 5, 3), {"padding": 1}, (2, 2, 1), 1),
    "dilated matrices": ((2, 40, 2), {"dilation": 2, "padding": 1}, (3, 4, 2), 2),
    "blocks of filters": ((3, 130, 3), {"padding": 1}, (2, 2, 1), 1),
}


def layer_of(name, axes, geometry):
    """A layer and an input."""
    (inputs, outputs, taps), arguments, sizes, batch = GEOMETRIES[geometry]
    torch.manual_seed(axes)
    layer = CONVOLUTIONS[name, axes](inputs, outputs, taps, dtype=F64, **arguments)
    if name != "identity":
        layer.eps, layer.gain = 0.3, 1.5
    return layer, torch.randn(batch, inputs, *sizes[:axes], dtype=F64)


def dense(layer, x):
    """d layer / d(weight, bias, x), each (outputs, numbers), by reverse mode through torch's layers."""
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    run = lambda w, b, z: functional_call(layer, {"weight": w, "bias": b}, (z,)).flatten()
    parts = jacrev(run, (0, 1, 2))(parameters["weight"], parameters["bias"], x)
    return [part.flatten(1) for part in parts]


@pytest.fixture(params=[True, False], ids=["products are fast", "convolutions are fast"], autouse=True)
def pace(request, monkeypatch):
    """Both ways, whichever this machine would take."""
    for name in ("matrices_beat_convolutions", "channels_last_pays"):
        assert getattr(convolution, name)() in (True, False)  # it can be measured
        monkeypatch.setattr(convolution, name, lambda: request.param)
    return request.param


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """The rows of each block, which are as few as may be."""
    seen = []
    rows_at_once = convolution._rows_at_once
    monkeypatch.setattr(convolution, "_BLOCK", 1)
    monkeypatch.setattr(convolution, "_rows_at_once", lambda *a: seen.append(rows_at_once(*a)) or seen[-1])
    return seen


@pytest.fixture
def calls(monkeypatch):
    """The names of the fused operators that ran."""
    ran = []
    for name in ("jvp", "tangent", "vjp", "gram"):
        kernel = getattr(convolution, name)
        monkeypatch.setattr(convolution, name, lambda *a, name=name, kernel=kernel: ran.append(name) or kernel(*a))
    return ran


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name, axes", CONVOLUTIONS)
def test_fused_products_are_those_of_the_dense_jacobians(name, axes, geometry, calls, blocks, pace):
    layer, x = layer_of(name, axes, geometry)
    by_weight, by_bias, by_x = dense(layer, x)
    by_parameters = torch.cat((by_weight, by_bias), 1)
    operator = ConvParameterJacobian(layer, x, bias=True)
    dw, dx, u = (torch.randn(n, dtype=F64) for n in (by_parameters.shape[1], x.numel(), len(by_x)))
    close = {"rtol": 1e-10, "atol": 1e-10}
    with torch.no_grad():
        y, t = operator.joint_mv(dw, dx)
        alone = operator.joint_tangent(dw, dx)
        back_w, back_x = operator.joint_rmv(u)
        toeplitz = ToeplitzConv(layer, x.shape[1:])
        columns = dx.reshape(len(x), -1).T
        gram = toeplitz.gram_mv(columns)
        assert_close(y, layer(x).flatten(), **close)
    expected = by_parameters @ dw + by_x @ dx
    assert expected.abs().min() > 1e-9
    assert_close(t, expected, **close)
    assert_close(alone, expected, **close)
    assert_close(back_w, by_parameters.T @ u, **close)
    assert_close(back_x, by_x.T @ u, **close)
    assert_close(gram.T.flatten(), by_x.T @ (by_x @ dx), **close)
    assert_close(u @ t, back_w @ dw + back_x @ dx, rtol=1e-12, atol=1e-10)
    assert calls == ["jvp", "tangent", "vjp", "gram"]
    if geometry == "blocks of filters" and axes > 1:
        assert blocks == ([64, 64] if name != "identity" and not pace else blocks if pace else [130, 130])
    for found, watched in zip((y, t), operator.joint_mv(dw, dx)):  # the other way, which autograd goes through
        assert watched.requires_grad
        assert_close(found, watched.detach(), **close)


@pytest.mark.parametrize("name, sizes", [("weight_norm", (2, 2)), ("entry_norm", (9, 9)), ("identity", (2, 2))])
def test_an_empty_batch_has_an_empty_tangent(name, sizes):
    dw, w = torch.randn(2, 70, 3, 3, 3, dtype=F64)
    empty = torch.randn(0, 3, *sizes, dtype=F64)
    arguments = name, CONSTANTS[name], (1, 1), (1, 1), (1, 1), False, (0, 0), 1
    assert OPS.normalised_conv_tangent(dw, empty, w, empty, *arguments).shape == (0, 70, *sizes)
    for found in OPS.normalised_conv_jvp(dw, empty, w, empty, None, *arguments):
        assert found.shape == (0, 70, *sizes)


@pytest.mark.parametrize("size, eps, image", [(1e-36, 1e-30, 1e-8), (1.0, 1.0, 1.0), (1e30, 1.0, 1e12)])
def test_filters_of_any_size_are_multiplied_without_overflow_or_loss(size, eps, image, pace):
    torch.manual_seed(0)
    dw, w = size * torch.randn(2, 128, 3, 3, 3)
    dx, x = image * torch.randn(2, 1, 3, 2, 2)
    geometry = (1, 1), (1, 1), (1, 1), False, (0, 0), 1
    arguments = "weight_norm", [eps, 1.5], *geometry
    found = [OPS.normalised_conv_tangent(dw, dx, w, x, *arguments)]
    found += OPS.normalised_conv_jvp(dw, dx, w, x, None, *arguments)
    y, t = OPS.normalised_conv_jvp(dw.double(), dx.double(), w.double(), x.double(), None, *arguments)
    for a, b in zip(found, (t, y, t)):
        assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    by_filters = torch.conv2d(dx, w, None, 1, 1).double()  # what the scale could not mend
    exact = torch.conv2d(dx.double(), w.double(), None, 1, 1)
    if size != 1.0:
        assert not torch.allclose(by_filters, exact, rtol=1e-4, atol=0.0)


def test_fused_products_of_transposed_layers(calls):
    torch.manual_seed(0)
    for axes, kind in ((1, nn.ConvTranspose1d), (2, nn.ConvTranspose2d), (3, nn.ConvTranspose3d)):
        options = {"stride": 2, "padding": 1, "output_padding": 1, "dilation": 2, "groups": 2}
        layer = kind(4, 6, 2, dtype=F64, **options)
        x = torch.randn(2, 4, *(4, 3, 3)[:axes], dtype=F64)
        by_weight, _, by_x = dense(layer, x)
        operator = ConvParameterJacobian(layer, x)
        dw, dx, u = (torch.randn(n, dtype=F64) for n in (by_weight.shape[1], x.numel(), len(by_x)))
        with torch.no_grad():
            y, t = operator.joint_mv(dw, dx)
            assert_close(y, layer(x).flatten())
            assert_close(t, by_weight @ dw + by_x @ dx, rtol=1e-10, atol=1e-10)
            for found, exact in zip(operator.joint_rmv(u), (by_weight.T @ u, by_x.T @ u)):
                assert_close(found, exact, rtol=1e-10, atol=1e-10)
            columns = dx.reshape(2, -1).T
            gram = ToeplitzConv(layer, x.shape[1:]).gram_mv(columns)
            assert_close(gram.T.flatten(), by_x.T @ (by_x @ dx), rtol=1e-10, atol=1e-10)
    assert calls == ["jvp", "vjp", "gram"] * 3


def test_nothing_is_fused_where_something_differentiates_or_batches(calls):
    layer, x = layer_of("weight_norm", 2, "plain")
    operator = ConvParameterJacobian(layer.requires_grad_(False), x)
    dw, dx, u = (torch.randn(3, n, dtype=F64) for n in (operator.shape[1], x.numel(), operator.shape[0]))
    one = [operator.joint_mv(a, b)[1] for a, b in zip(dw, dx)]
    assert calls == ["jvp"] * 3
    assert_close(vmap(operator.joint_mv)(dw, dx)[1], torch.stack(one))
    assert_close(operator.joint_mv(dw.T, dx.T)[1].T, torch.stack(one))
    tangent = torch.func.jvp(lambda v: operator.joint_tangent(v, dx[0]), (dw[0],), (dw[1],))[1]
    assert_close(tangent, operator.mv(dw[1]))
    leaf = u[0].clone().requires_grad_()
    assert all(part.requires_grad for part in operator.joint_rmv(leaf))
    assert calls == ["jvp"] * 3


class Doubled(tnn.modules.WeightNormConv2d):
    def effective_weight(self):
        return 2 * super().effective_weight()

    def forward(self, x):
        return nn.functional.conv2d(x, self.effective_weight(), self.bias)


def test_a_subclass_with_another_kernel_is_not_taken_for_its_base(calls):
    torch.manual_seed(0)
    layer, x = Doubled(2, 3, 2, dtype=F64), torch.randn(1, 2, 4, 4, dtype=F64)
    operator = ConvParameterJacobian(layer, x)
    dw, dx = torch.randn(operator.shape[1], dtype=F64), torch.randn(x.numel(), dtype=F64)
    with torch.no_grad():
        y, t = operator.joint_mv(dw, dx)
    by_weight, _, by_x = dense(layer, x)
    assert_close(y, layer(x).flatten())
    assert_close(t, by_weight @ dw + by_x @ dx, rtol=1e-10, atol=1e-10)
    assert calls == []


def test_vectors_of_another_length_or_dtype_are_refused_before_anything_runs():
    layer, x = layer_of("weight_norm", 2, "plain")
    operator = ConvParameterJacobian(layer, x)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"joint_mv: a vector \(54,\)"):
            operator.joint_mv(torch.ones(53, dtype=F64), torch.ones(x.numel(), dtype=F64))
        with pytest.raises(TypeError, match="joint_tangent: the map has torch.float64"):
            operator.joint_tangent(torch.ones(54), torch.ones(x.numel(), dtype=F64))


def by_dense_rows(g, w, x, images, eps, gain, geometry):
    """What ``weight_norm_conv_rows`` gives, in plain PyTorch and float64."""
    g, w, x, images = (t.double() for t in (g, w, x, images))
    rho = (eps + w.flatten(1).square().sum(1)).rsqrt().reshape(-1, *(1,) * (w.dim() - 1))
    unit = rho * w
    along = gain * rho * (g - unit * (unit * g).flatten(1).sum(1).reshape(rho.shape))
    conv = (torch.conv1d, torch.conv2d, torch.conv3d)[w.dim() - 3]
    stride, padding, dilation, groups = geometry
    both = conv(images, gain * unit, None, stride, padding, dilation, groups)
    n = len(images) - len(x)
    return both[:n], conv(x, along, None, stride, padding, dilation, groups) + both[n:]


CONV_ROWS = torch.ops.trainable_nn.weight_norm_conv_rows
ROWS_OF = {  # kernel, sizes of an image, (stride, padding, dilation, groups)
    "1d": ((11, 3, 4), (3, 9), ([2], [1], [2], 1)),
    "2d": ((11, 3, 2, 3), (3, 5, 6), ([1, 2], [2, 0], [2, 1], 1)),
    "3d": ((11, 2, 2, 1, 2), (2, 3, 4, 3), ([1, 1, 2], [1, 0, 1], [1, 1, 1], 1)),
    "groups": ((12, 2, 3, 3), (6, 5, 4), ([1, 1], [1, 1], [1, 1], 3)),
}


@pytest.mark.parametrize("geometry", ROWS_OF)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_convolution_by_rows_is_the_dense_one(geometry, dtype):
    kernel, image, arguments = ROWS_OF[geometry]
    torch.manual_seed(0)
    g, w = torch.randn(2, *kernel, dtype=dtype)
    x, dx, more = torch.randn(3, 2, *image, dtype=dtype)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    layouts = [lambda t: t, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)]
    if len(kernel) == 4:
        layouts.append(lambda t: t.contiguous(memory_format=torch.channels_last))
    for layout, at_once, images in itertools.product(layouts, (1, 4, 6, 11, 40), (dx, torch.cat((x, dx)), torch.cat((x, more, dx)))):
        expected = by_dense_rows(g, w, x, images, 0.3, 1.5, arguments)
        found = CONV_ROWS(layout(g), layout(w), layout(x), layout(images), at_once, 0.3, 1.5, *arguments)
        for a, b in zip(found, expected):
            assert a.is_contiguous() and a.dtype == dtype
            assert_close(a.double(), b, **close)
    with torch.inference_mode():
        found = CONV_ROWS(g, w, x, dx, 40, 0.3, 1.5, *arguments)[1]
    assert_close(found.double(), by_dense_rows(g, w, x, dx, 0.3, 1.5, arguments)[1], **close)


def test_a_convolution_by_rows_on_several_threads():
    torch.manual_seed(0)
    (g, w), (x, dx) = torch.randn(2, 64, 16, 3, 3), torch.randn(2, 8, 16, 40, 40)
    arguments = [1, 1], [1, 1], [1, 1], 1
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = CONV_ROWS(g, w, x, torch.cat((x, dx)), 48, 0.3, 1.5, *arguments)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(found, by_dense_rows(g, w, x, torch.cat((x, dx)), 0.3, 1.5, arguments)):
        assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


def test_rows_of_very_different_sizes_in_one_block():
    torch.manual_seed(0)
    (g, w), (x, dx) = torch.randn(2, 6, 2, 3, 3), torch.randn(2, 1, 2, 4, 4)
    w *= torch.tensor([1.0, 1e20, 1e-20, 1e12, 1e-12, 0.0]).reshape(-1, 1, 1, 1)
    arguments = [1, 1], [1, 1], [1, 1], 1
    for rows in (1, 2, 6):
        found = CONV_ROWS(g, w, x, torch.cat((x, dx)), rows, 1e-30, 1.5, *arguments)
        for a, b in zip(found, by_dense_rows(g, w, x, torch.cat((x, dx)), 1e-30, 1.5, arguments)):
            assert a.isfinite().all()
            size = b.abs().amax((0, 2, 3), keepdim=True)
            assert ((a.double() - b).abs() <= 1e-5 * size).all()


def test_rows_whose_squares_overflow_and_rows_that_are_cut_in_pieces():
    torch.manual_seed(0)
    arguments = [1, 1], [1, 1], [1, 1], 1
    (g, w), (x, dx) = torch.randn(2, 3, 2, 3, 3, dtype=F64), torch.randn(2, 1, 2, 4, 4, dtype=F64)
    w[1] *= 1e200
    expected = by_dense_rows(g, w / torch.tensor([1, 1e200, 1], dtype=F64).reshape(-1, 1, 1, 1), x, dx, 0.0, 1.5, arguments)[1]
    found = CONV_ROWS(g, w, x, dx, 2, 0.0, 1.5, *arguments)[1]  # P(w) does not change with w's size, and DP(w) g falls with it
    moved = torch.conv2d(dx, 1.5 * w[1:2] / 1e200 / (w[1] / 1e200).norm(), None, 1, 1)
    assert_close(found[:, 1:2], moved, rtol=1e-12, atol=1e-12)
    assert_close(found[:, ::2], expected[:, ::2], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[:, 1:2], expected[:, 1:2])

    (g, w), (x, dx) = torch.randn(2, 2, 30000, 3, 3), torch.randn(2, 1, 30000, 3, 3)
    for rows in (1, 2):
        found = CONV_ROWS(g, w, x, torch.cat((x, dx)), rows, 0.3, 1.5, *arguments)
        for a, b in zip(found, by_dense_rows(g, w, x, torch.cat((x, dx)), 0.3, 1.5, arguments)):
            assert_close(a.double(), b, rtol=1e-3, atol=1e-4)
    w[0, 0, 0, 0] = float("nan")
    found = CONV_ROWS(g, w, x, dx, 1, 0.3, 1.5, *arguments)[1]
    assert found[:, 0].isnan().all() and found[:, 1].isfinite().all()


@pytest.mark.skipif("cpu" not in native.loaded, reason="no compiled CPU kernels")
def test_a_convolution_by_rows_refuses_what_it_does_not_know():
    g = w = torch.ones(4, 2, 3, 3)
    x, arguments = torch.ones(1, 2, 4, 4), ([1, 1], [1, 1], [1, 1], 1)
    for wrong in (
        (g.half(), w.half(), x.half(), x.half(), 2),
        (g, w, x, x, 0),
        (g[:0], w[:0], x, x, 2),
        (g[0, 0], w[0, 0], x, x, 2),
        (g[:3], w, x, x, 2),
        (g, w, x[:, :1], x, 2),
        (g, w, x, torch.ones(1, 2, 4, 5), 2),
        (g, w, torch.ones(2, 2, 4, 4), x, 2),
        (g, w, x, x.double(), 2),
        (g, w, x[0], x[0], 2),
        (g[..., 0], w[..., 0], x, x, 2),
    ):
        with pytest.raises(RuntimeError):
            CONV_ROWS(*wrong, 0.3, 1.5, *arguments)
    for wrong in (([0, 1], [1, 1], [1, 1], 1), ([1, 1], [1, 1], [1, 0], 1), ([1], [1], [1], 1), ([1, 1], [1, 1], [1, 1], 2)):
        with pytest.raises(RuntimeError):
            CONV_ROWS(g, w, x, x, 2, 0.3, 1.5, *wrong)
    assert CONV_ROWS(g, w, x, x, 2, 0.3, 1.5, *arguments)[1].shape == (1, 4, 4, 4)  # what is right is not refused


GEOMETRIES_OF_OPS = {
    "plain": ((2, 3, 3, 3), (2, 3, 5, 4), ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)),
    "groups, stride": ((4, 2, 3, 2), (2, 4, 5, 4), ((2, 1), (1, 1), (1, 2), False, (0, 0), 2)),
    "transposed": ((3, 2, 2, 2), (2, 3, 3, 2), ((2, 2), (1, 0), (1, 1), True, (1, 0), 1)),
    "matrices": ((20, 2, 2), (2, 2, 4), ((2,), (1,), (1,), False, (0,), 1)),
    "one batch": ((9, 9, 3), (1, 9, 5), ((1,), (1,), (1,), False, (0,), 1)),
}


@pytest.mark.parametrize(
    "name, geometry", [*(("weight_norm", g) for g in GEOMETRIES_OF_OPS), ("identity", "groups, stride"),
                       ("identity", "matrices"), ("entry_norm", "one batch")]
)  # fmt: skip
def test_the_fused_operators_keep_the_registration_contract(name, geometry):
    kernel, image, arguments = GEOMETRIES_OF_OPS[geometry]
    torch.manual_seed(0)
    dw, w, dx, x = (torch.randn(s, dtype=F64) for s in (kernel, kernel, image, image))
    u = torch.randn_like(torch.ops.aten.convolution(x, w, None, *arguments))
    bias = torch.randn(u.shape[1], dtype=F64)
    normalised = (name, CONSTANTS[name], *arguments)
    for b in (None, bias):
        torch.library.opcheck(OPS.normalised_conv_jvp.default, (dw, dx, w, x, b, *normalised))
    torch.library.opcheck(OPS.normalised_conv_tangent.default, (dw, dx, w, x, *normalised))
    stride, padding, dilation, transposed, _, groups = arguments
    if not transposed and name == "weight_norm":
        rows = (dw, w, x, torch.cat((x, dx)), 40, *CONSTANTS[name], stride, padding, dilation, groups)
        torch.library.opcheck(CONV_ROWS.default, rows)
    torch.library.opcheck(OPS.normalised_conv_vjp.default, (u, w, x, *normalised))
    torch.library.opcheck(OPS.conv_gram.default, (x, w, *arguments))


def test_every_layout_gives_the_same_products():
    (dw, w), (dx, x) = (torch.randn(2, 4, 3, 3, 3, dtype=F64), torch.randn(2, 2, 3, 6, 5, dtype=F64))
    arguments = ("weight_norm", [0.3, 1.5], (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    expected = OPS.normalised_conv_jvp(dw, dx, w, x, None, *arguments)
    last = lambda t: t.contiguous(memory_format=torch.channels_last)
    for turn in itertools.product((lambda t: t, last), repeat=4):
        operands = [f(t) for f, t in zip(turn, (dw, dx, w, x))]
        for found, exact in zip(OPS.normalised_conv_jvp(*operands, None, *arguments), expected):
            assert found.is_contiguous()
            assert_close(found, exact)
        u = operands[1]
        found = OPS.normalised_conv_vjp(expected[0], operands[2], operands[3], *arguments)
        for a, b in zip(found, OPS.normalised_conv_vjp(expected[0], w, x, *arguments)):
            assert_close(a, b)
        assert_close(OPS.conv_gram(u, operands[2], *arguments[2:]), OPS.conv_gram(dx, w, *arguments[2:]))
