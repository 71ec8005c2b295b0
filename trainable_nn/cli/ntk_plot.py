"""The figure of `ntk`: the kernel's eigenvalues, and the loss that they predict beside the one measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..plotting import STYLES, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .ntk import Outcome


def kernel_figure(outcome: Outcome) -> Figure:
    figure = new_figure(9.2, 3.9)
    spectrum, losses = figure.subplots(1, 2)
    _draw_spectrum(spectrum, outcome)
    _draw_losses(losses, outcome)
    figure.suptitle(
        f"Tangent kernel: {outcome.samples} images, {outcome.outputs} outputs, {outcome.parameters:,} parameters"
    )
    return figure


def _draw_spectrum(axes: Axes, outcome: Outcome) -> None:
    values = [value for value in reversed(outcome.prediction.eigenvalues.tolist()) if value > 0]
    style = {key: value for key, value in STYLES[0].items() if key != "marker"}
    axes.plot(range(1, len(values) + 1), values, label="eigenvalues", linewidth=1.8, **style)
    axes.axhline(outcome.noise_floor, color="#222222", linestyle=":", linewidth=1.2, label="noise floor (estimate)")
    axes.set_yscale("log")
    axes.set_xlabel("rank")
    axes.set_ylabel("eigenvalue of K")
    axes.set_title(f"condition number {outcome.prediction.condition_number:.3g}")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize="small")


def _draw_losses(axes: Axes, outcome: Outcome) -> None:
    for style, (name, values) in zip(STYLES, (("predicted", outcome.predicted), ("measured", outcome.measured))):
        shown = {key: value for key, value in style.items() if key != "marker"}
        axes.plot(range(len(values)), values, label=name, linewidth=1.8, **shown)
    axes.set_yscale("log")
    axes.set_xlabel("step of gradient descent")
    axes.set_ylabel("mean squared loss")
    axes.set_title(f"step size {outcome.step_size:.3g}")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
