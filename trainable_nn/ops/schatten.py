r"""The squared Schatten norm S^2 = (sum_f c_f tr (M_f M_f^*)^p)^(1/p) of blocks M_f, p = 2^j, and its gradient.

One Gram product on the smaller side gives G_f, and tr G^p = ||G^(p/2)||_F^2 needs j - 1 squarings. The gradient

    dS^2 / dM_f = 2 S^(2 - 2p) c_f G_f^(p-1) M_f,   G^(p-1) = G G^2 G^4 ... G^(p/2),

needs j - 1 products of powers that are there, and one with M_f. Automatic differentiation would take two products for
each squaring. Each power is divided by its trace or its Frobenius norm before it is squared, so nothing
overflows, and a trace is above rank^-2. These divisors are constants to autograd: no value depends on them.

A Hermitian A + iB, A symmetric and B antisymmetric, is held as the real matrix K = A + B: ||G||_F = ||K||_F, and a product of two
that commute is A K' + B K'^T, one real product where complex arithmetic takes two of that size.

Of small matrices the calls cost more than the products: there Hermitian matrices are complex ones, and what is one number for all
of them is a number of Python's.

S^2 is analytic in M but at M = 0, where its gradient is 0 and continuous.
"""

import math

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .eager import may_look_at

HALVED = 128  # rows; of a larger Gram matrix the upper half is not computed
LEAST = 1e-300  # of a norm: below, it counts as 0
SMALL = 32  # rows; up to there the number of calls is the cost, not their arithmetic


def squared_schatten_norm(
    x: Tensor, y: Tensor | None, power: int, copies: float = 1.0, *, coarse_gradient: bool = False
) -> Tensor:
    """S^2 of each item of a batch, differentiable to any order, in both modes and under every transform.

    Shape:
        x, y: (batch, f, rows, columns), real and imaginary part, of entries whose squares neither overflow nor matter
        below; y is None for real blocks.  copies: c_f.  -> (batch,).
    Units:
        coarse_gradient: a gradient that is not differentiated again may be computed in float32.
    """
    if x.shape[-2] > x.shape[-1]:
        x, y = x.mT, None if y is None else -y.mT
    if power == 1 or x.numel() == 0:
        return copies * (x.square().sum((1, 2, 3)) + (0.0 if y is None else y.square().sum((1, 2, 3))))
    if torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _formula(x, y, power, copies)[0]
    if len(x) == 1 and x.shape[-2] <= SMALL and may_look_at(x):
        return _SmallSquared.apply(x, y, power, copies)
    return _Squared.apply(x, y, power, copies, coarse_gradient)


def _times_transpose(x: Tensor) -> Tensor:
    """x x^T; of two halves of the rows, their product is computed once."""
    rows = x.shape[2]
    if rows <= HALVED:
        return x @ x.mT
    upper, lower = x[:, :, : rows // 2], x[:, :, rows // 2 :]
    beside = lower @ upper.mT
    first = torch.cat([_times_transpose(upper), beside.mT], 3)
    return torch.cat([first, torch.cat([beside, _times_transpose(lower)], 3)], 2)


def _gram(x: Tensor, y: Tensor | None) -> Tensor:
    if y is None:
        return _times_transpose(x)
    cross = y @ x.mT
    return _times_transpose(torch.cat([x, y], 3)) + (cross - cross.mT)


def _parts(k: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of K = A + B."""
    t = k.mT
    return (k + t) / 2, (k - t) / 2


def _square(k: Tensor, real: bool) -> Tensor:
    """K of the square: K K^T = A^2 - B^2 - AB + BA, and 2 AB more."""
    if real:
        return _times_transpose(k)
    a, b = _parts(k)
    return torch.baddbmm(_times_transpose(k).flatten(0, 1), a.flatten(0, 1), b.flatten(0, 1), alpha=2).view_as(k)


def _product(k: Tensor, other: Tensor, real: bool) -> Tensor:
    """K of the product of two Hermitian matrices that commute."""
    if real:
        return k @ other
    return torch.cat(_parts(k), 3) @ torch.cat([other, other.mT], 2)


def _formula(x: Tensor, y: Tensor | None, power: int, copies: float) -> tuple[Tensor, list[Tensor], Tensor]:
    """S^2, the divided powers of G, and the product of their divisors and the last trace."""
    k = _gram(x, y)
    trace = k.detach().diagonal(dim1=2, dim2=3).sum(2).amax(1)
    zero = trace == 0
    divisor = torch.where(zero, 1.0, trace)
    squared, product, powers = trace, divisor, []
    exponent = power // 2
    while True:
        k = k / divisor[:, None, None, None]
        powers.append(k)
        size = k.square().sum((2, 3))  # the trace of the square
        if exponent == 1:
            break
        divisor = torch.where(zero, 1.0, size.detach().amax(1))
        squared = squared * divisor ** (exponent / power)
        product = product * divisor
        k = _square(k, y is None)
        exponent //= 2
    last = torch.where(zero, 1.0, copies * size.sum(1))
    return squared * last ** (1.0 / power), powers, product * last


def _direction(x: Tensor, y: Tensor | None, powers: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The gradient, but for a factor: the product of the powers times M."""
    k = powers[0]
    for other in powers[1:]:
        k = _product(k, other, y is None)
    if y is None:
        return k @ x, None
    a, b = _parts(k)
    return a @ x - b @ y, a @ y + b @ x


class _Squared(Function):
    @staticmethod
    def forward(ctx, x, y, power, copies, coarse):
        squared, powers, product = _formula(x, y, power, copies)
        ctx.power, ctx.copies, ctx.coarse = power, copies, coarse
        ctx.save_for_backward(x, y, squared, product, *powers)
        return squared

    @staticmethod
    def backward(ctx, g):
        x, y, squared, product, *powers = ctx.saved_tensors
        if torch.is_grad_enabled():  # differentiated once more: by the formula, from the blocks
            squared, powers, product = _formula(x, y, ctx.power, ctx.copies)
            directions = _direction(x, y, powers)
        elif ctx.coarse:
            with torch.autocast(x.device.type, enabled=False):
                directions = _direction(x.float(), None if y is None else y.float(), [k.float() for k in powers])
        else:
            directions = _direction(x, y, powers)
        factor = (2.0 * ctx.copies * g * squared / product)[:, None, None, None]
        return *(None if d is None else factor * d for d in directions), None, None, None


def _small_formula(m: Tensor, power: int, copies: float) -> tuple[float, list[Tensor], float]:
    """As ``_formula``, of one item of a batch with real or complex blocks, and divided by Frobenius norms alone."""
    k, powers, squared, product, exponent = m @ m.mH, [], 1.0, 1.0, power
    while True:
        sizes = (torch.view_as_real(k) if k.is_complex() else k).square().flatten(1).sum(1)  # ||k||_F^2
        divisor = math.sqrt(sizes.amax().item())
        if divisor < LEAST:
            return 0.0, [k], 1.0
        k = k * (1.0 / divisor)  # a division of complex numbers takes four times as long
        powers.append(k)
        squared, product = squared * divisor ** (exponent / power), product * divisor
        exponent //= 2
        if exponent == 1:
            break
        k = k @ k
    last = copies * sizes.sum().item() / divisor**2
    return squared * last ** (1.0 / power), powers, product * last


class _SmallSquared(Function):
    @staticmethod
    def forward(ctx, x, y, power, copies):
        m = x[0] if y is None else torch.complex(x[0], y[0])
        squared, powers, product = _small_formula(m, power, copies)
        ctx.power, ctx.copies, ctx.ratio = power, copies, 2.0 * copies * squared / product
        ctx.save_for_backward(x, y, m, *powers)
        return x.new_full((1,), squared)

    @staticmethod
    def backward(ctx, g):
        x, y, m, *powers = ctx.saved_tensors
        if torch.is_grad_enabled():  # differentiated once more: by the formula, from the blocks
            squared, powers, product = _formula(x, y, ctx.power, ctx.copies)
            factor = (2.0 * ctx.copies * g * squared / product)[:, None, None, None]
            return *(None if d is None else factor * d for d in _direction(x, y, powers)), None, None
        k = powers[0]
        for other in powers[1:]:
            k = k @ other
        d = (k @ m) * (ctx.ratio * g)[:, None, None, None]
        return (d, None, None, None) if y is None else (d.real, d.imag, None, None)
