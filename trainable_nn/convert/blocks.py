"""What a residual block is: an addition of a branch and a linear skip, found in the block's own graph."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import fx, nn

from .. import tracing
from ..tracing import NotTraceable
from .layers import LINEAR, Layer, flatten, why_unknown

CHAINLESS = "its branch is more than a chain of known steps"


class NotABlock(Exception):
    """A module that adds two paths and still isn't a residual block that we know; the text says why."""


@dataclass(frozen=True)
class Call:
    """One step of a traced path: a child called by its path in the block, or an activation without a module."""

    path: str = ""
    activation: type[nn.Module] | None = None
    options: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Anatomy:
    """The parts of y = after(branch(u) + skip(u)), u = before(x).

    An empty ``skip`` is the identity. ``raw`` says that u is x itself, for the skip. ``branch`` is None where
    the block cannot be put together anew from its layers, and ``obstacle`` says why.
    """

    before: tuple[Call, ...]
    branch: tuple[Call, ...] | None
    skip: tuple[Call, ...]
    after: tuple[Call, ...]
    raw: bool
    obstacle: str = ""


def layers_of(block: nn.Module, calls: tuple[Call, ...]) -> list[Layer]:
    """The layers of a traced path, chains inside it opened; an activation without a module has the path ""."""
    found = []
    for call in calls:
        if call.path:
            found.extend(flatten(call.path, block.get_submodule(call.path), tracing.chain_of))
        else:
            found.append(Layer("", call.activation(**dict(call.options)), "activation"))
    return found


def anatomy_of(block: nn.Module, adapters: Mapping[str, Callable[[nn.Module], Anatomy]]) -> Anatomy | None:
    """The parts of a residual block; None for a module that adds nothing.

    Raises:
        NotABlock: it adds two paths in a way that no rule knows.
        NotTraceable: torch.fx cannot follow it and there is no adapter for its type.
    """
    adapter = adapters.get(f"{type(block).__module__}.{type(block).__qualname__}")
    if adapter is not None:
        return adapter(block)
    modes = [_parse(block, tracing.trace(block, training)) for training in (True, False)]
    if modes[0] == modes[1]:
        return modes[0]
    if None in modes or any(getattr(modes[0], part) != getattr(modes[1], part) for part in ("skip", "after", "raw")):
        raise NotABlock("it is another block in training than in evaluation")
    return replace(modes[0], before=(), branch=None, obstacle="its forward asks for self.training")


def _parse(block: nn.Module, graph: fx.Graph) -> Anatomy | None:
    sums = tracing.joins(graph)
    if not sums:
        return None
    if len(sums) > 1:
        raise NotABlock(f"it adds {len(sums)} times, and a residual block adds once")
    if set(sums[0].kwargs) - {"input", "other"}:
        raise NotABlock("its addition is scaled or writes into another tensor")
    after, start = _walk(tracing.output_of(graph), sums[0])
    if start is not sums[0]:
        raise NotABlock("something other than an activation follows the addition")
    if any(layer.role not in ("activation", "identity", "dropout") for layer in layers_of(block, after)):
        raise NotABlock("something other than an activation follows the addition")
    skip, source, branch_end = _skip_and_source(block, sums[0])
    for call in skip:
        if _uses(graph, call.path) > 1:
            raise NotABlock(f"it calls {call.path}, which is its shortcut, more than once")
    before, start = _walk(source, None)
    branch, foot = _walk(branch_end, source)
    raw = source.op == "placeholder"
    obstacle = _obstacle(block, graph)
    if not obstacle and (foot is not source or start.op != "placeholder"):
        obstacle = f"{CHAINLESS} ({_name(foot if foot is not source else start)})"
    explained = len(before) + len(branch) + len(skip) + len(after) + 1
    if not obstacle and sum(node.op not in ("placeholder", "output") for node in graph.nodes) != explained:
        obstacle = CHAINLESS
    return Anatomy((), None, skip, after, raw, obstacle) if obstacle else Anatomy(before, branch, skip, after, raw)


def _name(node: object) -> str:
    target = node.target if isinstance(node, fx.Node) else node
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _uses(graph: fx.Graph, path: str) -> int:
    """How many calls reach a module, itself, a part of it or something that holds it."""
    targets = [f"{node.target}." for node in graph.nodes if node.op == "call_module"]
    return sum(target.startswith(f"{path}.") or f"{path}.".startswith(target) for target in targets)


def _obstacle(block: nn.Module, graph: fx.Graph) -> str:
    """Why a block cannot be put together anew, whatever its branch is; empty where it can."""
    if vars(block)["_parameters"] or vars(block)["_buffers"]:
        return "it has parameters or buffers of its own beside those of its layers"
    if len(inspect.signature(type(block).forward).parameters) != 2:
        return "its forward takes more than one input"
    return ""


def _skip_and_source(block: nn.Module, join: fx.Node) -> tuple[tuple[Call, ...], fx.Node, fx.Node]:
    """Which side of the addition is the linear skip, the node that it starts from, and the end of the branch."""
    candidates = []
    left, right = tracing.operands(join)
    for side, other in ((left, right), (right, left)):
        calls, source = _walk(side, None, lambda node: _is_linear(block, node))
        if source in tracing.ancestors(other) and side is not other:
            candidates.append((calls, source, other))
    identities = [candidate for candidate in candidates if not candidate[0]]
    if len(identities) == 1:
        return identities[0]
    if len(candidates) != 1:
        what = "both sides" if candidates else "neither side"
        raise NotABlock(
            f"{what} of its addition could be the skip: the identity or layers that are linear{_stranger(block, join)}"
        )
    return candidates[0]


def _stranger(block: nn.Module, join: fx.Node) -> str:
    """Names the first layer of unknown type at the end of a side of the addition."""
    for side in tracing.operands(join):
        if side.op == "call_module":
            unknown = [
                x
                for x in flatten(side.target, block.get_submodule(side.target), tracing.chain_of)
                if x.role == "unknown"
            ]
            if unknown:
                return f" ({why_unknown(unknown[0])})"
    return ""


def _is_linear(block: nn.Module, node: fx.Node) -> bool:
    """Whether a step belongs to a linear skip: known linear layers whose value nobody else reads."""
    if node.op != "call_module" or len(node.users) != 1:
        return False
    return all(x.role in LINEAR for x in flatten(node.target, block.get_submodule(node.target), tracing.chain_of))


def _walk(node: object, stop: fx.Node | None, accept: Callable[[fx.Node], bool] = lambda node: True):
    """The calls that lead back from a node, in forward order, and the node where they begin.

    It ends at ``stop``, at the first step that is not accepted, or that is more than a call of one tensor.
    """
    calls = []
    while isinstance(node, fx.Node) and node is not stop:
        call = _call(node)
        if call is None or not accept(node):
            break
        calls.append(call)
        node = node.args[0]
    return tuple(reversed(calls)), node


def _call(node: fx.Node) -> Call | None:
    if len(node.args) < 1 or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        return Call(path=node.target)
    options = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    plain = all(isinstance(v, (int, float, str)) for v in options.values()) and len(node.args) == 1
    if node.op in ("call_function", "call_method") and node.target in tracing.ACTIVATIONS and plain:
        return Call(activation=tracing.ACTIVATIONS[node.target], options=tuple(sorted(options.items())))
    return None


__all__ = ["Anatomy", "Call", "NotABlock", "NotTraceable", "anatomy_of", "layers_of"]
