"""A proved bound against a random direction: what is measured outside of what is proved is a fault of ours, and raises."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import CertificateError
from .problem import Problem
from .seen import Seen, backward_work

MOST_WORK = 3e9  # multiplications of the one product that is measured; a larger network goes without
ALLOWED = 1e-6


def check_by_draw(problem: Problem, layers: Sequence[Seen], upper: float | None, generator: torch.Generator | None) -> None:
    r"""Draw a unit direction v in the parameters, and raise if \|\|DF v\|\| is above ``upper`` >= \|\|DF\|\|.

    generator: for the draw; None draws the same direction each time. Networks that torch.func refuses, or that are too large, go without.

    Raises:
        CertificateError: the bound is wrong.
    """
    if upper is None or 2.0 * len(problem.inputs) * backward_work(layers, problem.parameters) > MOST_WORK:
        return
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    now = {name: p.detach() for name, p in problem.parameters.items()}
    v = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype, device=generator.device).cpu() for n, p in now.items()}
    length = sum(float(d.square().sum()) for d in v.values()) ** 0.5
    try:
        _, image = torch.func.jvp(problem.outputs_at, (now,), ({n: d / length for n, d in v.items()},))
    except Exception:  # noqa: BLE001, torch.func refuses some forwards, in many ways
        return
    found = float(image.norm())
    if found > upper * (1.0 + ALLOWED):
        raise CertificateError(
            f"certify: a direction was found in which the outputs move by {found:.9g}, above the proved bound {upper:.9g}. That "
            f"is a fault of this package, and no certificate is given. Report this model."
        )
