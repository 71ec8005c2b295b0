"""Paper B (arXiv 1911.04351): the width it asks for, the width that is proved enough here, and the width that fits.

    python examples/reproduce_paper_b.py --output paper_b             # some minutes
    python examples/reproduce_paper_b.py --output paper_b --quick     # some seconds

Three results, each as CSV and picture, and all of it in paper_b.json:

* widths: for each number of samples n, the paper's m = K n (a claim: Lemma 5.1, on which it rests, is false), the
  least width tried at which ``linear_width.certificate`` proves convergence from the paper's own initialisation, and
  the least width tried at which gradient descent fits random labels for most seeds;
* constants: alpha, beta and L as claimed and corrected, as certified, and as measured along the path of descent;
* loss: predicted from the eigenvalues of the initial tangent kernel, r_t = (Id - step K)^t r_0, against measured.

Inputs are random on the unit sphere and labels are random signs: the setting of the theorem, where nothing helps.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import pathlib

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from trainable_nn import plotting
from trainable_nn.theory import linear_width

FITS = 1e-3  # of the initial loss
SHOWN = 1e-6  # of the initial loss: where the picture of the losses ends
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
QUICK = {"samples": [2, 4], "dimension": 16, "steps": 300, "seeds": 1, "most": 128, "curves": [16, 128]}


def data(n: int, dimension: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of length 1 and labels of +1 and -1."""
    draw = np.random.default_rng((seed, n))
    x = draw.standard_normal((n, dimension))
    return x / np.linalg.norm(x, axis=1, keepdims=True), draw.choice([-1.0, 1.0], n)


def network(x: np.ndarray, y: np.ndarray, width: int, options: argparse.Namespace, seed: int):
    """The paper's network at the paper's initialisation."""
    return linear_width.LinearWidthResNet.for_targets(
        torch.tensor(y), x.shape[1], width, options.depth, nonlinearity=options.nonlinearity,
        residual_scale=options.residual_scale, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def usual_step(net, x: np.ndarray) -> float:
    """1 / ||J||^2 at the start, which is what practice would take; nothing is proved about it."""
    return 1.0 / float(np.linalg.eigvalsh(linear_width.measure(net, x, detail=False).gram)[-1])


def fits(x: np.ndarray, y: np.ndarray, width: int, options: argparse.Namespace) -> bool:
    """Whether descent brings the loss to FITS of its start within the steps, for most seeds."""
    good = 0
    for seed in range(options.seeds):
        net = network(x, y, width, options, seed)
        step = usual_step(net, x)
        first = linear_width.descend(net, x, y, step)
        good += any(linear_width.descend(net, x, y, step) <= FITS * first for _ in range(options.steps))
    return 2 * good > options.seeds


def widths(options: argparse.Namespace, progress: Progress) -> list[dict]:
    """One row for each number of samples."""
    task = progress.add_task("widths", total=2 * len(options.samples))
    rows = []
    for n in options.samples:
        x, y = data(n, options.dimension, options.seed)
        constants = linear_width.paper_constants(network(x, y, 64, options, 0), x, y)
        fitting = next((m for m in WIDTHS if fits(x, y, m, options)), None)
        progress.advance(task)
        needed, certified = math.nan, None
        for m in (2**k for k in range(4, 1 + int(math.log2(options.most)))):
            found = linear_width.certificate(network(x, y, m, options, 0), x, y)
            needed = found.needed_over_available
            if found.holds:
                certified = m
                break
        progress.advance(task)
        rows.append({
            "samples": n, "lambda": constants["lambda(X)", "measured"], "claimed": constants["width", "claimed"],
            "certified": certified, "needed_over_available": needed, "fits": fitting,
        })  # fmt: skip
    return rows


def constants(options: argparse.Namespace, progress: Progress) -> list[dict]:
    """Alpha, beta and L for the least width that is certified at the fewest samples, or for the widest one tried."""
    x, y = data(min(options.samples), options.dimension, options.seed)
    task = progress.add_task("constants", total=options.steps)
    for k in range(4, 1 + int(math.log2(options.most))):
        net = network(x, y, 2**k, options, 0)
        found = linear_width.certificate(net, x, y)
        if found.holds:
            break
    claims = linear_width.paper_constants(net, x, y)
    step, seen = found.step_size if found.holds else usual_step(net, x), []
    for t in range(options.steps):
        if t % max(1, options.steps // 20) == 0:
            centre = linear_width.measure(net, x, detail=False)
            seen.append((np.concatenate([w.ravel() for w in centre.weights]), centre.jacobian()))
        linear_width.descend(net, x, y, step)
        progress.advance(task)
    values = [np.linalg.svd(jacobian, compute_uv=False) for _, jacobian in seen]
    bends = [
        np.linalg.norm(j - k, 2) / np.linalg.norm(a - b)
        for i, (a, j) in enumerate(seen) for b, k in seen[:i] if np.linalg.norm(a - b) > 1e-9
    ]  # fmt: skip
    length = max(float(np.linalg.norm(a - seen[0][0])) for a, _ in seen)
    table = (
        ("alpha", "alpha on the ball", found.alpha, min(float(v[-1]) for v in values)),
        ("beta", "beta on the ball", found.beta, max(float(v[0]) for v in values)),
        ("L", "L on the ball", found.lipschitz, max(bends, default=math.nan)),
        ("radius", "radius", found.radius, length),
        ("step size", "step size", found.step_size, step),
    )
    return [
        {
            "constant": name, "claimed": claims[row, "claimed"], "corrected": claims[row, "corrected"],
            "certified": certified if found.holds else None, "measured": measured, "samples": len(y), "width": net.width,
        }
        for name, row, certified, measured in table
    ]  # fmt: skip


def losses(options: argparse.Namespace, progress: Progress) -> list[dict]:
    """Predicted and measured loss at each step, until both are below SHOWN, for each width, on the most samples."""
    x, y = data(max(options.samples), options.dimension, options.seed)
    task = progress.add_task("loss", total=len(options.curves))
    rows = []
    for width in options.curves:
        net = network(x, y, width, options, 1)
        centre = linear_width.measure(net, x, detail=False)
        eigenvalues, vectors = np.linalg.eigh(centre.gram)
        step = 1.0 / eigenvalues[-1]
        parts = vectors.T @ (centre.outputs - y)
        for t in range(options.steps):
            predicted = float(np.sum(((1 - step * eigenvalues) ** t * parts) ** 2) / 2)
            measured = linear_width.descend(net, x, y, step)
            rows.append({"samples": len(y), "width": width, "step": t, "predicted": predicted, "measured": measured})
            if max(predicted, measured) < SHOWN * rows[-1 - t]["measured"]:
                break
        progress.advance(task)
    return rows


def draw_widths(rows: list[dict], path: pathlib.Path, most: int) -> None:
    figure = plotting.new_figure(6.4, 4.4)
    axes = figure.add_subplot()
    series = (("claimed", "paper B's K n: claimed, its proof has a hole"), ("certified", "proved enough at this start"),
              ("fits", "descent fits, most seeds"))  # fmt: skip
    for style, (key, label) in zip(plotting.STYLES, series, strict=False):
        points = [(row["samples"], row[key]) for row in rows if row[key] is not None]
        axes.plot(*zip(*points, strict=True), label=label, **style) if points else None
    open_ = [row["samples"] for row in rows if row["certified"] is None]
    axes.plot(open_, [most] * len(open_), "s", color=plotting.STYLES[1]["color"], markersize=9, markerfacecolor="none",
              label=f"no certificate up to {most}") if open_ else None  # fmt: skip
    samples = [row["samples"] for row in rows]
    axes.set_xscale("log", base=2), axes.set_yscale("log")
    axes.set_xticks(samples, [str(n) for n in samples])
    axes.set_xlabel("samples n"), axes.set_ylabel("width m")
    axes.set_title("Width needed against number of samples")
    axes.grid(True, which="major", alpha=0.3), axes.legend(fontsize="small")
    figure.savefig(path)


def draw_constants(rows: list[dict], path: pathlib.Path) -> None:
    figure = plotting.new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    names = [row["constant"] for row in rows]
    for style, key in zip(plotting.STYLES, ("claimed", "corrected", "certified", "measured"), strict=False):
        points = [(at, row[key]) for at, row in enumerate(rows) if row[key] is not None]
        marks = {"color": style["color"], "marker": style["marker"], "linestyle": "none", "markersize": 8}
        axes.plot(*zip(*points, strict=True), label=key, alpha=0.85, **marks) if points else None
    axes.set_yscale("log"), axes.set_xticks(range(len(names)), names)
    axes.set_title(f"Constants at {rows[0]['samples']} samples, width {rows[0]['width']}")
    axes.grid(True, which="major", alpha=0.3), axes.legend(fontsize="small")
    figure.savefig(path)


def draw_losses(rows: list[dict], path: pathlib.Path) -> None:
    figure = plotting.new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    for style, width in zip(plotting.STYLES, dict.fromkeys(row["width"] for row in rows), strict=False):
        here = [row for row in rows if row["width"] == width]
        steps = [row["step"] for row in here]
        axes.plot(steps, [row["measured"] for row in here], color=style["color"], label=f"width {width}, measured")
        predicted = [row["predicted"] for row in here]
        axes.plot(steps, predicted, color=style["color"], linestyle="--", alpha=0.8, label=f"width {width}, predicted")
    top = max(row["measured"] for row in rows)
    last = max((row["step"] for row in rows if max(row["measured"], row["predicted"]) > SHOWN * top), default=1)
    axes.set_yscale("log"), axes.set_ylim(SHOWN * top, 2 * top), axes.set_xlim(0, 1.02 * last + 1)
    axes.set_xlabel("step of gradient descent"), axes.set_ylabel("loss, half the squared residual")
    axes.set_title(f"Predicted by the initial tangent kernel, and measured ({rows[0]['samples']} samples)")
    axes.grid(True, which="major", alpha=0.3), axes.legend(fontsize="small")
    figure.savefig(path)


def write(rows: list[dict], path: pathlib.Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def known(value):
    """JSON has no infinity and no NaN: null stands for both."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(title: str, rows: list[dict], console: Console) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*("-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("paper_b"))
    parser.add_argument("--quick", action="store_true", help="2 and 4 samples, 300 steps, widths up to 128")
    parser.add_argument("--samples", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--dimension", type=int, default=32, help="of the inputs")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--residual-scale", type=float, default=0.1, help="the paper's c_res")
    parser.add_argument("--nonlinearity", default="tanh")
    parser.add_argument("--steps", type=int, default=2000, help="of each training")
    parser.add_argument("--seeds", type=int, default=3, help="initialisations for each width that is tried")
    parser.add_argument("--most", type=int, default=1024, help="widest network that is offered to the certificate")
    parser.add_argument("--curves", type=int, nargs="+", default=[16, 128, 1024], help="widths of the loss curves")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    if (
        min([*options.samples, *options.curves, options.dimension, options.steps, options.seeds]) < 1
        or options.most < 16
    ):
        parser.error("samples, curves, dimension, steps and seeds must be at least 1, and --most at least 16")
    return options


def main() -> None:
    options, console = parse_arguments(), Console()
    options.output.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        found = {"widths": widths(options, progress), "constants": constants(options, progress)}
        found["loss"] = losses(options, progress)
    for name, rows in found.items():
        write(rows, options.output / f"{name}.csv")
    draw_widths(found["widths"], options.output / "widths.png", options.most)
    draw_constants(found["constants"], options.output / "constants.png")
    draw_losses(found["loss"], options.output / "loss.png")
    orders = linear_width.table1(max(options.samples), options.depth, claimed_width=found["widths"][-1]["claimed"])
    settings = {key: str(v) if isinstance(v, pathlib.Path) else v for key, v in vars(options).items()}
    tables = {**found, "table1": [vars(row) for row in orders]}
    finite = {name: [{key: known(v) for key, v in row.items()} for row in rows] for name, rows in tables.items()}
    (options.output / "paper_b.json").write_text(
        json.dumps({"settings": settings, **finite}, indent=1, allow_nan=False)
    )
    show("Width needed", found["widths"], console)
    show("Constants: claimed, corrected, certified, measured", found["constants"], console)
    console.print(f"What each paper of Table 1 would demand at n = {max(options.samples)}, H = {options.depth}:")
    console.print(linear_width.table1_text(orders), highlight=False, soft_wrap=True)
    console.print(f"Everything is in {options.output}: paper_b.json, three tables (.csv) and three pictures (.png).")


if __name__ == "__main__":
    main()
