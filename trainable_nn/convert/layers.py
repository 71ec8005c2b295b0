"""What part a layer plays in a residual block: by its exact type, never by its base class."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

LINEAR = ("convolution", "norm", "mean", "identity")  # a projection shortcut is made of these
PASSIVE = ("identity", "dropout", "attention", "mean", "pool")  # a branch may hold these behind its last norm

_TORCH = {
    "convolution": "conv.Conv1d conv.Conv2d conv.Conv3d linear.Linear",
    "norm": "batchnorm.BatchNorm1d batchnorm.BatchNorm2d batchnorm.BatchNorm3d batchnorm.SyncBatchNorm "
    "normalization.GroupNorm instancenorm.InstanceNorm1d instancenorm.InstanceNorm2d instancenorm.InstanceNorm3d",
    "mean": "pooling.AvgPool1d pooling.AvgPool2d pooling.AvgPool3d",
    "pool": "pooling.MaxPool1d pooling.MaxPool2d pooling.MaxPool3d pooling.AdaptiveAvgPool2d",
    "identity": "linear.Identity",
    "dropout": "dropout.Dropout dropout.Dropout1d dropout.Dropout2d dropout.Dropout3d dropout.AlphaDropout "
    "dropout.FeatureAlphaDropout",
    "activation": "activation.ReLU activation.ReLU6 activation.LeakyReLU activation.ELU activation.CELU activation.SELU "
    "activation.GELU activation.SiLU activation.Mish activation.Tanh activation.Sigmoid activation.Softplus "
    "activation.Softsign activation.Hardswish activation.Hardtanh activation.Hardsigmoid activation.PReLU",
}
_ZOOS = {
    "norm": "timm.layers.norm.GroupNorm",
    "dropout": "timm.layers.drop.DropPath timm.layers.drop.DropBlock2d torchvision.ops.stochastic_depth.StochasticDepth "
    "torchvision.ops.drop_block.DropBlock2d",
    "attention": "timm.layers.squeeze_excite.SEModule timm.layers.squeeze_excite.EffectiveSEModule "
    "timm.layers.eca.EcaModule timm.layers.eca.CecaModule timm.layers.cbam.CbamModule timm.layers.cbam.LightCbamModule "
    "timm.layers.gather_excite.GatherExcite timm.layers.global_context.GlobalContext timm.models.senet.SEModule "
    "torchvision.ops.misc.SqueezeExcitation",
    "pool": "timm.layers.blur_pool.BlurPool2d timm.layers.pool2d_same.AvgPool2dSame",
    "activation": "timm.layers.activations.Swish timm.layers.activations.Mish timm.layers.activations.Sigmoid "
    "timm.layers.activations.Tanh timm.layers.activations.HardSwish timm.layers.activations.HardSigmoid "
    "timm.layers.activations.HardMish timm.layers.activations.GELU timm.layers.activations.GELUTanh "
    "timm.layers.activations.QuickGELU",
}
_NORMS_WITH_ACTIVATION = ("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.GroupNormAct")
ROLES = (
    {f"torch.nn.modules.{name}": role for role, names in _TORCH.items() for name in names.split()}
    | {name: role for role, names in _ZOOS.items() for name in names.split()}
    | dict.fromkeys(_NORMS_WITH_ACTIVATION, "norm and activation")
)


@dataclass(frozen=True)
class Layer:
    """A layer inside a block: its path there, itself, and its role ("unknown" where no rule covers its type)."""

    path: str
    module: nn.Module
    role: str


def role_of(module: nn.Module) -> str:
    """The role of a layer by the qualified name of its exact type; "unknown" for everything else."""
    if "forward" in vars(module) or parametrize.is_parametrized(module):
        return "unknown"
    if type(module) is nn.PReLU and module.num_parameters != 1:
        return "unknown"  # one slope per channel: it would not fit the block's input
    role = ROLES.get(f"{type(module).__module__}.{type(module).__qualname__}", "unknown")
    if role == "norm and activation" and {type(module.act), type(module.drop)} == {nn.Identity}:
        return "norm"
    return role


def is_sequence(module: nn.Module) -> bool:
    """Whether a module does no more than apply its children in order."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
    )


def flatten(path: str, module: nn.Module, chain_of: Callable[[nn.Module], list[str] | None]) -> Iterator[Layer]:
    """The layers that a module applies one after the other; itself, where it is more than a chain."""
    role = role_of(module)
    names = list(module._modules) if is_sequence(module) else None
    if names is None and role == "unknown" and module._modules:
        names = chain_of(module)
    if names is None:
        yield Layer(path, module, role)
        return
    for name in names:
        yield from flatten(f"{path}.{name}", module.get_submodule(name), chain_of)


def why_unknown(layer: Layer) -> str:
    """Why no rule covers a layer, as the end of a sentence."""
    kind = type(layer.module)
    if parametrize.is_parametrized(layer.module):
        return (
            f"{layer.path} has an active parametrization; call torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if "forward" in vars(layer.module):
        return f"{layer.path} has its forward replaced on the instance"
    known = next(
        (base.__name__ for base in kind.__mro__[1:] if f"{base.__module__}.{base.__qualname__}" in ROLES), None
    )
    if known:
        return f"{layer.path} is a {kind.__name__}, a subclass of {known} that no rule covers"
    return f"{layer.path} is a {kind.__name__}, which no rule covers"
