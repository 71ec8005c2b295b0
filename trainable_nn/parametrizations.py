"""Normalisations for ``torch.nn.utils.parametrize.register_parametrization``; assigning to the tensor inverts them.

The modules of this package normalise in ``forward`` and keep plain state_dict keys; these serve
those who prefer torch's parametrisations.
"""

from torch import Tensor, nn

from . import functional


class EntryNorm(nn.Module):
    """P(w) = gain * w (eps + w^2)^(-1/2) + leak * w, entry by entry.

    Raises:
        ValueError: eps, gain or leak is no constant of a normalisation.
        ConversionError: at assignment (and at registration, which keeps the weight), an entry is out of P's range.
    """

    def __init__(self, eps: float = 1.0, *, gain: float = 1.0, leak: float = 0.0, nearest: bool = False) -> None:
        functional.check_constants("EntryNorm", eps=eps, gain=gain, leak=leak)
        super().__init__()
        self.eps, self.gain, self.leak, self.nearest = float(eps), float(gain), float(leak), nearest

    def forward(self, w: Tensor) -> Tensor:
        return functional.entry_norm(w, self.eps, gain=self.gain, leak=self.leak)

    def right_inverse(self, p: Tensor) -> Tensor:
        """w with P(w) = p; with ``nearest=True`` entries out of range are first moved into it."""
        return functional.entry_norm_inverse(
            p, self.eps, gain=self.gain, leak=self.leak, nearest=self.nearest, where="EntryNorm"
        )

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}, gain={self.gain:g}, leak={self.leak:g}, nearest={self.nearest}"


class WeightNorm(nn.Module):
    """P(w) = gain * w (eps + |w_row|^2)^(-1/2); a row is one index of dimension ``dim``.

    Raises:
        ValueError: eps or gain is no constant of a normalisation.
        ConversionError: at assignment (and at registration, which keeps the weight), a row is out of P's range.
    """

    def __init__(self, eps: float = 1.0, *, gain: float = 1.0, dim: int | None = 0, nearest: bool = False) -> None:
        functional.check_constants("WeightNorm", eps=eps, gain=gain)
        super().__init__()
        self.eps, self.gain, self.dim, self.nearest = float(eps), float(gain), dim, nearest

    def forward(self, w: Tensor) -> Tensor:
        return functional.weight_norm(w, self.eps, self.dim, gain=self.gain)

    def right_inverse(self, p: Tensor) -> Tensor:
        """w with P(w) = p; with ``nearest=True`` rows out of range are first shortened."""
        rows = p.unsqueeze(0) if self.dim is None else p.movedim(self.dim, 0)
        options = {"gain": self.gain, "nearest": self.nearest, "where": "WeightNorm"}
        w = functional.weight_norm_inverse(rows, self.eps, **options)
        return w.squeeze(0) if self.dim is None else w.movedim(0, self.dim)

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}, gain={self.gain:g}, dim={self.dim}, nearest={self.nearest}"


class SchattenNorm(nn.Module):
    """P(w) = gain * w (eps + S(w)^2)^(-1/2), S the Schatten norm of order 2 * power of w as a matrix: ||P(w)||_2 < gain.

    Beside ``torch.nn.utils.parametrizations.spectral_norm`` the bound holds at every step, not in the limit of a power
    iteration, and P is smooth. ``groups`` matrices beside each other are normalised each by itself. The operator norm of a
    convolution can be ``theory.geometry_factor`` times that of its kernel: give it as factor.

    Raises:
        ValueError: eps, gain, power or factor is no constant of a normalisation.
        ConversionError: at assignment (and at registration, which keeps the weight), the norm is out of P's range.
    """

    def __init__(
        self,
        eps: float = 1.0,
        *,
        gain: float = 1.0,
        power: int = 16,
        groups: int = 1,
        factor: float = 1.0,
        nearest: bool = False,
    ) -> None:
        functional.check_constants("SchattenNorm", eps=eps, gain=gain)
        functional.check_power("SchattenNorm", power)
        super().__init__()
        self.eps, self.gain, self.power = float(eps), float(gain), power
        self.groups, self.factor, self.nearest = groups, float(factor), nearest

    def forward(self, w: Tensor) -> Tensor:
        options = {"gain": self.gain, "groups": self.groups, "factor": self.factor}
        return functional.schatten_norm(w, self.eps, self.power, **options)

    def right_inverse(self, p: Tensor) -> Tensor:
        """w with P(w) = p; with ``nearest=True`` a matrix out of range is first scaled into it."""
        options = {"gain": self.gain, "groups": self.groups, "factor": self.factor}
        return functional.schatten_norm_inverse(
            p, self.eps, self.power, **options, nearest=self.nearest, where="SchattenNorm"
        )

    def extra_repr(self) -> str:
        return (
            f"eps={self.eps:g}, gain={self.gain:g}, power={self.power}, groups={self.groups}, factor={self.factor:g}, "
            f"nearest={self.nearest}"
        )
