"""The plan of a conversion: pure data, to read, to store and to compare."""

import math
from dataclasses import asdict, dataclass, fields

from ..errors import ConversionError
from .recipes import ProvableRecipe, Recipe


@dataclass(frozen=True)
class Step:
    """What happens at one path, why, and to which state_dict keys.

    ``also`` are further paths of the same shared module. ``kept``, ``new`` and ``dropped`` are full keys;
    every key of the model that no step names survives unchanged.
    """

    path: str
    before: str
    after: str
    reason: str
    kept: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether the step replaces anything."""
        return self.before != self.after


@dataclass(frozen=True)
class Plan:
    """The steps of a conversion in the model's order.

    ``function_change`` is the L2 distance of the outputs on the sample input, in evaluation mode, relative to
    the original's norm (absolute where that is 0); None where no sample was given.
    """

    recipe: Recipe | ProvableRecipe
    model: str
    steps: tuple[Step, ...]
    keep: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    function_change: float | None = None

    def __str__(self) -> str:
        rows = [("path", "before", "after", "weights kept/new/dropped", "why")]
        for step in self.steps:
            path = ", ".join((step.path or "(model)", *step.also))
            after = step.after if step.changes else "unchanged"
            rows.append(
                (path, step.before, after, f"{len(step.kept)}/{len(step.new)}/{len(step.dropped)}", step.reason)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        table = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]) for row in rows]
        return "\n".join([self._title(), *table, *self.notes, self.distance()])

    def _title(self) -> str:
        changed = sum(step.changes for step in self.steps)
        return f"{self.model} by recipe {self.recipe}: {changed} of {len(self.steps)} paths change."

    def distance(self) -> str:
        """How far the function moves, in a sentence."""
        if self.function_change is None:
            return "How far the function moves was not measured: give sample_input."
        return f"On the sample input the outputs move by {self.function_change:.3g} times their norm."

    def __rich__(self):
        from .tables import plan_rich  # tables read plans

        return plan_rich(self)

    def _repr_html_(self) -> str:
        from .tables import plan_html

        return plan_html(self)

    def to_dict(self) -> dict:
        """The plan as values that JSON knows; a change that is not finite is written as a string."""
        change = self.function_change
        written = str(change) if change is not None and not math.isfinite(change) else change
        return {**asdict(self), "recipe": self.recipe.to_dict(), "function_change": written}

    @classmethod
    def from_dict(cls, values: dict) -> "Plan":
        """The plan that ``to_dict`` wrote, also after a trip through JSON.

        Raises:
            ConversionError: fields are missing or unknown.
        """
        try:
            steps = tuple(
                Step(**{k: tuple(v) if isinstance(v, list) else v for k, v in s.items()}) for s in values["steps"]
            )
            change = values["function_change"]
            return cls(
                **{name: values[name] for name in _WORDS},
                **{name: tuple(values[name]) for name in ("keep", "notes")},
                recipe=Recipe.from_dict(values["recipe"]),
                steps=steps,
                function_change=None if change is None else float(change),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ConversionError(f"Plan.from_dict: not a plan that to_dict wrote ({error}).") from error


_WORDS = tuple(f.name for f in fields(Plan) if f.name == "model")
