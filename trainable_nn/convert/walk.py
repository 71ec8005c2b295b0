"""The walk over a model: every residual block in it, and the paths that are left alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from ..errors import ConversionError
from .blocks import Anatomy, NotABlock, NotTraceable, anatomy_of
from .layers import is_sequence, role_of

_LIBRARIES = ("torch.nn.", "torch.ao.", "trainable_nn.modules.")  # their layers are whole


@dataclass(frozen=True)
class Found:
    """A residual block: all paths at which the model holds it, itself, and its parts."""

    paths: tuple[str, ...]
    block: nn.Module
    anatomy: Anatomy


@dataclass
class Survey:
    """What the walk found in a model: blocks, the paths under ``keep``, and containers that torch.fx cannot follow."""

    model: nn.Module
    keep: tuple[str, ...]
    blocks: list[Found] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)
    places: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def is_kept(self, path: str) -> bool:
        """Whether ``keep`` names this path or one above it."""
        return any(path == kept or path.startswith(f"{kept}.") for kept in self.keep)


def survey(model: nn.Module, keep: tuple[str, ...], adapters: Mapping[str, Callable[[nn.Module], Anatomy]]) -> Survey:
    """Walk from the root down, into blocks as well.

    Raises:
        ConversionError: a module adds two paths and no rule knows how, or cannot be followed and holds no
            block that was found; with its path and the ``keep`` that leaves it.
    """
    found = Survey(model, keep)
    for path, module in model.named_modules(remove_duplicate=False):
        found.places[id(module)] = (*found.places.get(id(module), ()), path)
    _visit(found, "", model, adapters, set())
    return found


def _visit(found: Survey, path: str, module: nn.Module, adapters: Mapping, seen: set[int]) -> int:
    """Search below a path; the number of blocks, kept paths among them, that were found there."""
    if found.is_kept(path):
        return 1
    if id(module) in seen:
        return 0
    seen.add(id(module))
    reason, anatomy = "", None
    if _has_own_code(module):
        try:
            anatomy = anatomy_of(module, adapters)
        except NotABlock as error:
            raise ConversionError(
                _refusal(path, module, f"adds two paths like a residual block, but {error}")
            ) from error
        except NotTraceable as error:
            reason = str(error)
        if anatomy is not None:
            found.blocks.append(Found(found.places[id(module)], module, anatomy))
    below = sum(
        _visit(found, f"{path}.{name}".lstrip("."), child, adapters, seen) for name, child in module.named_children()
    )
    if reason and not below and any(True for child in module.children() for _ in child.parameters()):
        raise ConversionError(
            _refusal(path, module, f"could be a residual block, but torch.fx cannot follow it ({reason})")
        )
    if reason and below:
        found.opaque[path] = reason
    return below + (anatomy is not None)


def _has_own_code(module: nn.Module) -> bool:
    """Whether a module's forward is a user's: neither a layer that we know, nor one of torch.nn, nor a plain container."""
    if role_of(module) != "unknown" or is_sequence(module) or type(module).__module__.startswith(_LIBRARIES):
        return False
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _refusal(path: str, module: nn.Module, what: str) -> str:
    name = type(module).__name__
    if not path:
        return f"{name}: the model itself {what}. Put the addition into a module of its own, or convert its parts one by one."
    return f"{path}: {name} {what}. Leave it unchanged with keep=({path!r},)."
