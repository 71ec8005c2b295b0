"""Plan a conversion and carry it out: survey, edits, build everything, then swap."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..errors import ConversionError
from .blocks import Anatomy
from .chain import chain_of_blocks
from .checks import check_keep, check_model
from .measure import function_change
from .plan import Plan, Step
from .provable import Design, design, plan_of, with_shape
from .provable_build import build
from .recipes import ProvableRecipe, Recipe, as_recipe
from .rewrite import Edit, edit_for
from .walk import Survey, survey

# Type by qualified name -> the parts of a block that torch.fx cannot follow. The residual networks of torchvision and
# timm need none.
ADAPTERS: Mapping[str, Callable[[nn.Module], Anatomy]] = {}


def plan(
    model: nn.Module,
    recipe: str | Recipe | ProvableRecipe = "paper",
    *,
    keep: Sequence[str] = (),
    sample_input: Tensor | tuple | None = None,
) -> Plan:
    """What ``convert_model`` would do with the same arguments, as data; the model is not touched.

    Cost:
        A few milliseconds per block; with ``sample_input`` two copies of the model and two forward passes.
    Raises:
        ConversionError: as ``convert_model``.
    """
    chosen = as_recipe(recipe)
    if isinstance(chosen, ProvableRecipe):
        planned, made = _designed(model, chosen, keep, sample_input)
        return _compared(planned, _copied(model), build(made), sample_input) if sample_input is not None else planned
    planned, edits = _prepare(model, chosen, keep)
    return _measured(planned, edits, model, sample_input)


def convert_model(
    model: nn.Module,
    recipe: str | Recipe | ProvableRecipe = "paper",
    *,
    keep: Sequence[str] = (),
    sample_input: Tensor | tuple | None = None,
    inplace: bool = False,
) -> nn.Module:
    """A copy of the model whose residual blocks are rewritten; ``inplace`` rewrites the model itself.

    Surviving weights keep their keys, dtype, device, memory format and requires_grad, modules their mode and
    hooks, and a module that stands at several places stays one. ``keep`` names paths that are left alone,
    with all below them. The result carries ``conversion_report``, the plan that was applied.

    A model on the meta device can be converted: no step needs a value. ``sample_input`` is a tensor or a
    tuple of arguments; it is moved to the model's device and dtype, and goes through copies, in evaluation
    mode, so that running statistics and random generators stay as they are.

    Raises:
        ConversionError: nothing to rewrite, a block that no rule knows, or bad input (weights that are not
            finite, a wrapped, scripted, compiled or already converted model, ...). The model is then as before.
    """
    chosen = as_recipe(recipe)
    if isinstance(chosen, ProvableRecipe):
        return _rebuilt(model, chosen, keep, sample_input, inplace)
    planned, edits = _prepare(model, chosen, keep)
    if inplace:
        _check_root_stays(model, edits)
    planned = _measured(planned, edits, model, sample_input)
    converted = _applied(model if inplace else _copied(model), edits)
    converted.conversion_report = planned
    return converted


def _rebuilt(model: nn.Module, recipe: ProvableRecipe, keep: Sequence[str], sample_input, inplace: bool) -> nn.Module:
    """The new network of the recipe "provable": another module, so the old one cannot become it."""
    if inplace:
        raise ConversionError(
            f"{type(model).__name__}: recipe 'provable' builds a new network, so inplace=True cannot hold. Take the result."
        )
    planned, made = _designed(model, recipe, keep, sample_input)
    network = build(made).train(model.training)
    if sample_input is not None:
        planned = _compared(planned, _copied(model), copy.deepcopy(network), sample_input)
    network.conversion_report = planned
    return network


def _designed(model: nn.Module, recipe: ProvableRecipe, keep: Sequence[str], sample_input) -> tuple[Plan, Design]:
    check_keep(model, keep)
    if keep:
        raise ConversionError(
            f"keep: recipe 'provable' builds a whole new network, and a part that is kept ({keep[0]}) would break the "
            f"guarantee. Convert without keep, or with recipe='paper'."
        )
    check_model(model, ())
    recipe = with_shape(recipe, sample_input)
    found = survey(model, (), ADAPTERS)
    if not found.blocks:
        raise ConversionError(f"{type(model).__name__}: no residual block was found, and recipe 'provable' is made of them.")
    made = design(model, chain_of_blocks(model, found.blocks, recipe.input_shape), recipe)
    return plan_of(model, made), made


def _compared(planned: Plan, original: nn.Module, network: nn.Module, sample_input) -> Plan:
    return replace(planned, function_change=function_change(original, network, sample_input))


def _prepare(model: nn.Module, chosen: Recipe, keep: Sequence[str]) -> tuple[Plan, list[Edit]]:
    check_keep(model, keep)
    keep = tuple(keep)
    check_model(model, keep)
    found = survey(model, keep, ADAPTERS)
    if not found.blocks and not keep:
        raise ConversionError(
            f"{type(model).__name__}: no residual block was found, and the recipe {chosen.name!r} rewrites nothing else."
        )
    edits = [edit_for(block, chosen, found) for block in found.blocks]
    _check_sharing(found, edits)
    kept = [Step(path, _kind(model, path), _kind(model, path), "keep names it") for path in keep]
    steps = sorted([edit.step for edit in edits] + kept, key=_order(model))
    return Plan(chosen, type(model).__name__, tuple(steps), keep, _notes(found, edits)), edits


def _kind(model: nn.Module, path: str) -> str:
    return type(model.get_submodule(path)).__name__


def _order(model: nn.Module) -> Callable[[Step], int]:
    order = {path: index for index, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return lambda step: order[step.path]


def _notes(found: Survey, edits: list[Edit]) -> tuple[str, ...]:
    """What a reader of the plan should know beyond its steps."""
    notes = [
        f"{path or '(model)'}: its own forward cannot be traced and stays ({why})."
        for path, why in found.opaque.items()
    ]
    if any(edit.step.new for edit in edits):
        notes.append(
            "Blocks moved to pre-activation compute another function: train them before use. Their new norms start "
            "fresh, and what follows the last block reads a sum that nothing has normalised or activated."
        )
    for edit in edits:
        for key in edit.step.dropped:
            module = found.model.get_submodule(key.rpartition(".")[0])
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                notes.append(f"{key.rpartition('.')[0]}: it goes, and its hooks with it.")
    return tuple(dict.fromkeys(notes))


def _check_sharing(found: Survey, edits: list[Edit]) -> None:
    """A module that is replaced must be replaced, in the same way, at every place where the model holds it."""
    places: dict[int, set[str]] = {}
    kinds: dict[int, tuple[str, str]] = {}
    for edit in edits:
        for change in edit.changes:
            paths = [f"{path}.{change.path}".strip(".") for path in edit.paths]
            module = found.model.get_submodule(paths[0])
            places.setdefault(id(module), set()).update(paths)
            if kinds.setdefault(id(module), (change.kind, paths[0]))[0] != change.kind:
                raise ConversionError(_shared(paths[0], kinds[id(module)][1], edit.paths[0]))
    for identity, paths in places.items():
        others = sorted(set(found.places[identity]) - paths) + sorted(path for path in paths if found.is_kept(path))
        if others:
            raise ConversionError(_shared(min(paths), others[0], min(paths)))


def _shared(path: str, other: str, block: str) -> str:
    return (
        f"{path}: the module also stands at {other}, where the recipe does not rewrite it in the same way. Give each "
        f"place a module of its own, or leave both unchanged with keep=({block!r}, {other!r})."
    )


def _check_root_stays(model: nn.Module, edits: list[Edit]) -> None:
    if any(change.path == "" and "" in edit.paths for edit in edits for change in edit.changes):
        name = type(model).__name__
        raise ConversionError(f"{name}: the model itself is the block, so inplace=True cannot replace it.")


def _measured(planned: Plan, edits: list[Edit], model: nn.Module, sample_input: Tensor | tuple | None) -> Plan:
    if sample_input is None:
        return planned
    converted = _applied(_copied(model), edits)
    return replace(planned, function_change=function_change(_copied(model), converted, sample_input))


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a user's __deepcopy__ or a non-leaf tensor raises
        raise ConversionError(
            f"{type(model).__name__}: the model cannot be copied ({error}). Convert it with inplace=True and no sample_input."
        ) from error


def _applied(model: nn.Module, edits: list[Edit]) -> nn.Module:
    """Build every new module, then put them in; the model is untouched until all are built."""
    new: dict[int, tuple[nn.Module, nn.Module]] = {}
    for edit in edits:
        for change in edit.changes:
            old = model.get_submodule(f"{edit.paths[0]}.{change.path}".strip("."))
            if id(old) not in new:
                new[id(old)] = (old, change.make(old))
    root = new[id(model)][1] if id(model) in new else model
    waiting, seen = [root], set()
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, child in module._modules.items():
            if id(child) in new:
                module._modules[name] = child = new[id(child)][1]
            if child is not None:
                waiting.append(child)
    return root
