"""The command `ntk`: the kernel of a network at real images, its spectrum, and the training that it predicts."""

from __future__ import annotations

import copy
import math
import pathlib
from dataclasses import asdict, dataclass
from decimal import ROUND_FLOOR, Context

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ..certify.kernel_error import KernelError, kernel_error_at_most
from ..errors import OptionError, TrainableNNError
from ..linop import KernelExtremes, kernel_extremes, noise_floor, ntk
from ..linop.data_spectrum import least_eigenvalue_at_least
from ..theory import TrainingPrediction, predict_training
from .certify import Request
from .ntk_plot import kernel_figure
from .terminal import number, print_json, stderr, stdout, table

HOLDS, DOES_NOT_HOLD = 0, 1


@dataclass(frozen=True)
class Settings:
    """What the options of `ntk` ask for beside model and data."""

    steps: int
    step_size: float | None
    by_layer: bool
    single: bool
    budget: int
    plot: pathlib.Path | None


@dataclass(frozen=True)
class Outcome:
    """A kernel's spectrum, and the losses of as many steps of gradient descent, predicted and measured.

    rounding: what is proved of the kernel's entries, None where nothing is, and ``unproved`` says why. smallest_at_least: a
    lower bound of lambda(DF), proved where the rounding is.
    """

    samples: int
    outputs: int
    parameters: int
    dtype: str
    extremes: KernelExtremes
    noise_floor: float
    rounding: KernelError | None
    unproved: str
    smallest_at_least: float
    prediction: TrainingPrediction
    step_size: float
    predicted: list[float]
    measured: list[float]
    layers: dict[str, tuple[float, float]]

    @property
    def has_full_rank(self) -> bool:
        return self.smallest_at_least > 0


def show_kernel(request: Request, settings: Settings, *, as_json: bool) -> int:
    """Compute, print, draw; status 0 where the smallest eigenvalue is shown to be above 0."""
    images, labels, classes = request.samples()
    model = request.build(images).to(torch.float32 if settings.single else torch.float64)
    images = images.to(next(model.parameters()).dtype)
    with torch.no_grad():
        start = copy.deepcopy(model)(images)
    targets = request.targets(labels, classes, start)
    outcome = _outcome(model, images, start, targets, settings)
    if settings.plot is not None:
        kernel_figure(outcome).savefig(settings.plot)
    if as_json:
        print_json(_as_dict(outcome))
    else:
        _print(outcome, settings)
    return HOLDS if outcome.has_full_rank else DOES_NOT_HOLD


def _outcome(model: nn.Module, images: Tensor, start: Tensor, targets: Tensor, settings: Settings) -> Outcome:
    found = ntk(model, images, by_layer=settings.by_layer, budget=settings.budget << 20, progress=True)
    layers = {}
    if settings.by_layer:
        layers = {name: (float(part.trace()), float(torch.linalg.eigvalsh(part)[-1])) for name, part in found.items()}
        found = sum(found.values())
    floor = noise_floor(found, start.dtype)
    rounding, unproved = _rounding(model, images, found, settings.single)
    ends = kernel_extremes(found, error=floor if rounding is None else rounding.kernel)
    least = ends.smallest_at_least
    if rounding is not None:
        least = max(least, rounding.smallest_at_least(least_eigenvalue_at_least(found.cpu(), ends.smallest)))
    prediction = predict_training(found, start - targets)
    step = 0.5 * prediction.largest_stable_step if settings.step_size is None else settings.step_size
    if not 0.0 < step < math.inf:
        raise OptionError(f"--step-size {step}: must be positive and finite, and the kernel not zero.")
    return Outcome(
        len(images),
        start[0].numel(),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        str(start.dtype).removeprefix("torch."),
        ends,
        floor,
        rounding,
        unproved,
        least,
        prediction,
        step,
        prediction.predict_loss(range(settings.steps + 1), step).tolist(),
        _measured(model, images, targets, step, settings.steps),
        layers,
    )


def _rounding(model: nn.Module, images: Tensor, kernel: Tensor, single: bool) -> tuple[KernelError | None, str]:
    """What is proved of the kernel's entries, or why nothing is."""
    if single:
        return None, "it was computed in float32"
    try:
        return kernel_error_at_most(model, images, kernel), ""
    except (TrainableNNError, ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        return None, " ".join(str(error).split())


def _measured(model: nn.Module, images: Tensor, targets: Tensor, step: float, steps: int) -> list[float]:
    """Losses of gradient descent on all images at once, from the model's weights; the model stays as it is."""
    model = copy.deepcopy(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=step)
    losses = []
    console = stderr()
    for index in track(
        range(steps + 1), "training", console=console, transient=True, disable=not console.is_terminal
    ):
        loss = mse_loss(model(images), targets)
        losses.append(float(loss.detach()))
        if index < steps:
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return losses


def _as_dict(outcome: Outcome) -> dict:
    prediction = outcome.prediction
    return {
        **{key: getattr(outcome, key) for key in ("samples", "outputs", "parameters", "dtype", "noise_floor")},
        "full_rank": outcome.has_full_rank,
        "smallest_at_least": outcome.smallest_at_least,
        "rounding": None if outcome.rounding is None else asdict(outcome.rounding),
        "unproved": outcome.unproved,
        "extremes": asdict(outcome.extremes),
        "condition_number": prediction.condition_number,
        "effective_dimension": prediction.effective_dimension(),
        "largest_stable_step": prediction.largest_stable_step,
        "step_size": outcome.step_size,
        "predicted_loss": outcome.predicted,
        "measured_loss": outcome.measured,
        "layers": {name: {"trace": trace, "largest": top} for name, (trace, top) in outcome.layers.items()},
        "eigenvalues": prediction.eigenvalues.tolist(),
    }


def _print(outcome: Outcome, settings: Settings) -> None:
    out, ends, prediction = stdout(), outcome.extremes, outcome.prediction
    rows = [
        ("smallest eigenvalue, lambda(DF)", number(ends.smallest), _between(ends.smallest_at_least, ends.smallest_at_most)),
        ("largest eigenvalue", number(ends.largest), _between(ends.largest_at_least, ends.largest_at_most)),
        ("lambda(DF), at least", _below(outcome.smallest_at_least), "proved" if outcome.rounding else "rounding estimated"),
        ("noise floor (estimated rounding)", number(outcome.noise_floor), ""),
        ("condition number", number(prediction.condition_number), ""),
        ("effective dimension", number(prediction.effective_dimension()), f"of {len(prediction.eigenvalues)}"),
        ("largest stable step, mean squared loss", number(prediction.largest_stable_step), "to first order"),
    ]
    title = (
        f"Tangent kernel of {outcome.samples} images with {outcome.outputs} outputs, {outcome.parameters} parameters, "
        f"{outcome.dtype}"
    )
    caption = (
        f"Bounds are proved, with a rounding of the kernel of {number(outcome.rounding.kernel)} counted."
        if outcome.rounding is not None
        else f"Bounds are proved of the matrix, widened by the noise floor, which is an estimate: {outcome.unproved}"
    )
    out.print(table(title, ("", "value", "between"), rows, caption=caption))
    if outcome.layers:
        total = sum(trace for trace, _ in outcome.layers.values())
        parts = [(name, number(trace), f"{100 * trace / total:.1f}%", number(top)) for name, (trace, top) in outcome.layers.items()]
        out.print(table("By layer", ("layer", "trace", "share", "largest eigenvalue"), parts))
    shown = sorted({0, 1, *(settings.steps * part // 4 for part in range(1, 5))} & set(range(settings.steps + 1)))
    losses = [(str(t), number(outcome.predicted[t]), number(outcome.measured[t])) for t in shown]
    step = f"Gradient descent with step {number(outcome.step_size)}"
    out.print(table(step, ("step", "predicted loss", "measured loss"), losses, left=0))
    verdict = "DF has full rank on these images." if outcome.has_full_rank else (
        "No lower bound above rounding: DF may have no full rank on these images."
    )
    out.print(verdict, markup=False)
    if settings.plot is not None:
        out.print(f"Wrote {settings.plot}.", markup=False)


def _below(value: float) -> str:
    """Six digits that are not above it."""
    return number(float(Context(prec=6, rounding=ROUND_FLOOR).create_decimal(value)), ".6g")


def _between(low: float, high: float) -> str:
    return f"{number(low, '.6g')} and {number(high, '.6g')}"
