"""One forward pass of a network whose graph is then read; nothing of it stays on the network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .graph import Graph, output_shapes, read_graph

DROPOUTS = (nn.modules.dropout._DropoutNd, nn.RReLU)


class Network:
    """A model, its wanted parameters by name, and the layer that each belongs to."""

    def __init__(self, model: nn.Module, where: str = "ntk") -> None:
        self.model, self.where = _unwrapped(model), where
        _check_model(where, self.model)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        _check_parameters(where, self.parameters)
        first = next(iter(self.parameters.values()))
        self.dtype, self.device = first.dtype, first.device

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs (n, ...) with their graph, and the leaf that stands for the input in it."""
        x = x.detach()
        x = x.requires_grad_() if x.is_floating_point() else x
        with torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
            entered = x.clone() if x.is_floating_point() else x  # in-place operations may not write into a leaf
            y = self.call({}, entered)
        y = _checked_output(self.where, y, len(x))
        return (y if y.grad_fn is not None else y.clone()), x

    def call(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """The model with these parameters in place of its own; training mode updates copies of its buffers."""
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        return functional_call(self.model, {**buffers, **parameters}, (x,))

    def graph(self, y: Tensor, x: Tensor) -> Graph:
        """The graph of ``forward``'s result."""
        names = {id(p): name for name, p in self.parameters.items()}
        graph = read_graph(y.grad_fn, {id(x)}, names)
        if "CheckpointFunctionBackward" in graph.names:
            raise ValueError(
                f"{self.where}: a part of the model runs under reentrant checkpointing, which hides its parameters. "
                f"Pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
            )
        return graph


def bytes_per_sample(network: Network, x: Tensor, outputs: int) -> tuple[float, int]:
    """What a forward pass keeps and the widest cut of ``outputs`` backward passes, for one sample; and C."""
    own = {p.untyped_storage().data_ptr() for p in [*network.model.parameters(), *network.model.buffers()]}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        y, leaf = network.forward(x)
    classes = y[0].numel()
    graph = network.graph(y, leaf)
    waiting: dict = {y.grad_fn: y.numel()}
    widest = y.numel()
    for node in graph.order:
        for _, (m, nr) in graph.data[node]:
            waiting[m] = max(waiting.get(m, 0), output_shapes(m)[nr].numel())
        widest = max(widest, sum(waiting.values()))
        waiting.pop(node, None)
    cut = widest * y.element_size() * (outputs or classes)
    return (sum(kept.values()) + cut) / len(x), classes


def layer_of(name: str) -> str:
    """The path of the module that a parameter belongs to; a parametrised layer's is the layer's own."""
    path = name.split(".parametrizations.")[0]
    return path if ".parametrizations." in name else path.rpartition(".")[0]


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products without TF32 while the Gram matrix is made."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of DataParallel, DistributedDataParallel and torch.compile."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return _unwrapped(model.module)
    return _unwrapped(model._orig_mod) if hasattr(model, "_orig_mod") else model


def _check_model(where: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: the model must be a torch.nn.Module, got {type(model).__name__}.")
    for path, module in model.named_modules():
        if isinstance(module, DROPOUTS) and module.training and getattr(module, "p", 1.0) > 0:
            raise ValueError(
                f"{where}: {path or 'the model'} is a {type(module).__name__} in training mode, so the network is "
                f"random and has no one Jacobian. Call .eval() on it."
            )


def _check_parameters(where: str, parameters: dict[str, Tensor]) -> None:
    if not parameters:
        raise ValueError(f"{where}: no parameter requires a gradient, so the Jacobian has no columns.")
    dtypes = {p.dtype for p in parameters.values()}
    if not dtypes <= {torch.float32, torch.float64} or len(dtypes) > 1:
        raise TypeError(
            f"{where}: parameters must all be float32 or all float64, got {', '.join(sorted(map(str, dtypes)))}. "
            f"Convert the model with .float() or .double()."
        )
    for name, p in parameters.items():
        if nn.parameter.is_lazy(p) or p.is_meta:
            raise ValueError(f"{where}: {name} has no values yet (meta device or lazy). Load them first.")
        if p.layout is not torch.strided or not bool(torch.isfinite(p.detach()).all()):
            raise ValueError(f"{where}: {name} has entries that are NaN or infinite. Replace them first.")


def _checked_output(where: str, y, count: int) -> Tensor:
    if not isinstance(y, Tensor) or not y.is_floating_point():
        found = f"{y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"{where}: the model must give one tensor of floats, got {found}. Wrap it in a module that does.")
    if y.dim() == 0 or len(y) != count or y.numel() == 0:
        raise ValueError(
            f"{where}: {count} samples gave an output of shape {tuple(y.shape)}; its first axis must count the samples."
        )
    if not y.requires_grad:
        raise ValueError(f"{where}: the output does not depend on any parameter that requires a gradient.")
    if not bool(torch.isfinite(y.detach()).all()):
        raise ValueError(f"{where}: the outputs have entries that are NaN or infinite. Check weights and inputs.")
    return y
