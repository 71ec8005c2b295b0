"""What a conversion does to a network: a name and its options, as data."""

from dataclasses import asdict, dataclass

from ..errors import ConversionError

SKIPS = ("conv", "paper", "orthogonal")


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
        if not isinstance(self.name, str) or self.name not in RECIPES:
            raise ConversionError(_unknown(self.name))
        if self.skip not in SKIPS:
            raise ConversionError(f"Recipe: skip must be one of {', '.join(SKIPS)}, got {self.skip!r}.")
        if not isinstance(self.preactivation, bool):
            raise ConversionError(f"Recipe: preactivation must be True or False, got {self.preactivation!r}.")

    def to_dict(self) -> dict:
        """The recipe as values that JSON knows."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "Recipe":
        """The recipe that ``to_dict`` wrote; unknown fields are a ConversionError."""
        unknown = set(fields) - {"name", "skip", "preactivation"}
        if unknown:
            raise ConversionError(f"Recipe: unknown field {min(unknown)!r}; the fields are name, skip, preactivation.")
        return cls(**fields)


def paper(*, skip: str = "paper", preactivation: bool = True) -> Recipe:
    """The modified ResNet of paper A's experiments; the options are those of ``Recipe``."""
    return Recipe("paper", skip, preactivation)


RECIPES = {"paper": paper}


def as_recipe(recipe: "str | Recipe") -> Recipe:
    """A recipe by name with its default options, or the recipe itself."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ConversionError(_unknown(recipe))
    return RECIPES[recipe]()


def _unknown(name: object) -> str:
    if name == "provable":
        return "Recipe: 'provable' is not in this release; 'paper' is. Use recipe='paper'."
    return f"Recipe: no recipe is named {name!r}; there is {', '.join(map(repr, RECIPES))}."
