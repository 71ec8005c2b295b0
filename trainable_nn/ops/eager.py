"""Whether Python may look at the values of a tensor: eagerly, without a wait, and with nobody tracing what it does."""

import torch
from torch import Tensor
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)
_compiling, _transforming = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active
_modes, _tracing = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state


def may_look_at(x: Tensor) -> bool:
    """False while compiling, exporting, tracing, under torch.func or a dispatch mode, for subclasses and other devices."""
    if _compiling() or _transforming() or type(x) not in _PLAIN or not x.is_cpu:
        return False
    return _modes() == 0 and _tracing() is None
