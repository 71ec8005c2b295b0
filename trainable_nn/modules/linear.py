"""Linear layers whose weight is normalised in forward."""

from torch import Tensor, nn

from .. import functional
from .normalised import EntryNormalised, WeightNormalised


class EntryNormLinear(EntryNormalised, nn.Linear):
    r"""y = x P(w)^T + b with P(w) = gain * w (eps + w^2)^(-1/2) + leak * w, entry by entry.

    Each entry of P(w) is below gain where leak = 0, so \|\|P(w)\|\|_2 < gain (m n)^(1/2) for every w, m = out_features
    and n = in_features. With leak > 0 the slope of P is at least leak everywhere, and P is unbounded. The parameter
    ``weight`` is w, with torch's shape, name and initial values; ``effective_weight()`` is P(w).

    Shape:
        x: (\*, n) -> y: (\*, m). weight: (m, n). bias: (m,).
    Raises:
        ValueError: eps outside [1e-30, 1e30], gain not positive, leak negative, or one of them not finite.
    Source:
        Paper A, Example A.2; its leak is THEORY 4(a).
    """

    plain_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        eps: float = 1.0,
        gain: float = 1.0,
        leak: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._set_constants(eps=eps, gain=gain, leak=leak)

    def forward(self, x: Tensor) -> Tensor:
        return functional.entry_norm_linear(x, self.weight, self.bias, eps=self.eps, gain=self.gain, leak=self.leak)


class WeightNormLinear(WeightNormalised, nn.Linear):
    r"""y = x P(w)^T + b with P(w) = gain * w (eps + abs(w_row)^2)^(-1/2), row by row.

    Each row of P(w) is shorter than gain, so \|\|P(w)\|\|_2 < gain m^(1/2) for every w, m = out_features. Unlike
    torch's weight_norm no row is divided by zero, and the length of a row is trained through w itself. The parameter
    ``weight`` is w, with torch's shape, name and initial values; ``effective_weight()`` is P(w).

    Shape:
        x: (\*, n) -> y: (\*, m). weight: (m, n). bias: (m,).
    Raises:
        ValueError: eps outside [1e-30, 1e30], or gain not positive and finite.
    Source:
        Paper A, Example A.2, Lemma A.7.
    """

    plain_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        eps: float = 1.0,
        gain: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._set_constants(eps=eps, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        return functional.weight_norm_linear(x, self.weight, self.bias, eps=self.eps, gain=self.gain)
