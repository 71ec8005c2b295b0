r"""Gradient descent where the gradient is bounded from below: the trajectory theorems, as arithmetic on their constants.

Setting: loss l(theta) = gamma(F(theta)), e = l - inf gamma, s(theta) = sigma_min(DF) over the output side, so that
\|\|grad l\|\|^2 = <DF DF^T grad gamma, grad gamma> >= s^2 \|\|grad gamma\|\|^2 (Theorem 2.4).

On a ball B(theta_0, R) let l be L-smooth, and s >= alpha(d) at distance d, alpha falling. A step eta = c / L,
0 < c < 2, inside the ball gives e - e' >= (1 - c / 2) eta \|\|grad l\|\|^2, also when it is shortened. With D = eta
\|\|grad l\|\| the length of the step, and S the path so far (S >= d):

* mu-PL: sqrt e - sqrt e' >= (e - e') / (2 sqrt e) >= (1 - c / 2) (sqrt mu / 2) alpha(S) D. Summed, alpha falling:
  int_0^S alpha <= 2 sqrt(e_0 / mu) / (1 - c / 2). So the path ends within R as soon as int_0^R alpha is at least that,
  by continuity no step leaves, and e' <= (1 - (1 - c / 2) eta mu alpha(R)^2) e.
* \|\|grad gamma\|\|^2 >= a e^2: ln e - ln e' >= (e - e') / e >= (1 - c / 2) sqrt a alpha(S) D, so down to e = goal the
  path ends within R as soon as int_0^R alpha >= ln(e_0 / goal) / (sqrt a (1 - c / 2)), and
  1 / e' >= 1 / e + (1 - c / 2) eta a alpha(R)^2.

With alpha constant and c = 1 the first is Proposition R of THEORY 4 (II.1.8). Integrating alpha instead closes at
twice the residual. All of it is about exact arithmetic with the full batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .costs import Cost
from .rounding import down, product_up, up

SHARES = (1.0, 0.5, 0.25, 0.1)  # c = eta L; a small one needs a smaller ball, so it is tried where 1 does not close
OVERSHOOT = 3e-3
ROUNDS = 16  # of the search for the smallest ball; each asks once for the constants on a ball
Constants = Callable[[float], tuple[float, float]]  # R -> (sup ||DF||, Lipschitz constant of DF) on B(theta_0, R)
Floor = float | Callable[[float], float]


@dataclass(frozen=True)
class Sigma:
    """A lower bound of s at distance d: max(floor, centre - lipschitz * d); ``floor`` holds everywhere."""

    centre: float
    lipschitz: float
    floor: float = 0.0

    def at(self, distance: float) -> float:
        return max(self.floor, down(self.centre - up(self.lipschitz * distance), 2), 0.0)

    def integral(self, distance: float) -> float:
        """A lower bound of int_0^distance: a triangle cut off where the floor takes over."""
        if self.centre <= self.floor:
            return down(self.floor * distance)
        bend = distance
        if self.lipschitz > 0.0:
            bend = min(distance, (self.centre - self.floor) / self.lipschitz)
        falling = bend * (self.centre - 0.5 * self.lipschitz * bend)
        return down(falling + self.floor * max(distance - bend, 0.0), 8)


@dataclass(frozen=True)
class Descent:
    """Plain gradient descent with one step size, and what is proved of it from its starting point.

    ``excess`` is e_0, ``goal`` the excess down to which it holds: 0, or above 0 where the infimum is at infinity.
    ``share`` is eta L. ``sigma`` bounds sigma_min(DF) on the ball of ``radius``, which the path never leaves.
    """

    excess: float
    goal: float
    radius: float
    step_size: float
    smoothness: float
    share: float
    sigma: float
    jacobian: float
    jacobian_lipschitz: float
    domination: float  # (mu or a) sigma^2, of e or of e^2
    squared: bool

    @property
    def gain(self) -> float:
        """(1 - c / 2) eta times the domination: what one step takes of e, or adds to 1 / e."""
        return down((1.0 - self.share / 2.0) * self.step_size * self.domination, 3)

    @property
    def rate(self) -> float | None:
        """q with e_t <= q^t e_0; None where only 1 / e grows."""
        return None if self.squared else min(1.0, up(1.0 - self.gain))

    def excess_after(self, steps: int) -> float:
        """An upper bound of e_t; the bound stays at the goal."""
        if self.excess == 0.0:
            return 0.0
        if self.squared:
            return max(self.goal, up(1.0 / down(1.0 / self.excess + steps * self.gain, 3), 2))
        exponent = -steps * self.gain  # (1 - g)^t <= e^(-g t)
        return up(self.excess * math.exp(exponent), 4)

    def steps_to(self, excess: float) -> int | None:
        """Steps after which e_t <= excess is proved; None where that is not proved for any."""
        if excess >= self.excess:
            return 0
        if excess < self.goal or excess < 0.0 or self.gain <= 0.0 or excess == 0.0:
            return None
        needed = 1.0 / excess - 1.0 / self.excess if self.squared else math.log(self.excess / excess)
        steps = needed / self.gain * (1.0 + 1e-9)
        return math.ceil(steps) if steps < 2**62 else None


@dataclass(frozen=True)
class Gap:
    """Why no ball was found: at ``radius``, the path could be ``needed`` long in int alpha, and ``reached`` is there.

    ``share`` is eta L there where the step was given and is too long: 2 or more.
    """

    radius: float
    reached: float
    needed: float
    share: float = 0.0


def descend(
    cost: Cost, excess: float, centre: float, floor: Floor, constants: Constants, goal: float = 0.0
) -> Descent | Gap:
    """The proved descent with the longest step for which a ball closes, or by how much none does.

    Shape:
        centre: lower bound of sigma_min(DF(theta_0)). floor: R -> lower bound of sigma_min(DF) on B(theta_0, R), falling
        in R; or one number that holds everywhere.
        goal: excess to reach; above 0 for a cost without ``pl``.
    Cost:
        At most len(SHARES) * (ROUNDS + 1) calls of ``constants``.
    """
    lowest = floor if callable(floor) else lambda radius: floor
    if excess <= goal:
        jacobian, lipschitz = constants(0.0)
        return _descent(cost, excess, goal, 0.0, 1.0, Sigma(centre, lipschitz, lowest(0.0)), jacobian)
    gap = _hopeless(cost, excess, centre, lowest, constants, goal)
    for share in SHARES if gap is None else ():
        outcome = _close(cost, excess, centre, lowest, constants, goal, share)
        if isinstance(outcome, Descent):
            return outcome
        elif gap is None or outcome.reached * gap.needed > gap.reached * outcome.needed:
            gap = outcome
    return gap


def descend_with(
    step: float, cost: Cost, excess: float, centre: float, floor: Floor, constants: Constants, goal: float = 0.0
) -> Descent | Gap:
    """The same for a step that is given: c = step * L(R) grows with the ball, and must stay below 2.

    Cost:
        At most ROUNDS calls of ``constants``.
    Raises:
        ValueError: the step is not positive and finite.
    """
    if not 0.0 < step < math.inf:
        raise ValueError(f"descend_with: the step must be positive and finite, got {step}. Give one.")
    lowest = floor if callable(floor) else lambda radius: floor
    radius = 0.0
    gap = Gap(0.0, 0.0, math.inf)
    for attempt in range(ROUNDS):
        jacobian, lipschitz = constants(radius)
        share = up(step * loss_smoothness(cost, excess, jacobian, lipschitz))
        if not share < 2.0:
            return Gap(radius, gap.reached, gap.needed, share) if math.isfinite(share) else gap
        sigma = Sigma(centre, lipschitz, lowest(radius))
        needed = path_needed(cost, excess, goal, share) if excess > goal else 0.0
        reached = sigma.integral(radius)
        if reached >= needed:
            return _descent(cost, excess, goal, radius, share, sigma, jacobian, step)
        gap = Gap(radius, reached, needed)
        wanted = _radius_for(needed, sigma)
        if not (math.isfinite(wanted) and sigma.at(0.0) > 0.0):
            return _at_its_best(gap, sigma)
        radius = up(max(wanted, radius) * (1.0 + OVERSHOOT * 1.5**attempt))
    return gap


def _at_its_best(gap: Gap, sigma: Sigma) -> Gap:
    """The gap with all that these constants could reach, on any ball: sigma falls to nothing before it is enough."""
    if sigma.lipschitz <= 0.0 or sigma.floor > 0.0:
        return gap
    return Gap(
        up(sigma.centre / sigma.lipschitz), max(gap.reached, sigma.centre**2 / (2.0 * sigma.lipschitz)), gap.needed
    )


def _hopeless(cost, excess, centre, floor, constants, goal) -> Gap | None:
    """A gap after one look, where even vanishing steps do not close a ball; the floor's part by a rough look."""
    needed = path_needed(cost, excess, goal, 0.0)
    start = max(centre, floor(0.0))
    if not (start > 0.0 and math.isfinite(needed)):
        return Gap(0.0, 0.0, needed)
    radius = needed / start  # no smaller ball holds the path, and Lip(DF) only grows with the ball
    jacobian, lipschitz = constants(radius)
    if not (math.isfinite(jacobian) and math.isfinite(lipschitz)):
        return Gap(radius, 0.0, needed)
    reached = centre**2 / (2.0 * lipschitz) if lipschitz > 0.0 else math.inf
    rough = 8.0 * radius * floor(8.0 * radius)
    if floor(math.inf) > 0.0 or reached + rough >= needed:
        return None
    return Gap(radius, Sigma(centre, lipschitz, floor(radius)).integral(radius), needed)


def path_needed(cost: Cost, excess: float, goal: float, share: float) -> float:
    """An upper bound of what int alpha must reach; infinite for a cost whose gradient has no lower bound."""
    factor = 1.0 - share / 2.0
    if cost.pl > 0.0:
        return up(2.0 * math.sqrt(excess / cost.pl) / factor, 6)
    if cost.pl_squared is not None and goal > 0.0:
        return up(math.log(excess / goal) / (math.sqrt(cost.pl_squared(excess)) * factor), 8)
    return math.inf


def _close(cost, excess, centre, floor, constants, goal, share) -> Descent | Gap:
    """Raise R to what the constants on B(R) demand, until B(R) holds it: the least fixed point, from below."""
    needed = path_needed(cost, excess, goal, share)
    start = max(centre, floor(0.0))
    if not (start > 0.0 and math.isfinite(needed)):
        return Gap(0.0, 0.0, needed)
    radius = up(needed / start, 2)
    gap = Gap(radius, 0.0, needed)
    for attempt in range(ROUNDS):
        jacobian, lipschitz = constants(radius)
        if not (math.isfinite(jacobian) and math.isfinite(lipschitz)):
            return gap
        sigma = Sigma(centre, lipschitz, floor(radius))
        reached = sigma.integral(radius)
        if reached >= needed:
            return _descent(cost, excess, goal, radius, share, sigma, jacobian)
        if reached > gap.reached:
            gap = Gap(radius, reached, needed)
        wanted = _radius_for(needed, sigma)
        if not math.isfinite(wanted):
            return gap
        radius = up(max(wanted, radius) * (1.0 + OVERSHOOT * 1.5**attempt))  # ever bolder, so that it ends
    return gap


def _radius_for(needed: float, sigma: Sigma) -> float:
    """The R at which the integral reaches ``needed`` if the constants stayed as they are; infinity if none does."""
    total = sigma.centre**2 - 2.0 * sigma.lipschitz * needed
    if sigma.centre > sigma.floor and (sigma.floor == 0.0 or total >= sigma.floor**2):  # before the floor takes over
        if sigma.lipschitz == 0.0:
            return needed / sigma.centre
        return 2.0 * needed / (sigma.centre + math.sqrt(total)) if total >= 0.0 else math.inf
    if sigma.floor <= 0.0:
        return math.inf
    before = 0.5 * (max(sigma.centre, sigma.floor) ** 2 - sigma.floor**2) / max(sigma.lipschitz, 1e-300)
    bend = max(sigma.centre - sigma.floor, 0.0) / max(sigma.lipschitz, 1e-300)
    return bend + max(needed - before, 0.0) / sigma.floor


def _descent(
    cost, excess, goal, radius, share, sigma: Sigma, jacobian: float, step: float | None = None
) -> Descent | Gap:
    smoothness = loss_smoothness(cost, excess, jacobian, sigma.lipschitz)
    worst = sigma.at(radius)
    squared = cost.pl == 0.0
    factor = cost.pl_squared(excess) if squared and cost.pl_squared else cost.pl
    if step is None:
        step = down(share / smoothness, 2) if smoothness > 0.0 else 0.0
    domination = down(factor * worst * worst, 3)
    values = (radius, step, smoothness, share, worst, jacobian, sigma.lipschitz, domination, squared)
    if not all(map(math.isfinite, values)) or step <= 0.0:
        return Gap(radius, 0.0, path_needed(cost, excess, goal, share))
    return Descent(excess, goal, *values)


def loss_smoothness(cost: Cost, excess: float, jacobian: float, jacobian_lipschitz: float) -> float:
    r"""L = sup \|\|hess gamma\|\| sup \|\|DF\|\|^2 + sup \|\|grad gamma\|\| Lip(DF), where gamma - inf <= excess (II.2.7)."""
    curved = cost.gradient_at_most(excess) * jacobian_lipschitz if jacobian_lipschitz else 0.0
    return up(cost.smoothness * jacobian * jacobian + curved, 5)


def sigma_from_layers(first: float, steps: Sequence[tuple[float, float]]) -> float:
    r"""sigma_min(DF) >= sigma(D f_1) prod (sigma(I_l) - \|\|J g_l\|\|): Proposition 4.6 with the first layer's term alone.

    Shape:
        steps: (sigma(I_l), upper bound of \|\|J g_l\|\|) for l >= 2, singular values over the output side.
    Source:
        Paper A, Proposition 4.6, Theorem 4.7, Lemma A.8 (Weyl).
    """
    total = first
    for sigma, rho in steps:
        total = down(total * down(sigma - rho, 1), 1) if sigma > rho else 0.0
    return total


def a_posteriori(excess: float, steps: Iterable[tuple[float, float, float]]) -> float:
    """e_T <= e_0 prod (1 - eta (1 - eta L / 2) m) for steps (eta, L, m), m the domination at theta_t, L on the segment.

    Raises:
        ValueError: a step is not below 2 / L, so nothing is proved of it.
    Source:
        II.4.1 item 5; paper A (37) with its factor corrected.
    """
    factors = [excess]
    for eta, smoothness, domination in steps:
        if not 0.0 <= eta * smoothness < 2.0:
            raise ValueError(
                f"a_posteriori: a step of {eta} is not below 2 / L = {2 / smoothness}. Take smaller steps."
            )
        factors.append(min(1.0, up(1.0 - down(eta * (1.0 - eta * smoothness / 2.0) * domination, 6), 1)))
    return product_up(factors)
