"""The Jacobian of a small network in 50 digits: loops over single numbers with their gradients, by the layers' formulas.

Nothing of torch's arithmetic, of autograd or of the package is used; a layer that is not known raises NotHere.
"""

import itertools

import numpy as np
from mpmath import mp, mpf
from regularity_networks import Block, Twice
from torch import nn

import trainable_nn as tnn
from trainable_nn import modules
from trainable_nn.modules.floored import FlooredBatchNorm1d, FlooredBatchNorm2d
from trainable_nn.modules.shortcut import PooledConv2d

mp.dps = 50
exact = np.frompyfunc(lambda x: mpf(float(x)), 1, 1)


class NotHere(Exception):
    """The oracle doesn't know this layer."""


class Number:
    """A value with its gradient in all parameters."""

    def __init__(self, v, g) -> None:
        self.v, self.g = v, g

    def __add__(self, o):
        return Number(self.v + o.v, self.g + o.g) if isinstance(o, Number) else Number(self.v + o, self.g)

    def __mul__(self, o):
        return Number(self.v * o.v, self.g * o.v + o.g * self.v) if isinstance(o, Number) else Number(self.v * o, self.g * o)

    def __neg__(self):
        return self * mpf(-1)

    def __sub__(self, o):
        return self + (-o)

    def __rsub__(self, o):
        return -self + o

    def __pow__(self, power):
        return self.through(self.v**power, power * self.v ** (power - 1))

    def __truediv__(self, o):
        return self * (o**-1)

    def through(self, value, slope):
        """phi of it, given phi(v) and phi'(v)."""
        return Number(value, self.g * slope)

    __radd__, __rmul__ = __add__, __mul__


def phi_cdf(z):
    return (1 + mp.erf(z / mp.sqrt(2))) / 2


def phi_pdf(z):
    return mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi)


def sigmoid(z):
    return 1 / (1 + mp.exp(-z))


def mish(z):
    t = mp.tanh(mp.log1p(mp.exp(z)))
    return z * t, t + z * (1 - t * t) * sigmoid(z)


def gelu_tanh(z):
    k, c = mp.sqrt(2 / mp.pi), mpf(44715) / 10**6
    t = mp.tanh(k * (z + c * z**3))
    return z * (1 + t) / 2, (1 + t) / 2 + z * (1 - t * t) * k * (1 + 3 * c * z * z) / 2


def scaled(pair, scale):
    return pair[0] * scale, pair[1] * scale


def gelu(z):
    return z * phi_cdf(z), phi_cdf(z) + z * phi_pdf(z)


def silu(z):
    s = sigmoid(z)
    return z * s, s + z * s * (1 - s)


SELU_ALPHA, SELU_SCALE = mpf("1.6732632423543772848170429916717"), mpf("1.0507009873554804934193349852946")


def hardswish(z):
    inner = (z * (z + 3) / 6, (2 * z + 3) / 6)
    return (z, mpf(1)) if z > 3 else (mpf(0), mpf(0)) if z <= -3 else inner


def root(z):
    return mp.sqrt(1 + z * z)


from trainable_nn.functional.activation import ERF_TO_SLOPE_1  # noqa: E402, floats that are part of the formulas
from trainable_nn.theory.nonlinearities import GELU_TO_SLOPE_1, SILU_TO_SLOPE_1  # noqa: E402

ACTIVATIONS = {
    **dict.fromkeys((nn.Tanh, modules.Tanh), lambda z, m: (mp.tanh(z), 1 - mp.tanh(z) ** 2)),
    nn.Sigmoid: lambda z, m: (sigmoid(z), sigmoid(z) * (1 - sigmoid(z))),
    nn.SiLU: lambda z, m: silu(z),
    modules.SiLU1: lambda z, m: scaled(silu(z), mpf(SILU_TO_SLOPE_1)),
    nn.Mish: lambda z, m: mish(z),
    **dict.fromkeys((nn.Softsign, modules.SoftSign), lambda z, m: (z / (1 + abs(z)), 1 / (1 + abs(z)) ** 2)),
    nn.GELU: lambda z, m: gelu_tanh(z) if m.approximate == "tanh" else gelu(z),
    modules.GELU1: lambda z, m: scaled(gelu(z), mpf(GELU_TO_SLOPE_1)),
    nn.Softplus: lambda z, m: (mp.log1p(mp.exp(m.beta * z)) / m.beta, sigmoid(m.beta * z)),
    modules.Softplus0: lambda z, m: (mp.log1p(mp.exp(z)) - mp.log(2), sigmoid(z)),
    modules.SmoothReLU: lambda z, m: ((z + root(z) - 1) / 2, (1 + z / root(z)) / 2),
    modules.Erf1: lambda z, m: scaled((mp.erf(z), 2 / mp.sqrt(mp.pi) * mp.exp(-z * z)), mpf(ERF_TO_SLOPE_1)),
    modules.Arctan: lambda z, m: (mp.atan(z), 1 / (1 + z * z)),
    modules.ISRU: lambda z, m: (z / root(z), root(z) ** -3),
    nn.ELU: lambda z, m: (z, mpf(1)) if z > 0 else scaled((mp.expm1(z), mp.exp(z)), mpf(m.alpha)),
    nn.SELU: lambda z, m: scaled((z, mpf(1)) if z > 0 else scaled((mp.expm1(z), mp.exp(z)), SELU_ALPHA), SELU_SCALE),
    nn.Hardswish: lambda z, m: hardswish(z),
    nn.ReLU: lambda z, m: (z, mpf(1)) if z > 0 else (mpf(0), mpf(0)),
    nn.LeakyReLU: lambda z, m: (z, mpf(1)) if z > 0 else (z * mpf(m.negative_slope), mpf(m.negative_slope)),
}
SAME = (nn.Identity, nn.Dropout)


class Network:
    """The outputs of a model in Numbers."""

    def __init__(self, model: nn.Module) -> None:
        held = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.count, start, self.numbers = sum(p.numel() for _, p in held), 0, {}
        for _, p in held:
            self.numbers[id(p)] = self._variables(p.detach().numpy(), start)
            start += p.numel()
        self.model = model

    def _variables(self, values, start):
        found = np.empty(values.size, dtype=object)
        for k, value in enumerate(values.ravel()):
            g = np.array([mpf(0)] * self.count, dtype=object)
            g[start + k] = mpf(1)
            found[k] = Number(mpf(float(value)), g)
        return found.reshape(values.shape)

    def constants(self, values):
        zero = np.array([mpf(0)] * self.count, dtype=object)
        return np.frompyfunc(lambda v: Number(mpf(float(v)), zero), 1, 1)(np.asarray(values))

    def of(self, p):
        """A parameter or a buffer."""
        return self.numbers[id(p)] if id(p) in self.numbers else self.constants(p.detach().numpy())

    def jacobian(self, inputs) -> np.ndarray:
        """(outputs of all samples, parameters), of mpf."""
        rows = self.run(self.model, self.constants(inputs.numpy()))
        return np.array([n.g for n in rows.ravel()], dtype=object)

    def run(self, m, x):
        """x: (samples, ...)."""
        kind = type(m)
        if kind is nn.Sequential:
            for child in m._modules.values():
                x = self.run(child, x)
            return x
        if kind in SAME:
            return x
        if kind in ACTIVATIONS:
            return np.frompyfunc(lambda z: z.through(*ACTIVATIONS[kind](z.v, m)), 1, 1)(x)
        if kind is Block:
            return x + self.run(m.branch, x) * mpf(m.scale)
        if kind is Twice:
            tanh = np.frompyfunc(lambda z: z.through(mp.tanh(z.v), 1 - mp.tanh(z.v) ** 2), 1, 1)
            return self.run(m.layer, self.run(m.between, self.run(m.layer, x))) - tanh(x)
        if kind is tnn.ContractiveResidual and m.skip is None:
            return x + self.run(m.branch, x) * mpf(m.scale)
        if kind is tnn.SpectrallyBoundedResidual and m.skip is None:
            return x + self.run(m.branch, x) * (mpf(m._frozen) * (1 - mpf(2) ** -52))
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            return self._batch_norm(m, x)
        return np.stack([self.of_one(m, sample) for sample in x])

    def of_one(self, m, x):
        """One sample."""
        kind = type(m)
        if kind is nn.Flatten:
            return x.ravel()
        if kind is nn.AdaptiveAvgPool2d and m.output_size == 1:
            return self._mean(x)
        if kind is nn.AvgPool2d:
            return self._average(m, x)
        if kind is nn.MaxPool2d:
            return self._largest(m, x)
        if kind in (nn.LayerNorm, nn.GroupNorm):
            return self._sample_norm(m, x)
        if isinstance(m, nn.Linear):
            y = (self.weight(m) * x).sum(-1)
            return y if m.bias is None else y + self.of(m.bias)
        if isinstance(m, nn.Conv2d) and kind is not PooledConv2d and m.padding_mode in ("zeros", "circular"):
            return self._convolve(m, x)
        raise NotHere(kind)

    def weight(self, m):
        w = self.of(m.weight)
        name = type(m).__name__
        if name in ("Linear", "Conv2d"):
            return w
        eps, gain, rows = mpf(m.eps), mpf(m.gain), w.reshape(len(w), -1)
        half = -mpf(1) / 2
        if name.startswith("EntryNorm"):
            return w * ((w * w) + eps) ** half * gain + w * mpf(m.leak)
        if name.startswith("WeightNorm"):
            lengths = ((rows * rows).sum(1) + eps) ** half * gain
            return (rows * lengths[:, None]).reshape(w.shape)
        if name == "SpectralNormLinear":
            gram = (rows[:, None] * rows[None]).sum(-1)
            for _ in range(m.power.bit_length() - 1):
                gram = (gram[:, :, None] * gram[None]).sum(1)
            return w * (np.trace(gram) ** (mpf(1) / m.power) + eps) ** half * gain
        raise NotHere(type(m))

    def _convolve(self, m, x):
        w, (k, l), (s, t), (p, q) = self.weight(m), m.kernel_size, m.stride, m.padding
        if m.padding_mode == "circular":
            x = np.pad(x, ((0, 0), (p, p), (q, q)), mode="wrap")
        elif p or q:
            x = np.pad(x, ((0, 0), (p, p), (q, q)), constant_values=self.constants(np.zeros(1))[0])
        each = x.shape[0] // m.groups
        rows, columns = (x.shape[1] - k) // s + 1, (x.shape[2] - l) // t + 1
        y = np.empty((len(w), rows, columns), dtype=object)
        for o, i, j in itertools.product(range(len(w)), range(rows), range(columns)):
            first = o // (len(w) // m.groups) * each
            y[o, i, j] = (w[o] * x[first : first + each, i * s : i * s + k, j * t : j * t + l]).sum()
        return y if m.bias is None else y + self.of(m.bias)[:, None, None]

    def _mean(self, x):
        return np.array([[[channel.sum() * (mpf(1) / channel.size)]] for channel in x], dtype=object)

    def _windows(self, m, x):
        k = m.kernel_size if isinstance(m.kernel_size, int) else m.kernel_size[0]
        s = m.stride if isinstance(m.stride, int) else m.stride[0]
        if m.padding or getattr(m, "ceil_mode", False) and ((x.shape[1] - k) % s or (x.shape[2] - k) % s):
            raise NotHere(type(m))
        rows, columns = (x.shape[1] - k) // s + 1, (x.shape[2] - k) // s + 1
        y = np.empty((len(x), rows, columns), dtype=object)
        for c, i, j in itertools.product(range(len(x)), range(rows), range(columns)):
            y[c, i, j] = x[c, i * s : i * s + k, j * s : j * s + k]
        return y

    def _average(self, m, x):
        return np.frompyfunc(lambda window: window.sum() * (mpf(1) / window.size), 1, 1)(self._windows(m, x))

    def _largest(self, m, x):
        return np.frompyfunc(lambda window: max(window.ravel(), key=lambda n: n.v), 1, 1)(self._windows(m, x))

    def _batch_norm(self, m, x):
        """By the buffers, or by the batch's own statistics."""

        def inverse(squared):  # of a number or a Number, s^2 = var + eps
            s = squared ** (mpf(1) / 2)
            if isinstance(m, (FlooredBatchNorm1d, FlooredBatchNorm2d)):
                floor, size = mpf(m.floor), s.v if isinstance(s, Number) else s
                s = squared / (4 * floor) + floor if size < 2 * floor else s
            return s**-1

        y = np.empty_like(x)
        for c in range(x.shape[1]):
            values = x[:, c]
            if m.training or m.running_mean is None:
                share = mpf(1) / values.size
                centred = values - values.sum() * share
                y[:, c] = centred * inverse((centred * centred).sum() * share + mpf(m.eps))
            else:
                scale = inverse(mpf(float(m.running_var[c])) + mpf(m.eps))
                y[:, c] = (values - mpf(float(m.running_mean[c]))) * scale
        return self._affine(m, y, (1, -1, *(1,) * (x.ndim - 2)))

    def _affine(self, m, y, shape):
        y = y if m.weight is None else y * self.of(m.weight).reshape(shape)
        return y if m.bias is None else y + self.of(m.bias).reshape(shape)

    def _sample_norm(self, m, x):
        size = np.prod(m.normalized_shape) if isinstance(m, nn.LayerNorm) else x.size // m.num_groups
        groups = x.reshape(-1, int(size))
        share = mpf(1) / int(size)
        centred = groups - (groups.sum(1) * share)[:, None]
        y = centred * (((centred * centred).sum(1) * share + mpf(m.eps)) ** (-mpf(1) / 2))[:, None]
        shape = m.normalized_shape if isinstance(m, nn.LayerNorm) else (-1, *(1,) * (x.ndim - 1))
        return self._affine(m, y.reshape(x.shape), shape)


CONTAINERS = (nn.Sequential, Block, Twice, tnn.ContractiveResidual, tnn.SpectrallyBoundedResidual)
LEAVES = (*SAME, *ACTIVATIONS, nn.Flatten, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, FlooredBatchNorm1d)
LEAVES += (FlooredBatchNorm2d, nn.Linear, tnn.EntryNormLinear, tnn.WeightNormLinear, tnn.SpectralNormLinear)
LEAVES += (nn.Conv2d, tnn.EntryNormConv2d, tnn.WeightNormConv2d, nn.Dropout)


def knows(model: nn.Module) -> bool:
    """Whether every layer is one of the oracle's."""
    square = lambda m: type(m) is nn.AdaptiveAvgPool2d and m.output_size == 1
    moving = lambda m: type(m) is tnn.SpectrallyBoundedResidual and "_frozen" not in vars(m)
    return all((type(m) in CONTAINERS + LEAVES or square(m)) and not moving(m) for m in model.modules())


def exact_jacobian(model: nn.Module, inputs) -> np.ndarray:
    """(outputs, parameters) in 50 digits."""
    return Network(model).jacobian(inputs)


def distance(computed, truth: np.ndarray) -> float:
    """Frobenius, of a tensor from an array of mpf."""
    return float(mp.sqrt(sum((exact(computed.numpy()) - truth).ravel() ** 2)))


def spectral_distance(computed, truth: np.ndarray) -> float:
    """Of two symmetric matrices; the difference is formed in 50 digits."""
    difference = (exact(computed.numpy()) - truth).astype(np.float64)
    return float(np.abs(np.linalg.eigvalsh(difference)).max())
