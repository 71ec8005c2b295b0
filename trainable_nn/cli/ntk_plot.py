"""The figure of `ntk`: the kernel's eigenvalues, and the loss that they predict beside the one measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..plotting import descent_curves, kernel_spectrum, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .ntk import Outcome


def kernel_figure(outcome: Outcome) -> Figure:
    figure = new_figure(9.2, 3.9)
    spectrum, losses = figure.subplots(1, 2)
    values, title = outcome.prediction.eigenvalues.tolist(), f"condition number {outcome.prediction.condition_number:.3g}"
    kernel_spectrum(spectrum, values, noise_floor=outcome.noise_floor, title=title)
    curves = {"predicted": outcome.predicted, "measured": outcome.measured}
    descent_curves(losses, curves, title=f"step size {outcome.step_size:.3g}")
    losses.set_ylabel("mean squared loss")
    figure.suptitle(
        f"Tangent kernel: {outcome.samples} images, {outcome.outputs} outputs, {outcome.parameters:,} parameters"
    )
    return figure
