"""A pre-activation residual block, put together from layers that exist already."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class PreActivationBlock(nn.Module):
    r"""y = branch(u) + shortcut(u), with u = before(x): the block of ResNet v2, from layers given by name.

    ``before`` is the normalisation and the activation in front; the shortcut is x itself where no layer is
    named for it, and reads x in place of u where ``shortcut_reads_input`` says so. A block stores its layers
    under the names that it is given, so that weights which came from another block keep their keys. A name
    may stand twice: the layer is then applied twice.

    Shape:
        x: whatever the first layer takes -> what the last layer of the branch gives; the shortcut must agree.
    Raises:
        ValueError: a name that no layer has, or an empty branch.
    Source:
        THEORY section 1 (ResNet v2); with ``shortcut_reads_input`` section 7, where the skip must not stand
        behind an activation, whose Jacobian has zero singular values.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        *,
        before: Sequence[str] = (),
        branch: Sequence[str],
        shortcut: Sequence[str] = (),
        shortcut_reads_input: bool = False,
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.before, self.branch, self.shortcut = tuple(before), tuple(branch), tuple(shortcut)
        self.shortcut_reads_input = shortcut_reads_input
        self._check()

    def _check(self) -> None:
        if not self.branch:
            raise ValueError("PreActivationBlock: the branch names no layer; a block needs at least one.")
        known = {name for name, _ in self.named_modules(remove_duplicate=False)}
        unknown = [name for name in self.before + self.branch + self.shortcut if name not in known]
        if unknown:
            raise ValueError(
                f"PreActivationBlock: no layer is named {unknown[0]!r}; the names are {sorted(known - {''})}."
            )

    def _through(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        for name in names:
            x = self.get_submodule(name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        u = self._through(self.before, x)
        skip = self._through(self.shortcut, x if self.shortcut_reads_input else u) if self.shortcut else x
        return self._through(self.branch, u) + skip

    def extra_repr(self) -> str:
        source = "x" if self.shortcut_reads_input else "u"
        skip = " -> ".join((source,) + self.shortcut) if self.shortcut else "x"
        before, branch = " -> ".join(("x",) + self.before), " -> ".join(("u",) + self.branch)
        return f"u = {before}; branch = {branch}; shortcut = {skip}"
