"""Which of some grids of frequencies has the least maximum of ||M(w)||, by estimates; nothing here enters a bound.

The points of a coarse grid get a few steps of Lanczos' algorithm, those of each grid too where the coarse one is high
beside them, and what may still be a grid's maximum gets more.
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .rough_symbol import Lanczos, RoughSymbol
from .symbol import REMEMBERED, Grid, Peak, Symbol, angles, frequencies

STEPS, WARM_STEPS, MORE_STEPS = 8, 6, 7  # of Lanczos: at first, from a neighbour's vector, and then
COARSE = 6  # points of the coarse grid for each step between the outermost taps
NEAR = 0.1  # below its maximum the coarse grid is not high
FEW = 12  # high points
SPREADS = (0.03,)  # what the estimates may still differ by, after WARM_STEPS
SETTLED = 1e-4  # what the last step added to the estimates, relatively, where no more are made
EQUAL = 128  # channels for which looking at a frequency costs what proving costs, or so


@dataclass(frozen=True)
class Choice:
    """A grid, an estimate of its maximum of ||M(w)||^2, and where it is."""

    grid: Grid
    estimate: float
    peak: Peak
    rough: RoughSymbol

    def around_peak(self, steps: np.ndarray) -> tuple[float, Tensor]:
        """The second eigenvalue at the peak over the first; and top vectors there and at the points around it, weighted.

        Shape:
            steps: b_j of the taps.  vectors: (c, points), each times (its eigenvalue / the largest)^4; of one group.
        """
        here = self.peak.numerators[None]
        beside = 2 * np.array(list(itertools.product((-1, 0, 1), repeat=len(self.grid[0]))))
        points = (here + beside) % (2 * np.array(self.grid[0]))
        run = Lanczos(self.rough, angles(points, steps, self.grid[0]), keep_basis=True).run(WARM_STEPS)
        values, vectors = (x[0] for x in run.tops())
        middle = vectors[:, len(points) // 2, None]
        top = middle / torch.linalg.vector_norm(middle)
        rest = Lanczos(self.rough, angles(here, steps, self.grid[0]), without=top).run(WARM_STEPS)
        second = float(rest.values()) / max(float(values[len(points) // 2]), 1e-30)
        return second, vectors * (values / values.max().clamp_min(1e-30)) ** 4


def choose_grid(symbol: Symbol, grids: list[Grid], longer: list[Grid]) -> Choice:
    """The grid that promises the least; the longer ones are tried too where few points are high.

    Cost:
        16 k c width flops for k taps, each step and frequency, in low precision: 8 to 20 steps.
    """
    rough, (steps, _) = RoughSymbol(symbol), symbol.steps
    reach = steps.max(0) - steps.min(0)
    coarse = (tuple(min(n, max(1, COARSE * int(r))) for n, r in zip(grids[0][0], reach)), (0,) * len(reach))
    run = Lanczos(rough, angles(frequencies(*coarse), steps, coarse[0]), keep_basis=True).run(STEPS)
    values, vectors = run.tops()
    map_of = _Map(coarse, values.amax(0).numpy())
    most = int(len(frequencies(*grids[0])) * symbol.channels / EQUAL)
    if map_of.beside(grids[0], FEW + 1)[0].shape[0] <= FEW:
        grids = grids + longer
    most = max(FEW, most // len(grids))
    beside = [map_of.beside(grid, most) for grid in grids]
    points = np.concatenate([p for p, _, _ in beside])
    owners = np.repeat(np.arange(len(grids)), [len(p) for p, _, _ in beside])
    columns, turned = (torch.from_numpy(np.concatenate(x)) for x in list(zip(*beside))[1:])
    start = vectors[..., columns]
    start = torch.where(turned, start.conj(), start)
    phase = torch.cat([angles(p, steps, g[0]) for (p, _, _), g in zip(beside, grids)])
    run = Lanczos(rough, phase, start=start).run(WARM_STEPS)
    for spread in SPREADS if symbol.channels > STEPS else ():
        found = run.values().amax(0).numpy()
        tops = np.array([found[owners == n].max() if n in owners else np.inf for n in range(len(grids))])
        high = found >= (1 - spread) * tops[owners]
        kept = np.flatnonzero(high & (tops[owners] <= (1 + 2 * spread) * tops.min()))
        run, points, owners = run.restrict(kept), points[kept], owners[kept]
        if run.last_gain() > SETTLED:
            run.run(MORE_STEPS)
    values = run.values()
    found = values.amax(0).numpy()
    best = min(sorted(set(owners.tolist())), key=lambda n: found[owners == n].max())
    column = np.flatnonzero(owners == best)[found[owners == best].argmax()]
    return Choice(grids[best], float(found[column]), Peak(int(values[:, column].argmax()), points[column]), rough)


class _Map:
    """Values on a coarse grid without twists."""

    def __init__(self, grid: Grid, height: np.ndarray) -> None:
        self.grid, self.top = grid, height.max()
        self.height, self.number = np.zeros(grid[0]), np.zeros(grid[0], dtype=np.int64)
        self.turned = np.zeros(grid[0], dtype=bool)
        m = frequencies(*grid) // 2
        for turned, places in ((True, -m % np.array(grid[0])), (False, m)):
            at = tuple(places.T)
            self.height[at], self.number[at], self.turned[at] = height, np.arange(len(m)), turned

    def beside(self, grid: Grid, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The frequencies of a grid with a high point beside them, at most so many; its number; is it the opposite?"""
        kept = np.prod(grid[0]) <= REMEMBERED
        corners, shares = (_corners if kept else _corners.__wrapped__)(self.grid[0], grid)
        heights = self.height.ravel()[corners]
        order = np.argsort(-(shares * heights).sum(0), kind="stable")[:most]
        order = np.sort(order[heights.max(0)[order] >= (1 - NEAR) * self.top])
        at = corners[shares.argmax(0)[order], order]
        return frequencies(*grid)[order], self.number.ravel()[at], self.turned.ravel()[at]


@lru_cache(256)  # layers often have the same grids
def _corners(sizes: tuple[int, ...], grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the coarse points around each frequency of a grid, and their shares in it: (2^axes, frequencies)."""
    place = frequencies(*grid) / (2 * np.array(grid[0])) * sizes
    low = np.floor(place).astype(np.int64)
    corners = np.array(list(itertools.product((0, 1), repeat=len(sizes))))
    shares = np.array([np.where(c, place - low, 1 - place + low).prod(1) for c in corners])
    return np.array([np.ravel_multi_index(tuple(((low + c) % sizes).T), sizes) for c in corners]), shares
