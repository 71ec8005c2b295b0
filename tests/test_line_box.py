"""Holding vectors to the pixels on one axis: against dense matrices, and against the exact maximum on that axis."""

import math
import random

import numpy as np
import oracles
import pytest
import torch
from test_operator_norm import CASES, ORACLE, fill, matrix_norm
from torch import nn

from trainable_nn.linop import line_box, operator_norm, operator_norm_at_most
from trainable_nn.linop.grid_choice import choose_grid
from trainable_nn.linop.layers import read_layer
from trainable_nn.linop.operator_norm import Prepared
from trainable_nn.linop.symbol import frequencies, symbol_of
from trainable_nn.linop.symbol_gram import gram_of

F64, C128 = torch.float64, torch.complex128
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# axes, (in, out, taps), arguments, sizes: one place is free on some axis of each
GEOMETRIES = {
    "one axis": (1, (9, 7, 3), {"padding": 1}, (4,)),
    "two axes": (2, (5, 6, 3), {"padding": 1}, (4, 4)),
    "the shorter one": (2, (6, 4, 3), {"padding": 1}, (5, 3)),
    "three axes": (3, (3, 3, 3), {"padding": 1}, (2, 3, 3)),
    "stride": (2, (4, 9, 3), {"padding": 1, "stride": 2}, (7, 7)),
    "more outputs": (2, (3, 14, 3), {"padding": 1}, (4, 3)),
}


def case(geometry: str, kind: str, seed: int):
    """A convolution, its sizes, its Gram matrices, the grid, the box, and the factor of a bound's root."""
    count, (inputs, outputs, taps), arguments, sizes = GEOMETRIES[geometry]
    torch.manual_seed(seed)
    conv = KINDS[count](inputs, outputs, taps, bias=False, dtype=F64, **arguments)
    if kind == "random":
        nn.init.normal_(conv.weight)
    elif kind == "low rank":
        left, right = torch.randn(outputs, 2, dtype=F64), torch.randn(2, *conv.weight.shape[1:], dtype=F64)
        conv.weight.data = torch.einsum("or,ri...->oi...", left, right)
    elif kind == "smooth":  # the largest values at neighbouring frequencies, of nearly one direction
        conv.weight.data.abs_()
    one = Prepared.of(read_layer(conv, sizes))
    symbol = symbol_of(one.kernel, one.positions, tuple(axis.stride for axis in one.layer.axes))
    places, twists = tuple(c.places for c in one.circles), tuple(seed >> a & 1 for a in range(count))
    choice = choose_grid(symbol, [(places, twists)], [])
    box = tuple(c.box[symbol.by_inputs] for c in one.circles)
    gram = gram_of(symbol, len(frequencies(*choice.grid)))
    return conv, sizes, gram, choice, box, math.ldexp(1.0, one.exponent)


def exact_maximum(gram, grid, axis: int) -> float:
    """max y^* G y over y of norm 1 with sum_f y_f = 0 on each line along the axis, by eigenvalues of dense matrices."""
    turn, values = 2 * np.array(grid[0]), {}
    for part, grams in gram.chunks(grid):
        for m, g in zip(part, grams):
            values[tuple((-m % turn).tolist())] = g.conj()
            values[tuple(m.tolist())] = g
    lines = {}
    for m, g in values.items():
        lines.setdefault((*m[:axis], *m[axis + 1 :]), []).append(g)
    most = 0.0
    for line in lines.values():
        places, c = len(line), gram.channels
        ones = torch.ones(places, 1, dtype=F64) / math.sqrt(places)
        free = torch.linalg.qr(torch.cat([ones, torch.eye(places, dtype=F64)[:, 1:]], 1))[0][:, 1:]
        held = torch.kron(free.to(C128).contiguous(), torch.eye(c, dtype=C128))
        most = max(most, float(torch.linalg.eigvalsh(held.mH @ torch.block_diag(*line) @ held)[-1]))
    return most


def axis_of(choice, box) -> int:
    return min((n, a) for a, (n, pixels) in enumerate(zip(choice.grid[0], box)) if n == pixels + 1)[1]


@pytest.mark.parametrize("kind", ["random", "low rank", "smooth"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_level_is_proved_only_above_the_exact_maximum_and_the_dense_norm(geometry, kind, monkeypatch):
    proved, refused, below_circle = 0, 0, 0
    for seed in range(8):
        conv, sizes, gram, choice, box, scale = case(geometry, kind, seed)
        exact = exact_maximum(gram, choice.grid, axis_of(choice, box))
        truth = oracles.norm_of(oracles.matrix_of(conv, (conv.in_channels, *sizes)))
        assert math.sqrt(exact) * scale >= truth * (1 - 1e-12)
        for share in (0.3, 0.7, 0.9, 0.97, 0.999999, 1.00001, 1.02, 1.1):
            monkeypatch.setattr(line_box, "LEVEL", share * exact / choice.estimate)
            found = line_box.line_maximum(gram, choice, box)
            assert found >= exact * (1 - 1e-13), (seed, share)
            proved += found < math.inf
            refused += share < 1.0
            below_circle += found < choice.estimate * 0.99
            if found < math.inf:
                assert found <= share * exact * (1 + 1e-6)
                assert math.sqrt(found) * scale >= truth * (1 - 1e-12)
    assert proved >= 8 and refused == 40
    if kind == "random":
        assert below_circle >= 8


def random_case(rng: random.Random):
    """A zero-padded convolution with a place free on some axis of its circle, for which a level may be proved."""
    while True:
        count = rng.choice((1, 2, 2, 3))
        most = {1: 16, 2: 8, 3: 3}[count]
        taps = tuple(rng.choice((1, 2, 3, 3, 3, 4)) for _ in range(count))
        arguments = {"padding": tuple(rng.randint(0, t - 1) for t in taps), "stride": rng.choice((1, 1, 1, 2))}
        sizes = tuple(rng.randint(2, 5) for _ in range(count))
        if any(n + 2 * p < t for n, p, t in zip(sizes, arguments["padding"], taps)):
            continue
        shape = rng.randint(1, most), rng.randint(1, most)
        conv = KINDS[count](*shape, taps, bias=False, dtype=F64, **arguments)
        fill(conv.weight, rng)
        one = Prepared.of(read_layer(conv, sizes))
        if one.exponent is None or one.uses < 2:
            continue
        symbol = symbol_of(one.kernel, one.positions, tuple(axis.stride for axis in one.layer.axes))
        places, box = tuple(c.places for c in one.circles), tuple(c.box[symbol.by_inputs] for c in one.circles)
        if all(c.open for c in one.circles) and any(n == b + 1 and n <= 6 for n, b in zip(places, box)):
            choice = choose_grid(symbol, [(places, tuple(rng.randint(0, 1) for _ in places))], [])
            return conv, sizes, gram_of(symbol, len(frequencies(*choice.grid))), choice, box, one.exponent


@pytest.mark.parametrize("batch", range(4))
def test_no_level_below_the_dense_norm_is_proved(batch, monkeypatch):
    """The whole sweep: OPERATOR_NORM_CASES=10000."""
    rng, proved, tight = random.Random(batch), 0, 0.0
    for _ in range(CASES // 40):
        conv, sizes, gram, choice, box, exponent = random_case(rng)
        truth = matrix_norm(conv, conv.in_channels, sizes)
        for _ in range(3):
            monkeypatch.setattr(line_box, "LEVEL", rng.uniform(0.6, 1.02))
            found = line_box.line_maximum(gram, choice, box)
            assert math.sqrt(found) >= math.ldexp(truth, -exponent) * ORACLE, (conv, sizes)
            proved += found < choice.estimate
            tight = max(tight, math.ldexp(truth, -exponent) / math.sqrt(found))
    assert proved > CASES // 400 and tight > 0.95


def test_with_every_place_in_use_or_several_free_nothing_is_claimed():
    _, _, gram, choice, box, _ = case("two axes", "random", 0)
    assert line_box.line_maximum(gram, choice, box) < math.inf
    for other in ((5, 5), (3, 3), (5, 3)):
        assert line_box.line_maximum(gram, choice, other) == math.inf


def test_a_free_place_that_is_none_breaks_the_law(monkeypatch):
    """Vectors that fill the circle reach its maximum: taken for held ones, they go past the level."""
    broken = 0
    for seed in range(8):
        torch.manual_seed(seed)
        conv = nn.Conv1d(12, 12, 3, 1, 1, bias=False, dtype=F64, padding_mode="circular")
        one = Prepared.of(read_layer(conv, (5,)))
        symbol = symbol_of(one.kernel, one.positions, (1,))
        choice = choose_grid(symbol, [((5,), (0,))], [])
        monkeypatch.setattr(line_box, "LEVEL", 0.98)
        found = line_box.line_maximum(gram_of(symbol, 3), choice, (4,))
        truth = oracles.norm_of(oracles.matrix_of(conv, (12, 5)))
        broken += math.ldexp(math.sqrt(found), one.exponent) < truth
    assert broken > 4


def test_what_rounding_may_hide_is_not_claimed():
    _, _, gram, choice, box, _ = case("two axes", "random", 1)
    least = line_box.line_maximum(gram, choice, box)
    object.__setattr__(gram, "error", 1e-3 * least)
    assert line_box.line_maximum(gram, choice, box) == math.inf


def test_the_rounding_that_is_counted_is_there():
    """rho by 50 digits is at most what is proved of it, and the terms beside the computed sum are not empty."""
    mp = pytest.importorskip("mpmath")
    rng = random.Random(0)
    with mp.workdps(50):
        for _ in range(5):
            c, q = 4, 2
            a = torch.randn(c, c, dtype=C128, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
            n = a @ a.mH + 1e-3 * torch.eye(c, dtype=C128)
            line = []
            for _ in range(3):
                u = torch.randn(c, q, dtype=C128) * 1e-2
                line.append(line_box._Raised(n, torch.linalg.cholesky(n), u, float(torch.linalg.norm(n)), 0.0, 0.0))
            lower, upper = 0.0, 1e3  # of what the vectors may be multiplied with, so that rho stays below 1
            for _ in range(60):
                middle = (lower + upper) / 2
                scaled = [line_box.replace(at, u=at.u * middle) for at in line]
                holds = line_box._holds(scaled, 1e-10, 1e-14, 9e-11)
                lower, upper = (middle, upper) if holds else (lower, middle)
            assert 0 < lower < 999
            exact = exact_rho(mp, [line_box.replace(at, u=at.u * lower) for at in line])
            assert 0.999 <= exact <= 1


def exact_rho(mp, line) -> float:
    """rho of the best L."""
    to = lambda t: mp.matrix([[mp.mpc(complex(z)) for z in row] for row in t.tolist()])
    inverses, us = [mp.inverse(to(at.n)) for at in line], [to(at.u) for at in line]
    c, q = us[0].rows, us[0].cols
    total = sum(inverses[1:], inverses[0])
    widths = q * len(line)
    right = mp.matrix(c, widths)
    for i, (inverse, u) in enumerate(zip(inverses, us)):
        moved = inverse * u
        for r in range(c):
            for k in range(q):
                right[r, i * q + k] = -moved[r, k]
    shared = mp.inverse(total) * right
    found = mp.matrix(widths, widths)
    for i, (inverse, u) in enumerate(zip(inverses, us)):
        v = shared.copy()
        for r in range(c):
            for k in range(q):
                v[r, i * q + k] += u[r, k]
        found += v.H * inverse * v
    return float(max(mp.eighe(found, eigvals_only=True)))


def test_a_wide_convolution_of_a_small_image_is_bounded_closer_than_on_the_circle(monkeypatch):
    """128 random channels at 4 x 4, where the circle costs 10 %."""
    for seed in range(2):
        torch.manual_seed(seed)
        conv = nn.Conv2d(128, 128, 3, 1, 1, bias=False, dtype=F64)
        nn.init.normal_(conv.weight)
        truth = oracles.norm_of(oracles.matrix_of(conv, (128, 4, 4)))
        held = operator_norm_at_most(conv, (4, 4))
        with monkeypatch.context() as patch:
            patch.setattr(operator_norm, "line_maximum", lambda *arguments: math.inf)
            circle = operator_norm_at_most(conv, (4, 4))
        assert truth <= held <= 0.99 * circle
        assert held <= 1.1 * truth
