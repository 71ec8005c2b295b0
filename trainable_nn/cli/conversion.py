"""The commands `plan` and `convert`."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

import torch
from torch import nn

from .. import checkpoint, convert
from ..errors import ConversionError, OptionError
from . import models
from .terminal import number, print_json, stderr, stdout, table

HOLDS = 0


@dataclass(frozen=True)
class Request:
    """What the options of `plan` and `convert` ask for."""

    model: str
    model_arg: list[str]
    checkpoint: pathlib.Path | None
    recipe: str
    skip: str
    post_activation: bool
    keep: list[str]
    sample_shape: str

    def build(self) -> nn.Module:
        with stderr().status(f"building {self.model}"):
            model = models.build(self.model, self.model_arg)
            if self.checkpoint is not None:
                models.load_weights(model, self.checkpoint)
        return model

    def options(self) -> dict:
        """The arguments of ``plan`` and ``convert_model`` behind the model."""
        recipe = recipe_of(self.recipe, skip=self.skip, preactivation=not self.post_activation)
        return {"recipe": recipe, "keep": tuple(self.keep), "sample_input": self._sample()}

    def _sample(self) -> torch.Tensor | None:
        if not self.sample_shape:
            return None
        try:
            shape = [int(part) for part in self.sample_shape.split(",")]
            return torch.randn(shape, generator=torch.Generator().manual_seed(0))
        except (ValueError, RuntimeError) as error:
            raise OptionError(
                f"--sample-shape {self.sample_shape}: needs sizes with commas between, such as 1,3,224,224."
            ) from error


def recipe_of(name: str, **options) -> convert.Recipe | convert.ProvableRecipe:
    """The recipe that the options name; a wrong option is no statement about the model, so it is an OptionError."""
    try:
        if name == "provable":
            changed = {key: value for key, value in options.items() if value != getattr(convert.paper(), key)}
            if changed:
                raise OptionError(f"--recipe provable: {', '.join(sorted(changed))} is an option of the recipe 'paper'. Leave it out.")
            return convert.provable()
        return convert.Recipe(name, **options)
    except ConversionError as error:
        raise OptionError(str(error)) from error


def show_plan(request: Request, *, as_json: bool) -> int:
    """Print the plan, as a table or as JSON."""
    options = request.options()
    model = request.build()
    with stderr().status("planning"):
        plan = convert.plan(model, **options)
    print_json(plan.to_dict()) if as_json else print_plan(plan)
    return HOLDS


def convert_and_save(request: Request, output: pathlib.Path, *, as_json: bool) -> int:
    """Convert, save, and print the plan that was applied."""
    options = request.options()
    model = request.build()
    with stderr().status("converting"):
        converted = convert.convert_model(model, **options)
        origin = {"factory": request.model, "arguments": request.model_arg}
        checkpoint.save(converted, output, origin=origin)
    saved = checkpoint.load(output)  # what was written can be read
    plan = converted.conversion_report
    if as_json:
        print_json({"output": str(output), "hash": saved.hash, "conversion": plan.to_dict()})
    else:
        print_plan(plan)
        stdout().print(f"Wrote {output} ({len(saved.tensors)} tensors, sha256 {saved.hash[:16]}...).", markup=False)
    return HOLDS


def print_plan(plan: convert.Plan, *, all_steps: bool = True) -> None:
    """The plan as a table: what changes at each path, how many keys survive, and why."""
    changed = [step for step in plan.steps if step.changes]
    title = (
        f"{plan.model}, recipe {plan.recipe}: {len(changed)} of {len(plan.steps)} places change"
    )
    rows = [_row(step) for step in (plan.steps if all_steps else changed)]
    out = stdout()
    out.print(table(title, ("path", "before", "after", "why", "keys kept/new/dropped"), rows, left=4))
    for note in plan.notes:
        out.print(note, markup=False)
    if plan.function_change is not None:
        out.print(f"On the sample input the outputs move by {number(plan.function_change, '.3g')} times their norm.")


def _row(step: convert.Step) -> tuple[str, ...]:
    path = ", ".join((step.path or "(model)", *step.also))
    keys = f"{len(step.kept)}/{len(step.new)}/{len(step.dropped)}"
    return path, step.before, step.after if step.changes else "unchanged", step.reason, keys
