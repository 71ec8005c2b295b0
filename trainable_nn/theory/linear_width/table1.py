"""Paper B's Table 1: the width that each convergence result asks for, at the same samples, depth and precision.

The results are orders in n and H; what stands here is the order with its constant set to 1, so rows compare growth and
say nothing about a given network. "poly" states no exponent, so no number can be made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...errors import OptionError
from .rows import table_of


@dataclass(frozen=True)
class Demand:
    """One row: the paper's reference number, network, activation, loss, the order as printed, and its value or None."""

    reference: str
    network: str
    activation: str
    loss: str
    order: str
    width: float | None


ORDERS: tuple[tuple[str, str, str, str, str, Callable[[int, int], float] | None], ...] = (
    ("[16]", "single hidden layer", "ReLU", "cross entropy", "poly(n)", None),
    ("[17]", "single hidden layer", "ReLU", "quadratic", "n^6", lambda n, H: float(n) ** 6),
    ("[18]", "multi-layer, CNN, ResNet", "ReLU", "arbitrary", "poly(n, H)", None),
    ("[19]", "feedforward", "ReLU", "smooth", "poly(n, H)", None),
    ("[20]", "feedforward", "smooth", "quadratic", "poly(n) 2^O(H)", None),
    ("[20]", "CNN, ResNet", "smooth", "quadratic", "poly(n, H)", None),
    ("[21]", "single hidden layer", "ReLU", "quadratic", "n^7", lambda n, H: float(n) ** 7),
    ("[22]", "single hidden layer", "smooth", "quadratic", "n^2", lambda n, H: float(n) ** 2),
    ("[22]", "single hidden layer", "ReLU", "quadratic", "n^4", lambda n, H: float(n) ** 4),
    ("[23]", "ResNet", "ReLU", "quadratic", "max(H, n^24)", lambda n, H: max(float(H), float(n) ** 24)),
    ("[23]", "ResNet, scaling 1/sqrt(H)", "ReLU", "quadratic", "n^24 H^7", lambda n, H: float(n) ** 24 * float(H) ** 7),
    ("[24]", "feedforward", "smooth", "smooth", "B^4 n 2^O(H)", lambda n, H: float(n) * 2.0**H),
    ("B", "ResNet", "smooth", "quadratic", "n", lambda n, H: float(n)),
)


def table1(n: int, depth: int, *, claimed_width: float | None = None) -> tuple[Demand, ...]:
    """What each result would demand. [24]'s row is for an adversarial radius of 1 and for 2^O(H) = 2^H.

    ``claimed_width`` adds paper B's own K n with its constants, the row "width" of ``paper_constants``.
    """
    if min(n, depth) < 1:
        raise OptionError(f"linear_width.table1: n and depth must be at least 1, got {n} and {depth}.")
    rows = [Demand(*words, None if order is None else order(n, depth)) for *words, order in ORDERS]
    if claimed_width is not None:
        rows.append(Demand("B", "ResNet", "smooth", "quadratic", "K n (6.2), claimed", claimed_width))
    return tuple(rows)


def table1_text(rows: tuple[Demand, ...]) -> str:
    """The rows as a table."""
    heads = ("paper", "network", "activation", "loss", "order of the width", "at constant 1")
    return table_of(
        heads,
        (
            (
                r.reference,
                r.network,
                r.activation,
                r.loss,
                r.order,
                "not stated" if r.width is None else f"{r.width:.3g}",
            )
            for r in rows
        ),
    )
