"""The numeric certificate of paper B's network: this network, these data, from the present parameters on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch

from ...errors import CertificateError, DatasetError, OptionError
from .centre import Centre, measure
from .network import LinearWidthResNet
from .path import Enclosure, closes, enclose
from .rows import MEASURED, PROVED, Row, Rows

ROUNDOFF_LIMIT = 1e-8  # of J, over ||J||; ``growth.OUTWARD`` covers ten times as much


@dataclass(frozen=True)
class Certificate:
    """What is proved about gradient descent on 1/2 ||f - y||^2 from the present parameters.

    Where ``holds``: descent with ``step_size`` or any smaller step, in exact arithmetic, over the full batch and all
    W_h, never leaves ``radius`` around the start (by the length of its path), sigma_min(J) >= ``alpha`` and ||J|| <=
    ``beta`` all the way, and loss_t <= loss_0 rate^t for a step of ``step_size``. Where not: "no certificate", and
    ``needed_over_available`` says by how much; nothing is said about whether descent converges.
    """

    holds: bool
    loss: float
    alpha: float
    beta: float
    lipschitz: float
    radius: float
    step_size: float
    rate: float
    needed_over_available: float
    rows: Rows
    enclosure: Enclosure

    def steps_to(self, loss: float) -> int:
        """A number of steps after which 1/2 ||f - y||^2 is at most this, proved.

        Raises:
            CertificateError: there is no certificate. OptionError: a loss that is not above 0.
        """
        if not self.holds:
            raise CertificateError(f"linear_width.Certificate.steps_to: {self.verdict} No number of steps is proved.")
        if not loss > 0:
            raise OptionError(f"linear_width.Certificate.steps_to: the loss to reach must be above 0, got {loss}.")
        return (
            0 if loss >= self.loss else math.ceil(math.log(loss / self.loss) / math.log1p(self.rate - 1) * (1 + 1e-9))
        )

    @property
    def verdict(self) -> str:
        if self.holds:
            return f"Certified: loss_t <= {self.loss:.4g} * {self.rate:.10g}^t for step {self.step_size:.4g}."
        if not math.isfinite(self.needed_over_available):
            return "No certificate: the Jacobian has no full rank that survives rounding."
        return (
            f"No certificate: the residual is {self.needed_over_available:.3g} times what provably vanishes before "
            "the bound of sigma_min(J) reaches 0."
        )

    def __str__(self) -> str:
        return f"{self.verdict}\n{self.rows}"


def certificate(network: LinearWidthResNet, inputs: np.ndarray, targets: np.ndarray) -> Certificate:
    """Prove, or say that it cannot be proved, that gradient descent on 1/2 ||f - y||^2 converges from here.

    The numbers are those of this network: the Jacobian's singular values at the present parameters, and the growth of
    the Jacobian along the path (``path``, ``growth``). No hypothesis on initialisation, width or data enters.

    Shape:
        inputs: (n, in_features). targets: (n,). For a centred output give the targets y + f(inputs).
    Cost:
        ``measure``, and O(H (n + m)) for each of at most some 1,500 cells: seconds at n = 8, m = 512.
    Raises:
        DatasetError: inputs or targets of another shape, or not finite. OptionError: parameters that are not finite.
    Source:
        Paper B, Theorem 2.1; THEORY_PAPERS II.4.1 item 4, sharpened (module ``path``).
    """
    centre = measure(network, inputs)
    return _certificate(centre, centre.outputs - targets_of(targets, len(centre.outputs)))


def scale_that_certifies(
    network: LinearWidthResNet, inputs: np.ndarray, targets: np.ndarray, *, most: float = 2.0**12, rtol: float = 0.02
) -> float:
    """The least omega, to a relative rtol, for which f(theta_0) + omega (f - f(theta_0)) gets a certificate.

    omega multiplies the Jacobian and leaves the residual: how much lazier the network would have to be, 1 where it is
    certified as it is, infinity above ``most``. Cost: some 10 certificates.
    """
    centre = measure(network, inputs)
    residual = centre.outputs - targets_of(targets, len(centre.outputs))
    holds = lambda omega: closes(scaled(centre, omega), residual)
    if holds(1.0):
        return 1.0
    low, high = 1.0, 2.0
    while not holds(high):
        low, high = high, 2 * high
        if high > most:
            return math.inf
    while high > low * (1 + rtol):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def train_until_certified(
    network: LinearWidthResNet, inputs: np.ndarray, targets: np.ndarray, *, step_size: float | None = None,
    most: int = 100_000,
) -> tuple[int, Certificate]:  # fmt: skip
    """Plain gradient descent on 1/2 ||f - y||^2, in place, until its own parameters are certified.

    The certificate speaks of descent from the parameters reached, not of the steps before. It is asked for after
    0, 1, 2, 4, ... steps. Default step: 1 / (2 ||J||^2) at the start, which no statement covers.

    Returns:
        The steps taken and the last certificate, which holds unless ``most`` steps were not enough.
    """
    if step_size is None:
        centre = measure(network, inputs, detail=False)
        step_size = 0.5 / float(np.linalg.eigvalsh(centre.gram)[-1])
    if not (math.isfinite(step_size) and step_size > 0):
        raise OptionError(f"linear_width.train_until_certified: step_size must be above 0, got {step_size}.")
    taken, ask = 0, 0
    while True:
        if taken == ask:
            found = certificate(network, inputs, targets)
            if found.holds or taken >= most:
                return taken, found
            ask = min(most, max(1, 2 * ask))
        descend(network, inputs, targets, step_size)
        taken += 1


def descend(network: LinearWidthResNet, inputs: np.ndarray, targets: np.ndarray, step_size: float) -> float:
    """One step of plain gradient descent on 1/2 ||f - y||^2, in place; returns the loss before it."""
    device, dtype = network.a.device, network.a.dtype
    x, y = (torch.as_tensor(np.asarray(v), dtype=dtype, device=device) for v in (inputs, targets))
    with torch.enable_grad():
        loss = (network(x) - y).square().sum() / 2
        gradients = torch.autograd.grad(loss, list(network.weights))
    with torch.no_grad():
        for weight, gradient in zip(network.weights, gradients, strict=True):
            weight.sub_(gradient, alpha=step_size)
    return loss.item()


def scaled(centre: Centre, omega: float) -> Centre:
    """The centre of omega f: b and everything linear in it times omega, the Gram times omega^2; outputs stay."""
    products = centre.products
    return dataclasses.replace(
        centre,
        back=[omega * b for b in centre.back],
        gram_of_layer=[omega**2 * g for g in centre.gram_of_layer],
        products=None if products is None else dataclasses.replace(products, bent=omega * products.bent),
    )


def targets_of(targets: np.ndarray, n: int) -> np.ndarray:
    y = np.asarray(targets.detach().cpu() if hasattr(targets, "detach") else targets)
    if y.shape != (n,) or y.dtype.kind not in "fiu" or not np.isfinite(y.astype(np.float64)).all():
        raise DatasetError(
            f"linear_width: the targets must be {n} finite numbers, one a sample, got shape {y.shape} of {y.dtype}. "
            "Paper B's network has one output."
        )
    return y.astype(np.float64)


def _certificate(centre: Centre, residual: np.ndarray) -> Certificate:
    enclosure = enclose(centre, residual)
    rounding = centre.roundoff / enclosure.sigma_largest if enclosure.sigma_largest > 0 else math.inf
    holds = enclosure.closes and rounding <= ROUNDOFF_LIMIT
    loss = float(residual @ residual) / 2 * (1 + 1e-12)
    drift = float(enclosure.drift[-1])
    source = "II.4.1 item 4, sharpened"
    rows = [
        Row("sigma_min(J) at the start", enclosure.sigma_smallest, PROVED, source, "from the Gram, rounding taken off"),
        Row("||J|| at the start", enclosure.sigma_largest, PROVED, source, "the same, rounding added"),
        Row("residual ||f - y||", math.sqrt(2 * loss), MEASURED, "(2.1)"),
        Row("rounding of J", rounding, PROVED, "II.4.1 item 7", f"relative; at most {ROUNDOFF_LIMIT:g} allowed"),
    ]
    if holds:
        rows += [
            Row(
                "radius", float(enclosure.s[-1]), PROVED, source, "of the path's length; the paper's is 4 ||r|| / alpha"
            ),
            Row("||J - J_0||", drift, PROVED, source, "at most, on the path"),
            Row("alpha", enclosure.alpha, PROVED, source, "at most sigma_min(J), on the path"),
            Row("beta", enclosure.beta, PROVED, source, "at least ||J||, on the path"),
            Row("L", enclosure.lipschitz, PROVED, source, "Lipschitz constant of J along steps"),
            Row("step size", enclosure.step_size, PROVED, "II.3.2"),
            Row("rate", enclosure.rate, PROVED, "II.3.2", "of the loss, a step"),
        ]
    else:
        rows.append(Row("needed / available", enclosure.needed_over_available, MEASURED, source, "1 would close"))
    return Certificate(
        holds, loss, enclosure.alpha if holds else 0.0, enclosure.beta, enclosure.lipschitz,
        float(enclosure.s[-1]) if holds else math.inf, enclosure.step_size if holds else 0.0,
        enclosure.rate if holds else 1.0, enclosure.needed_over_available, Rows(tuple(rows)), enclosure,
    )  # fmt: skip
