"""The Jacobian of a convolution in its input: a Toeplitz matrix by blocks, as a linear map of one sample."""

import torch
from torch import Tensor

from ..ops import convolution as fused
from .convolution_reader import read_convolution
from .fused import geometry_arguments, may_fuse
from .geometry import geometry_of
from .linear_map import LinearMap
from .without_autocast import without_autocast

MOST_ENTRIES = 2**22  # of the sparse matrix: building it takes about 60 bytes each


class ToeplitzConv(LinearMap):
    r"""J = d conv(x, K) / dx, of shape (outputs, inputs), for one sample flattened as ``Tensor.flatten`` does.

    ``conv_or_weight`` is a module (torch's convolutions, transposed or not, and this package's, whose kernel is
    ``effective_weight()``), or the kernel with torch's arguments. The kernel is read once, here, and stays attached to
    its graph: products are differentiable in it and in the vectors, and ``vmap`` goes through. The bias plays no part.

    Shape:
        input_shape: (channels, sizes...) of one sample, 1 to 3 sizes. A vector is (n,); several are the columns of
        (n, k). weight: as torch's, (out, in / groups, k...), transposed (in, out / groups, k...).
    Cost:
        ``mv`` and ``rmv`` one convolution or transposed convolution over all columns as one batch; ``dense`` as many
        as the smaller side has.
    Raises:
        TypeError: no convolution, a layer whose forward is not torch's, or a dtype that is no float.
        ValueError: arguments that torch's convolution would not take, arguments beside a module, weights without
        values, NaN or infinite, a sample that the layer doesn't read, or an empty output.
    Source:
        Paper A, equation (20): J = P(w) x Id, here with P(w) the Toeplitz matrix of the kernel.
    """

    def __init__(
        self,
        conv_or_weight,
        input_shape,
        *,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        padding_mode: str = "zeros",
        transposed: bool = False,
        output_padding=0,
    ) -> None:
        arguments = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
            "transposed": transposed,
            "output_padding": output_padding,
        }
        read = read_convolution("ToeplitzConv", conv_or_weight, arguments)
        self.geometry = geometry_of("ToeplitzConv", read.kernel.shape, input_shape, **read.arguments)
        self.weight, self.transposed = read.kernel, read.arguments["transposed"]
        self.dtype, self.device = read.kernel.dtype, read.kernel.device
        sides = (self.geometry.wide, self.geometry.narrow)
        self.input_shape, self.output_shape = map(torch.Size, reversed(sides) if self.transposed else sides)
        self.shape = (self.output_shape.numel(), self.input_shape.numel())
        self._arguments = geometry_arguments(self.geometry, self.transposed)

    @without_autocast
    def gram_mv(self, vectors: Tensor, *, side: str = "inputs") -> Tensor:
        """J^T J v on the side "inputs", the default; J J^T u, what ``Jacobian.gram_mv`` is, on the side "outputs"."""
        real = isinstance(vectors, Tensor) and not self.dtype.is_complex
        if side == "inputs" and real and may_fuse(vectors, self.weight):
            return self._apply("gram_mv", self._push_and_pull, vectors, self.shape[1], self.shape[1])
        return self._gram(vectors, side)

    def to(self, *args, **options) -> "ToeplitzConv":
        """The same map with its kernel converted as ``Tensor.to`` does: another dtype or device."""
        other = object.__new__(ToeplitzConv)
        other.__dict__.update(self.__dict__)
        other.weight = self.weight.to(*args, **options)
        other.dtype, other.device = other.weight.dtype, other.weight.device
        return other

    @without_autocast
    def to_sparse(self, *, most_entries: int = MOST_ENTRIES) -> Tensor:
        """The matrix as ``torch.sparse_csr``, detached; taps on the same pixel are summed.

        Raises:
            ValueError: taps times outputs are more than ``most_entries``.
        """
        entries = self.weight[0].numel() * self.geometry.narrow[0] * torch.Size(self.geometry.narrow[1:]).numel()
        if entries > most_entries:
            raise ValueError(
                f"ToeplitzConv.to_sparse: the matrix has about {entries} entries, and the limit is {most_entries}. "
                f"Use mv and rmv, or raise most_entries."
            )
        narrow, wide, kernel = (index.to(self.device) for index in self.geometry.entries())
        places = torch.stack((wide, narrow) if self.transposed else (narrow, wide))
        values = self.weight.detach().flatten()[kernel]
        options = {"device": self.device, "check_invariants": False}
        return torch.sparse_coo_tensor(places, values, self.shape, **options).coalesce().to_sparse_csr()

    def __repr__(self) -> str:
        kind = "transposed, " if self.transposed else ""
        return (
            f"ToeplitzConv({self.shape[0]} x {self.shape[1]}, {kind}{tuple(self.input_shape)} -> "
            f"{tuple(self.output_shape)}, {self.dtype}, {self.device})"
        )

    def _push_and_pull(self, rows: Tensor) -> Tensor:
        x = rows.reshape(-1, *self.input_shape)
        if self.transposed or not self.geometry.pads:
            return fused.gram(x, self.weight, *self._arguments).flatten(1)
        padded = self.geometry.padded(x)
        return self.geometry.unpadded(fused.gram(padded, self.weight, *self._arguments)).flatten(1)

    def _push(self, rows: Tensor) -> Tensor:
        x = rows.reshape(-1, *self.input_shape)
        product = self.geometry.scatter if self.transposed else self.geometry.correlate
        return product(x, self.weight).flatten(1)

    def _pull(self, rows: Tensor) -> Tensor:
        u = rows.reshape(-1, *self.output_shape)
        product = self.geometry.correlate if self.transposed else self.geometry.scatter
        return product(u, self.weight.conj()).flatten(1)
