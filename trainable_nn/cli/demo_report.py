"""What `demo` prints: the set-up, what was converted, and what was measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..demo.training import Run
from ..spectra import Spectrum
from .conversion import print_plan
from .terminal import number, stdout, table

if TYPE_CHECKING:
    from .demo import Outcome, Settings


ROUNDING = 1e-12  # a share of the largest singular value, well above float64's own 2e-16 times the size


def print_start(settings: Settings, data, choice, plan) -> None:
    out = stdout()
    images = "x".join(map(str, data.train_images.shape[1:]))
    out.print(
        f"PreActResNet18 of width {settings.width} on {data.name} ({images}, {len(data.train_labels)} training and "
        f"{len(data.test_labels)} test images), {choice.name}, batches of {settings.batch_size}, seed {settings.seed}.",
        markup=False,
    )
    print_plan(plan, all_steps=False)


def print_outcome(outcome: Outcome) -> None:
    out = stdout()
    if outcome.spectra:
        out.print(_spectra_table(outcome))
    out.print(_epoch_table(outcome))
    for name, run in outcome.runs.items():
        out.print(f"{name}: {_summary(run)}", markup=False)
    remark = _remark(outcome)
    if remark:
        out.print(remark, markup=False)
    folder = outcome.settings.output
    out.print(f"Wrote {folder / 'comparison.png'} and {folder / 'results.json'} in {outcome.seconds:.0f} s.", markup=False)


def _epoch_table(outcome: Outcome):
    names = list(outcome.runs)
    columns = ["epoch", *(f"{name} loss" for name in names), *(f"{name} test" for name in names)]
    rows = []
    for index in range(len(outcome.runs[names[0]].epochs)):
        epochs = [outcome.runs[name].epochs[index] for name in names]
        losses = [number(epoch.train_loss) for epoch in epochs]
        rows.append((str(index + 1), *losses, *(_percent(epoch.test_accuracy) for epoch in epochs)))
    return table("Training loss (mean over the epoch's batches) and test accuracy", columns, rows, left=0)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}%"


def _spectra_table(outcome: Outcome):
    """Smallest, mean and largest singular value, original -> converted."""
    original, converted = ({s.path: s for s in spectra} for spectra in outcome.spectra.values())
    rows = []
    for path, before in original.items():
        after = converted.get(path)
        shape = f"{before.shape[0]}x{before.shape[1]}"
        if before.values is None:
            rows.append((path, shape, "too large to compute", "", ""))
            continue
        cells = [f"{_value(before, key)} -> {_value(after, key)}" for key in ("smallest", "mean", "largest")]
        rows.append((path, shape, *cells))
    return table(
        "Singular values of Jacobians at the start: original -> converted",
        ("module", "Jacobian", "smallest", "mean", "largest"),
        rows,
        caption="At one training image, batch normalisation held at the statistics of 64. 0 means below 1e-12 of the largest.",
    )


def _value(spectrum: Spectrum | None, key: str) -> str:
    """One figure of a spectrum; what rounding makes of a zero is printed as 0."""
    if spectrum is None or spectrum.values is None:
        return "-"
    value = getattr(spectrum, key)
    return "0" if value < ROUNDING * spectrum.largest else number(value, ".3g")


def _summary(run: Run) -> str:
    if run.diverged_at:
        return f"diverged: the loss of step {run.diverged_at} is not finite. Try a smaller --lr."
    last = run.epochs[-1]
    return f"last epoch: training loss {number(last.train_loss)}, test accuracy {_percent(last.test_accuracy)}, {run.seconds:.0f} s of training"


def _remark(outcome: Outcome) -> str:
    """How large a difference of two accuracies chance alone makes: the binomial standard error."""
    shares = [run.epochs[-1].test_accuracy for run in outcome.runs.values()]
    if any(math.isnan(share) for share in shares):
        return ""
    count = len(outcome.data.test_labels)
    error = 100 * math.sqrt(sum(share * (1 - share) / count for share in shares))
    difference = 100 * (shares[1] - shares[0])
    return (
        f"Accuracy differs by {difference:+.1f} points; {count} test images alone give a standard error of {error:.1f} "
        f"points. This is one seed: try others with --seed before you conclude."
    )
