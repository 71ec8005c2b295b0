"""A pre-activation residual block, put together from layers that exist already."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class PreActivationBlock(nn.Module):
    r"""y = branch(u) + shortcut(u), with u = before(x): the block of ResNet v2, from layers given by name.

    ``before`` is the normalisation and the activation in front; the shortcut is x itself where no layer is
    named for it, and reads x in place of u where ``shortcut_reads_input`` says so. A block stores its layers
    under the names that it is given, so that weights which came from another block keep their keys; the order
    is in ``layer_names``. A name may stand twice: the layer is then applied twice.

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
        self.layer_names = {"before": tuple(before), "branch": tuple(branch), "shortcut": tuple(shortcut)}
        self.shortcut_reads_input = shortcut_reads_input
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._check()

    def _check(self) -> None:
        if not self.layer_names["branch"]:
            raise ValueError("PreActivationBlock: the branch names no layer; a block needs at least one.")
        known = {name for name, _ in self.named_modules(remove_duplicate=False)}
        unknown = [name for names in self.layer_names.values() for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"PreActivationBlock: no layer is named {unknown[0]!r}; the names are {sorted(known - {''})}."
            )

    def _through(self, part: str, x: Tensor) -> Tensor:
        for name in self.layer_names[part]:
            x = self.get_submodule(name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        u = self._through("before", x)
        reads_x = self.shortcut_reads_input or not self.layer_names["shortcut"]
        skip = self._through("shortcut", x if reads_x else u)
        return self._through("branch", u) + skip

    def extra_repr(self) -> str:
        reads_x = self.shortcut_reads_input or not self.layer_names["shortcut"]
        starts = {"before": "x", "branch": "u", "shortcut": "x" if reads_x else "u"}
        paths = {part: " -> ".join((starts[part], *names)) for part, names in self.layer_names.items()}
        return f"u = {paths['before']}; branch = {paths['branch']}; shortcut = {paths['shortcut']}"
