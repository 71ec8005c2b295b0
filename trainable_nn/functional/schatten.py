"""Schatten normalisation P(w) = gain * w (eps + L(w)^2)^(-1/2), L(w) a smooth bound of the operator norm; and its inverse."""

import math

import torch
from torch import Tensor

from ..linop import FrequencyGrid
from ..ops import squared_schatten_norm
from .inverse import TINY, _check_finite, _check_range, _largest, _stretch
from .normalise import check_constants, check_weight

MOST_POWER = 2**20


def schatten_norm(
    w: Tensor,
    eps: float = 1.0,
    power: int = 16,
    *,
    gain: float = 1.0,
    groups: int = 1,
    factor: float = 1.0,
    grid: FrequencyGrid | None = None,
) -> Tensor:
    r"""P(w) = gain * w (eps + L(w)^2)^(-1/2) with L = factor * S: \|\|P(w)\|\|_2 < gain / factor for every w.

    S(w) = (tr (W W^T)^p)^(1/(2p)), p = power, is the Schatten-2p norm of w as a matrix, from 1 to rank^(1/(2p)) times the
    spectral norm: p = 1 is the Frobenius norm. With a grid S is taken of the symbol of a convolution, and its factor
    counts too: the operator norm of the convolution with kernel P(w) is then below gain / factor for images of every size.
    P is analytic but at w = 0, where it is twice differentiable and D^2 P = 0 is continuous.

    Shape:
        w: (rows, ...), read as the matrix (rows, columns), or as ``groups`` of them beside each other, each normalised by
        itself -> the same, in w's dtype and memory format. All arithmetic is in float64.
    Units:
        factor: that of ``geometry_factor``, where w is a convolution's kernel and no grid is given.
    Cost:
        For an m x n matrix, m <= n: m^2 n + (log2(p) - 1) m^3 multiplications, and as many for the gradient; with a
        grid that much for each of its frequencies, in complex numbers.
    Raises:
        TypeError: w is not float16, bfloat16, float32 or float64.
        ValueError: eps outside [1e-30, 1e30], gain or factor not positive and finite, power no power of two, a
        grid for another power or kernel, or groups that don't divide the rows.
    Source:
        THEORY 5; the Frobenius case is paper A's weight normalisation of the whole matrix.
    """
    check_weight("schatten_norm", w)
    check_schatten("schatten_norm", w, eps=eps, gain=gain, power=power, groups=groups, factor=factor, grid=grid)
    if w.numel() == 0:
        return w * 1.0
    x = _wide(w)
    u, scale, squared = _scaled_norm(x, eps, power, groups, factor, grid, coarse_gradient=w.dtype != torch.float64)
    rho = gain * torch.rsqrt((math.sqrt(eps) / scale).square() + squared)
    return (u * _by_rows(rho, w)).to(w.dtype)


def schatten_norm_inverse(
    p: Tensor,
    eps: float = 1.0,
    power: int = 16,
    *,
    gain: float = 1.0,
    groups: int = 1,
    factor: float = 1.0,
    grid: FrequencyGrid | None = None,
    nearest: bool = False,
    where: str = "schatten_norm_inverse",
) -> Tensor:
    """w with P(w) = p, group by group: P only scales, so w = sqrt(eps) p (gain^2 - L(p)^2)^(-1/2).

    Shape:
        p: as w of ``schatten_norm`` -> the same, in p's dtype and memory format.
    Raises:
        ConversionError: an entry is NaN or infinite, or L(p) is not below gain for some group and ``nearest`` is
        False; with ``nearest=True`` such a group is scaled to the largest L below gain.
    """
    check_weight(where, p)
    check_schatten(where, p, eps=eps, gain=gain, power=power, groups=groups, factor=factor, grid=grid)
    _check_finite(where, p)
    if p.numel() == 0:
        return p.detach().clone()
    wide = _wide(p.detach())
    _, scale, squared = _scaled_norm(wide, TINY, power, groups, factor, grid)
    bound = scale * squared.sqrt()
    if nearest:
        reached = bound.clamp(max=_largest(gain, p.dtype))
        wide, bound = wide * _by_rows(reached / bound.clamp(min=TINY), p), reached
    _check_range(where, "group", bound, gain)
    return (_by_rows(_stretch(bound, eps, gain), p) * wide).to(p.dtype)


def check_schatten(
    where: str, w: Tensor, *, eps: float, gain: float, power: int, groups: int, factor: float, grid: FrequencyGrid | None
) -> None:
    """Raise ValueError, naming ``where``, unless these are constants of a Schatten normalisation of w."""
    check_constants(where, eps=eps, gain=gain)
    check_power(where, power)
    if not 0.0 < factor < math.inf:
        raise ValueError(f"{where}: factor must be positive and finite, got {factor}.")
    if w.dim() < 2 or groups < 1 or w.shape[0] % groups:
        raise ValueError(
            f"{where}: a weight of shape {tuple(w.shape)} is not {groups} matrices beside each other. Give two "
            f"dimensions or more, and groups that divide the first."
        )
    if grid is not None and grid.power != power:
        raise ValueError(f"{where}: the grid was made for power={grid.power}, got power={power}. Make one for it.")
    if grid is not None and len(grid.phases) != math.prod(w.shape[2:]):
        raise ValueError(
            f"{where}: the grid was made for {len(grid.phases)} taps, and the weight of shape {tuple(w.shape)} has "
            f"{math.prod(w.shape[2:])}. Make one for its kernel size."
        )


def check_power(where: str, power: int) -> None:
    """Raise ValueError, naming ``where``, unless the power is 1, 2, 4, ... up to the largest."""
    if not isinstance(power, int) or not 1 <= power <= MOST_POWER or power & (power - 1):
        raise ValueError(f"{where}: power must be 1, 2, 4, ... up to {MOST_POWER}, got {power!r}.")


def _wide(w: Tensor) -> Tensor:
    """In float64, or in float32 where the device has no more."""
    return w.to(torch.float32 if w.device.type == "mps" else torch.float64)


def _scaled_norm(
    x: Tensor,
    eps: float,
    power: int,
    groups: int,
    factor: float,
    grid: FrequencyGrid | None,
    *,
    coarse_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """u = x / scale, the scale of each group, and L(u)^2.

    The scale is the largest entry, or sqrt(eps): no square overflows. It is a constant to autograd, as no value depends on it.
    """
    rows = x.detach().reshape(groups, -1)
    scale = rows.abs().amax(1).clamp(min=math.sqrt(eps))
    u = x / _by_rows(scale, x)
    if grid is None:
        blocks, copies = (u.reshape(groups, 1, x.shape[0] // groups, -1), None), 1.0
    else:
        kernel = u.reshape(groups, x.shape[0] // groups, x.shape[1], -1)
        blocks, copies, factor = grid.symbol(kernel), grid.copies, factor * grid.factor
    squared = squared_schatten_norm(*blocks, power, copies, coarse_gradient=coarse_gradient)
    return u, scale, factor**2 * squared


def _by_rows(value: Tensor, w: Tensor) -> Tensor:
    """One number for each group, as one for each row of w."""
    rows = value[:, None].expand(-1, w.shape[0] // value.shape[0]).reshape(-1)
    return rows.reshape(-1, *[1] * (w.dim() - 1))
