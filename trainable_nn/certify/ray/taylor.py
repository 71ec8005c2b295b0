r"""Taylor models along a ray: x(u) = c_0 + c_1 u + c_2 u^2 + rho(u), \|rho(u)\| <= r u^3 entry by entry, u in [0, 1].

Sums, products and smooth functions of such models are such models. The three coefficients are computed as they are,
so signs cancel; what is of third order is bounded by absolute values where it arises, and ``remainder`` carries it on.
Where some layer has no third derivative, all models are of order 2: c_2 = 0 and \|rho(u)\| <= r u^2. Rounding: what a rule
returns as r is a sum of products of numbers that are not negative, so it is within a factor 1 + 2^-20 of itself, for ``remainder`` to
put on. Coefficients are rounded, and how far they are from exact ones is ``rounding``'s; the rules hold at each u for any function
within r of the coefficients' polynomial, so what they are rounded to is what the next step starts from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Bilinear = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Taylor:
    """c_0, c_1, c_2 and the bound r >= 0 of what is left, tensors of one shape."""

    c0: Tensor
    c1: Tensor
    c2: Tensor
    r: Tensor

    def image(self, linear: Callable[[Tensor], Tensor]) -> Taylor:
        """A x for a fixed linear map, r without |A| x.r, which is for the caller to add."""
        c0 = linear(self.c0)
        return Taylor(c0, linear(self.c1), linear(self.c2), torch.zeros_like(c0))

    def plus(self, other: Taylor) -> Taylor:
        return Taylor(self.c0 + other.c0, self.c1 + other.c1, self.c2 + other.c2, self.r + other.r)

    def scaled(self, factor: float) -> Taylor:
        return Taylor(factor * self.c0, factor * self.c1, factor * self.c2, abs(factor) * self.r)

    @property
    def reach(self) -> Tensor:
        """At least |x(u) - c_0| / u."""
        return self.c1.abs() + self.c2.abs() + self.r

    @property
    def size(self) -> Tensor:
        """At least |x(u)|."""
        return self.c0.abs() + self.reach

    def at(self, u: float) -> Tensor:
        """The polynomial at u, without its remainder."""
        return self.c0 + u * (self.c1 + u * self.c2)


def product(a: Taylor, b: Taylor, multiply: Bilinear, order: int) -> Taylor:
    """a * b for a bilinear map whose terms are products of entries, so that |a * b| <= |a| * |b|.

    r is without |a_0| * r_b, the linear image of b's remainder. The polynomials' terms of the order and above are
    summed with their signs first. For a remainder, |a - a_0| * r_b + r_a * (|b| - r_b) covers both and their product
    once.
    """
    rest = multiply(a.reach, b.r) + multiply(a.r, b.c0.abs() + b.c1.abs() + b.c2.abs())
    c0, c1 = multiply(a.c0, b.c0), multiply(a.c0, b.c1) + multiply(a.c1, b.c0)
    second = multiply(a.c1, b.c1)
    if order == 2:
        return Taylor(c0, c1, torch.zeros_like(c0), second.abs() + rest)
    c2 = multiply(a.c0, b.c2) + second + multiply(a.c2, b.c0)
    third = multiply(a.c1, b.c2) + multiply(a.c2, b.c1)
    return Taylor(c0, c1, c2, third.abs() + multiply(a.c2, b.c2).abs() + rest)


def composed(
    x: Taylor, value: Tensor, first: Tensor, second: Tensor, third_at_most: Tensor | float, slope: float = math.inf
) -> Taylor:
    r"""phi(x(u)) entry by entry, to order 3, from phi, phi', phi'' at c_0 and a bound of \|phi'''\| where x(u) can be.

    r is without \|phi'\| x.r, the linear image of x's remainder. With d = x(u) - c_0 and p its polynomial part, either
    phi(c_0) + phi' d + phi'' d^2 / 2 and at most sup \|phi'''\| \|d\|^3 / 6 more; or the same for p, and
    (phi'(xi) - phi') (d - p) more, at most (\|phi''\| \|d\| + sup \|phi'''\| \|d\|^2 / 2) \|d - p\| and at most
    (slope + \|phi'\|) \|d - p\| for slope >= sup \|phi'\|, so that a large remainder grows by no power of itself.
    """
    bent, moved = second.abs(), x.c1.abs() + x.c2.abs()
    known = 0.5 * bent * ((2.0 * x.c1 * x.c2).abs() + x.c2.square())
    whole = known + bent * (moved * x.r + 0.5 * x.r.square()) + third_at_most / 6.0 * x.reach**3
    drift = (bent * x.reach + 0.5 * third_at_most * x.reach.square()).clamp_max(slope + first.abs())
    rest = torch.fmin(whole, known + third_at_most / 6.0 * moved**3 + drift * x.r)
    return Taylor(value, first * x.c1, first * x.c2 + 0.5 * second * x.c1.square(), rest)


def composed_to_second(
    x: Taylor, value: Tensor, first: Tensor, second_at_most: Tensor | float, slope: float = math.inf
) -> Taylor:
    r"""The same to order 2: phi(c_0) + phi' d, and at most sup \|phi''\| d^2 / 2 more; or that of p, and the drift."""
    whole = 0.5 * second_at_most * x.reach.square()
    drift = (second_at_most * x.reach).clamp_max(slope + first.abs())
    rest = torch.fmin(whole, 0.5 * second_at_most * x.c1.square() + drift * x.r)
    return Taylor(value, first * x.c1, torch.zeros_like(value), rest)


def constant(value: Tensor) -> Taylor:
    zero = value.new_zeros(value.shape)
    return Taylor(value, zero, zero, zero)


def line(start: Tensor, direction: Tensor) -> Taylor:
    """start + u direction."""
    zero = start.new_zeros(start.shape)
    return Taylor(start, direction, zero, zero)
