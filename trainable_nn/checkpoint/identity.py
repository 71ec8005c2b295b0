"""What decides a model's function beside its tensors: the conversion, and the constants of this package's layers."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..convert import Plan, convert_model
from ..errors import CheckpointError, ConversionError

CONSTANTS = ("eps", "gain", "leak", "bound", "stride", "in_channels", "out_channels")
LAYERS = __name__.partition(".")[0] + ".modules."  # where this package's layers are defined


def describe(model: nn.Module) -> dict[str, Any]:
    """The metadata that follow from the model, as values that JSON knows."""
    from .. import __version__  # defined after this file is imported

    return {
        "package": __version__,
        "model": f"{type(model).__module__}:{type(model).__qualname__}",
        "conversion": conversion_of(model),
        "constants": constants_of(model),
    }


def conversion_of(model: nn.Module) -> dict[str, Any] | None:
    """The plan by which ``model`` was converted; None where it was not."""
    plan = getattr(model, "conversion_report", None)
    return None if plan is None else json.loads(json.dumps(plan.to_dict()))


def constants_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Class and constants of each layer of this package, by path."""
    found = {}
    for path, module in model.named_modules():
        if type(module).__module__.startswith(LAYERS):
            values = {name: getattr(module, name, None) for name in CONSTANTS}
            known = {name: value for name, value in values.items() if isinstance(value, int | float | tuple)}
            found[path] = json.loads(json.dumps({"class": type(module).__qualname__} | known))
    return found


def converted_as(path: pathlib.Path, metadata: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """The model, converted as the file's was: a copy when it still has to be converted, else the model itself."""
    present = getattr(model, "conversion_report", None)
    if metadata["conversion"] is None:
        if present is None:
            return model
        raise CheckpointError(
            f"{path}: holds a plain model, and the given one is converted by {present.recipe}. "
            f"Load the file into the plain model, then convert that."
        )
    try:
        recorded = Plan.from_dict(metadata["conversion"])
        if present is None:
            model = convert_model(model, recorded.recipe, keep=recorded.keep)
    except ConversionError as error:
        raise CheckpointError(f"{path}: its recipe does not convert the given model: {error}") from error
    difference = _difference(recorded, model.conversion_report)
    if difference:
        raise CheckpointError(f"{path}: {difference} Give the model that was saved, or its plain form.")
    return model


def check_constants(path: pathlib.Path, metadata: Mapping[str, Any], model: nn.Module) -> None:
    """Constants are no tensors, yet with another eps the same tensors are another function."""
    recorded, present = metadata["constants"], constants_of(model)
    for place in sorted(recorded | present):
        if recorded.get(place) != present.get(place):
            found, needed = (there.get(place, "no layer of trainable_nn") for there in (recorded, present))
            raise CheckpointError(
                f"{path}: {place or 'the model'} is {found} in the file, and {needed} in the model. "
                f"Build the model with the constants of the file."
            )


def _difference(recorded: Plan, present: Plan) -> str | None:
    """Where two plans differ in what they did; notes and measured numbers do not count."""
    if recorded.recipe != present.recipe:
        return f"was converted by {recorded.recipe}, and the given model by {present.recipe}."
    there, here = ({step.path: step.after for step in plan.steps} for plan in (recorded, present))
    for place in sorted(there | here):
        if there.get(place) != here.get(place):
            found, needed = (plan.get(place, "left alone") for plan in (there, here))
            return f"{place or 'the model'} became {found} in the file, and {needed} in the given model."
    return None
