"""The graph of one module's own forward, its children left whole."""

import copy
import inspect
import operator
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx, nn

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
ACTIVATIONS = {  # a call without a module -> the layer that does the same
    F.relu: nn.ReLU, F.relu_: nn.ReLU, torch.relu: nn.ReLU, torch.relu_: nn.ReLU, "relu": nn.ReLU, "relu_": nn.ReLU,
    F.relu6: nn.ReLU6, F.leaky_relu: nn.LeakyReLU, F.elu: nn.ELU, F.silu: nn.SiLU, F.gelu: nn.GELU, F.mish: nn.Mish,
    F.softplus: nn.Softplus, F.hardswish: nn.Hardswish, F.tanh: nn.Tanh, torch.tanh: nn.Tanh, "tanh": nn.Tanh,
    F.sigmoid: nn.Sigmoid, torch.sigmoid: nn.Sigmoid, "sigmoid": nn.Sigmoid,
}  # fmt: skip
SIZES = ("size", "dim", "numel", "ndimension")


class NotTraceable(Exception):
    """A forward that torch.fx cannot follow; the text says why."""


class _Shallow(fx.Tracer):
    """Follows the root's own code and no child's, and never computes with its buffers."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True


def trace(module: nn.Module, training: bool) -> fx.Graph:
    """Graph of ``module.forward`` in one mode, default arguments left at their defaults.

    The code runs on a twin with its own attributes, so the module, its buffers and random generators stay as
    they are.

    Raises:
        NotTraceable: with the reason.
    """
    count = _required_inputs(module)
    original = type(module).forward
    forwards = {1: lambda self, a: original(self, a), 2: lambda self, a, b: original(self, a, b)}
    forwards[3] = lambda self, a, b, c: original(self, a, b, c)
    if count not in forwards:
        raise NotTraceable(f"its forward takes {count} inputs")
    random_state, torch_state = random.getstate(), torch.get_rng_state()
    try:
        graph = _Shallow().trace(_twin(module, forwards[count], training))
    except Exception as error:  # whatever the user's code raises on a proxy
        raise NotTraceable(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    finally:
        drew = random.getstate() != random_state or not torch.equal(torch.get_rng_state(), torch_state)
        random.setstate(random_state)
        torch.set_rng_state(torch_state)
    if drew:
        raise NotTraceable("its forward draws random numbers outside its layers")
    return graph


def _twin(module: nn.Module, forward: Callable, training: bool) -> nn.Module:
    """A module with the same parts and attributes of its own, whose forward takes only the inputs that must be given."""
    twin = object.__new__(type(type(module).__name__, (type(module),), {"forward": forward}))
    own = {
        name: copy.copy(value) if type(value) in (dict, list, set) else value for name, value in vars(module).items()
    }
    twin.__dict__.update(own, training=training)
    return twin


def _required_inputs(module: nn.Module) -> int:
    if "forward" in vars(module):
        raise NotTraceable("its forward is replaced on the instance")
    if type(module).forward is nn.Module.forward or not inspect.isfunction(type(module).forward):
        raise NotTraceable("it has no forward of its own")
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    free = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return max(1, len(free)) if parameters else 0


def output_of(graph: fx.Graph) -> object:
    """What the traced forward returns."""
    return next(node for node in graph.nodes if node.op == "output").args[0]


def is_size(node: object) -> bool:
    """Whether a node is a shape or a number computed from shapes, and no tensor."""
    if not isinstance(node, fx.Node):
        return not isinstance(node, torch.Tensor)
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    if node.op == "call_method":
        return node.target in SIZES
    return node.op == "call_function" and bool(node.args) and all(is_size(a) for a in node.args)


def operands(node: fx.Node) -> list[object]:
    """The two operands of an addition, by position or by name."""
    return [*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs)]


def joins(graph: fx.Graph) -> list[fx.Node]:
    """The additions of two tensors that both come from the inputs."""
    found = []
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and node.target in ADDITIONS:
            nodes = [value for value in operands(node) if isinstance(value, fx.Node) and not is_size(value)]
            if sum("placeholder" in _origins(value) for value in nodes) == 2:
                found.append(node)
    return found


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The nodes that a node is computed from, itself among them."""
    seen, waiting = set(), [node]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting.extend(current.all_input_nodes)
    return seen


def _origins(node: fx.Node) -> set[str]:
    return {ancestor.op for ancestor in ancestors(node)}


def chain_of(module: nn.Module) -> list[str] | None:
    """Names of the children that a module applies one after the other; None where it does anything else."""
    try:
        graph = trace(module, module.training)
    except NotTraceable:
        return None
    names, node = [], output_of(graph)
    while isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        names.append(node.target)
        node = node.args[0]
    used = sum(n.op not in ("placeholder", "output") for n in graph.nodes)
    if not (isinstance(node, fx.Node) and node.op == "placeholder") or used != len(names):
        return None
    return names[::-1]
