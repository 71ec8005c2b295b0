"""From a found block and a recipe: one step of the plan, and the changes that carry it out."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..errors import ConversionError
from .blocks import Anatomy, layers_of
from .plan import Step
from .rebuild import Parts, assemble, fresh_norm, moved_parts, same_parts
from .recipes import Recipe
from .skips import Change, Projection, Refused, orthogonal_change, pooled_change, projection_of
from .walk import Found, Survey


@dataclass(frozen=True)
class Edit:
    """A step of the plan, and its changes with paths in the block; a step that changes nothing has none."""

    step: Step
    paths: tuple[str, ...]
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What becomes of a block: words for the plan, and the changes."""

    after: str
    reason: str
    changes: tuple[Change, ...] = ()
    parts: Parts | None = None


def edit_for(found: Found, recipe: Recipe, survey: Survey) -> Edit:
    """The edit of one block.

    Raises:
        ConversionError: the recipe would rewrite the block and cannot; with its path and the ``keep`` that leaves it.
    """
    path, block = found.paths[0], found.block
    try:
        projection = projection_of(block, found.anatomy)
        verdict = _verdict(found, projection, recipe, survey)
    except Refused as refusal:
        where = f"{path}: {type(block).__name__}" if path else type(block).__name__
        leave = (
            f" Leave it unchanged with keep=({path!r},)."
            if path
            else " It is the whole model: put it into a larger one."
        )
        raise ConversionError(f"{where} cannot be rewritten, {refusal}.{leave}") from refusal
    before = f"{type(block).__name__}, {_form(block, found.anatomy)}, {projection or 'identity shortcut'}"
    kept, new, dropped = _keys(block, path, verdict)
    step = Step(path, before, verdict.after or before, verdict.reason, kept, new, dropped, found.paths[1:])
    return Edit(step, found.paths, verdict.changes)


def is_post_activation(block: nn.Module, anatomy: Anatomy) -> bool:
    """Whether an activation follows the addition."""
    return any(layer.role == "activation" for layer in layers_of(block, anatomy.after))


def _form(block: nn.Module, anatomy: Anatomy) -> str:
    return "post-activation" if is_post_activation(block, anatomy) else "pre-activation"


def _verdict(found: Found, projection: Projection | None, recipe: Recipe, survey: Survey) -> Verdict:
    block, anatomy = found.block, found.anatomy
    skip_kept = _keeps_skip(found, survey)
    skip = "conv" if projection is None or skip_kept else recipe.skip
    if is_post_activation(block, anatomy) and recipe.preactivation:
        return _moved(found, projection, skip, skip_kept, survey)
    if projection is None:
        return Verdict("", "an identity shortcut stays as it is")
    if skip == "conv":
        return Verdict("", "keep names its shortcut" if skip_kept else "skip='conv' leaves projections")
    if skip == "paper":
        change = pooled_change(projection, anatomy, block, norms_go=False)
        return Verdict(f"+ pooled path, {change.kind} at {change.path}", "projection shortcut", (change,))
    change = orthogonal_change(projection, anatomy)
    if anatomy.raw:
        return Verdict(f"{change.kind} at {change.path}", "projection shortcut", (change,))
    if is_post_activation(block, anatomy):
        raise Refused("its shortcut does not read the block's input, as the orthogonal skip must")
    parts = same_parts(block, anatomy)
    rebuild = Change("", "PreActivationBlock", lambda old: assemble(old, parts))
    return Verdict(
        f"PreActivationBlock, {change.kind} on the raw input", "projection shortcut", (change, rebuild), parts
    )


def _moved(found: Found, projection: Projection | None, skip: str, skip_kept: bool, survey: Survey) -> Verdict:
    block, anatomy = found.block, found.anatomy
    if anatomy.branch is not None and (anatomy.before or not anatomy.raw):
        raise Refused("something stands between its input and its skip")
    parts = moved_parts(block, anatomy, reads_input=projection is None or skip == "orthogonal", norms_stay=skip_kept)
    fresh_norm(block.get_submodule(parts.template), parts.channels, "meta")
    for gone in parts.removed:
        if survey.is_kept(f"{found.paths[0]}.{gone}".lstrip(".")):
            raise Refused(f"keep names {gone}, which goes when the block is moved to pre-activation")
    nested = [name for name in parts.removed if "." in name]
    changes = [Change(name, "Identity", lambda old: nn.Identity().train(old.training)) for name in nested]
    words = ["PreActivationBlock"]
    if skip == "paper":
        changes.append(pooled_change(projection, anatomy, block, norms_go=True))
        words.append("+ pooled path")
    elif skip == "orthogonal":
        changes.append(orthogonal_change(projection, anatomy))
        words.append("OrthogonalDownsample2d on the raw input")
    changes.append(Change("", "PreActivationBlock", lambda old: assemble(old, parts)))
    return Verdict(", ".join(words), "moved to pre-activation", tuple(changes), parts)


def _keeps_skip(found: Found, survey: Survey) -> bool:
    layers = layers_of(found.block, found.anatomy.skip)
    return any(survey.is_kept(f"{path}.{layer.path}".lstrip(".")) for path in found.paths for layer in layers)


def state_keys(module: nn.Module, prefix: str = "") -> Iterable[str]:
    """The keys of a module's state_dict, without making one."""
    for path, part in module.named_modules(prefix=prefix, remove_duplicate=False):
        names = [n for n, p in part._parameters.items() if p is not None]
        names += [n for n, b in part._buffers.items() if b is not None and n not in part._non_persistent_buffers_set]
        yield from (f"{path}.{name}".lstrip(".") for name in names)


def _keys(block: nn.Module, path: str, verdict: Verdict) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The block's keys that survive, that are new, and that go."""
    gone = list(verdict.parts.removed) if verdict.parts else []
    gone += [change.path for change in verdict.changes if change.kind == "OrthogonalDownsample2d"]
    prefixes = tuple(f"{path}.{name}.".lstrip(".") for name in gone)
    every = list(state_keys(block, path))
    dropped = tuple(key for key in every if prefixes and key.startswith(prefixes))
    new = ()
    if verdict.parts and verdict.parts.norm:
        norm = fresh_norm(block.get_submodule(verdict.parts.template), verdict.parts.channels, "meta")
        new = tuple(state_keys(norm, f"{path}.{verdict.parts.norm}".lstrip(".")))
    return tuple(key for key in every if key not in dropped), new, dropped
