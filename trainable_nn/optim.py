"""Certified step sizes as torch learning-rate schedulers."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .certify.certificate import Certificate
from .certify.path_certificate import PathCertificate
from .certify.problem import problem_of
from .certify.step import Step, certified_step, gradient_of
from .errors import CertificateError
from .theory.costs import Cost

__all__ = ["CertifiedDescent", "CertifiedLR", "LostGuaranteeWarning"]

PLAIN = "plain gradient descent"


class LostGuaranteeWarning(UserWarning):
    """The optimiser does not do what the guarantee is about; the message says what is lost."""


class CertifiedLR(LRScheduler):
    """The certificate's constant step for every parameter group, from ``certify`` or ``certify_path``.

    With ``torch.optim.SGD`` without momentum, weight decay and the like, on all of the certified samples in every step,
    the loss stays below ``predicted_loss`` and the weights within the certificate's radius; for a path, of the weights
    that float64 computed for it (``certify_path``). With any other optimiser
    the step is only a scale, and ``lost`` says which guarantee is gone.

    Raises:
        CertificateError: the certificate proves no step; its explanation follows.
    Source:
        THEORY 4; the certificate names each statement.
    """

    def __init__(self, optimizer: Optimizer, certificate: Certificate | PathCertificate, last_epoch: int = -1) -> None:
        if certificate.step_size is None or not certificate.step_size > 0.0:
            raise CertificateError(f"CertifiedLR: this certificate proves no step size.\n{certificate.explain()}")
        self.certificate, self.lost = certificate, lost_guarantee(optimizer)
        warn_of(self.lost, "CertifiedLR")
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        return [_like(group["lr"], self.certificate.step_size) for group in self.optimizer.param_groups]

    @property
    def predicted_loss(self) -> float | None:
        """An upper bound of the loss after the steps so far; None where the optimiser voids it."""
        return None if self.lost else self.certificate.predicted_loss(self.last_epoch)

    def state_dict(self) -> dict:
        return {key: value for key, value in super().state_dict().items() if key != "certificate"}


class CertifiedDescent(LRScheduler):
    """A step for every iteration, with descent proved from the weights of that moment: the loss falls at each.

    Call ``step()`` after ``optimizer.step()``, as with every scheduler; it reads the weights, takes the gradient of the
    loss over all samples in float64, and sets the learning rate for the next iteration. ``loss_at_most`` bounds the loss
    after that iteration, before it is made. ``history`` holds each ``Step``, and ``guarantee`` is the product of
    their rates: excess loss now over excess loss at the start is at most that. A step of 0 means that no descent could be
    proved, usually at the minimum.

    The loss is that of the network in exact arithmetic, at the weights that float64 stores after plain descent along the gradient
    as it is computed here; a model in float32 stores others. Rounding is part of the proof where ``rounding`` is "proved".

    Shape:
        inputs, targets: all samples; the loop must use the same in every iteration.
    Units:
        loss: as in ``certify``.
    Cost:
        For each step a gradient in float64 and some Taylor models of the network, a dozen forward passes each.
    Raises:
        CertificateError: a layer has no bounds; the model draws at random; or it does not run in float64.
        TypeError, ValueError: as ``certify``.
    Source:
        Convexity and smoothness of the cost with a Taylor model along the ray of the step; see ``certify.step`` and ``certify.ray``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        *,
        loss: str | Cost = "mse",
        last_epoch: int = -1,
    ) -> None:
        self.model, self.inputs, self.targets, self.loss = model, inputs, targets, loss
        self.lost = lost_guarantee(optimizer) or _untrained(optimizer, model)
        warn_of(self.lost, "CertifiedDescent")
        self.history: list[Step] = []
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        problem = problem_of(self.model, self.inputs, self.targets, self.loss, where="CertifiedDescent", prove=False)
        last = next((step.step_size for step in reversed(self.history) if step.step_size > 0), None)
        step = certified_step(problem, gradient_of(problem), last)
        self.history.append(step)
        return [_like(group["lr"], step.step_size) for group in self.optimizer.param_groups]

    @property
    def loss_at_most(self) -> float | None:
        """An upper bound of the loss after the next iteration; None where the optimiser voids it."""
        return None if self.lost else self.history[-1].loss_at_most

    @property
    def guarantee(self) -> float | None:
        """The product of the proved rates of all steps so far, the next included; None where the optimiser voids it."""
        if self.lost:
            return None
        product = 1.0
        for step in self.history:
            product *= step.rate
        return product

    @property
    def rounding(self) -> str:
        """ "proved" where no step so far rests on an assumption about rounding in float64, else "assumed"; each ``Step`` says why."""
        return "proved" if all(step.rounding == "proved" for step in self.history) else "assumed"

    def state_dict(self) -> dict:
        kept = ("model", "inputs", "targets", "loss", "history")
        return {key: value for key, value in super().state_dict().items() if key not in kept}


def lost_guarantee(optimizer: Optimizer) -> str | None:
    """What an optimiser's own rule takes from the guarantee of plain gradient descent; None if nothing."""
    everything = "neither the fall of the loss, nor the rate, nor the radius is guaranteed"
    if type(optimizer) is not torch.optim.SGD:
        return f"{type(optimizer).__name__} does not move along the gradient alone, so {everything}"
    wrong = {"momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "maximize": False}
    for group in optimizer.param_groups:
        for name, needed in wrong.items():
            if group.get(name, needed) != needed:
                return f"SGD with {name}={group[name]} is not {PLAIN}, so {everything}"
    return None


def _untrained(optimizer: Optimizer, model: nn.Module) -> str | None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in held:
            return f"{name} requires gradients and is not in the optimiser, so the proved step is of another path"
    return None


def warn_of(lost: str | None, where: str) -> None:
    if lost:
        warnings.warn(
            f"{where}: {lost}. Use torch.optim.SGD(parameters, lr=1.0) for it.", LostGuaranteeWarning, stacklevel=3
        )


def _like(lr: float | Tensor, value: float) -> float | Tensor:
    return torch.full_like(lr, value) if isinstance(lr, Tensor) else value
