"""The commands `certify` and `verify`."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from torch import Tensor, nn
from torch.nn.functional import one_hot

from .. import checkpoint, convert, datasets
from ..certify import Certificate, Hypothesis, PathCertificate, certify, certify_path, verify
from ..certify.certificate import GRADES
from ..certify.path_text import certificate_of
from ..errors import CertificateError, OptionError
from . import models
from .conversion import recipe_of
from .terminal import number, print_json, stderr, stdout, table

HOLDS, DOES_NOT_HOLD = 0, 1
READERS = {"idx": datasets.idx, "cifar10": datasets.cifar10, "cifar100": datasets.cifar100}
COLOURS = {"global": "bold green", "ball": "green", "measured": "yellow", "none": "red"}


@dataclass(frozen=True)
class Request:
    """What the options of `certify` and `verify` say of model and data."""

    model: str
    model_arg: list[str]
    checkpoint: pathlib.Path | None
    recipe: str
    data: str
    folder: pathlib.Path | None
    images: int
    size: int
    loss: str
    training: bool
    seed: int

    def samples(self) -> tuple[Tensor, Tensor, int]:
        """The first images, their labels, and how many classes there are."""
        if self.data == "digits":
            found = datasets.digits(size=self.size, seed=0)
        elif self.data not in READERS:
            raise OptionError(f"--data {self.data}: must be one of digits, {', '.join(READERS)}.")
        elif self.folder is None:
            raise OptionError(f"--data {self.data}: needs --folder, the folder that holds its files.")
        else:
            found = READERS[self.data](self.folder)
        return found.train_images[: self.images], found.train_labels[: self.images], len(found.classes)

    def build(self, images: Tensor, weights: checkpoint.Checkpoint | None = None) -> nn.Module:
        """The model in its mode, converted where that is asked, with its weights."""
        torch.manual_seed(self.seed)
        with stderr().status(f"building {self.model}"):
            model = models.build(self.model, self.model_arg)
            if self.checkpoint is not None:
                model = _filled(model, self.checkpoint)
            if weights is not None:
                model = checkpoint.load(weights.path, model)
            elif self.recipe:
                model = convert.convert_model(model, recipe_of(self.recipe), sample_input=images[:2])
        return model.train(self.training)

    def targets(self, labels: Tensor, classes: int, outputs: Tensor) -> Tensor:
        """Labels for cross-entropy, rows of 0 and 1 for the squared loss."""
        if self.loss != "mse":
            return labels
        width = outputs.shape[-1]
        if outputs.dim() != 2 or width < classes:
            raise OptionError(
                f"--loss mse: the model gives outputs {tuple(outputs.shape[1:])} for {classes} classes. Give it {classes} "
                f"outputs, for example with --model-arg num_classes={classes}."
            )
        return one_hot(labels, width).to(outputs.dtype)


def certify_model(
    request: Request,
    output: pathlib.Path | None,
    budget: int,
    at_least: str,
    path: int | None = None,
    step_size: float | None = None,
    *,
    as_json: bool,
) -> int:
    """Certify, print, write; status 0 where the grade is at least the one asked for.

    With ``path`` it is a constant step along gradient descent's own path of at most so many steps.
    """
    if at_least not in GRADES:
        raise OptionError(f"--at-least {at_least}: must be one of {', '.join(reversed(GRADES))}.")
    if step_size is not None and path is None:
        raise OptionError("--step-size: is the step of a path. Give --path as well, the number of steps that may be run.")
    model, images, targets = _prepared(request)
    options = {"loss": request.loss, "budget": budget << 20}
    with Watch() as watch:
        if path is None:
            certificate = certify(model, images, targets, **options, progress=watch)
        else:
            options |= {"steps": path, "step_size": step_size}
            certificate = certify_path(model, images, targets, **options, progress=watch)
    if output is not None:
        _write(output, certificate)
    if as_json:
        print(certificate.to_json())
    else:
        print_certificate(certificate)
        if output is not None:
            stdout().print(f"Wrote {output}.", markup=False)
    return HOLDS if GRADES.index(certificate.grade) >= GRADES.index(at_least) else DOES_NOT_HOLD


def verify_certificate(request: Request, source: pathlib.Path, *, as_json: bool) -> int:
    """Compute a certificate again; status 1 where a row of it does not hold."""
    weights, certificate = _read(source)
    model, images, targets = _prepared(request, weights)
    problem = ""
    try:
        with Watch() as watch:
            verify(certificate, model, images, targets, progress=watch)
    except CertificateError as error:
        problem = str(error)
    if as_json:
        print_json({"holds": not problem, "grade": certificate.grade, "reason": problem})
    elif problem:
        stdout().print(Text.assemble(("does not hold: ", "bold red"), problem))
    else:
        stdout().print(
            Text.assemble(("holds: ", "bold green"), f"grade {certificate.grade}, all {len(_rows_of(certificate))} rows.")
        )
    return DOES_NOT_HOLD if problem else HOLDS


def _rows_of(certificate: Certificate | PathCertificate) -> tuple[Hypothesis, ...]:
    """Its hypotheses; of a path those at its end."""
    return (certificate.arrival if isinstance(certificate, PathCertificate) else certificate).hypotheses


def print_certificate(certificate: Certificate | PathCertificate) -> None:
    """The rows as a table, then the certificate in words."""
    out = stdout()
    out.print(_rows(_rows_of(certificate)))
    first, _, rest = certificate.explain().partition("\n")
    out.print(Text(first, style=COLOURS[certificate.grade]))
    out.print(rest, markup=False)


def _rows(rows: tuple[Hypothesis, ...]):
    shown = table("", ("holds", "path", "hypothesis", "kind", "found", "against"), [], left=4)
    for row in rows:
        style = "green" if row.holds else "red" if row.grade else "yellow"
        cells = (row.path, row.name, row.kind, number(row.value, ".3g"), number(row.bound, ".3g"))
        shown.add_row(Text("yes" if row.holds else "no", style=style), *(Text(cell) for cell in cells))
    return shown


def _prepared(request: Request, weights: checkpoint.Checkpoint | None = None) -> tuple[nn.Module, Tensor, Tensor]:
    images, labels, classes = request.samples()
    model = request.build(images, weights)
    dtype = next((p.dtype for p in model.parameters()), images.dtype)
    images = images.to(dtype)
    try:
        with torch.no_grad():
            outputs = model(images[:2])
    except Exception as error:  # the user's model raises what it likes
        raise OptionError(
            f"{request.model}: does not run on images {tuple(images.shape[1:])} ({type(error).__name__}: {error}). Choose "
            f"another --data or --size."
        ) from error
    return model, images, request.targets(labels, classes, outputs)


def _filled(model: nn.Module, path: pathlib.Path) -> nn.Module:
    models.load_weights(model, path)
    return model


def _read(source: pathlib.Path) -> tuple[checkpoint.Checkpoint | None, Certificate | PathCertificate]:
    """A certificate or a path's from JSON, or from a file of trainable_nn.save with the weights that it is about."""
    if source.suffix == ".safetensors":
        weights = checkpoint.load(source)
        if weights.certificate is None:
            raise OptionError(
                f"{source}: holds no certificate. Save the model with certificate=..., or give the JSON file."
            )
        return weights, weights.certificate
    try:
        return None, certificate_of(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{source}: cannot be read ({error}). Name a file that `certify --output` wrote.") from error


def _write(output: pathlib.Path, certificate: Certificate | PathCertificate) -> None:
    try:
        output.write_text(certificate.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"--output {output}: cannot be written ({error.strerror}). Name a file in a folder that exists."
        ) from error


class Watch:
    """A live line on stderr with what is being computed."""

    def __init__(self) -> None:
        console = stderr()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.task = self.bars.add_task("certify", total=None)

    def __enter__(self) -> Watch:  # noqa: PYI034, Self is typing's from 3.11 on
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        self.bars.update(self.task, description=what, completed=done, total=total)
