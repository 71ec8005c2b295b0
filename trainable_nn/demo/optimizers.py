"""Any optimiser of torch.optim or torch-optimizer by its name, and one training step with it."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import OptionError

SGD_LR = 0.1  # the middle of the grid 0.2, 0.1, 0.05, 0.02 of the paper's experiments
LIBRARIES = ("torch.optim", "torch_optimizer")  # the first that knows a name wins
NEEDS_GRAPH = ("Adahessian",)  # reads the derivative of the gradient
NEEDS_CLOSURE = ("LBFGS",)  # evaluates the loss several times a step
KNOWN_WARNINGS = (  # of torch-optimizer 0.3, written for an older torch; none of them changes a step
    "Using backward.. with create_graph=True",
    "This overload of",
    "Converting a tensor with requires_grad=True",
    "An output with one or more elements was resized",
)
WITHOUT_LR = ("A2GradUni", "A2GradInc", "A2GradExp")  # accept lr and never read it


@dataclass(frozen=True)
class Choice:
    """An optimiser class with its options; the same choice is built once for each model."""

    name: str  # library and class
    kind: type[Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    inner_lr: float | None = None  # of the SGD that an optimiser around an optimiser drives

    def build(self, parameters: Iterable[Tensor]) -> Optimizer:
        """The optimiser for these parameters; OptionError where its class refuses them."""
        parameters = list(parameters)
        try:
            if self.inner_lr is not None:
                return self.kind(torch.optim.SGD(parameters, lr=self.inner_lr), **self.options)
            return self.kind(parameters, **self.options)
        except (TypeError, ValueError, AssertionError) as error:
            raise OptionError(f"{self.name}: cannot be made with {self.options}: {error}. Change the options.") from error

    def step(self, optimizer: Optimizer, loss_of: Callable[[], Tensor]) -> float:
        """One training step; the loss before it. A loss that is not finite is returned and not stepped on."""
        short = self.kind.__name__

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward(create_graph=short in NEEDS_GRAPH)
            return loss

        with warnings.catch_warnings():
            for words in KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", words, UserWarning)
            try:
                if short in NEEDS_CLOSURE:
                    return float(optimizer.step(closure).detach())
                loss = float(closure().detach())
                if math.isfinite(loss):
                    optimizer.step()
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                reason = str(error).strip().splitlines()[0]
                raise OptionError(f"{self.name}: a step failed: {reason}. Choose another optimiser.") from error
        optimizer.zero_grad(set_to_none=True)  # with create_graph the gradients hold the graph alive
        return loss


def choose(name: str, lr: float | None = None, arguments: Sequence[str] = ()) -> Choice:
    """Find an optimiser by ``Name`` or ``library.Name`` and check its options, given as ``key=value``.

    Without ``lr``, SGD takes 0.1 and every other class its own default.

    Raises:
        OptionError: the name, an option, or the package that the name needs is missing.
    """
    library, kind = _find(name)
    short, full = kind.__name__, f"{library.__name__}.{kind.__name__}"
    accepted = list(inspect.signature(kind.__init__).parameters)[2:]  # after self and params
    options = dict(_parse(argument, full, accepted) for argument in arguments)
    if short == "Lookahead":
        return Choice(full, kind, options, inner_lr=SGD_LR if lr is None else lr)
    if lr is not None:
        if "lr" not in accepted or short in WITHOUT_LR:
            raise OptionError(f"{full}: has no learning rate to set. Leave out --lr.")
        options["lr"] = lr
    elif short == "SGD" and "lr" not in options:
        options["lr"] = SGD_LR
    return Choice(full, kind, options)


def learning_rate(optimizer: Optimizer) -> float | None:
    """What the first parameter group has as its step size, or None where the optimiser sets it by itself."""
    value = optimizer.param_groups[0].get("lr")
    return None if value is None else float(value)


def _library(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _find(name: str) -> tuple[ModuleType, type[Optimizer]]:
    wanted, _, short = name.rpartition(".")
    if wanted not in ("", *LIBRARIES):
        raise OptionError(f"--optimizer {name}: the library must be one of {', '.join(LIBRARIES)}, got {wanted}.")
    missing = []
    for library_name in (wanted,) if wanted else LIBRARIES:
        library = _library(library_name)
        kind = getattr(library, short, None)
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer:
            return library, kind
        if library is None:
            missing.append(library_name)
    if missing:
        raise OptionError(
            f"--optimizer {name}: not in torch.optim, and torch-optimizer is not installed. "
            f"Install it with: pip install 'trainable_nn[optim]'."
        )
    raise OptionError(f"--optimizer {name}: no such optimiser; there are {', '.join(_names(wanted))}.")


def _names(wanted: str) -> list[str]:
    names = set()
    for library in map(_library, (wanted,) if wanted else LIBRARIES):
        kinds = {key: value for key, value in vars(library).items() if isinstance(value, type)}
        names |= {key for key, value in kinds.items() if issubclass(value, Optimizer) and value is not Optimizer}
    return sorted(names)


def _parse(argument: str, full: str, accepted: Sequence[str]) -> tuple[str, Any]:
    """Read ``key=value``, the value as a Python literal where it is one and as text elsewhere."""
    key, equals, text = argument.partition("=")
    if not equals or key not in accepted:
        raise OptionError(
            f"--optimizer-arg {argument}: {full} needs key=value with a key of {', '.join(accepted)}. Change it."
        )
    try:
        return key, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return key, text
