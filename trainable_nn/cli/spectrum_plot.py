"""The figure of `trainable-nn spectrum`: the singular values of each layer, before and after a conversion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..plotting import new_figure, singular_value_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 4
MOST_PANELS = 24


def spectrum_figure(spectra: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """One panel for each path, {path: {name: values in falling order}}; of more than 24 paths, evenly spaced ones."""
    paths = list(spectra)
    if len(paths) > MOST_PANELS:
        paths = [paths[index * (len(paths) - 1) // (MOST_PANELS - 1)] for index in range(MOST_PANELS)]
    columns = min(COLUMNS, len(paths))
    rows = math.ceil(len(paths) / columns)
    figure = new_figure(3.8 * columns, 3.0 * rows)
    for number, path in enumerate(paths):
        axes = figure.add_subplot(rows, columns, number + 1)
        singular_value_curves(axes, spectra[path], title=path)
        axes.axhline(1.0, color="grey", linewidth=0.8, zorder=0)
    shown = f", {len(paths)} of {len(spectra)} layers" if len(paths) < len(spectra) else ""
    figure.suptitle(f"Singular values of the layers{shown}")
    return figure
