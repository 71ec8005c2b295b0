"""Floats rounded to the safe side: an upper bound is never below the number that it stands for."""

import math
from collections.abc import Iterable

ROUNDOFF = 2.0**-53  # unit roundoff of float64: one operation errs by at most this, relatively


def up(x: float, operations: int = 1) -> float:
    """A float not below the exact value of x >= 0, where x came from that many rounded operations.

    Each operation divides by at most 1 + 2^-53, and a step of ``nextafter`` multiplies by 1 + 2^-53 or more.
    """
    for _ in range(operations):
        x = math.nextafter(x, math.inf)
    return x


def down(x: float, operations: int = 1) -> float:
    """A float not above the exact value of x >= 0, where x came from that many rounded operations; at least 0."""
    for _ in range(2 * operations):  # twice: just above a power of two, a step down is half as long
        x = math.nextafter(x, -math.inf)
    return max(x, 0.0)


def product_up(factors: Iterable[float]) -> float:
    """An upper bound of a product of numbers >= 0; multiplying by exactly 1 or 0 rounds nothing."""
    total = 1.0
    for factor in factors:
        if factor == 0.0 or total == 0.0:
            return 0.0
        total = total if factor == 1.0 else factor if total == 1.0 else up(total * factor)
    return total


def root_up(n: int) -> float:
    """An upper bound of the square root of an integer, exact for squares."""
    return float(math.isqrt(n)) if math.isqrt(n) ** 2 == n else up(math.sqrt(n))


def quotient_up(a: float, b: float) -> float:
    """An upper bound of a / b for a >= 0, b > 0; the quotient itself where b is a power of two."""
    return a / b if math.frexp(b)[0] == 0.5 else up(a / b)
