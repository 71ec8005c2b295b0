"""The command `report`: one page about a network, its conversion and its training, for a person."""

from __future__ import annotations

import copy
import pathlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import __version__, convert
from ..certify.certificate import GRADES
from ..errors import ConversionError, OptionError
from ..plotting import new_figure
from ..report import Findings, examine, page
from .certify import Request, Watch
from .conversion import recipe_of
from .terminal import number, print_json, stdout, table

HOLDS, DOES_NOT_HOLD = 0, 1
NONE = "none"  # the recipe that converts nothing


@dataclass(frozen=True)
class Settings:
    """What the options of `report` ask for beside model and data."""

    output: pathlib.Path
    steps: int
    budget: int
    at_least: str


def write_report(request: Request, settings: Settings, *, as_json: bool) -> int:
    """Compute, write the page, print where it stands; status 0 where the grade is at least the one asked for."""
    if settings.at_least not in GRADES:
        raise OptionError(f"--at-least {settings.at_least}: must be one of {', '.join(reversed(GRADES))}.")
    new_figure(1, 1)  # without matplotlib there are no charts; it says so before the work
    _check_writable(settings.output)
    findings = _findings(request, settings)
    _write(settings.output, page(findings))
    grade = findings.summary()["grade"] or GRADES[0]
    print_json({"output": str(settings.output), **findings.summary()}) if as_json else _print(findings, settings)
    return HOLDS if GRADES.index(grade) >= GRADES.index(settings.at_least) else DOES_NOT_HOLD


def _findings(request: Request, settings: Settings) -> Findings:
    images, labels, classes = request.samples()
    original = replace(request, recipe="").build(images)
    dtype = next((p.dtype for p in original.parameters()), images.dtype)
    images, outputs, note = _fitted(request, original, images.to(dtype))
    targets = request.targets(labels, classes, outputs)
    model, unconverted = _converted(request, original, images)
    facts = (
        ("Model", " ".join((request.model, *request.model_arg))),
        ("Weights", str(request.checkpoint) if request.checkpoint else f"random, seed {request.seed}"),
        ("Data", f"{len(images)} training images of {request.data}, {'x'.join(map(str, images.shape[1:]))}{note}"),
        ("Loss", request.loss),
        ("Mode", "training" if request.training else "evaluation: batch normalisation uses its running statistics"),
        ("Made by", f"trainable_nn {__version__}, torch {torch.__version__}"),
    )
    with Watch() as watch:
        return examine(
            model, images, targets, original=None if model is original else original, loss=request.loss,
            steps=settings.steps, budget=settings.budget << 20, title=request.model, facts=facts, unconverted=unconverted,
            progress=watch,
        )  # fmt: skip


def _fitted(request: Request, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, str]:
    """Images that the model takes, its outputs, and what was done to them: grey ones may be shown in three channels."""
    attempts = {"": images}
    if images.shape[1] == 1:
        attempts[", the grey channel three times"] = images.repeat(1, 3, 1, 1)
    errors = []
    for note, tried in attempts.items():
        try:
            with torch.no_grad():
                return tried, copy.deepcopy(model)(tried), note  # a copy: batch normalisation writes what it saw
        except Exception as error:  # noqa: BLE001, the user's model raises what it likes
            errors.append(f"{type(error).__name__}: {error}")
    raise OptionError(
        f"{request.model}: does not run on images {tuple(images.shape[1:])} ({errors[0]}). Choose another --data or --size."
    )


def _converted(request: Request, original: nn.Module, images: Tensor) -> tuple[nn.Module, str]:
    """The converted model, or the same one and why."""
    if request.recipe in ("", NONE):
        return original, "No conversion was asked for (--recipe none); the network is looked at as it is."
    try:
        found = convert.convert_model(original, recipe_of(request.recipe), sample_input=images[:2])
        return found.train(request.training), ""
    except ConversionError as error:
        return original, f"Nothing was converted, and the network is looked at as it is. Recipe {request.recipe}: {error}"


def _check_writable(output: pathlib.Path) -> None:
    """Before minutes of work."""
    if not output.parent.is_dir() or output.is_dir():
        raise OptionError(f"--output {output}: cannot be written. Name a file in a folder that exists.")


def _write(output: pathlib.Path, text: str) -> None:
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"--output {output}: cannot be written ({error.strerror}). Name a file in a folder that exists."
        ) from error


def _print(findings: Findings, settings: Settings) -> None:
    out, found = stdout(), findings.summary()
    prediction, missing = found["last_losses"]["prediction"], found["missing"]
    rows = [
        ("grade", found["grade"] or "-", ""),
        ("lambda_min(DF DF^T) at least", number(found["lambda_lower"]), "proved" if found["step_size"] else "measured"),
        ("step size", number(found["step_size"]), "proved"),
        ("rows in the way of a higher grade", number(found["failing"], "d"), ""),
        ("smallest eigenvalue of the kernel", number(found["smallest_eigenvalue"]), "measured"),
        ("largest norm of a layer, at most", number(found["largest_norm_at_most"]), "proved"),
    ]
    if prediction:
        rows.append((f"loss after {settings.steps} steps, predicted", number(prediction["said"]), "estimated"))
        rows.append((f"loss after {settings.steps} steps, measured", number(prediction["measured"]), "measured"))
    rows = [(name, value, "" if value == "-" else how) for name, value, how in rows]
    out.print(table(findings.title, ("", "value", "how"), rows))
    for part, reason in missing.items():
        out.print(f"{part}: {reason}", markup=False)
    out.print(f"Wrote {settings.output}.", markup=False)
