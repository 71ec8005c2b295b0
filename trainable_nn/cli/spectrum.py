"""The command `spectrum`: what each linear layer of a model does to lengths, proved, measured, and as torch has it."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from rich.progress import Progress
from torch import Tensor, nn

from .. import convert
from ..errors import OptionError
from ..linop import Jacobian, LayerBound, ToeplitzConv, extreme_singular_values, operator_norms_at_most
from . import models
from .conversion import recipe_of
from .spectrum_plot import spectrum_figure
from .terminal import number, print_json, stderr, stdout, table

HOLDS, DOES_NOT_HOLD = 0, 1
PLOTTED_UP_TO = 4096  # of the smaller side of a matrix whose singular values are all computed: 20 seconds
ROUNDING = 1e-9  # relative, of a measured value that touches a bound


@dataclass(frozen=True)
class Request:
    """What the options of `spectrum` ask for."""

    model: str
    model_arg: list[str]
    checkpoint: pathlib.Path | None
    input_shape: str
    recipe: str
    rtol: float
    smallest: bool
    plot: pathlib.Path | None

    def build(self) -> nn.Module:
        with stderr().status(f"building {self.model}"):
            model = models.build(self.model, self.model_arg)
            if self.checkpoint is not None:
                models.load_weights(model, self.checkpoint)
        return model.eval()

    def shape(self) -> tuple[int, ...]:
        try:
            shape = tuple(int(part) for part in self.input_shape.split(","))
        except ValueError:
            shape = ()
        if len(shape) < 2 or min(shape) < 1:
            raise OptionError(
                f"--input-shape {self.input_shape}: needs a batch and sizes above 0 with commas between, such as 1,3,32,32."
            )
        return shape


@dataclass(frozen=True)
class Row:
    """One layer at one size. torch_norm is that of the matrix, which torch's spectral norm divides by.

    after_torch: the measured operator norm of the layer that ``torch.nn.utils.parametrizations.spectral_norm`` makes of it
    when it has converged; 1 is what it promises.
    """

    path: str
    kind: str
    input_shape: tuple[int, ...] | None
    norm_at_most: float | None
    largest: float | None
    smallest: float | None
    residuals: tuple[float, float] | None
    converged: tuple[bool, bool] | None
    side: str | None
    torch_norm: float | None
    after_torch: float | None
    reason: str
    also: tuple[str, ...]


def show_spectrum(request: Request, *, as_json: bool) -> int:
    """Compute, print, draw; status 0 where every layer is bounded and no measured value lies above its bound."""
    shape = request.shape()
    if request.plot is not None and not request.plot.resolve().parent.is_dir():
        raise OptionError(f"--plot {request.plot}: there is no such folder. Make it first.")
    model = request.build()
    try:
        bounds = operator_norms_at_most(model, shape, rtol=request.rtol, progress=True)
    except RuntimeError as error:  # what the model says to a wrong input
        raise OptionError(f"--input-shape {request.input_shape}: the model does not take it ({error}).") from error
    rows = _measured(model, [bound for bound in bounds if bound.reason != "no linear layer or convolution"], request.smallest)
    if request.plot is not None:
        spectrum_figure(_spectra(model, rows, request, shape)).savefig(request.plot)
    if as_json:
        print_json({"model": request.model, "input_shape": list(shape), "layers": [asdict(row) for row in rows]})
    else:
        _print(request, rows)
    return HOLDS if rows and all(map(_holds, rows)) else DOES_NOT_HOLD


def _holds(row: Row) -> bool:
    return row.norm_at_most is not None and (row.largest or 0.0) <= row.norm_at_most * (1 + ROUNDING)


def _measured(model: nn.Module, bounds: Sequence[LayerBound], smallest: bool) -> list[Row]:
    rows, console = [], stderr()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("singular values", total=len(bounds))
        for bound in bounds:
            bar.update(task, description=f"singular values of {bound.path}")
            rows.append(_row(model.get_submodule(bound.path), bound, smallest))
            bar.advance(task)
    return rows


def _row(layer: nn.Module, bound: LayerBound, smallest: bool) -> Row:
    common = {"path": bound.path, "kind": bound.kind, "input_shape": bound.input_shape, "also": bound.also}
    if bound.norm_at_most is None:
        nothing = dict.fromkeys(("largest", "smallest", "residuals", "converged", "side", "torch_norm", "after_torch"))
        return Row(norm_at_most=None, reason=bound.reason, **common, **nothing)
    found = extreme_singular_values(_operator(layer, bound), which="both" if smallest else "largest")
    reshaped = _torch_norm(layer)
    return Row(
        norm_at_most=bound.norm_at_most,
        largest=found.largest,
        smallest=found.smallest if smallest else None,
        residuals=found.residuals,
        converged=found.converged,
        side=found.side,
        torch_norm=reshaped,
        after_torch=found.largest / reshaped if reshaped else None,
        reason="",
        **common,
    )


def _weight(layer: nn.Module) -> Tensor:
    return (layer.effective_weight() if hasattr(layer, "effective_weight") else layer.weight).detach()


def _operator(layer: nn.Module, bound: LayerBound) -> Tensor | ToeplitzConv:
    return _weight(layer) if isinstance(layer, nn.Linear) else ToeplitzConv(layer, bound.input_shape)


def _torch_norm(layer: nn.Module) -> float:
    """The norm of the matrix that torch's spectral norm makes of a weight: its rows are outputs, also where transposed."""
    weight = _weight(layer).double()
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    return float(torch.linalg.matrix_norm((weight.transpose(0, 1) if transposed else weight).flatten(1), 2))


def _spectra(model: nn.Module, rows: Sequence[Row], request: Request, shape: tuple[int, ...]) -> dict:
    """{path: {"before": values, "after ...": values}} of the layers that are small enough; after where a recipe is given."""
    named = {"before": (model, rows)}
    if request.recipe:
        converted = convert.convert_model(copy.deepcopy(model), recipe=recipe_of(request.recipe)).eval()
        bounds = operator_norms_at_most(converted, shape, rtol=request.rtol)
        named[f"after ({request.recipe})"] = (converted, bounds)
    panels: dict[str, dict[str, list[float]]] = {}
    console = stderr()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("all singular values", total=sum(len(found) for _, found in named.values()))
        for name, (network, found) in named.items():
            for row in found:
                values = _all_values(network.get_submodule(row.path), row) if row.norm_at_most is not None else None
                if values is not None:
                    panels.setdefault(row.path, {})[name] = values
                bar.advance(task)
    for row in rows if request.recipe else ():
        if len(panels.get(row.path, ())) == 1 and (values := _in_its_place(converted, row)) is not None:
            panels[row.path][f"after ({request.recipe})"] = values
    if not panels:
        raise OptionError(f"--plot: no layer has at most {PLOTTED_UP_TO} singular values. Give a smaller --input-shape.")
    return panels


def _in_its_place(model: nn.Module, row: Row) -> list[float] | None:
    """Of the Jacobian, at zero, of what a conversion put where a layer was, such as a shortcut, which is affine."""
    try:
        module = model.get_submodule(row.path)
    except AttributeError:
        return None
    if row.input_shape is None:
        return None
    jacobian = Jacobian(copy.deepcopy(module).double(), torch.zeros(1, *row.input_shape, dtype=torch.float64))
    return _singular_values(jacobian.dense().detach()) if min(jacobian.shape) <= PLOTTED_UP_TO else None


def _all_values(layer: nn.Module, row: Row | LayerBound) -> list[float] | None:
    operator = _operator(layer, row)
    if min(operator.shape) > PLOTTED_UP_TO:
        return None
    matrix = operator.double() if isinstance(operator, Tensor) else operator.to(torch.float64).dense().detach()
    return _singular_values(matrix)


def _singular_values(matrix: Tensor) -> list[float]:
    """All of them, in falling order; the triangle of a QR has them too and is smaller."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    return torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R).tolist()


def _print(request: Request, rows: Sequence[Row]) -> None:
    columns = ("layer", "kind", "input", "at most", "largest", "smallest", "torch divides by", "and leaves")
    cells = []
    for row in rows:
        flags = row.converged or (True, True)
        after = "" if row.after_torch is None else f"{row.after_torch:.4g}"
        cells.append(
            (
                ", ".join((row.path, *row.also)),
                row.kind,
                "x".join(map(str, row.input_shape or ())) or "-",
                number(row.norm_at_most, ".5g"),
                _value(row.largest, flags[1]),
                _value(row.smallest, flags[0]),
                number(row.torch_norm, ".4g"),
                after or "-",
            )
        )
    out = stdout()
    caption = (
        "at most: proved. largest, smallest: measured, ~ where not to 1e-6. torch divides by the norm of the kernel as a "
        "matrix (parametrizations.spectral_norm); what it leaves is called 1 there."
    )
    out.print(table(f"{request.model}: operator norms", columns, cells, left=3, caption=caption))
    for row in rows:
        if row.reason:
            out.print(f"{row.path}: {row.reason}", markup=False)
    wrong = [row.after_torch for row in rows if row.after_torch is not None]
    if wrong:
        out.print(f"torch's spectral norm leaves up to {max(wrong):.3g} where it says 1.", markup=False)
    if request.plot is not None:
        out.print(f"Wrote {request.plot}.", markup=False)


def _value(value: float | None, converged: bool) -> str:
    return number(value, ".5g") if converged or value is None else f"~{value:.2g}"
