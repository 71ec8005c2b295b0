r"""The squared Schatten norm S^2 = (sum_f c_f tr (M_f M_f^*)^p)^(1/p) of blocks M_f, p = 2^j, and its gradient.

One Gram product on the smaller side gives G_f, and tr G^p = ||G^(p/2)||_F^2 needs j - 1 squarings. The gradient

    dS^2 / dM_f = 2 S^(2 - 2p) c_f G_f^(p-1) M_f,   G^(p-1) = G G^2 G^4 ... G^(p/2),

needs j - 1 products of powers that are there, and one with M_f. Automatic differentiation would take two products for
each squaring. Each power is divided by its trace or its Frobenius norm before it is squared, so nothing
overflows, and a trace is above rank^-2. These divisors are constants to autograd: no value depends on them.

A Hermitian A + iB, A symmetric and B antisymmetric, is held as the real matrix K = A + B: ||G||_F = ||K||_F, and a product of two
that commute is A K' + B K'^T, one real product where complex arithmetic takes two of that size.

S^2 is analytic in M but at M = 0, where its gradient is 0 and continuous.
"""

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad


def squared_schatten_norm(x: Tensor, y: Tensor | None, power: int, copies: float = 1.0) -> Tensor:
    """S^2 of each item of a batch, differentiable to any order, in both modes and under every transform.

    Shape:
        x, y: (batch, f, rows, columns), real and imaginary part, of entries whose squares neither overflow nor matter
        below; y is None for real blocks.  copies: c_f.  -> (batch,).
    """
    if x.shape[-2] > x.shape[-1]:
        x, y = x.mT, None if y is None else -y.mT
    if power == 1 or x.numel() == 0:
        return copies * (x.square().sum((1, 2, 3)) + (0.0 if y is None else y.square().sum((1, 2, 3))))
    if torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _formula(x, y, power, copies)[0]
    return _Squared.apply(x, y, power, copies)


def _gram(x: Tensor, y: Tensor | None) -> Tensor:
    if y is None:
        return x @ x.mT
    z, cross = torch.cat([x, y], 3), y @ x.mT
    return z @ z.mT + (cross - cross.mT)


def _product(k: Tensor, other: Tensor, real: bool) -> Tensor:
    """K of the product of two Hermitian matrices that commute."""
    if real:
        return k @ other
    t = k.mT
    return torch.cat([(k + t) / 2, (k - t) / 2], 3) @ torch.cat([other, other.mT], 2)


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
        k = _product(k, k, y is None)
        exponent //= 2
    last = torch.where(zero, 1.0, copies * size.sum(1))
    return squared * last ** (1.0 / power), powers, product * last


def _gradient(x, y, squared: Tensor, powers: list[Tensor], product: Tensor, copies: float):
    k = powers[0]
    for other in powers[1:]:
        k = _product(k, other, y is None)
    k = (2.0 * copies * squared / product)[:, None, None, None] * k
    if y is None:
        return k @ x, None
    t = k.mT
    a, b = (k + t) / 2, (k - t) / 2
    return a @ x - b @ y, a @ y + b @ x


class _Squared(Function):
    @staticmethod
    def forward(ctx, x, y, power, copies):
        squared, powers, product = _formula(x, y, power, copies)
        ctx.power, ctx.copies = power, copies
        ctx.save_for_backward(x, y, squared, product, *powers)
        return squared

    @staticmethod
    def backward(ctx, g):
        x, y, squared, product, *powers = ctx.saved_tensors
        if torch.is_grad_enabled():  # differentiated once more: by the formula, from the blocks
            squared, powers, product = _formula(x, y, ctx.power, ctx.copies)
        d_x, d_y = _gradient(x, y, g * squared, powers, product, ctx.copies)
        return d_x, d_y, None, None
