"""What a conversion does to a network: a name and its options, as data."""

import math
from dataclasses import asdict, dataclass, fields

from ..errors import ConversionError
from ..functional.normalise import EPS_RANGE
from ..functional.schatten import check_power

SKIPS = ("conv", "paper", "orthogonal")
ACTIVATIONS = ("gelu", "silu", "tanh", "softplus", "smooth_relu", "keep")
NORMS = ("none", "floored")
WEIGHTS = ("spectral", "weight")


@dataclass(frozen=True)
class Recipe:
    """How residual blocks are rewritten.

    ``skip`` says what a projection shortcut of stride s becomes:
    "conv" keeps the user's projection;
    "paper" adds the pooled path, conv1x1(u) + s * AvgPool_s(u) with the pooled channels centred;
    "orthogonal" puts OrthogonalDownsample2d in its place, on the block's raw input, and drops the projection.
    ``preactivation`` moves post-activation blocks to pre-activation; without it they keep their form.

    Raises:
        ConversionError: an unknown skip mode, or a recipe that does not exist.
    Source:
        THEORY sections 1 and 7.
    """

    name: str = "paper"
    skip: str = "paper"
    preactivation: bool = True

    def __post_init__(self) -> None:
        if self.name != "paper":
            raise ConversionError(_unknown(self.name))
        if self.skip not in SKIPS:
            raise ConversionError(f"Recipe: skip must be one of {', '.join(SKIPS)}, got {self.skip!r}.")
        if not isinstance(self.preactivation, bool):
            raise ConversionError(f"Recipe: preactivation must be True or False, got {self.preactivation!r}.")

    def to_dict(self) -> dict:
        """The recipe as values that JSON knows."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict) -> "Recipe | ProvableRecipe":
        """The recipe, of either kind, that ``to_dict`` wrote; unknown fields are a ConversionError."""
        kind = ProvableRecipe if values.get("name") == "provable" else Recipe
        known = [field.name for field in fields(kind)]
        unknown = set(values) - set(known)
        if unknown:
            raise ConversionError(f"Recipe: unknown field {min(unknown)!r}; the fields are {', '.join(known)}.")
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def __str__(self) -> str:
        return f"{self.name!r} (skip={self.skip!r}, preactivation={self.preactivation})"


@dataclass(frozen=True)
class ProvableRecipe:
    """How a ResNet becomes a network for which the theorems hold.

    The new network is a first layer EntryNormLinear over the flattened input, one ContractiveResidual for each residual
    block of the old one, and a readout with orthonormal rows beside a bounded branch.
    ``leak`` is the first layer's: above 0 the global grade is possible, with 0 (the paper's own form) the ball grade.
    ``strength`` bounds the Jacobian of each branch everywhere; below 1.
    ``activation`` is smooth with slope at most 1; "keep" leaves the user's, and ReLU lowers the grade to measured.
    ``norm`` "floored" keeps batch normalisation in the branches, with a floor; it couples the samples and lowers the grade.
    ``weights`` normalises kernels by a Schatten norm ("spectral") or by rows ("weight"); ``eps`` and ``power`` are those of
    the layers. A smaller eps holds branches near their bound from the start, a larger power is tighter; both make the
    constants of a certificate larger.
    ``input_shape`` is the shape (C, H, W) of one sample; without it that of ``sample_input`` is taken.
    ``most_bytes`` is what the first layer's weight may take.

    Raises:
        ConversionError: an option out of its range.
    Source:
        THEORY section 4 (i) to (iii) and II.4.3; Theorem 4.7 of paper A.
    """

    name: str = "provable"
    leak: float = 0.1
    strength: float = 0.95
    activation: str = "gelu"
    norm: str = "none"
    weights: str = "spectral"
    bias: bool = True
    input_shape: tuple[int, ...] | None = None
    most_bytes: int = 2**32
    eps: float = 1.0
    power: int = 16

    def __post_init__(self) -> None:
        if self.name != "provable":
            raise ConversionError(_unknown(self.name))
        if not (_is_number(self.leak) and self.leak >= 0.0):
            raise ConversionError(f"ProvableRecipe: leak must be a finite number, at least 0, got {self.leak!r}.")
        if not (_is_number(self.strength) and 0.0 < self.strength < 1.0):
            raise ConversionError(f"ProvableRecipe: strength must be above 0 and below 1, got {self.strength!r}.")
        for option, known in (("activation", ACTIVATIONS), ("norm", NORMS), ("weights", WEIGHTS), ("bias", (True, False))):
            if getattr(self, option) not in known:
                listed = ", ".join(map(repr, known))
                raise ConversionError(f"ProvableRecipe: {option} must be one of {listed}, got {getattr(self, option)!r}.")
        if not (_is_number(self.eps) and EPS_RANGE[0] <= self.eps <= EPS_RANGE[1]):
            raise ConversionError(f"ProvableRecipe: eps must be from {EPS_RANGE[0]:g} to {EPS_RANGE[1]:g}, got {self.eps!r}.")
        try:
            check_power("ProvableRecipe", self.power)
        except ValueError as error:
            raise ConversionError(str(error)) from error
        if self.input_shape is not None and not _is_shape(self.input_shape):
            raise ConversionError(f"ProvableRecipe: input_shape must be (C, H, W) in whole numbers, got {self.input_shape!r}.")

    def to_dict(self) -> dict:
        """The recipe as values that JSON knows."""
        return asdict(self)

    def __str__(self) -> str:
        options = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name not in ("name", "most_bytes")]
        return f"{self.name!r} ({', '.join(options)})"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(isinstance(size, int) and size > 0 for size in value)


def paper(*, skip: str = "paper", preactivation: bool = True) -> Recipe:
    """The modified ResNet of paper A's experiments; the options are those of ``Recipe``."""
    return Recipe("paper", skip, preactivation)


def provable(**options) -> ProvableRecipe:
    """The form for which the theorems hold; the options are those of ``ProvableRecipe``."""
    return ProvableRecipe(**options)


RECIPES = {"paper": paper, "provable": provable}


def as_recipe(recipe: "str | Recipe | ProvableRecipe") -> Recipe | ProvableRecipe:
    """A recipe by name with its default options, or the recipe itself."""
    if isinstance(recipe, (Recipe, ProvableRecipe)):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ConversionError(_unknown(recipe))
    return RECIPES[recipe]()


def _unknown(name: object) -> str:
    if isinstance(name, str) and name in RECIPES:
        return f"Recipe: {name!r} has options of its own. Use trainable_nn.convert.{name}(...)."
    return f"Recipe: no recipe is named {name!r}; there is {', '.join(map(repr, RECIPES))}."
