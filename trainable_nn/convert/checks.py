"""What a model must be before it can be converted; each refusal names the path and the way out."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import ConversionError
from ..modules.contractive import ContractiveResidual
from ..modules.preactivation import PreActivationBlock
from ..modules.residual import SpectrallyBoundedResidual
from ..modules.shortcut import PooledConv2d, PooledSequential
from ..modules.skip import OrthogonalDownsample2d

OUR_BLOCKS = (PooledConv2d, PooledSequential, PreActivationBlock, OrthogonalDownsample2d, ContractiveResidual)
OUR_BLOCKS += (SpectrallyBoundedResidual,)
WRAPPERS = {  # qualified name of a wrapper -> where it holds the model
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
}


def check_keep(model: nn.Module, keep: Sequence[str]) -> None:
    """Raise ConversionError unless ``model`` is a module and every path in ``keep`` exists in it."""
    if not isinstance(model, nn.Module):
        hint = " Call it to make one." if isinstance(model, type) else ""
        raise ConversionError(f"convert_model: the model must be a torch.nn.Module, got {type(model).__name__}.{hint}")
    if isinstance(keep, str):
        raise ConversionError(f"keep: a sequence of paths was needed, got the string {keep!r}. Write keep=({keep!r},).")
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)} - {""}
    for path in keep:
        if path not in paths:
            raise ConversionError(
                f"keep: {type(model).__name__} has no module at {path!r}. Paths are those of named_modules()."
            )


def check_model(model: nn.Module, keep: Sequence[str]) -> None:
    """Raise ConversionError unless every module and weight outside ``keep`` can be converted."""
    modules = dict(_outside(model, keep))
    for path, module in modules.items():
        _check_module(f"{path}: " if path else "", module)
    for path, module in modules.items():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                _check_tensor(f"{path}.{name}".lstrip("."), tensor)
        for name in ("running_mean", "running_var"):
            if module._buffers.get(name) is not None:
                _check_tensor(f"{path}.{name}".lstrip("."), module._buffers[name])


def _outside(model: nn.Module, keep: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if not any(path == kept or path.startswith(f"{kept}.") for kept in keep):
            yield path, module


def _check_module(where: str, module: nn.Module) -> None:
    kind = type(module)
    inner = WRAPPERS.get(f"{kind.__module__}.{kind.__qualname__}")
    if inner:
        raise ConversionError(f"{where}{kind.__name__} wraps a model. Convert its .{inner} and wrap the result again.")
    if isinstance(module, torch.jit.ScriptModule):
        raise ConversionError(
            f"{where}{kind.__name__} is scripted and has no Python code to rewrite. Convert it before scripting."
        )
    if module._compiled_call_impl is not None:
        raise ConversionError(f"{where}{kind.__name__} was compiled in place. Convert it first, then call .compile().")
    if "conversion_report" in vars(module) or isinstance(module, OUR_BLOCKS):
        raise ConversionError(f"{where}{kind.__name__} is already converted. Convert the original model instead.")


def _check_tensor(key: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise ConversionError(
            f"{key}: the parameter has no shape yet. Run the model once on a sample, then convert it."
        )
    if not tensor.is_floating_point():
        raise ConversionError(
            f"{key}: the weight has dtype {tensor.dtype}, and floating-point weights are needed. Convert the model before "
            "it is quantised, or name the path in keep."
        )
    if tensor.is_meta or not tensor.numel():
        return
    if not torch.isfinite(torch.linalg.vector_norm(tensor.detach(), torch.inf)):
        raise ConversionError(f"{key}: the weight holds NaN or infinite values. Repair or reload it before converting.")
