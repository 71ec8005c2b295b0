"""Figures of a comparison: loss curves and singular values, for the screen and for print."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, told apart by every eye; each line also differs in dash and mark, for grey print.
STYLES = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    {"color": "#222222", "linestyle": ":", "marker": "D"},
)
FEW = 60  # points that still have room for a mark each
ZERO = 1e-12  # singular values below this share of the largest are drawn as zero


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that no window system and no global state of matplotlib knows of."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            "plotting: matplotlib is not installed, and it draws the figures. "
            "Install it with: pip install 'trainable_nn[plot]'."
        ) from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def loss_curves(axes: Axes, losses: Mapping[str, Sequence[float]], *, steps: Mapping[str, Sequence[float]] = {}) -> None:
    """Training loss over epochs on a logarithmic axis; ``steps`` adds the loss of every batch, faintly."""
    for style, (name, values) in zip(STYLES, losses.items(), strict=False):
        epochs = range(1, len(values) + 1)
        axes.plot(epochs, values, label=name, markersize=4, linewidth=1.6, zorder=3, **style)
        every = steps.get(name, ())
        if every and values:
            at = [(index + 1) * len(values) / len(every) for index in range(len(every))]
            axes.plot(at, every, color=style["color"], alpha=0.25, linewidth=0.7)
    if any(steps.values()):
        axes.plot([], [], color="grey", alpha=0.5, linewidth=0.7, label="thin: single batches")
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("training loss (cross-entropy)")
    axes.set_title("Training loss")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()


def loss_bands(axes: Axes, losses: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Mean training loss of several trials over epochs, in a band of one standard deviation; trials of one length."""
    for style, (name, trials) in zip(STYLES, losses.items(), strict=False):
        if not trials:
            continue
        columns = list(zip(*trials, strict=True))
        means = [statistics.fmean(column) for column in columns]
        deviations = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
        epochs = range(1, len(means) + 1)
        low = [max(mean - width, min(column)) for mean, width, column in zip(means, deviations, columns, strict=True)]
        high = [mean + width for mean, width in zip(means, deviations, strict=True)]
        axes.plot(epochs, means, label=f"{name}, {len(trials)} trials", markersize=4, linewidth=1.6, zorder=3, **style)
        axes.fill_between(epochs, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("training loss")
    axes.grid(True, which="both", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def accuracy_curves(axes: Axes, accuracies: Mapping[str, Sequence[float]]) -> None:
    """Accuracy on the test images over epochs, in percent."""
    for style, (name, values) in zip(STYLES, accuracies.items(), strict=False):
        percent = [100.0 * value for value in values]
        axes.plot(range(1, len(values) + 1), percent, label=name, markersize=4, linewidth=1.6, **style)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("Test accuracy")
    axes.grid(True, alpha=0.3)
    axes.legend()


def singular_value_curves(axes: Axes, spectra: Mapping[str, Sequence[float]], *, title: str) -> None:
    """Singular values in falling order over their rank in percent; zeros end a curve and are counted beside its name."""
    for style, (name, values) in zip(STYLES, spectra.items(), strict=False):
        largest = max(values, default=0.0)
        drawn = [value for value in values if value > ZERO * largest]
        zeros = len(values) - len(drawn)
        at = [100.0 * (index + 1) / len(values) for index in range(len(drawn))]
        label = f"{name} ({zeros} of {len(values)} are 0)" if zeros else name
        shown = {key: value for key, value in style.items() if key != "marker"}
        axes.plot(at, drawn, label=label, linewidth=1.8, **shown)
    axes.set_yscale("log")
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the singular values (%)")
    axes.set_ylabel("singular value")
    axes.set_title(title)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize="small")


def singular_value_histogram(
    axes: Axes, spectra: Mapping[str, Sequence[float]], *, title: str, bins: int = 32, top: float = 6.0
) -> None:
    """How many singular values fall in each of ``bins`` between 0 and ``top``, as a share; the last bin takes those above."""
    for style, (name, values) in zip(STYLES, spectra.items(), strict=False):
        shown = [min(value, top) for value in values]
        axes.hist(
            shown, bins=bins, range=(0.0, top), weights=[1.0 / max(1, len(shown))] * len(shown), histtype="step",
            linewidth=1.8, color=style["color"], linestyle=style["linestyle"], label=name,
        )  # fmt: skip
    axes.set_xlabel(f"singular value (those above {top:g} stand at {top:g})")
    axes.set_ylabel("share")
    axes.set_yscale("log")
    axes.set_title(title)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small")


def kernel_spectrum(
    axes: Axes, eigenvalues: Sequence[float], *, noise_floor: float | None = None, title: str = "Tangent kernel"
) -> None:
    """Positive eigenvalues in falling order over their rank; what is zero or below ends the curve and is counted."""
    drawn = sorted((value for value in eigenvalues if value > 0), reverse=True)
    missing = len(eigenvalues) - len(drawn)
    label = f"eigenvalues ({missing} of {len(eigenvalues)} are not positive)" if missing else "eigenvalues"
    mark = {"marker": "o", "markersize": 3} if len(drawn) <= FEW else {}
    axes.plot(range(1, len(drawn) + 1), drawn, label=label, linewidth=1.8, **{**_line(STYLES[0]), **mark})
    if noise_floor is not None:
        axes.axhline(noise_floor, linewidth=1.2, label="noise floor (estimate)", **_line(STYLES[3]))
    axes.set_yscale("log")
    axes.set_xlabel("rank")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("eigenvalue of the kernel")
    axes.set_title(title)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize="small")


def descent_curves(axes: Axes, losses: Mapping[str, Sequence[float]], *, title: str) -> None:
    """Losses over the steps of gradient descent, beginning with step 0; such as predicted, measured and proved."""
    for style, (name, values) in zip(STYLES, losses.items(), strict=False):
        axes.plot(range(len(values)), values, label=name, linewidth=1.8, **_line(style))
    seen = [value for values in losses.values() for value in values if math.isfinite(value)]
    if min(seen, default=0.0) > 0 and max(seen) > 2 * min(seen):  # else the logarithm has no round numbers to show
        axes.set_yscale("log")
    axes.set_xlabel("step of gradient descent")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("loss")
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize="small")


def norm_bounds(axes: Axes, bounds: Sequence[float], *, title: str) -> None:
    """Upper bounds of the layers' operator norms in the network's order, beside the line at 1."""
    shown = {"color": STYLES[0]["color"], "marker": STYLES[0]["marker"], "linestyle": "none", "markersize": 4}
    axes.plot(range(1, len(bounds) + 1), bounds, label="proved upper bound", **shown)
    axes.axhline(1.0, linewidth=1.2, label="1: a layer below it contracts", **_line(STYLES[3]))
    if bounds and min(bounds) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("linear layer, in the network's order")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("operator norm at most")
    axes.set_title(title)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize="small")


def _line(style: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in style.items() if key != "marker"}


def comparison(
    losses: Mapping[str, Sequence[float]],
    accuracies: Mapping[str, Sequence[float]],
    spectra: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    steps: Mapping[str, Sequence[float]] = {},
    title: str = "",
) -> Figure:
    """Loss, accuracy, and one panel of singular values for each entry of ``spectra`` (title: {name: values})."""
    columns = max(2, len(spectra))
    rows = 2 if spectra else 1
    figure = new_figure(4.6 * columns, 3.7 * rows)
    grid = figure.add_gridspec(rows, columns)
    loss_curves(figure.add_subplot(grid[0, : columns - 1]), losses, steps=steps)
    accuracy_curves(figure.add_subplot(grid[0, columns - 1]), accuracies)
    for column, (panel, values) in enumerate(spectra.items()):
        singular_value_curves(figure.add_subplot(grid[1, column]), values, title=panel)
    if title:
        figure.suptitle(title)
    return figure
