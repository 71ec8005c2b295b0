"""The command `demo`: a ResNet-18 and its converted copy, trained side by side on real images."""

from __future__ import annotations

import pathlib
import time
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .. import __version__, convert, datasets, ops, plotting
from ..demo.optimizers import Choice, choose
from ..demo.resnet import PreActBlock, PreActResNet18
from ..demo.training import Run, steps_per_epoch, train_side_by_side
from ..errors import OptionError
from ..spectra import Spectrum, spectra_of
from .conversion import recipe_of
from .demo_report import print_outcome, print_start
from .progress import Watch
from .terminal import print_json, stderr, to_json

HOLDS, DOES_NOT_HOLD = 0, 1
SPECTRUM_IMAGES = 64  # whose statistics the frozen batch normalisation takes
GRID = 8  # the network halves the image three times


@dataclass(frozen=True)
class Settings:
    """The options of `demo`, by their names on the command line."""

    epochs: int
    batch_size: int
    width: int
    size: int
    data: str
    folder: pathlib.Path | None
    train_images: int
    optimizer: str
    optimizer_arg: list[str]
    lr: float | None
    seed: int
    recipe: str
    skip: str
    device: str
    spectra: bool
    output: pathlib.Path


@dataclass(frozen=True)
class Outcome:
    """Everything that the demo measured."""

    settings: Settings
    data: datasets.ImageData
    choice: Choice
    plan: convert.Plan
    runs: dict[str, Run]
    spectra: dict[str, list[Spectrum]]
    seconds: float

    def to_dict(self) -> dict:
        settings = {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in asdict(self.settings).items()}
        spectra = {
            name: [{"path": s.path, "shape": s.shape, "smallest": s.smallest, "mean": s.mean, "largest": s.largest} for s in values]
            for name, values in self.spectra.items()
        }
        return {
            "trainable_nn": __version__,
            "kernels": ops.native.report().splitlines(),
            "threads": torch.get_num_threads(),
            "settings": settings,
            "data": repr(self.data),
            "optimizer": {"name": self.choice.name, "options": {key: str(value) for key, value in self.choice.options.items()}},
            "conversion": self.plan.to_dict(),
            "runs": {name: asdict(run) for name, run in self.runs.items()},
            "spectra": spectra,
            "seconds": self.seconds,
        }


def run(settings: Settings, *, as_json: bool) -> int:
    """Train, measure, print, write; status 1 when a run diverged."""
    start = time.perf_counter()
    choice = choose(settings.optimizer, settings.lr, settings.optimizer_arg)
    device = _device(settings.device)
    plotting.new_figure(1, 1)  # a missing matplotlib is said now, not after the training
    data = _images(settings)
    models = _models(settings, data)
    choice.build(models["original"].parameters())  # and so are its wrong options
    plan = models["converted"].conversion_report
    _make_folder(settings.output)
    if not as_json:
        print_start(settings, data, choice, plan)
    spectra = _spectra(models, data) if settings.spectra else {}
    models = {name: model.to(device) for name, model in models.items()}
    outcome = Outcome(settings, data, choice, plan, _train(settings, data, models, choice, device), spectra, 0.0)
    outcome = Outcome(**{f.name: getattr(outcome, f.name) for f in fields(Outcome)} | {"seconds": time.perf_counter() - start})
    _write(outcome)
    print_json(outcome.to_dict()) if as_json else print_outcome(outcome)
    return DOES_NOT_HOLD if any(run.diverged_at for run in outcome.runs.values()) else HOLDS


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"--device {name}: torch cannot use it here ({str(error).splitlines()[0]}). Try cpu.") from error
    return device


def _make_folder(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--output {folder}: cannot be made ({error.strerror}). Name another folder.") from error


def _images(settings: Settings) -> datasets.ImageData:
    if settings.data == "digits":
        if settings.size % GRID:
            raise OptionError(f"--size {settings.size}: must be a multiple of {GRID}, which the network halves three times.")
        return datasets.digits(size=settings.size, seed=settings.seed)
    readers = {"idx": datasets.idx, "cifar10": datasets.cifar10, "cifar100": datasets.cifar100}
    if settings.data not in readers:
        raise OptionError(f"--data {settings.data}: must be one of digits, {', '.join(readers)}.")
    if settings.folder is None:
        raise OptionError(f"--data {settings.data}: needs --folder, the folder that holds its files.")
    return readers[settings.data](settings.folder)


def _models(settings: Settings, data: datasets.ImageData) -> dict[str, nn.Module]:
    """The network and its converted copy, which start from the same weights."""
    torch.manual_seed(settings.seed)
    original = PreActResNet18(settings.width, data.train_images.shape[1], len(data.classes))
    recipe = recipe_of(settings.recipe, skip=settings.skip)
    sample = _padded(data.train_images[:SPECTRUM_IMAGES])
    return {"original": original, "converted": convert.convert_model(original, recipe, sample_input=sample)}


def _padded(images: Tensor) -> Tensor:
    """Repeat the border until the size is a multiple of 8: 28 x 28 becomes 32 x 32."""
    missing = -images.shape[-1] % GRID
    return pad(images, (missing // 2, missing - missing // 2) * 2, mode="replicate") if missing else images


def _spectra(models: dict[str, nn.Module], data: datasets.ImageData) -> dict[str, list[Spectrum]]:
    blocks = [path for path, block in models["original"].named_modules() if isinstance(block, PreActBlock) and block.projects]
    paths = [path for block in blocks for path in (f"{block}.shortcut", block)]
    images = _padded(data.train_images[:SPECTRUM_IMAGES])
    with stderr().status("singular values of the blocks at the first image"):
        return {name: spectra_of(model, paths, images) for name, model in models.items()}


def _train(settings: Settings, data: datasets.ImageData, models: dict[str, nn.Module], choice: Choice, device) -> dict[str, Run]:
    count = settings.train_images or len(data.train_labels)
    train, test = (
        (_padded(images).to(device), labels.to(device))
        for images, labels in (
            (data.train_images[:count], data.train_labels[:count]),
            (data.test_images, data.test_labels),
        )
    )
    steps = steps_per_epoch(len(train[1]), settings.batch_size) * settings.epochs
    with Watch(list(models), steps, settings.epochs) as watch:
        return train_side_by_side(
            models,
            train,
            test,
            choice,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            seed=settings.seed,
            on_step=watch.step,
            on_epoch=watch.epoch,
        )


def _write(outcome: Outcome) -> None:
    runs, folder = outcome.runs, outcome.settings.output
    panels: dict[str, dict[str, list[float]]] = {}
    for name, spectra in outcome.spectra.items():
        for spectrum in spectra:
            if spectrum.values is not None:
                panels.setdefault(f"Jacobian of {spectrum.path} at the start", {})[name] = spectrum.values.tolist()
    figure = plotting.comparison(
        {name: [epoch.train_loss for epoch in run.epochs] for name, run in runs.items()},
        {name: [epoch.test_accuracy for epoch in run.epochs] for name, run in runs.items()},
        dict(list(panels.items())[:2]),
        steps={name: run.step_losses for name, run in runs.items()},
        title=f"PreActResNet18 on {outcome.data.name}: original and converted, {outcome.choice.name}",
    )
    figure.savefig(folder / "comparison.png")
    (folder / "results.json").write_text(to_json(outcome.to_dict()) + "\n")
