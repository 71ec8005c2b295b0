"""A network, its data and its loss, copied to float64 and checked: what every certificate is about."""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..errors import CertificateError
from ..modules.residual import hold_scales
from ..theory.costs import Cost, cost_for
from ..theory.rounding import down, up
from .certificate import Fingerprint
from .held import with_held_weights
from .kernel_error import outputs_error_at_most
from .kernel_error.outputs import REFUSALS

ASSUMED = 2.0**-44  # of the outputs where nothing is proved of their rounding; too little where large values cancel
SLACK = 1 + 2.0**-20  # more than the rounding of a bound of rounding


@dataclass(frozen=True)
class Problem:
    """``model`` is a copy in float64 on the CPU, ``inputs`` and ``targets`` likewise; ``cost`` is None without targets.

    ``initial_loss`` and ``loss_at_least`` enclose the loss now, rounding in float64 included: ``outputs_error`` bounds that of the
    outputs, proved, or None where it is assumed to be 2^-44 of them and ``refused`` says why, or where nobody has tried: ``proved``. ``known`` keeps norms of the weights.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor | None
    cost: Cost | None
    loss: str
    outputs: Tensor
    initial_loss: float | None
    loss_at_least: float | None
    data_roundoff: float
    fingerprint: Fingerprint
    outputs_error: float | None = None
    refused: Exception | None = None
    known: dict = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What gradient descent moves: the parameters that require gradients, each once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def outputs_at(self, values: dict[str, Tensor]) -> Tensor:
        """The outputs with other parameters; batch norm writes into buffers of its own."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        given = _once_for_each_module(self.model, {**buffers, **values})
        return torch.func.functional_call(self.model, given, (self.inputs,), tie_weights=False)

    @property
    def excess(self) -> float | None:
        return None if self.initial_loss is None else max(self.initial_loss - self.cost.infimum, 0.0)


def _once_for_each_module(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values by names that reach every tensor of every module, and no module twice.

    With ties of its own functional_call leaves the new values in a module that stands at two paths (torch 2.13).
    """
    first = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    found = {}
    for path, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and first[id(tensor)] in values:
                found[f"{path}.{name}".lstrip(".")] = values[first[id(tensor)]]
    return found


def problem_of(
    model: nn.Module, inputs: Tensor, targets: Tensor | None, loss: str | Cost, *, where: str = "certify", prove: bool = True
) -> Problem:
    """Copy and check. prove: whether the outputs' rounding is looked for now; ``proved`` does it later.

    Raises:
        TypeError: inputs are no float tensor, targets no tensor, or the model gives no float tensor.
        ValueError: no samples, values that are not finite or not there, targets that do not fit the loss.
        CertificateError: the model cannot be copied or run in float64.
    """
    _check_data(where, inputs, targets)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        _check_values(where, name, value)
    fingerprint = fingerprint_of(model, inputs, targets)
    try:
        with torch.random.fork_rng(devices=[]):
            twin = hold_scales(copy.deepcopy(model).to(device="cpu", dtype=torch.float64))
            x = inputs.detach().to("cpu", torch.float64)
            with torch.no_grad(), with_held_weights(twin):
                outputs = twin(x)
    except Exception as error:  # the user's forward raises what it likes
        raise CertificateError(
            f"{where}: {type(model).__name__} did not run on a copy in float64 ({type(error).__name__}: {error}). "
            f"Give a model that runs on these inputs after model.double()."
        ) from error
    if not isinstance(outputs, Tensor) or not outputs.dtype.is_floating_point:
        raise TypeError(
            f"{where}: the model gave a {type(outputs).__name__}, where one float tensor is needed. Wrap it."
        )
    if not bool(torch.isfinite(outputs).all()):
        raise ValueError(f"{where}: the model's outputs are not finite on these inputs. Mend weights or inputs first.")
    y = None if targets is None else targets.detach().to("cpu", torch.float64 if targets.is_floating_point() else None)
    cost = None if y is None else cost_for(loss, outputs, y)
    known: dict = {}
    error, refused = _outputs_error(twin, x, known) if prove and cost is not None else (None, None)
    least, most = (None, None) if cost is None else loss_between(where, cost, outputs, y, error)
    name = loss if isinstance(loss, str) else loss.name
    roundoff = torch.finfo(inputs.dtype).eps / 2
    return Problem(twin, x, y, cost, name, outputs, most, least, roundoff, fingerprint, error, refused, known)


def proved(problem: Problem, where: str) -> Problem:
    """The problem with what can be proved of its outputs' rounding."""
    if problem.outputs_error is not None or problem.refused is not None:
        return problem
    error, refused = _outputs_error(problem.model, problem.inputs, problem.known)
    least, most = loss_between(where, problem.cost, problem.outputs, problem.targets, error)
    return replace(problem, initial_loss=most, loss_at_least=least, outputs_error=error, refused=refused)


def _outputs_error(model: nn.Module, inputs: Tensor, known: dict) -> tuple[float | None, Exception | None]:
    try:
        with torch.random.fork_rng(devices=[]):
            return outputs_error_at_most(model, inputs, known=known), None
    except REFUSALS as error:
        return None, error


def loss_between(
    where: str, cost: Cost, outputs: Tensor, targets: Tensor, error: float | None = None
) -> tuple[float, float]:
    """The loss, less and more what float64 can have lost: in its formula, and in the outputs, which are off by ``error``.

    The cost is convex and smooth: |gamma(z + d) - gamma(z)| <= ||grad gamma(z)|| |d| + (smoothness / 2) |d|^2.
    error: None for 2^-44 of the outputs, which is no proof.
    """
    value = float(cost.value(outputs, targets))
    if not math.isfinite(value):
        raise ValueError(f"{where}: the loss is {value}. Mend targets or weights first.")
    if value < cost.infimum - 1e-9 * abs(cost.infimum):
        raise ValueError(f"{where}: the loss is {value}, below the stated infimum {cost.infimum}. Check the Cost.")
    moved = float(outputs.norm()) * ASSUMED if error is None else error
    own = cost.rounding_at_most(outputs, targets, value)
    slack = cost.gradient_at_most(max(value - cost.infimum, 0.0) + own) * moved + 0.5 * cost.smoothness * moved**2 + own
    slack *= SLACK
    return max(down(value - slack, 2) if value > slack else value - slack, cost.infimum), up(value + slack, 2)


def _check_data(where: str, inputs: Tensor, targets: Tensor | None) -> None:
    if not isinstance(inputs, Tensor) or not inputs.dtype.is_floating_point:
        found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(
            f"{where}: inputs must be one float tensor with a sample in each row, got {found}. Convert them."
        )
    if targets is not None and not isinstance(targets, Tensor):
        raise TypeError(f"{where}: targets must be a tensor, got a {type(targets).__name__}. Convert them.")
    if inputs.dim() < 2 or inputs.numel() == 0:
        raise ValueError(f"{where}: inputs (N, ...) with N >= 1 are needed, got {tuple(inputs.shape)}. Give samples.")
    for name, value in (("inputs", inputs), ("targets", targets)):
        if value is not None:
            _check_values(where, name, value)


def _check_values(where: str, name: str, value: Tensor) -> None:
    if isinstance(value, nn.parameter.UninitializedTensorMixin) or value.is_meta:
        raise ValueError(f"{where}: {name} has no values yet (lazy or on the meta device). Fill it first.")
    if value.is_complex():
        raise TypeError(f"{where}: {name} is complex, and only real networks are covered. Use real parameters.")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{where}: {name} holds values that are not finite. Mend them first.")


def fingerprint_of(model: nn.Module, inputs: Tensor, targets: Tensor | None) -> Fingerprint:
    """Hashes of what a certificate is about."""
    return Fingerprint(weights_hash(model), *(_data_hash(data) for data in (inputs, targets)))


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of parameters and buffers, and of structure, constants, modes and what trains."""
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        _feed(digest, path, type(module).__qualname__, module.extra_repr(), str(module.training))
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for name, value in sorted([*model.named_parameters(remove_duplicate=False), *model.named_buffers()]):
        _feed(digest, name, str(name in trained))
        _feed_tensor(digest, value)
    return digest.hexdigest()


def _data_hash(data: Tensor | None) -> str:
    digest = hashlib.sha256()
    if data is not None:
        _feed_tensor(digest, data)
    return "" if data is None else digest.hexdigest()


def _feed(digest, *texts: str) -> None:
    for text in texts:
        part = text.encode()
        digest.update(len(part).to_bytes(8, "little"))  # so that no two lists of texts read the same
        digest.update(part)


def _feed_tensor(digest, value: Tensor) -> None:
    _feed(digest, str(value.dtype), str(tuple(value.shape)))
    flat = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    digest.update(memoryview(flat.numpy()))
