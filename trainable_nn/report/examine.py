"""Everything that a report shows, computed from a network, the one that it was converted from, and samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from ..certify import Certificate, certify
from ..convert import Plan
from ..linop import LayerBound, kernel_extremes, noise_floor, ntk, operator_norms_at_most
from ..spectra import Spectrum, spectra_of
from ..theory import predict_training
from .blocks import blocks_of, evenly
from .findings import Findings, Kernel, Losses, Missing

T = TypeVar("T")
Watch = Callable[[str, int, int], None]  # what is done, how much of it, of how much
LOSSES = {"mse": mse_loss, "cross_entropy": cross_entropy}
MOST_ROWS = 2048  # of the kernel; its decomposition takes some 10 seconds on one core
MOST_BLOCKS = 12  # whose spectra are computed
MOST_ENTRIES = 2**22  # of a Jacobian: 2048 x 2048, some 20 seconds on one core
PARTS = ("certificate", "spectra", "kernel", "predicted loss", "proved loss", "layers")


def examine(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    original: nn.Module | None = None,
    loss: str = "mse",
    steps: int = 50,
    budget: int = 2**30,
    title: str = "",
    facts: tuple[tuple[str, str], ...] = (),
    unconverted: str = "Nothing was converted; the network is looked at as it is.",
    progress: Watch | None = None,
) -> Findings:
    """Certificate, spectra of the blocks, kernel, losses predicted, proved and measured, and norms, all of ``model``.

    No part stops another: what cannot be computed is ``Missing`` and says why. ``original`` is the network that
    ``model`` was converted from; without it, or without a ``conversion_report``, blocks are shown as they are now.
    Training is measured on copies in float64, so the models stay as they are.

    Shape:
        inputs: (N, ...), floats; targets: as the loss takes them, "mse" or "cross_entropy".
    Cost:
        ``certify``, the kernel with its decomposition, at most 12 blocks' Jacobians of at most 2^22 entries, and 2 steps + 2
        passes of training. budget: bytes that matrices may take at once.
    Raises:
        ValueError: an unknown loss, or a negative number of steps.
    """
    if loss not in LOSSES or steps < 1:
        raise ValueError(f"examine: loss must be one of {', '.join(LOSSES)} and steps at least 1, got {loss!r}, {steps}.")
    watch = progress or (lambda what, done, total: None)
    work = _Work(model, inputs, targets, loss, steps, budget, watch)
    plan = getattr(model, "conversion_report", None)
    certificate = work.part(0, work.certificate)
    spectra = work.part(1, lambda: _spectra(original, model, plan, inputs))
    kernel = work.part(2, work.kernel)
    prediction = work.part(3, lambda: work.prediction(kernel))
    descent = work.part(4, lambda: work.descent(certificate))
    norms = work.part(5, work.norms)
    return Findings(
        title or type(model).__name__, facts, plan if isinstance(plan, Plan) else Missing(unconverted),
        certificate, spectra, kernel, prediction, descent, norms,
    )  # fmt: skip


class _Work:
    def __init__(self, model, inputs, targets, loss: str, steps: int, budget: int, watch: Watch) -> None:
        self.model, self.inputs, self.targets, self.loss = model, inputs, targets, loss
        self.steps, self.budget, self.watch = steps, budget, watch

    def part(self, index: int, compute: Callable[[], T]) -> T | Missing:
        self.watch(PARTS[index], index, len(PARTS))
        try:
            with torch.random.fork_rng(devices=[]):
                return compute()
        except Exception as error:  # noqa: BLE001, a user's model raises what it likes, and the page goes on
            return Missing(f"It could not be computed: {type(error).__name__}: {' '.join(str(error).split())}")

    def certificate(self) -> Certificate:
        return certify(self.model, self.inputs, self.targets, loss=self.loss, budget=self.budget)

    def kernel(self) -> Kernel | Missing:
        model, inputs = self._copy()
        with torch.no_grad():
            outputs = copy.deepcopy(model)(inputs)
        if outputs.numel() > MOST_ROWS:
            return Missing(
                f"{len(inputs)} samples with {outputs[0].numel()} outputs each make a kernel of {outputs.numel()} rows, and a "
                f"report decomposes at most {MOST_ROWS}. Take fewer samples, or a model with fewer outputs."
            )
        kernel = ntk(model, inputs, budget=self.budget)
        residual = outputs - self.targets if self.loss == "mse" else torch.zeros_like(outputs)
        return Kernel(kernel_extremes(kernel), predict_training(kernel, residual), noise_floor(kernel, torch.float64))

    def prediction(self, kernel: Kernel | Missing) -> Losses | Missing:
        if isinstance(kernel, Missing):
            return Missing(f"Without the kernel nothing is predicted. {kernel.reason}")
        if self.loss != "mse":
            return Missing(f"The kernel predicts the squared loss, and this report is about {self.loss}.")
        step = 0.5 * kernel.prediction.largest_stable_step
        if not 0.0 < step < math.inf:
            return Missing("The kernel is zero: no step of gradient descent moves the outputs, to first order.")
        said = kernel.prediction.predict_loss(range(self.steps + 1), step).tolist()
        return Losses(step, tuple(said), self._measured(step))

    def descent(self, certificate: Certificate | Missing) -> Losses | Missing:
        if isinstance(certificate, Missing):
            return Missing(f"There is no certificate. {certificate.reason}")
        if certificate.descent is None:
            return Missing(f"The grade is {certificate.grade}, and no loss is proved below grade ball.")
        said = certificate.loss_curve(range(self.steps + 1))
        return Losses(certificate.step_size, tuple(said), self._measured(certificate.step_size))

    def norms(self) -> list[LayerBound]:
        return operator_norms_at_most(self.model, self.inputs[:1])

    def _copy(self) -> tuple[nn.Module, Tensor]:
        return copy.deepcopy(self.model).to("cpu", torch.float64), self.inputs.detach().to("cpu", torch.float64)

    def _measured(self, step: float) -> tuple[float, ...]:
        """Losses of plain gradient descent on all samples at once, on a copy in float64."""
        model, inputs = self._copy()
        targets = self.targets.double() if self.targets.is_floating_point() else self.targets
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=step)
        losses = []
        for index in range(self.steps + 1):
            self.watch("training", index, self.steps)
            loss = LOSSES[self.loss](model(inputs), targets)
            losses.append(float(loss.detach()))
            if index < self.steps:
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return tuple(losses)


def _spectra(
    original: nn.Module | None, model: nn.Module, plan: Plan | None, inputs: Tensor
) -> dict[str, list[Spectrum]] | Missing:
    networks = {"now": model} if original is None or plan is None else {"before": original, "after": model}
    paths = blocks_of(model, plan)
    paths = [path for path in paths if all(path in dict(network.named_modules()) for network in networks.values())]
    if not paths:
        return Missing("No residual block was found in this network.")
    few = evenly(paths, MOST_BLOCKS)
    return {name: spectra_of(network, few, inputs, most_entries=MOST_ENTRIES) for name, network in networks.items()}
