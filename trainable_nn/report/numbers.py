"""The sections with charts: spectra, kernel, losses and norms, each with its numbers as a table."""

from __future__ import annotations

from collections.abc import Sequence

from .. import plotting
from ..linop import LayerBound
from ..spectra import Spectrum
from ..tables import Cell, Table, numeral, paragraphs
from .blocks import evenly
from .findings import Findings, Losses, Missing
from .parts import absent, charts, folded, picture, section, shown

ROUNDING = 1e-12  # a share of the largest singular value: what is below is rounding's
MOST_PICTURES = 4
FLAT = 0.01  # a share of the loss
NEAR = 1e4
ROWS = 11  # of a curve's table


def spectra_section(findings: Findings) -> str:
    title, spectra = "Singular values of the blocks", findings.spectra
    if isinstance(spectra, Missing):
        return section(title, ("measured",), absent(spectra.reason))
    about = (
        "A block whose Jacobian has singular values near 1 passes signals and gradients on as they are; one with values at 0 "
        "loses directions. Taken in float64 at the first sample, with batch normalisation held at the statistics of all samples."
    )
    names = list(spectra)
    drawn = [s.path for s in spectra[names[0]] if all(_value(spectra[name], s.path) is not None for name in names)]
    pictures = [_blocks_picture(index, path, spectra) for index, path in enumerate(evenly(drawn, MOST_PICTURES))]
    body = paragraphs([about]) + charts(*pictures) + folded("Each block", spectra_table(spectra))
    return section(title, ("measured",), body)


def _value(spectra: Sequence[Spectrum], path: str) -> Spectrum | None:
    return next((s for s in spectra if s.path == path and s.values is not None), None)


def _blocks_picture(index: int, path: str, spectra: dict[str, list[Spectrum]]) -> str:
    found = {name: _value(those, path) for name, those in spectra.items()}
    curves = {name: spectrum.values.tolist() for name, spectrum in found.items()}
    said = "; ".join(
        f"{name}: {len(spectrum.values)} singular values from {_shown(spectrum, spectrum.smallest).text} to {spectrum.largest:.3g}"
        for name, spectrum in found.items()
    )
    return picture(
        f"block-{index}", lambda axes: plotting.singular_value_curves(axes, curves, title=""), f"Block {path}", f"{said}."
    )


def spectra_table(spectra: dict[str, list[Spectrum]]) -> Table:
    """Smallest, mean and largest singular value of each block, for each of the networks."""
    keys, names = ("smallest", "mean", "largest"), list(spectra)
    columns = ("block", *(f"{key} {name}" for key in keys for name in names))
    rows = []
    for path in [spectrum.path for spectrum in spectra[names[0]]]:
        found = {name: _value(those, path) for name, those in spectra.items()}
        rows.append((path, *(_shown(found[name], getattr(found[name], key, None)) for key in keys for name in names)))
    caption = "0 means below 1e-12 of the largest, where rounding is as large. A dash: its Jacobian is too large to decompose here."
    return Table("", columns, tuple(rows), caption=caption)


def _shown(spectrum: Spectrum | None, value: float | None) -> Cell:
    if spectrum is None or value is None:
        return Cell("-")
    return Cell("0", value=0.0) if value < ROUNDING * spectrum.largest else numeral(value, ".3g")


def kernel_section(findings: Findings) -> str:
    title, kernel = "Tangent kernel", findings.kernel
    if isinstance(kernel, Missing):
        return section(title, ("measured",), absent(kernel.reason))
    ends, floor = kernel.extremes, kernel.noise_floor
    values = kernel.prediction.eigenvalues.tolist()
    rank = "so the outputs on these samples can be moved independently" if ends.smallest_at_least > floor else (
        "which does not stand above rounding: some directions of the outputs may not be trainable"
    )
    about = (
        "The eigenvalues of DF DF^T say how fast gradient descent moves each direction of the outputs, near the present "
        f"weights. The smallest is {ends.smallest:.4g}, {rank}."
    )
    said = (
        f"{len(values)} eigenvalues from {ends.smallest:.3g} to {ends.largest:.3g}; condition number "
        f"{ends.condition_number:.3g}; noise floor, an estimate of rounding: {floor:.2g}."
    )
    drawn = floor if ends.smallest < NEAR * floor else None  # far below, it would press the eigenvalues to a line
    chart = picture(
        "kernel", lambda axes: plotting.kernel_spectrum(axes, values, noise_floor=drawn), "Eigenvalues of the kernel", said
    )
    note = "The bounds are proved of the matrix that was computed; what rounding put into its entries is only estimated."
    tables = shown(ends.table()) + paragraphs([note]) + shown(kernel.prediction.table())
    return section(title, ("measured", "estimated"), paragraphs([about]) + charts(chart, f"<div>{tables}</div>"))


def losses_section(findings: Findings) -> str:
    title = "Predicted against measured loss"
    about = (
        "Gradient descent was really run, on a copy in float64, all samples in every step. The prediction is the kernel's, "
        "exact only as long as the kernel stays as it is; the proved bound is the certificate's, and holds at every step."
    )
    parts = [
        _losses("prediction", "Predicted by the kernel", "predicted", findings.prediction),
        _losses("descent", "Proved by the certificate", "proved upper bound", findings.descent),
    ]
    return section(title, ("measured", "estimated", "proved"), paragraphs([about]) + charts(*parts))


def _losses(name: str, title: str, said: str, losses: Losses | Missing) -> str:
    if isinstance(losses, Missing):
        return f"<div><h3>{title}</h3>{absent(losses.reason)}</div>"
    curves = {said: losses.said, "measured": losses.measured}
    last = len(losses.measured) - 1
    words = (
        f"Step size {losses.step_size:.4g}. After {last} steps: {said} {losses.said[-1]:.4g}, measured "
        f"{losses.measured[-1]:.4g}, from {losses.measured[0]:.4g}."
    )
    if name == "descent":
        words += f" {above(losses)}"
    if losses.said[-1] > (1.0 - FLAT) * losses.said[0] and losses.measured[-1] > (1.0 - FLAT) * losses.measured[0]:
        chart = f"<h3>{title}</h3>{paragraphs([f'Both stay within {FLAT:.0%} of where they began, so there is no curve to draw.', words])}"
    else:
        chart = picture(name, lambda axes: plotting.descent_curves(axes, curves, title=""), title, words)
    at = evenly(range(last + 1), ROWS)
    rows = tuple((str(t), numeral(losses.said[t]), numeral(losses.measured[t])) for t in at)
    return f"<div>{chart}{folded('The numbers', Table('', ('step', said, 'measured'), rows, left=0))}</div>"


def above(losses: Losses) -> str:
    """Whether a measured loss ever stood above its bound."""
    steps = [t for t, (bound, loss) in enumerate(zip(losses.said, losses.measured, strict=True)) if not loss <= bound]
    if steps:
        return f"The measured loss stands above the bound at {len(steps)} steps, first at {steps[0]}: this is an error, report it."
    return "The measured loss never stands above the bound."


def norms_section(findings: Findings) -> str:
    title, norms = "Proved norms of the layers", findings.norms
    if isinstance(norms, Missing):
        return section(title, ("proved",), absent(norms.reason))
    bounds = [row.norm_at_most for row in norms if row.norm_at_most is not None]
    if not bounds:
        return section(title, ("proved",), absent("No layer with a known norm stands in this network."))
    said = (
        f"{len(bounds)} linear layers, with upper bounds from {min(bounds):.3g} to {max(bounds):.3g}; "
        f"{sum(bound <= 1 for bound in bounds)} are at most 1."
    )
    chart = picture("norms", lambda axes: plotting.norm_bounds(axes, bounds, title=""), "Upper bounds of operator norms", said)
    about = (
        "How much a layer can enlarge a difference of its inputs, at most: proved at the size of image that it sees here. An "
        "upper bound, so the norm itself may be smaller."
    )
    others = norms_table([row for row in norms if row.norm_at_most is None], "")
    left = folded(f"Layers without a bound ({len(others.rows)})", others) if others.rows else ""
    table = folded("Each linear layer", norms_table([row for row in norms if row.norm_at_most is not None], ""))
    return section(title, ("proved",), paragraphs([about]) + chart + table + left)


def norms_table(norms: Sequence[LayerBound], title: str = "Proved norms") -> Table:
    """One row a layer: its bound, or why it has none."""
    rows = []
    for row in norms:
        path = ", ".join((row.path or "(model)", *row.also))
        size = "" if row.input_shape is None else " x ".join(map(str, row.input_shape))
        bound = Cell(row.reason) if row.norm_at_most is None else numeral(row.norm_at_most, ".5g")
        rows.append((path, row.kind, size, bound))
    return Table(title, ("layer", "kind", "input", "norm at most"), tuple(rows), left=3)
