"""The commands and their options."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ..convert.recipes import SKIPS
from ..errors import ConversionError, TrainableNNError

HOLDS, DOES_NOT_HOLD, NO_ANSWER = 0, 1, 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count
UsageError = typer.BadParameter.__base__  # typer brings its own click since 0.20; both have this ancestor

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Convert networks to forms that train better, and see the difference. "
    "Status: 0 it holds, 1 it does not hold, 2 it cannot be answered.",
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
Trace = Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="Name of the recipe.")]
Skip = Annotated[str, typer.Option("--skip", help=f"What a projection shortcut becomes: {', '.join(SKIPS)}.")]
PostActivation = Annotated[bool, typer.Option("--post-activation", help="Keep post-activation blocks as they are.")]
Keep = Annotated[list[str], typer.Option("--keep", help="Path of a module to leave alone; may be repeated.")]
Model = Annotated[str, typer.Argument(help="Import path, such as torchvision.models:resnet18 or net.py:Net.")]
ModelArg = Annotated[list[str], typer.Option("--model-arg", help="key=value for the model; may be repeated.")]
Weights = Annotated[
    pathlib.Path | None,
    typer.Option(
        "--checkpoint", help="Weights to load first: safetensors, or a file of torch.save holding tensors only."
    ),
]
SampleShape = Annotated[
    str, typer.Option("--sample-shape", help="Shape of a random input, such as 1,3,224,224, to measure the change on.")
]


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 10,
    batch_size: Annotated[int, typer.Option(min=2, help="Images per step.")] = 64,
    width: Annotated[int, typer.Option(min=1, help="Channels of the first stage; 64 is the full ResNet-18.")] = 8,
    size: Annotated[int, typer.Option(min=8, help="Digits are enlarged to this many pixels; a multiple of 8.")] = 16,
    data: Annotated[str, typer.Option(help="digits, or idx, cifar10, cifar100 with --folder.")] = "digits",
    folder: Annotated[pathlib.Path | None, typer.Option(help="Folder of the data set.")] = None,
    train_images: Annotated[int, typer.Option(min=0, help="Use only so many training images; 0 for all.")] = 0,
    optimizer: Annotated[str, typer.Option(help="A class of torch.optim or torch_optimizer.")] = "SGD",
    optimizer_arg: Annotated[list[str], typer.Option(help="key=value for the optimiser; may be repeated.")] = [],  # noqa: B006
    lr: Annotated[float | None, typer.Option(help="Step size. SGD: 0.1; others: their own default.")] = None,
    seed: Annotated[int, typer.Option(help="Decides initial weights, split and batches.")] = 0,
    recipe: RecipeName = "paper",
    skip: Skip = "paper",
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, mps.")] = "cpu",
    spectra: Annotated[bool, typer.Option(help="Compute singular values of blocks and shortcuts.")] = True,
    output: Annotated[pathlib.Path, typer.Option(help="Folder for the figure and the numbers.")] = pathlib.Path(
        "trainable-nn-demo"
    ),
    json: Json = False,
    traceback: Trace = False,
) -> int:
    """Train a ResNet-18 and its converted copy side by side on real images.

    Both start from the same weights and see the same batches. Writes comparison.png and results.json.
    """
    from .demo import Settings, run

    options = {key: value for key, value in locals().items() if key in Settings.__dataclass_fields__}
    return run(Settings(**options), as_json=json)


@app.command()
def plan(
    model: Model,
    model_arg: ModelArg = [],  # noqa: B006
    checkpoint: Weights = None,
    recipe: RecipeName = "paper",
    skip: Skip = "paper",
    post_activation: PostActivation = False,
    keep: Keep = [],  # noqa: B006
    sample_shape: SampleShape = "",
    json: Json = False,
    traceback: Trace = False,
) -> int:
    """Show what a conversion would change, and change nothing."""
    from .conversion import Request, show_plan

    request = Request(model, model_arg, checkpoint, recipe, skip, post_activation, keep, sample_shape)
    return show_plan(request, as_json=json)


@app.command()
def convert(
    model: Model,
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    model_arg: ModelArg = [],  # noqa: B006
    checkpoint: Weights = None,
    recipe: RecipeName = "paper",
    skip: Skip = "paper",
    post_activation: PostActivation = False,
    keep: Keep = [],  # noqa: B006
    sample_shape: SampleShape = "",
    json: Json = False,
    traceback: Trace = False,
) -> int:
    """Convert a model and save it; trainable_nn.load(file, model) reads it back into the plain model."""
    from .conversion import Request, convert_and_save

    request = Request(model, model_arg, checkpoint, recipe, skip, post_activation, keep, sample_shape)
    return convert_and_save(request, output, as_json=json)


Data = Annotated[str, typer.Option(help="digits, or idx, cifar10, cifar100 with --folder.")]
Folder = Annotated[pathlib.Path | None, typer.Option(help="Folder of the data set.")]
Images = Annotated[int, typer.Option(min=1, help="How many training images: all of them count in every step.")]
Size = Annotated[int, typer.Option(min=8, help="Digits are enlarged to this many pixels.")]
Loss = Annotated[str, typer.Option(help="cross_entropy, or mse against rows of 0 and 1.")]
Convert = Annotated[str, typer.Option("--recipe", help="Convert first by this recipe, such as provable.")]
Training = Annotated[bool, typer.Option("--training-mode", help="Look at the network in training mode, not eval().")]
Seed = Annotated[int, typer.Option(help="Decides initial weights.")]


@app.command()
def certify(
    model: Model,
    model_arg: ModelArg = [],  # noqa: B006
    checkpoint: Weights = None,
    recipe: Convert = "",
    data: Data = "digits",
    folder: Folder = None,
    images: Images = 32,
    size: Size = 8,
    loss: Loss = "mse",
    training_mode: Training = False,
    seed: Seed = 0,
    budget: Annotated[int, typer.Option(min=1, help="MiB that matrices may take at once; work grows with it.")] = 1024,
    at_least: Annotated[str, typer.Option(help="Grade that counts as success: global, ball, measured, none.")] = "ball",
    path: Annotated[
        int | None, typer.Option(min=0, help="Prove a constant step along a path of at most so many steps, as certify_path does.")
    ] = None,
    step_size: Annotated[float | None, typer.Option(help="The step that --path proves; else one is looked for.")] = None,
    output: Annotated[
        pathlib.Path | None, typer.Option("--output", "-o", help="File for the certificate, JSON.")
    ] = None,
    json: Json = False,
    traceback: Trace = False,
) -> int:
    """Say what is proved of training this model on these images, and what stands in the way of more.

    Status 0 where the grade is at least --at-least.
    """
    from .certify import Request, certify_model

    request = Request(model, model_arg, checkpoint, recipe, data, folder, images, size, loss, training_mode, seed)
    return certify_model(request, output, budget, at_least, path, step_size, as_json=json)


@app.command()
def verify(
    certificate: Annotated[pathlib.Path, typer.Argument(help="The JSON file, or a safetensors file that holds one.")],
    model: Model,
    model_arg: ModelArg = [],  # noqa: B006
    checkpoint: Weights = None,
    recipe: Convert = "",
    data: Data = "digits",
    folder: Folder = None,
    images: Images = 32,
    size: Size = 8,
    loss: Loss = "mse",
    training_mode: Training = False,
    seed: Seed = 0,
    json: Json = False,
    traceback: Trace = False,
) -> int:
    """Compute a certificate again; status 1 where weights, data or a row of it are not what it says."""
    from .certify import Request, verify_certificate

    request = Request(model, model_arg, checkpoint, recipe, data, folder, images, size, loss, training_mode, seed)
    return verify_certificate(request, certificate, as_json=json)


@app.command()
def ntk(
    model: Model,
    model_arg: ModelArg = [],  # noqa: B006
    checkpoint: Weights = None,
    recipe: Convert = "",
    data: Data = "digits",
    folder: Folder = None,
    images: Images = 32,
    size: Size = 8,
    training_mode: Training = False,
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(min=0, help="Steps of gradient descent to predict and to measure.")] = 100,
    step_size: Annotated[float | None, typer.Option(help="Half the largest stable step unless given.")] = None,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="Show what each layer adds to the kernel.")] = False,
    single: Annotated[bool, typer.Option("--float32", help="Run the network in float32: faster, more rounding.")] = False,
    budget: Annotated[int, typer.Option(min=1, help="MiB that the kernel's computation may take.")] = 4096,
    plot: Annotated[pathlib.Path | None, typer.Option("--plot", help="File for the figure, such as kernel.png.")] = None,
    json: Json = False,
    traceback: Trace = False,
) -> int:
    """Compute the neural tangent kernel: its spectrum, and the training that it predicts beside the real one.

    Status 0 where the smallest eigenvalue is shown to be above 0.
    """
    from .certify import Request
    from .ntk import Settings, show_kernel

    request = Request(model, model_arg, checkpoint, recipe, data, folder, images, size, "mse", training_mode, seed)
    return show_kernel(request, Settings(steps, step_size, by_layer, single, budget, plot), as_json=json)


@app.command()
def spectrum(
    model: Model,
    input_shape: Annotated[str, typer.Option("--input-shape", help="What the model takes, with a batch: 1,3,32,32.")],
    model_arg: ModelArg = [],  # noqa: B006
    checkpoint: Weights = None,
    recipe: Annotated[str, typer.Option("--recipe", help="Show in --plot the layers after this recipe too.")] = "paper",
    rtol: Annotated[float, typer.Option(help="Work of the proofs: rtol / 40 of excess is arithmetic's.")] = 0.05,
    smallest: Annotated[bool, typer.Option(help="Find the smallest singular values too: most of the time.")] = True,
    plot: Annotated[pathlib.Path | None, typer.Option("--plot", help="File for the figure, such as spectrum.png.")] = None,
    json: Json = False,
    traceback: Trace = False,
) -> int:
    """Show what each linear layer and convolution does to lengths: a proved bound, the extremes, torch's spectral norm.

    Status 0 where every layer is bounded and no measured value is above its bound.
    """
    from .spectrum import Request, show_spectrum

    request = Request(model, model_arg, checkpoint, input_shape, recipe, rtol, smallest, plot)
    return show_spectrum(request, as_json=json)


@app.command()
def report(
    model: Model,
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="The page to write.")] = pathlib.Path(
        "report.html"
    ),
    model_arg: ModelArg = [],  # noqa: B006
    checkpoint: Weights = None,
    recipe: Annotated[str, typer.Option("--recipe", help="Convert first: paper, provable, or none.")] = "paper",
    data: Data = "digits",
    folder: Folder = None,
    images: Images = 16,
    size: Size = 8,
    loss: Loss = "mse",
    training_mode: Training = False,
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of gradient descent to predict and to measure.")] = 50,
    budget: Annotated[int, typer.Option(min=1, help="MiB that matrices may take at once; work grows with it.")] = 1024,
    at_least: Annotated[str, typer.Option(help="Grade that counts as success: global, ball, measured, none.")] = "none",
    json: Json = False,
    traceback: Trace = False,
) -> int:
    """Write one page for a person: conversion, certificate, spectra, kernel, losses predicted and measured, norms.

    It stands alone, without network access. Status 0 where it was written and the grade is at least --at-least.
    """
    from .certify import Request
    from .report import Settings, write_report

    request = Request(model, model_arg, checkpoint, recipe, data, folder, images, size, loss, training_mode, seed)
    return write_report(request, Settings(output, steps, budget, at_least), as_json=json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit status. One line on stderr for every error, unless --traceback is given."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(args=arguments or ["--help"], prog_name="trainable-nn", standalone_mode=False)
        if not arguments:  # the help, and nothing that could hold
            return NO_ANSWER
        return status if isinstance(status, int) else HOLDS
    except UsageError as error:
        return _complain(error.format_message(), NO_ANSWER)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted.", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_ANSWER
    except Exception as error:
        if "--traceback" in arguments:
            raise
        if isinstance(error, TrainableNNError):
            return _complain(str(error), DOES_NOT_HOLD if isinstance(error, ConversionError) else NO_ANSWER)
        return _complain(f"{type(error).__name__}: {error} (--traceback shows where)", NO_ANSWER)


def _complain(message: str, status: int) -> int:
    print(f"trainable-nn: {' '.join(message.split())}", file=sys.stderr)
    return status
