"""A residual block whose branch is provably shorter than its skip, with the weights that it has, at every step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .anchor import Anchor, Bounds, LinearPart, anchored, bounds_of, size_of
from .lipschitz import RULES, Reading, Rule, lipschitz_bound, sum_of
from .smooth_maximum import smooth_maximum_with_one

MARGIN = 2.0**-18  # below the bound, for all that is rounded on the way
REACHED = 0.95  # of the tightness: where the proof starts to show in the scale
SPENT = 0.93  # of the tightness: where a new certificate is wanted
LASTING = SPENT * (1.0 - 2.0**-9)  # up to where none is made, whatever float32 rounds
ROOM = 1.25  # of the tightness over the proved bound when it is set; it stays while that is in ROOMS
ROOMS = (1.125, 1.5)
WAIT = 100  # the most forward passes between two certificates; the first ones wait for 1, 2, 4, ...


class SpectrallyBoundedResidual(nn.Module):
    r"""y = skip(x) + a(theta) branch(x), \|\|J(a branch)\|\|_2 <= bound at every x, for the parameters of now.

    The branch is made of torch's layers or ours: convolutions, linear layers, activations, pooling, dropout,
    ``FlooredBatchNorm``, layer and group normalisation (their eps is their floor: raise it), sequences of these and
    residuals in them. The bound is of the whole batch's Jacobian, in training and evaluation alike, of the exact function
    of the float weights (of the rounded ones under autocast); how torch rounds while it computes is not in it. With a skip
    whose singular values are 1 the block's Jacobian has all of its within [1 - bound, 1 + bound].

    Let S(theta) be the product of the layers' smooth sizes (a linear one: 1.1 f (1e-24 + abs(w)^2)^(1/2), Frobenius norm
    times geometry factor), V(theta) >= the branch's Lipschitz constant what the anchors prove now (``anchor``), t the buffer
    ``tightness`` in (0, 1], and h >= max(1, r) smooth (``smooth_maximum_with_one``). Then

        a = 1 / h(L / bound),  L = t S h(V / (t S)) >= V,  so a <= min(1, bound / L) and a V <= bound,

    whatever t, the weights and the anchors are: nothing can go stale. Where V <= 0.95 t S, L = t S is C^infinity in
    theta, a is C^3, and autograd gives its derivative. ``tightness`` is the only state that shapes the function, and is
    in the state_dict; an anchor only proves. When the slack V <= 0.93 t S is spent, ``certify`` is called before an eager
    forward pass: it proves new anchors, and changes t where t S is not 1.125 to 1.5 times what is proved. It is called
    after 1, 2, 4, ... and then every 100 passes at most; meanwhile a shrinks smoothly as the weights move on. With
    ``tight=False`` t stays 1, nothing is certified and the block is one fixed smooth function of theta, with a weak branch.

    Gradient descent and a are of one function of theta as long as t stays: always with ``tight=False``, else while the
    slack lasts. ``trainable_nn.certify`` speaks of that function, on balls in which the slack provably lasts.

    Compiled, exported and inside torch.func, the formula holds and the graph is one; no certificate is made there, so
    call ``certify`` now and then outside. A forward hook that changes values is not seen, and voids the bound.

    Shape:
        x: what branch and skip take; their outputs must have one shape.
    Cost:
        Each pass reads the weights and the anchors, a copy of the weights, a few times, and on CUDA waits for one
        number. A certificate costs ``operator_norm_at_most`` for each linear layer; one is made here and after loading.
    Raises:
        UnboundedError: a part of the branch has no bound; the message gives its path.
        ValueError: bound is not between 0 and 1, or branch or skip overwrites its input; or, in forward, the two
        outputs differ in shape.
    Source:
        Paper A, Lemma A.8; the uniform margin 1 - bound is THEORY_PAPERS II.1.7, item 4. The anchors and a are ours.
    """

    _held = False  # by ``hold_scales``

    def __init__(
        self,
        branch: nn.Module,
        skip: nn.Module | None = None,
        *,
        bound: float = 0.9,
        tight: bool = True,
        rules: Mapping[type, Rule] | None = None,
    ) -> None:
        if not 0.0 < bound < 1.0:
            raise ValueError(f"SpectrallyBoundedResidual: bound must be above 0 and below 1, got {bound}.")
        for path, module in (("branch", branch), ("skip", skip)):
            _check_input_is_kept(path, module)
        super().__init__()
        self.branch, self.skip = branch, skip
        self.bound, self.tight, self.rules = float(bound), bool(tight), rules
        self._anchors: dict[str, Anchor] = {}
        self._passes = self._certificates = 0
        self._tightness_is_unknown = False
        places = {p.device for p in branch.parameters()}
        self.register_buffer("tightness", torch.ones((), dtype=torch.float32, device=next(iter(places), None)))
        self.register_load_state_dict_post_hook(_prove_what_was_loaded)
        self.certify()

    @property
    def scale(self) -> Tensor:
        """a(theta) of now, 0-dim float64, differentiable in the branch's parameters."""
        if "_frozen" in vars(self):
            return torch.tensor(self._frozen, dtype=torch.float64)
        return self._scale(proof_shows=True)

    def _scale(self, proof_shows: bool) -> Tensor:
        """a; without the proof's part of it, which is nothing where V <= 0.95 t S."""
        bounds = self._bounds(None if proof_shows else size_of)
        if not isinstance(bounds, Bounds):
            lipschitz = torch.tensor(bounds, dtype=torch.float64, device=self.tightness.device)
        else:
            lipschitz = bounds.size * self._tightness()
            if proof_shows:
                lipschitz = lipschitz * smooth_maximum_with_one(bounds.proved / lipschitz, REACHED)
        return (1.0 - MARGIN) / smooth_maximum_with_one(lipschitz / self.bound, 0.5)

    def _tightness(self) -> Tensor:
        return self.tightness.double().clamp(1e-30, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        if "_frozen" in vars(self):
            scale = self.scale
        else:
            scale = self._scale(proof_shows=not self._may_certify() or self._keep_certified() > REACHED)
        kept = x if self.skip is None else self.skip(x)
        change = self.branch(x)
        if kept.shape != change.shape:
            raise ValueError(
                f"SpectrallyBoundedResidual: the skip gives shape {tuple(kept.shape)} and the branch "
                f"{tuple(change.shape)}. Give a skip of the branch's shape, for example OrthogonalDownsample2d."
            )
        scale = scale * (1.0 - torch.finfo(change.dtype).eps)  # rounding to the dtype never makes it larger
        return kept + scale.to(change.dtype) * change

    def certify(self) -> float:
        """Prove new anchors at the weights of now, and set ``tightness`` if there is too much or too little room.

        Returns ``certified_bound()``. A branch on the meta device is left as it is.

        Raises:
            UnboundedError: nothing bounds a part of the branch.
            ValueError: a weight is not finite.
        """
        return self._certify(may_tighten=True)

    @torch.no_grad()
    def _certify(self, may_tighten: bool) -> float:
        if any(p.is_meta for p in self.branch.parameters()):
            self._bounds()
            return self.bound
        if self.tight:
            with torch.inference_mode(False), torch.no_grad():
                self._anchor_all()
                self._set_tightness(may_tighten)
        return self.certified_bound()

    def _anchor_all(self) -> None:
        anchors: dict[str, Anchor] = {}

        def keep(part: LinearPart) -> Bounds:
            anchors[part.path] = anchored(part, self._anchors.get(part.path))
            return bounds_of(part, anchors)

        self._bounds(keep)
        self._anchors, self._passes = anchors, 0
        self._certificates += 1

    def _set_tightness(self, may_tighten: bool) -> None:
        bounds = self._bounds()
        if not isinstance(bounds, Bounds):
            return
        wanted = float(bounds.proved / bounds.size)
        room = float(self.tightness) / wanted if wanted > 0 else math.inf
        least, most = ROOMS if may_tighten else (1 / REACHED, math.inf)
        if not least <= room <= most and math.isfinite(wanted):
            self.tightness.fill_(min(1.0, max(ROOM * wanted, 1e-6)))

    def certified_bound(self, input_shape: Sequence[int] | None = None) -> float:
        r"""A proved upper bound of \|\|J(a branch)\|\|_2 now, at most ``bound``: in this mode, under this autocast.

        Without input_shape it holds for every size, and is what the anchors prove, at the cost of a pass over the
        weights. With one it is tight there, and costs a new ``operator_norm_at_most`` for each linear layer.

        Shape:
            input_shape: the shape of one sample, without the batch.
        Raises:
            UnboundedError: the branch was changed to one that nothing bounds.
            ValueError: a weight is on the meta device, or not finite.
        """
        with torch.no_grad():
            proved = self._proved(self._bounds(any_mode=False))
            if input_shape is not None:
                reading = Reading("branch", any_weights=False, input_shape=tuple(input_shape))
                proved = min(proved, float(lipschitz_bound(self.branch, reading, self._rules())))
            bound = float(self.scale) * proved * (1.0 + MARGIN / 4)
        if not math.isfinite(bound):
            raise ValueError("SpectrallyBoundedResidual: a weight of the branch is NaN, infinite or near overflow.")
        return bound

    @staticmethod
    def _proved(bounds: "Bounds | float") -> float:
        proved = bounds.proved if isinstance(bounds, Bounds) else bounds
        if isinstance(proved, Tensor) and proved.is_meta:
            raise ValueError("SpectrallyBoundedResidual: the branch is on the meta device. Load its weights first.")
        return float(proved)

    def _bounds(self, linear=None, *, any_mode: bool = True) -> "Bounds | float":
        given = linear or (lambda part: bounds_of(part, self._anchors))
        reading = Reading("branch", any_weights=False, linear=given, any_mode=any_mode)
        return lipschitz_bound(self.branch, reading, self._rules())

    def _rules(self) -> Mapping[type, Rule]:
        return BRANCH_RULES if self.rules is None else self.rules

    def _may_certify(self) -> bool:
        if torch.compiler.is_compiling() or not self.tight or self._held or "_frozen" in vars(self):
            return False
        if torch._C._are_functorch_transforms_active() or self.tightness.is_meta:
            return False
        return not (self.tightness.is_cuda and torch.cuda.is_current_stream_capturing())

    @torch.no_grad()
    def _keep_certified(self) -> float:
        """V / (t S), after a new certificate if the slack is spent and the wait is over; infinity for what isn't finite."""
        self._passes += 1
        ratio = self._ratio()
        if SPENT < ratio < math.inf and (self._passes >= min(2**self._certificates, WAIT) or not self._anchors):
            self._certify(may_tighten=True)
            ratio = self._ratio()
        return ratio

    def _ratio(self) -> float:
        bounds = self._bounds()
        if not isinstance(bounds, Bounds):
            return 0.0
        ratio = float(bounds.proved / (bounds.size * self._tightness()))
        return ratio if math.isfinite(ratio) else math.inf

    def _apply(self, fn, recurse=True):
        """Move as every module does. Anchors move by value, whatever fn does with memory; from meta there are none."""
        was_meta = self.tightness.is_meta
        super()._apply(fn, recurse)
        place = self.tightness.device
        self._anchors = {} if place.type == "meta" else {n: a.moved(place) for n, a in self._anchors.items()}
        if was_meta and not self.tightness.is_meta:
            self.tightness.fill_(1.0)
            self._tightness_is_unknown = True
        return self

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        """A file without ``tightness``, as of a plain branch, leaves it to be set by the weights."""
        key = f"{prefix}tightness"
        self._tightness_is_unknown = key not in state_dict
        if self._tightness_is_unknown:
            state_dict = {**state_dict, key: self.tightness}
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def freeze(self) -> None:
        """Make a the constant that it is now; the bound then holds for these weights only. ``fold`` does so."""
        self._frozen = float(self.scale.detach())
        hooks = self._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _prove_what_was_loaded]:
            del hooks[key]

    def extra_repr(self) -> str:
        said = "" if self.tightness.is_meta else f", scale={float(self.scale.detach()):.4g}"
        return f"bound={self.bound:g}{said}" + ("" if self.tight else ", tight=False")


def hold_scales(model: nn.Module) -> nn.Module:
    """The model itself, whose blocks prove nothing anew in forward passes from here on: each is one function of its weights."""
    for module in model.modules():
        if isinstance(module, SpectrallyBoundedResidual):
            module._held = True
    return model


def slack_of(model: nn.Module) -> dict[str, float]:
    """Path -> V / (t S) of each block that sets t anew in a forward pass where this is above ``SPENT``."""
    blocks = [(path, m) for path, m in model.named_modules() if isinstance(m, SpectrallyBoundedResidual)]
    with torch.no_grad():
        return {path: m._ratio() for path, m in blocks if m.tight and "_frozen" not in vars(m)}


def _prove_what_was_loaded(block: SpectrallyBoundedResidual, keys) -> None:
    """New anchors at the loaded weights; the loaded tightness stays, unless the proof doesn't reach it."""
    if block.tightness.is_meta or not all(torch.isfinite(p).all() for p in block.branch.parameters()):
        return
    block._certify(may_tighten=block._tightness_is_unknown)
    block._tightness_is_unknown = False


def residual_rule(module: SpectrallyBoundedResidual, reading: Reading, rules: Mapping[type, Rule]) -> "float | Bounds":
    """L(skip) + bound, for a residual inside a branch: it keeps its own bound."""
    beside = replace(reading, path=f"{reading.path}.skip")
    skip = 1.0 if module.skip is None else lipschitz_bound(module.skip, beside, rules)
    return sum_of(skip, module.bound)


BRANCH_RULES: dict[type, Rule] = {**RULES, SpectrallyBoundedResidual: residual_rule}
PASSED_ON = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def _check_input_is_kept(prefix: str, module: nn.Module | None) -> None:
    """Refuse a side that starts in place: it would write into x, which the other side still needs."""
    for path, leaf in [] if module is None else module.named_modules(prefix=prefix):
        if isinstance(leaf, nn.Sequential):
            continue
        if getattr(leaf, "inplace", False):
            raise ValueError(
                f"{path}: {type(leaf).__name__} works in place on the block's input, which both sides need. "
                f"Use inplace=False."
            )
        if type(leaf) not in PASSED_ON:
            return
