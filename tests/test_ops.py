"""The operators against closed forms in float64: values, all derivatives, every transform, dtype and layout."""

import gc
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

from trainable_nn import ops
from trainable_nn.functional import entry_norm, weight_norm

EPS, GAIN, LEAK = 0.3, 1.5, 0.25
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "permuted": lambda t: t.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    "with gaps": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[..., ::2],
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "overlapping": lambda t: t[:, :, :1].expand_as(t),
}


# ---- the closed forms, written entry by entry and row by row; none uses the package


def en(w):
    return GAIN * w / (EPS + w**2) ** 0.5 + LEAK * w


def en_slope(w):
    return GAIN * EPS * (EPS + w**2) ** -1.5 + LEAK


def en_curvature(w):
    return -3 * GAIN * EPS * w * (EPS + w**2) ** -2.5


def wn(w):
    return GAIN * w / (EPS + w.flatten(1).square().sum(1)).sqrt().view(-1, *[1] * (w.dim() - 1))


def wn_jacobian_of_row(w):
    """Dense: (eps + |w|^2)^(-1/2) (Id - w w^T / (eps + |w|^2))."""
    s = EPS + w @ w
    return GAIN * s**-0.5 * (torch.eye(len(w), dtype=w.dtype) - torch.outer(w, w) / s)


def wn_second_of_row(w):
    """T[i, j, k] = d^2 P_i / dw_j dw_k, from the three products of Kronecker's delta."""
    s, one = EPS + w @ w, torch.eye(len(w), dtype=w.dtype)
    deltas = (
        torch.einsum("ij,k->ijk", one, w) + torch.einsum("ik,j->ijk", one, w) + torch.einsum("jk,i->ijk", one, w)
    )
    return GAIN * (3 * s**-2.5 * torch.einsum("i,j,k->ijk", w, w, w) - s**-1.5 * deltas)


def entry(w):
    return entry_norm(w, EPS, gain=GAIN, leak=LEAK)


def row(w):
    return weight_norm(w, EPS, gain=GAIN)


def weights(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wn_jacobian(w):
    """Dense Jacobian of all rows, (rows, k, rows, k)."""
    rows, k = w.shape
    out = w.new_zeros(rows, k, rows, k)
    for i in range(rows):
        out[i, :, i] = wn_jacobian_of_row(w[i])
    return out


CASES = {"entry_norm": (entry, en), "weight_norm": (row, wn)}
cases = pytest.mark.parametrize("f, closed", CASES.values(), ids=CASES)


def slope_times(name, g, w):
    """DP(w) g from the closed form."""
    if name == "entry_norm":
        return en_slope(w) * g
    flat_w, flat_g = w.flatten(1), g.flatten(1)
    return torch.stack([wn_jacobian_of_row(a) @ b for a, b in zip(flat_w, flat_g)]).view_as(w)


def second_times(name, v, g, w):
    """The gradient in w of <v, DP(w) g> from the closed form."""
    if name == "entry_norm":
        return v * g * en_curvature(w)
    rows = zip(v.flatten(1), g.flatten(1), w.flatten(1))
    return torch.stack([torch.einsum("ijk,i,j->k", wn_second_of_row(c), a, b) for a, b, c in rows]).view_as(w)


# ---- values and derivatives by plain autograd


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_two_derivatives_are_the_closed_forms_in_every_dtype_and_layout(name, dtype, layout):
    f, closed = CASES[name]
    w, g, v = (layout(weights(5, 7, 3, 4, seed=s).to(dtype)) for s in (1, 2, 3))
    g = g.contiguous()  # a gradient may come in another layout than the weight
    w.requires_grad_()
    g.requires_grad_()
    exact = [t.detach().double() for t in (w, g, v)]

    y = f(w)
    (dw,) = torch.autograd.grad(y, w, g, create_graph=True)
    ddg, ddw = torch.autograd.grad(dw, (g, w), v)
    tolerance = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    for found, expected in (
        (y, closed(exact[0])),
        (dw, slope_times(name, exact[1], exact[0])),
        (ddg, slope_times(name, exact[2], exact[0])),
        (ddw, second_times(name, exact[2], exact[1], exact[0])),
    ):
        assert found.dtype == dtype
        assert_close(found.detach().double(), expected, **tolerance)
    assert y.stride() == torch.empty_like(w).stride()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, constants", [("entry_norm", (EPS, GAIN, LEAK)), ("weight_norm", (EPS, GAIN))])
def test_the_pair_is_the_value_and_the_derivative_to_the_last_bit(name, constants, dtype, layout):
    w, g = (layout(weights(5, 7, 3, 4, seed=s).to(dtype)) for s in (1, 2))
    value, tangent = getattr(PRIVATE, f"{name}_pair")(g, w, *constants)
    assert torch.equal(value, getattr(PRIVATE, name)(w, *constants))
    assert torch.equal(tangent, getattr(PRIVATE, f"{name}_backward")(g, w, *constants))


@cases
def test_gradcheck_in_both_modes_and_twice(f, closed):
    w = weights(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        f, w, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(f, w, check_fwd_over_rev=True)


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1, 1), (300, 1), (2, 4099), (64, 3, 7, 7), (5, 0), (0, 5), (33,), ()])
def test_every_shape_down_to_none(shape):
    w = weights(*shape)
    assert_close(entry(w), en(w), rtol=1e-14, atol=1e-15)
    if shape:
        w = w.requires_grad_()
        y = row(w)
        assert y.shape == w.shape
        if w.numel():
            expected = wn(w.view(shape[0], -1)).view(shape)
            assert_close(y, expected, rtol=1e-13, atol=1e-15)
        y.sum().backward()
        assert w.grad.shape == w.shape


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_weight_norm_of_any_dimension_is_that_of_the_permuted_weight(dim):
    w = weights(4, 5, 6).requires_grad_()
    y = weight_norm(w, EPS, dim, gain=GAIN)
    assert_close(y, wn(w.movedim(dim, 0)).movedim(0, dim), rtol=1e-14, atol=1e-15)
    (found,) = torch.autograd.grad(y.square().sum(), w)
    (expected,) = torch.autograd.grad(wn(w.movedim(dim, 0)).square().sum(), w)
    assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_weight_norm_of_no_dimension_divides_by_the_norm_of_all():
    w = weights(4, 5, 6)
    assert_close(weight_norm(w, EPS, None, gain=GAIN), GAIN * w / (EPS + w.square().sum()).sqrt(), rtol=1e-14, atol=0)
    with pytest.raises(IndexError, match="no dimension 3"):
        weight_norm(w, EPS, 3)


# ---- every transform, against the dense closed forms


@pytest.fixture(params=CASES)
def dense(request):
    """Name, function, a weight (4, 3), and the dense Jacobian and Hessian of q(w) = sum P(w)^2 / 2."""
    w = weights(4, 3, seed=5)
    name = request.param
    f, closed = CASES[name]
    if name == "entry_norm":
        jacobian = torch.diag_embed(en_slope(w).flatten()).view(4, 3, 4, 3)
    else:
        jacobian = wn_jacobian(w)
    curvature = torch.stack([
        second_times(name, closed(w), direction.view(4, 3), w).flatten() for direction in torch.eye(12, dtype=w.dtype)
    ])
    flat = jacobian.reshape(12, 12)
    return name, f, w, jacobian, (flat.T @ flat + curvature).view(4, 3, 4, 3)


def half_square(f):
    return lambda w: f(w).square().sum() / 2


def near(found, expected):
    assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_jacrev_jacfwd_and_vjp(dense):
    _, f, w, jacobian, _ = dense
    near(jacrev(f)(w), jacobian)
    near(jacfwd(f)(w), jacobian)
    g = weights(4, 3, seed=9)
    near(vjp(f, w)[1](g)[0], torch.einsum("abcd,ab->cd", jacobian, g))


def test_jvp_of_torch_func_and_of_dual_numbers_is_not_zero(dense):
    _, f, w, jacobian, _ = dense
    v = weights(4, 3, seed=9)
    expected = torch.einsum("abcd,cd->ab", jacobian, v)
    assert expected.abs().min() > 1e-3
    near(jvp(f, (w,), (v,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(w, v)
        near(torch.autograd.forward_ad.unpack_dual(f(dual)).tangent, expected)


@pytest.mark.parametrize("order", ["hessian", "rev over rev", "fwd over fwd", "rev over fwd", "autograd.functional"])
def test_hessians_by_every_order_of_the_modes(dense, order):
    _, f, w, _, expected = dense
    ways = {
        "hessian": hessian,
        "rev over rev": lambda q: jacrev(jacrev(q)),
        "fwd over fwd": lambda q: jacfwd(jacfwd(q)),
        "rev over fwd": lambda q: jacrev(jacfwd(q)),
        "autograd.functional": lambda q: lambda w: torch.autograd.functional.hessian(q, w),
    }
    near(ways[order](half_square(f))(w), expected)


def test_third_derivatives_agree_with_those_of_the_closed_form(dense):
    name, f, w, _, _ = dense
    w = w[:2, :2]
    closed = CASES[name][1]
    third = lambda q: jacfwd(jacrev(jacrev(q)))(w)
    near(third(half_square(f)), third(half_square(closed)))
    x = w.clone().requires_grad_()
    (first,) = torch.autograd.grad(half_square(f)(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(second.square().sum(), x)
    (first,) = torch.autograd.grad(half_square(closed)(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    near(found, torch.autograd.grad(second.square().sum(), x)[0])


def test_vmap_and_vmap_of_grad_over_any_dimension(dense):
    name, f, w, _, _ = dense
    stack = torch.stack([w, 2 * w, -w], dim=1)
    expected = torch.stack([CASES[name][1](stack[:, i]) for i in range(3)])
    near(vmap(f, in_dims=1)(stack), expected)
    q = half_square(f)
    found = vmap(grad(q), in_dims=1)(stack)
    near(found, torch.stack([slope_times(name, CASES[name][1](stack[:, i]), stack[:, i]) for i in range(3)]))
    near(vmap(hessian(q), in_dims=1)(stack)[0], dense[4])


def test_vmap_over_the_gradient_alone(dense):
    """The weight is not batched, the cotangent is: as in a Jacobian computed row by row."""
    _, f, w, jacobian, _ = dense
    _, pull = vjp(f, w)
    near(vmap(lambda g: pull(g)[0])(torch.eye(12, dtype=w.dtype).view(12, 4, 3)), jacobian.reshape(12, 4, 3))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_graph_break(dense, backend):
    name, f, w, _, _ = dense
    closed = CASES[name][1]
    x = w.clone().requires_grad_()
    y = torch.compile(f, fullgraph=True, backend=backend)(x)
    near(y.detach(), closed(w))
    near(torch.autograd.grad(y.square().sum() / 2, x)[0], slope_times(name, closed(w), w))


def test_transforms_inside_a_compiled_function(dense):
    _, f, w, jacobian, expected = dense
    v = weights(4, 3, seed=9)
    compiled = lambda g: torch.compile(g, fullgraph=True, backend="aot_eager")
    near(compiled(lambda w: jvp(f, (w,), (v,))[1])(w), torch.einsum("abcd,cd->ab", jacobian, v))
    near(compiled(lambda w: jacrev(f)(w))(w), jacobian)
    near(compiled(lambda w: hessian(half_square(f))(w))(w), expected)
    near(compiled(vmap(grad(half_square(f))))(torch.stack([w, w]))[1], grad(half_square(f))(w))


def test_a_compiled_gradient_keeps_its_digits_where_the_slope_is_small():
    """Differentiating w (eps + w^2)^(-1/2) entry by entry would lose them: r - w^2 r^3 cancels."""
    w = torch.tensor([300.0], requires_grad=True)
    y = torch.compile(lambda w: entry_norm(w, 1.0), fullgraph=True, backend="aot_eager")(w)
    (found,) = torch.autograd.grad(y, w)
    assert_close(found.double(), (1 + 300.0**2) ** -1.5 * torch.ones(1, dtype=torch.float64), rtol=1e-6, atol=0)


class Layer(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f
        self.weight = torch.nn.Parameter(weights(4, 3, seed=5))

    def forward(self, x):
        return x @ self.f(self.weight).T


@pytest.mark.parametrize("strict", [False, True])
@cases
def test_exported(f, closed, strict):
    layer, x = Layer(f), weights(2, 3)
    exported = torch.export.export(layer, (x,), strict=strict)
    near(exported.module()(x), x @ closed(layer.weight).T)
    assert "trainable_nn" not in exported.graph_module.code  # plain aten: it runs where the package is not


@cases
def test_autocast_leaves_the_weight_in_its_dtype(f, closed):
    layer, x = Layer(f).float(), weights(2, 3).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert f(layer.weight).dtype == torch.float32
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@cases
def test_per_sample_gradients_of_a_layer(f, closed):
    layer, xs = Layer(f), weights(6, 2, 3)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, xs)["weight"]
    for x, g in zip(xs, found):
        w = layer.weight.detach().requires_grad_()
        near(g, torch.autograd.grad((x @ closed(w).T).square().sum(), w)[0])


@cases
def test_activation_checkpointing(f, closed):
    w = weights(4, 3).requires_grad_()
    y = torch.utils.checkpoint.checkpoint(f, w, use_reentrant=False)
    (found,) = torch.autograd.grad(y.square().sum(), w)
    near(found, torch.autograd.grad(closed(w).square().sum(), w)[0])


# ---- the ends of the number line


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-8, 1.0, 1e8])
def test_entries_up_to_the_largest_number_and_down_to_denormals(dtype, eps):
    info = torch.finfo(dtype)
    sizes = [0.0, info.smallest_normal / 4, info.smallest_normal, info.eps, 0.5, 1.0, 3e3, info.max / 4, info.max]
    w = torch.tensor([s * x for x in sizes for s in (1, -1)], dtype=dtype)
    exact = torch.tensor([x / math.hypot(math.sqrt(eps), x) for x in w.double().tolist()], dtype=torch.float64)
    lengths = [math.hypot(math.sqrt(eps), x) for x in w.double().tolist()]
    slope = torch.tensor([eps / n**3 if n < 1e90 else 0.0 for n in lengths], dtype=torch.float64)
    w.requires_grad_()
    y = entry_norm(w, eps)
    (dw,) = torch.autograd.grad(y.sum(), w)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # one denormal
    assert_close(y.detach().double(), exact, rtol=8 * info.eps, atol=tiny)
    assert_close(dw.double(), slope.double().clamp(max=float(info.max)), rtol=16 * info.eps, atol=tiny)
    if eps <= 1:  # P is at least as steep as w then: nothing vanishes that is not zero
        assert torch.equal(y == 0, w == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_up_to_the_largest_number_and_down_to_denormals(dtype):
    info = torch.finfo(dtype)
    for size in (info.smallest_normal / 4, info.smallest_normal, 1e-3, 1.0, info.max / 8, info.max):
        w = torch.tensor([[size, -size, size / 2, 0.0], [1.0, 2.0, -3.0, 0.0]], dtype=dtype).requires_grad_()
        part = 0.25 if size > 1 else 1.0  # the length itself may be more than the largest number
        x = w.detach().double() * part
        length = torch.tensor([[math.hypot(part, *r)] for r in x.tolist()], dtype=torch.float64)
        n = x / length
        y = weight_norm(w, 1.0)
        assert_close(y.detach().double(), n, rtol=4 * info.eps, atol=info.smallest_normal * info.eps)
        (dw,) = torch.autograd.grad(y, w, torch.ones_like(w), create_graph=True)
        slope = (1 - n * n.sum(1, keepdim=True)) * part / length
        assert_close(dw.detach().double(), slope, rtol=8 * info.eps, atol=8 * info.eps * float(part / length.min()))
        assert torch.autograd.grad(dw.sum(), w)[0].isfinite().all()


@cases
def test_zero_is_a_fixed_point_with_a_finite_slope(f, closed):
    w = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    y = f(w)
    assert torch.equal(y, torch.zeros_like(w))
    (dw,) = torch.autograd.grad(y, w, torch.ones_like(w), create_graph=True)
    near(dw.detach(), torch.full_like(w, GAIN * EPS**-0.5 + (LEAK if f is entry else 0.0)))
    assert torch.equal(torch.autograd.grad(dw.sum(), w)[0], torch.zeros_like(w))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
def test_a_weight_that_is_not_finite_is_not_hidden_and_spoils_only_its_row(f, closed, dtype, bad):
    w = torch.ones(3, 40, dtype=dtype)
    w[1, 37] = bad
    w.requires_grad_()
    y = f(w)
    (dw,) = torch.autograd.grad(y, w, torch.ones_like(w))
    assert not y[1, 37].isfinite() and dw[1, 37].isnan()
    assert y[[0, 2]].isfinite().all() and dw[[0, 2]].isfinite().all()
    assert y[1].isnan().all() == (f is row)  # its length divides the whole row


def test_a_small_weight_passes_unchanged_at_eps_1():
    w = torch.tensor([1e-45, -1e-40, 1e-30, 0.0, -0.0])
    for y in (entry_norm(w, 1.0), weight_norm(w, 1.0, None)):
        assert torch.equal(y, w)
        assert torch.equal(y.signbit(), w.signbit())


def test_the_radial_part_of_a_gradient_keeps_its_digits():
    """DP(w) w = eps (eps + |w|^2)^(-3/2) w: in float32 arithmetic the difference would leave only noise."""
    w = weights(2, 500, scale=100).float().requires_grad_()
    x = w.detach().double()
    (found,) = torch.autograd.grad(weight_norm(w, 1.0), w, w.detach())
    expected = (1 + x.square().sum(1, keepdim=True)) ** -1.5 * x
    assert_close(found.double(), expected, rtol=1e-5, atol=0)


# ---- bad input


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("f", [entry_norm, weight_norm])
def test_other_dtypes_are_refused_with_the_way_out(f, dtype):
    with pytest.raises(TypeError, match=f"{f.__name__}: the weight has dtype .*Convert it first"):
        f(torch.ones(2, 2).to(dtype))


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan, math.inf, 1e-31, 1e31])
@pytest.mark.parametrize("f", [entry_norm, weight_norm])
def test_an_eps_that_is_no_constant_of_a_normalisation(f, eps):
    with pytest.raises(ValueError, match=f"{f.__name__}: eps must be from 1e-30 to 1e\\+30, got"):
        f(torch.ones(2, 2), eps)


@pytest.mark.parametrize("constants", [{"gain": 0.0}, {"gain": -1.0}, {"gain": math.nan}, {"gain": math.inf}])
@pytest.mark.parametrize("f", [entry_norm, weight_norm])
def test_a_gain_that_is_not_positive_and_finite(f, constants):
    with pytest.raises(ValueError, match="gain must be positive and finite"):
        f(torch.ones(2, 2), **constants)


@pytest.mark.parametrize("leak", [-0.1, math.nan, math.inf])
def test_a_leak_that_is_negative_or_not_finite(leak):
    with pytest.raises(ValueError, match="leak must be at least 0 and finite"):
        entry_norm(torch.ones(2, 2), leak=leak)


# ---- the registration, and the compiled kernels beside the reference

PRIVATE = torch.ops.trainable_nn
LAYOUTS_OF_OPS = {k: LAYOUTS[k] for k in ("contiguous", "channels_last", "transposed", "with gaps")}


@pytest.mark.parametrize("layout", LAYOUTS_OF_OPS.values(), ids=LAYOUTS_OF_OPS)
def test_the_operators_keep_the_registration_contract(layout):
    w, g, v = (layout(weights(2, 4, 5, 3, seed=s)).detach() for s in range(3))
    for name, constants in (("entry_norm", (EPS, GAIN, LEAK)), ("weight_norm", (EPS, GAIN))):
        for suffix, operands in (
            ("", (w,)), ("_backward", (g, w)), ("_double_backward", (v, g, w)), ("_pair", (g, w)),
        ):  # fmt: skip
            torch.library.opcheck(getattr(PRIVATE, name + suffix).default, (*operands, *constants))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_meta_tensors_have_the_shape_and_strides_of_real_ones(layout):
    w = layout(weights(2, 4, 5, 3))
    meta = torch.empty_strided(w.shape, w.stride(), device="meta", dtype=w.dtype)
    for f in (entry, row):
        assert f(meta).stride() == f(w).stride()
        assert f(meta).device.type == "meta"


def test_operands_that_differ_are_refused():
    w = torch.ones(2, 3)
    for g in (torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float64)):
        with pytest.raises(RuntimeError):
            PRIVATE.entry_norm_backward(g, w, 1.0, 1.0, 0.0)


@pytest.mark.skipif("cpu" not in ops.native.loaded, reason="no compiled CPU kernels")
def test_a_result_depends_neither_on_its_place_nor_on_the_number_of_threads():
    w = weights(40, 5003).float()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = entry(w), row(w)
        torch.set_num_threads(2)
        together = entry(w), row(w)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, alone, together))
    for shift in range(1, 20):
        assert torch.equal(entry(w.flatten()[shift : shift + 100].clone()), alone[0].flatten()[shift : shift + 100])


LONG = 2**18  # entries from which the threads share a row


def all_derivatives(w, g, v, eps):
    """The operators' four results."""
    dp, second = PRIVATE.weight_norm_double_backward(v, g, w, eps, GAIN)
    return *PRIVATE.weight_norm_pair(g, w, eps, GAIN), dp, second


def closed_form_of_a_row(w, g, v, eps, size):
    """The same of the row size * w, for a power of two size: w itself stays where squares are numbers."""
    rho = (eps / size / size + w @ w) ** -0.5
    n = rho * w
    a, b, c = n @ v, n @ g, g @ v
    second = GAIN * rho**2 * (n * (3 * a * b - c) - b * v - a * g)
    return GAIN * n, GAIN * rho * (g - n * b) / size, GAIN * rho * (v - n * a) / size, second / size / size


@pytest.mark.skipif("cpu" not in ops.native.loaded, reason="no compiled CPU kernels")
@pytest.mark.parametrize("size", ["smallest", "one", "largest"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_row_has_the_same_bits_for_any_number_of_threads_and_is_the_closed_form(dtype, size):
    info, entries = torch.finfo(dtype), LONG + 12345
    exponent = math.floor(math.log2(info.max)) - 2
    size = {"smallest": info.smallest_normal, "one": 1.0, "largest": 2.0**exponent}[size]
    eps = 0.3
    w, g, v = (weights(entries, seed=s).clamp(-3, 3).to(dtype) for s in (1, 2, 3))
    w = w * size
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(all_derivatives(w[None], g[None], v[None], eps))
    finally:
        torch.set_num_threads(before)
    for one, two, three in zip(*found):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    shrink = max(size, 1.0)  # small squares vanish beside eps as they are
    exact = closed_form_of_a_row(w.double() / shrink, g.double(), v.double(), eps, shrink)
    for one, expected in zip(found[0], exact):
        least = 2 * info.smallest_normal * info.eps  # a step between denormals
        assert_close(one[0].double(), expected, rtol=8 * info.eps, atol=max(least, 1e-12 * float(expected.abs().max())))


@pytest.mark.skipif("cpu" not in ops.native.loaded, reason="no compiled CPU kernels")
def test_long_rows_side_by_side_are_those_alone_and_one_that_overflows_spoils_no_other():
    w, g, v = (weights(3, LONG + 7, seed=s) for s in (1, 2, 3))
    w[1] *= 2.0**1000
    together = all_derivatives(w, g, v, EPS)
    for i in range(3):
        for found, alone in zip(together, all_derivatives(*(t[i : i + 1].clone() for t in (w, g, v)), EPS)):
            assert torch.equal(found[i : i + 1], alone)
        exact = closed_form_of_a_row(*(t[i] / (s if i == 1 else 1) for t, s in ((w, 2.0**1000), (g, 1), (v, 1))), EPS,
                                     2.0**1000 if i == 1 else 1.0)  # fmt: skip
        for found, expected in zip(together, exact):
            assert_close(found[i], expected, rtol=1e-12, atol=1e-14 * float(expected.abs().max()))


@pytest.mark.skipif("cpu" not in ops.native.loaded, reason="no compiled CPU kernels")
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "permuted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_small_call_has_the_bits_of_a_large_one(dtype, layout):
    """It runs on shorter registers where the machine has longer ones."""
    info = torch.finfo(dtype)
    for size in (info.smallest_normal, 1.0, info.max / 16):
        large = [weights(60, 7, 11, 5, seed=s).clamp(-3, 3).to(dtype) for s in (1, 2, 3)]
        large[0] *= size
        small = [LAYOUTS[layout](t[9:12].clone()) for t in large]
        (w, g, v), (few_w, few_g, few_v) = map(LAYOUTS[layout], large), small
        for name, constants in (("entry_norm", (EPS, GAIN, LEAK)), ("weight_norm", (EPS, GAIN))):
            op = lambda suffix, *t, name=name, constants=constants: getattr(PRIVATE, name + suffix)(*t, *constants)
            pairs = [
                (op("", w), op("", few_w)),
                (op("_backward", g, w), op("_backward", few_g, few_w)),
                *zip(op("_pair", g, w), op("_pair", few_g, few_w)),
                *zip(op("_double_backward", v, g, w), op("_double_backward", few_v, few_g, few_w)),
            ]
            for among, alone in pairs:
                assert torch.equal(among[9:12].nan_to_num(nan=7.0), alone.nan_to_num(nan=7.0))


COMPARE = """
import os, sys, torch
os.environ["TRAINABLE_NN_NATIVE"] = sys.argv[1]
if len(sys.argv) > 3: os.environ["TRAINABLE_NN_CPU"] = sys.argv[3]
from trainable_nn.ops import native
assert ("cpu" in native.loaded) == (sys.argv[1] == "1"), native.report()
out = []
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for shape in ((7, 3, 5, 5), (3, 1001), (33, 2, 4, 8), (1, 300001)):
        for permuted in (False, True):
            g = torch.Generator().manual_seed(1)
            w, h, v = (torch.randn(shape, generator=g, dtype=torch.float64).mul(2).to(dtype) for _ in range(3))
            if permuted: w = w.transpose(0, 1).contiguous().transpose(0, 1)
            for name, constants in (("entry_norm", (0.3, 1.5, 0.25)), ("weight_norm", (0.3, 1.5))):
                op = lambda suffix, *t: getattr(torch.ops.trainable_nn, name + suffix)(*t, *constants)
                out += [op("", w), op("_backward", h, w), *op("_double_backward", v, h, w), *op("_pair", h, w)]
            if dtype.itemsize > 2 and len(shape) == 4:
                x, y = torch.randn(2, 3, shape[1], 6, 8, generator=g, dtype=torch.float64).to(dtype)
                geometry = [1, 2], [2, 1], [1, 1], 1
                out += torch.ops.trainable_nn.weight_norm_conv_rows(h, w, x, torch.cat((x, y)), 4, 0.3, 1.5, *geometry)
torch.save(out, sys.argv[2])
"""


@pytest.mark.skipif("cpu" not in ops.native.loaded, reason="no compiled CPU kernels")
@pytest.mark.parametrize("instructions", ["avx512", "avx2", "scalar"])
def test_each_instruction_set_gives_the_values_of_the_reference(instructions, tmp_path):
    def results(*arguments):
        subprocess.run([sys.executable, "-W", "ignore", "-c", COMPARE, *arguments], check=True, cwd=tmp_path)
        return torch.load(tmp_path / arguments[1])

    compiled, reference = results("1", "compiled.pt", instructions), results("0", "reference.pt")
    for a, b in zip(compiled, reference, strict=True):
        eps = torch.finfo(a.dtype).eps
        few = 1 if a.dtype.itemsize == 2 else 16  # 16-bit results differ by a rounding at most
        assert_close(a.double(), b.double(), rtol=few * eps, atol=few * eps * float(b.double().abs().max()))


@pytest.mark.skipif("cpu" not in ops.native.loaded, reason="no compiled CPU kernels")
@pytest.mark.skipif(os.environ.get("TRAINABLE_NN_POOL_MIB") == "0", reason="the pool is switched off")
def test_a_freed_output_serves_the_next_call_and_a_living_one_never():
    ops.native.empty_cache()
    w = weights(600, 1000).float()
    first = ops.entry_norm(w, 1.0, 1.0, 0.0)
    kept, address = first.clone(), first.data_ptr()
    second = ops.entry_norm(w, 1.0, 2.0, 0.0)  # the first is alive: another block
    assert second.data_ptr() != address
    assert torch.equal(first, kept)
    view = first[3:5]
    del first
    gc.collect()
    assert ops.entry_norm(w, 1.0, 3.0, 0.0).data_ptr() != address  # a view keeps it
    assert torch.equal(view, kept[3:5])
    del view
    gc.collect()
    assert ops.entry_norm(w, 1.0, 1.0, 0.0).data_ptr() == address
    gc.collect()
    assert ops.native.empty_cache() >= 600 * 1000 * 4
    assert ops.native.empty_cache() == 0
