"""The network as a list of steps in the order of their computation, each with its value now in float64."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ... import tracing
from ...errors import UnboundedError
from .steps import Input, Step, Sum


@dataclass(frozen=True)
class Node:
    """A step, the places of its inputs, and its value."""

    step: Step
    inputs: tuple[int, ...]
    value: Tensor


Rule = Callable[["Graph", nn.Module, str, int], int]


class Graph:
    """The steps that a module's forward takes from one input; ``rules`` says which step a type of module is.

    Raises:
        UnboundedError: a module or a call without a rule, by its path.
    """

    def __init__(self, inputs: Tensor, rules: Mapping[type, Rule], known: dict | None = None) -> None:
        self.rules, self.known = rules, {} if known is None else known
        self.nodes = [Node(Input("", "input"), (), inputs)]

    def add(self, step: Step, *inputs: int) -> int:
        """Append a step and compute its value."""
        with torch.no_grad():
            value = step.forward(*(self.nodes[i].value for i in inputs))
        if not isinstance(value, Tensor) or not torch.isfinite(value).all():
            raise ValueError(
                f"{step.path or 'the model'}: {step.kind} gives values that are NaN or infinite. Check its weights "
                f"and the inputs."
            )
        self.nodes.append(Node(step, inputs, value))
        return len(self.nodes) - 1

    def read(self, module: nn.Module, path: str, source: int) -> int:
        """Append a module's steps, read from its rule or from its own forward; the place of its output."""
        if any((module._forward_hooks, module._forward_pre_hooks)):
            raise UnboundedError(
                f"{path or 'the model'}: {type(module).__name__} has forward hooks, which may change what it computes. "
                f"Remove them first."
            )
        if "forward" in vars(module):
            raise UnboundedError(
                f"{path or 'the model'}: the forward of this {type(module).__name__} is replaced on the instance, so "
                f"its class doesn't tell what it computes. Give the class a forward of its own."
            )
        rule = self.rules.get(type(module))
        if rule is not None:
            return rule(self, module, path, source)
        if not any(True for _ in module.children()) and type(module).__module__.split(".")[0] in ("torch", "trainable_nn"):
            raise UnboundedError(
                f"{path or 'the model'}: nothing bounds {type(module).__module__}.{type(module).__qualname__} and its "
                f"derivatives. Use a smooth activation, a linear or convolution layer or a normalisation with a rule."
            )
        return self._trace(module, path, source)

    def keep(self, last: int) -> None:
        """Drop the steps that the output at ``last`` is not computed from."""
        live, waiting = set(), [last]
        while waiting:
            index = waiting.pop()
            if index not in live:
                live.add(index)
                waiting.extend(self.nodes[index].inputs)
        order = sorted(live | {0})
        place = {old: new for new, old in enumerate(order)}
        kept = [self.nodes[i] for i in order]
        self.nodes = [Node(n.step, tuple(place[i] for i in n.inputs), n.value) for n in kept]

    def without_values(self) -> "Graph":
        """The same steps with the shapes of their values alone; they are kept nowhere."""
        for node in self.nodes:
            node.step.forget()
        shapes = Graph.__new__(Graph)
        shapes.rules, shapes.known = self.rules, self.known
        shapes.nodes = [Node(n.step, n.inputs, torch.empty_like(n.value, device="meta")) for n in self.nodes]
        return shapes

    def _trace(self, module: nn.Module, path: str, source: int) -> int:
        try:
            graph = tracing.trace(module, module.training)
        except tracing.NotTraceable as reason:
            raise UnboundedError(
                f"{path or 'the model'}: the forward of {type(module).__name__} can't be followed: {reason}. Write it "
                f"from layers and additions, without branches on values."
            ) from reason
        return _Reader(self, module, path, source).run(graph)


class _Reader:
    """Follows one module's own graph."""

    def __init__(self, graph: Graph, module: nn.Module, path: str, source: int) -> None:
        self.graph, self.module, self.path, self.source = graph, module, path, source
        self.places: dict[fx.Node, object] = {}

    def run(self, traced: fx.Graph) -> int:
        """The place of the output."""
        inputs = 0
        for node in traced.nodes:
            if node.op == "placeholder":
                inputs += 1
                if inputs > 1:
                    raise self._unknown("a second input")
                self.places[node] = Place(self.source)
            elif node.op == "output":
                return self._place(self.places.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None, "an output")
            else:
                self.places[node] = self._call(node)
        raise self._unknown("no output")

    def _call(self, node: fx.Node):
        args = fx.node.map_arg(node.args, lambda n: self.places[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: self.places[n])
        if node.op == "call_module":
            if len(args) != 1 or kwargs:
                raise self._unknown(f"a call of {node.target} with more than one input")
            child = f"{self.path}.{node.target}".lstrip(".")
            return Place(self.graph.read(self.module.get_submodule(node.target), child, self._place(args[0], child)))
        held = [a for a in (*args, *kwargs.values()) if isinstance(a, Place)]
        if node.op in ("call_function", "call_method"):
            if tracing.is_size(node) and held:
                return self._size(node, args, kwargs)
            if not held:
                return self._number(node, args, kwargs)
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            if node.target in tracing.ADDITIONS or node.target in (operator.sub, torch.sub, "sub"):
                return self._sum(name, args, kwargs)
            if node.target in (operator.mul, torch.mul, "mul", operator.truediv, operator.neg):
                return self._scaled(name, args)
            if node.target in tracing.ACTIVATIONS:
                module = tracing.ACTIVATIONS[node.target](**{k: v for k, v in kwargs.items() if k != "input"})
                module.inplace = False
                return Place(self.graph.read(module, self._at(name), self._place(*self._only(held, args[1:], name))))
            if name in FUNCTIONS:
                return Place(FUNCTIONS[name](self.graph, self._at(name), held[0].index, args[1:], kwargs))
        raise self._unknown(f"{node.op} {getattr(node.target, '__name__', node.target)}")

    def _only(self, held, rest, name):
        if len(held) != 1 or rest:
            raise self._unknown(f"{name} with more arguments than its input")
        return held[0], name

    def _sum(self, name: str, args, kwargs) -> "Place":
        terms = [*args, *(kwargs[k] for k in ("input", "other") if k in kwargs)]
        sign = -1.0 if name.lstrip("_") == "sub" else 1.0
        if len(terms) != 2 or not all(isinstance(t, Place) for t in terms):
            raise self._unknown(f"{name} with something that is no step's output")
        scales = (1.0, sign * float(kwargs.get("alpha", 1.0)))
        values = [self.graph.nodes[t.index].value for t in terms]
        if values[0].shape != values[1].shape:
            raise self._unknown(f"{name} of different shapes {tuple(values[0].shape)} and {tuple(values[1].shape)}")
        return Place(self.graph.add(Sum(self._at(name), scales), *(t.index for t in terms)))

    def _scaled(self, name: str, args) -> "Place":
        places = [a for a in args if isinstance(a, Place)]
        numbers = [a for a in args if isinstance(a, (int, float))]
        if len(places) != 1 or len(places) + len(numbers) != len(args):
            raise self._unknown(f"{name} with something that is no number")
        scale = -1.0 if name == "neg" else float(numbers[0])
        if name == "truediv":
            if not isinstance(args[0], Place):
                raise self._unknown("a division by a step's output")
            scale = 1.0 / scale
        return Place(self.graph.add(Sum(self._at(name), (scale,)), places[0].index))

    def _size(self, node: fx.Node, args, kwargs):
        """A shape, read from the value at hand."""
        args = [self.graph.nodes[a.index].value if isinstance(a, Place) else a for a in args]
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    def _number(self, node: fx.Node, args, kwargs):
        return getattr(args[0], node.target)(*args[1:], **kwargs) if node.op == "call_method" else node.target(*args, **kwargs)

    def _place(self, value, what: str) -> int:
        if not isinstance(value, Place):
            raise self._unknown(f"{what} that is not one tensor")
        return value.index

    def _at(self, name: str) -> str:
        return f"{self.path}.{name}".lstrip(".")

    def _unknown(self, what: str) -> UnboundedError:
        return UnboundedError(
            f"{self.path or 'the model'}: the forward of {type(self.module).__name__} has {what}, for which there is "
            f"no rule. Write it from layers, additions and reshapes."
        )


@dataclass(frozen=True)
class Place:
    """The place of a step among the graph's."""

    index: int


FUNCTIONS: dict[str, Callable] = {}  # name -> (graph, path, source, positional arguments after x, keywords) -> place


def functional(*names: str):
    """Register the reading of a function or method of tensors."""

    def register(reading: Callable) -> Callable:
        FUNCTIONS.update(dict.fromkeys(names, reading))
        return reading

    return register


__all__ = ["FUNCTIONS", "F", "Graph", "Node", "Place", "Rule", "functional"]
