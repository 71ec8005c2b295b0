"""The exact kernel against the Gram matrix of a dense Jacobian by torch.func, for every kind of layer and of sharing."""

import os

import mpmath
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from kernel_peers import kernel_by_nngeometry, kernel_products_by_curvlinops
from small_resnets import PostActBlock, PreActBlock, SmallResNet, filled
from test_distributed import free_port
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

import trainable_nn as tnn
from trainable_nn.linop import noise_floor, ntk, ntk_blocks
from trainable_nn.linop.gram import contract, inner, schedule
from trainable_nn.linop.gram.features import Factors
from trainable_nn.linop.gram.rows import Block, Sums


def dense_jacobian(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Rows sample by sample, for each parameter, by torch.func on torch's own layers."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    buffers = dict(model.named_buffers())

    def f(parameters):
        return functional_call(model, {**parameters, **{n: b.clone() for n, b in buffers.items()}}, (x,)).flatten()

    return {name: j.reshape(len(j), -1) for name, j in jacrev(f)(parameters).items()}


def dense_kernel(model: nn.Module, x: Tensor) -> Tensor:
    return sum(j @ j.T for j in dense_jacobian(model, x).values())


def reduced(kernel: Tensor, samples: int, outputs: str) -> Tensor:
    each = kernel.reshape(samples, -1, samples, kernel.shape[0] // samples)
    return {"all": kernel, "sum": each.sum((1, 3)), "trace": each.diagonal(dim1=1, dim2=3).sum(-1)}[outputs]


class Tied(nn.Module):
    """An embedding whose weight is also the last layer's, and one linear layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle = nn.Embedding(7, 4, padding_idx=1), nn.Linear(4, 4)
        self.last = nn.Linear(4, 7, bias=False)
        self.last.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.middle(torch.tanh(self.middle(self.embed(ids)))).mean(1))


class Functional(nn.Module):
    """Parameters that no layer owns: in products, added, scaling, and alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.shift = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5))
        self.scale, self.kernel = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.randn(2, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x @ self.w.T * self.shift - self.shift) @ self.w * self.scale
        return F.conv1d(y.unsqueeze(1), self.kernel, padding=1).flatten(1) + self.w.square().sum()


class SequenceFirst(nn.Module):
    """Samples on the second axis, where rows of a linear layer take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.block = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0)
        self.position = nn.Parameter(torch.randn(5, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x.transpose(0, 1)) + self.position).mean(0))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, power, x, w):
        ctx.save_for_backward(x, w)
        return x**power * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return None, 2 * x * w * g, (g * x**2).sum(0)

    @staticmethod
    def of(x, w):
        return Square.apply(2, x, w)


class Custom(nn.Module):
    """An operation that only its own backward knows; its oracle is the same in plain torch."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.first, self.w, self.plain = nn.Linear(4, 3), nn.Parameter(torch.tensor([0.3, -1.0, 2.0])), plain

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return h**2 * self.w if self.plain else Square.of(h, self.w)


def seq(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def random_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2.0)
    return model


CASES = {
    "linear": (lambda: seq(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (6, 4)),
    "linear on images": (lambda: seq(nn.Linear(4, 5), nn.LayerNorm([3, 5]), nn.PReLU(), nn.Flatten()), (4, 3, 4)),
    "conv 2d, in place": (
        lambda: seq(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, 2, 2, 2, groups=2), nn.Flatten()
        ),
        (3, 3, 6, 6),
    ),
    "padding modes": (
        lambda: seq(
            nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(4, 4, (3, 2), padding="same", padding_mode="circular"),
            nn.Tanh(),
            nn.Conv2d(4, 2, 4, padding="same"),
            nn.Conv2d(2, 2, (2, 3), (2, 1), padding=(1, 2), padding_mode="replicate"),
            nn.MaxPool2d(2),
            nn.Flatten(),
        ),
        (3, 3, 6, 6),
    ),
    "1d and transposed": (
        lambda: seq(
            nn.Conv1d(2, 4, 3, padding=1, stride=2),
            nn.Tanh(),
            nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.Flatten(),
            nn.Linear(48, 2),
        ),
        (3, 2, 7),
    ),
    "2d transposed": (
        lambda: seq(nn.ConvTranspose2d(2, 3, (3, 2), (1, 2), (1, 0), dilation=2, bias=False), nn.Flatten(), nn.Tanh()),
        (2, 2, 4, 3),
    ),
    "3d and transposed": (
        lambda: seq(nn.Conv3d(2, 4, 2, padding=1, groups=2), nn.Tanh(), nn.ConvTranspose3d(4, 2, 2, 2), nn.Flatten()),
        (2, 2, 2, 2, 1),
    ),
    "depthwise": (lambda: seq(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1), nn.Flatten()), (3, 4, 5, 5)),
    "batch norm, evaluation": (
        lambda: random_statistics(
            seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
        ).eval(),
        (3, 3, 6, 6),
    ),
    "batch norm, training": (
        lambda: seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)),
        (3, 3, 6, 6),
    ),
    "group, instance, layer norm": (
        lambda: seq(
            nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.SiLU(), nn.Flatten(),
            nn.Linear(64, 4), nn.LayerNorm(4),
        ),
        (3, 3, 6, 6),
    ),
    "shared, embedding": (Tied, (4, 3)),
    "functional": (Functional, (3, 4)),
    "attention": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), (3, 2, 6)),
    "samples on the second axis": (SequenceFirst, (3, 5, 4)),
    "bilinear, gated": (lambda: Gated(), (4, 3)),
    "recurrent": (lambda: Recurrent(), (3, 4, 2)),
    "ours": (
        lambda: seq(
            tnn.EntryNormLinear(4, 5, leak=0.1), tnn.SmoothReLU(), tnn.WeightNormLinear(5, 5), tnn.Tanh(),
            nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)),
        ),
        (3, 4),
    ),
    "our convolutions": (
        lambda: seq(
            tnn.EntryNormConv2d(3, 4, 3, padding=1),
            tnn.Softplus0(),
            tnn.SpectrallyBoundedResidual(tnn.WeightNormConv2d(4, 4, 3, padding=1)),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(36, 2),
        ),
        (3, 3, 6, 6),
    ),
    "ours, spectral": (
        lambda: seq(
            tnn.SpectralNormConv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), tnn.SpectralNormLinear(64, 5),
            nn.utils.parametrizations.orthogonal(nn.Linear(5, 3)),
        ),
        (3, 2, 4, 4),
    ),
    "ours, floored, evaluation": (
        lambda: random_statistics(seq(nn.Conv2d(2, 3, 3), tnn.FlooredBatchNorm2d(3), nn.Flatten())).eval(),
        (3, 2, 4, 4),
    ),
    "ours, floored, training": (
        lambda: seq(nn.Conv2d(2, 3, 3), tnn.FlooredBatchNorm2d(3), nn.Tanh(), nn.Flatten()),
        (3, 2, 4, 4),
    ),
    "residual, pre-activation": (lambda: filled(SmallResNet(PreActBlock, 3, 3)), (3, 3, 8, 8)),
    "residual, post-activation": (lambda: filled(SmallResNet(PostActBlock, 3, 3)), (3, 3, 8, 8)),
}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear, self.gate = nn.Bilinear(3, 3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x) * torch.sigmoid(self.gate(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.GRUCell(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.last(h)


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    make, shape = CASES[name]
    torch.manual_seed(3)
    model = make().to(dtype)
    return model, torch.randint(7, shape) if name == "shared, embedding" else torch.randn(shape, dtype=dtype)


def assert_near(found: Tensor, expected: Tensor, relative: float) -> None:
    assert found.dtype is torch.float64 and found.shape == expected.shape
    assert float((found - expected).abs().max()) <= relative * float(expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_that_of_the_dense_jacobian(name):
    model, x = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = dense_kernel(model, x)
    for outputs in ("all", "sum", "trace"):
        wanted = reduced(expected, len(x), outputs)
        found = ntk(model, x, outputs=outputs)
        assert_near(found, wanted, 1e-10)
        assert torch.equal(found, found.T) and not found.requires_grad
        assert_near(sum(ntk(model, x, outputs=outputs, by_layer=True).values()), wanted, 1e-10)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_a_float32_kernel_is_near_the_float64_one(name):
    model, x = build(name, torch.float32)
    found = ntk(model, x)
    wide = x.double() if x.is_floating_point() else x
    expected = dense_kernel(model.double(), wide)
    assert_near(found, expected, 1e-5)
    floor = noise_floor(found, torch.float32)
    assert torch.linalg.matrix_norm(found - expected, 2) <= floor
    assert torch.linalg.eigvalsh(found)[0] >= -floor


def test_parts_by_layer_are_the_kernels_of_each_layer():
    model, x = build("residual, pre-activation")
    found = ntk(model, x, by_layer=True)
    jacobian = dense_jacobian(model, x)
    assert list(found) == list(dict.fromkeys(name.rpartition(".")[0] for name in jacobian))
    for layer, part in found.items():
        mine = [j for name, j in jacobian.items() if name.rpartition(".")[0] == layer]
        assert_near(part, sum(j @ j.T for j in mine), 1e-10)


def test_a_shared_parameter_counts_once_with_its_summed_gradient():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4).double()
    model, x = seq(shared, nn.Tanh(), shared), torch.randn(5, 4, dtype=torch.float64)
    apart = seq(*(nn.Linear(4, 4).double() for _ in range(1)), nn.Tanh(), nn.Linear(4, 4).double())
    apart.load_state_dict(model.state_dict())
    assert_near(ntk(model, x), dense_kernel(model, x), 1e-10)
    assert (ntk(apart, x) - ntk(model, x)).abs().max() > 0.1  # what a sum over uses would give


def test_batch_norm_in_training_mode_is_not_taken_for_evaluation():
    model, x = build("batch norm, training")
    coupled = ntk(model, x)
    assert (coupled - ntk(model.eval(), x)).abs().max() > 0.1 * coupled.abs().max()


def test_samples_that_meet_outside_of_any_layer_are_seen():
    class Centred(nn.Module):
        def __init__(self, strength: float) -> None:
            super().__init__()
            self.a, self.b, self.strength = nn.Linear(3, 4), nn.Linear(4, 2), strength

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            return self.b(h - self.strength * h.roll(1, 0))

    x = torch.randn(5, 3, dtype=torch.float64)
    for strength in (1.0, 1e-6):
        model = Centred(strength).double()
        assert_near(ntk(model, x), dense_kernel(model, x), 1e-10)


def test_a_kernel_made_from_the_batch_couples_its_samples():
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.first = nn.Linear(8, 6), nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            kernel = self.make(x.flatten(1)).reshape(-1, 1, 3)[: 2 * len(x)]
            return nn.functional.conv1d(self.first(x), kernel).mean(2)

    model, x = Hyper().double(), torch.randn(3, 1, 8, dtype=torch.float64)
    assert_near(ntk(model, x), dense_kernel(model, x), 1e-10)


def test_frozen_parameters_have_no_columns():
    model, x = build("linear")
    model[0].weight.requires_grad_(False)
    assert_near(ntk(model, x), dense_kernel(model, x), 1e-10)
    assert (ntk(model, x) - ntk(build("linear")[0], x)).abs().max() > 1e-3


def test_a_custom_function_is_asked_for_its_own_gradient():
    torch.manual_seed(0)
    model, plain = Custom().double(), Custom(plain=True).double()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 4, dtype=torch.float64)
    assert_near(ntk(model, x), dense_kernel(plain, x), 1e-10)


@pytest.mark.filterwarnings('ignore')
def test_checkpointing_is_seen_through_or_refused():
    class Checked(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.first, self.last, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 2), reentrant

        def forward(self, x: Tensor) -> Tensor:
            run = torch.utils.checkpoint.checkpoint
            return self.last(run(lambda h: torch.tanh(self.first(h)), x, use_reentrant=self.reentrant))

    x, model = torch.randn(3, 3, dtype=torch.float64), Checked(False).double()
    plain = seq(model.first, nn.Tanh(), model.last)
    assert_near(ntk(model, x), dense_kernel(plain, x), 1e-10)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        ntk(Checked(True).double(), x)


@pytest.mark.parametrize("geometry", [(3, 1, 1, 1), (3, 2, 1, 1), (2, 3, 2, 2), (3, 2, 3, 2), (5, 1, 4, 1), (1, 2, 0, 1)])
def test_every_formula_agrees_on_a_convolution_of_any_geometry(monkeypatch, geometry):
    """taps, stride, padding, dilation; another number of taps on the second axis, and of samples than fills a tile."""
    taps, stride, padding, dilation = geometry
    conv = nn.Conv2d(3, 4, (taps, 2), stride, padding, dilation)
    model = seq(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    x = torch.randn(5, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = dense_kernel(model, x)
    for way in contract.WAYS:
        monkeypatch.setattr(contract, "cheapest", lambda *a, way=way: way)
        assert_near(ntk(model, x), expected, 1e-12)


@pytest.mark.parametrize("rows", [1, 7, 16, 23, 40, 130, 520])
def test_inner_products_of_rows_are_those_of_float64(rows):
    """Also where they run as a convolution."""
    x = torch.randn(rows, 700, generator=torch.Generator().manual_seed(rows))
    exact = x.double() @ x.double().T
    assert_near(inner.inner_products(x, x), exact, 1e-6)
    assert_near(inner.inner_products(x[:, ::2], x[:, ::2]), x.double()[:, ::2] @ x.double()[:, ::2].T, 1e-6)


def test_three_formulas_give_one_gram_matrix():
    torch.manual_seed(0)
    a, b = torch.randn(9, 1, 7, 5).double(), torch.randn(9, 1, 3, 4, 5).double()
    factors = Factors(lambda s: a[s], lambda s, o=slice(None): b[s, :, :, o], 1, 7, 4, 5, 3, lambda r: r)
    rows = torch.einsum("ngdt,ngkot->nkod", a, b).flatten(2)
    for trace, expected in ((False, torch.einsum("ikp,jlp->ikjl", rows, rows)), (True, None)):
        expected = torch.einsum("ikp,jkp->ij", rows, rows) if trace else expected
        for block in (Block(slice(0, 9), slice(0, 9)), Block(slice(0, 4), slice(4, 9)), Block(slice(2, 5), slice(2, 9))):
            for way in contract.WAYS:
                for workspace in (2**10, 2**14, 2**24):
                    sums = Sums(block, 1 if trace else 3, False, a.device)
                    contract.contract(factors, block, sums.adder(""), trace, workspace, way)
                    wanted = expected[block.left][..., block.right] if trace else expected[block.left][:, :, block.right]
                    assert_near(sums.result(""), wanted.reshape(sums.result("").shape), 1e-12)


def test_a_kernel_agrees_with_arithmetic_of_fifty_digits():
    torch.manual_seed(1)
    model, x = seq(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double(), torch.randn(3, 2, dtype=torch.float64)
    found = ntk(model, x)
    mpmath.mp.dps = 50
    w, c, v, _ = (p.detach().tolist() for p in model.parameters())

    def row(sample: list[float], output: int) -> list:
        h = [mpmath.tanh(sum(mpmath.mpf(w[i][j]) * sample[j] for j in range(2)) + c[i]) for i in range(3)]
        back = [mpmath.mpf(v[output][i]) * (1 - h[i] ** 2) for i in range(3)]
        first = [back[i] * sample[j] for i in range(3) for j in range(2)] + back
        second = [h[i] if o == output else mpmath.mpf(0) for o in range(2) for i in range(3)]
        return first + second + [mpmath.mpf(int(o == output)) for o in range(2)]

    rows = [row(sample, output) for sample in x.tolist() for output in range(2)]
    for i in range(6):
        for j in range(6):
            exact = mpmath.fsum(p * q for p, q in zip(rows[i], rows[j]))
            assert abs(mpmath.mpf(float(found[i, j])) - exact) <= 1e-13


# inputs, budget, blocks

TIGHT = 300_000  # bytes


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return seq(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(144, 3)).double()


@pytest.fixture
def tight(monkeypatch):
    monkeypatch.setattr(schedule, "WORKSPACE", (2**16, 2**20))


def test_any_budget_and_form_of_inputs_give_the_same_kernel(tight):
    model, x = small_network(), torch.randn(13, 1, 8, 8, dtype=torch.float64)
    whole = ntk(model, x)
    data = TensorDataset(x, torch.zeros(13))
    inputs = (x, data, DataLoader(data, batch_size=5), [x[:10], (x[10:], "target")])
    for given in inputs:
        for outputs in ("all", "sum", "trace"):
            found = ntk(model, given, outputs=outputs, budget=TIGHT)
            assert_near(found, reduced(whole, 13, outputs), 1e-12)
    assert len({block.run for block in ntk_blocks(model, data, budget=TIGHT)}) > 3  # the budget was too small for all
    parts = ntk(model, x, by_layer=True, budget=2**20)
    assert_near(sum(parts.values()), whole, 1e-12)


def test_a_data_set_is_read_a_few_samples_at_a_time(tight):
    class Counting(torch.utils.data.Dataset):
        alive = most = 0

        def __len__(self) -> int:
            return 40

        def __getitem__(self, i: int) -> Tensor:
            Counting.reads.append(i)
            return torch.full((1, 8, 8), float(i), dtype=torch.float64)

    Counting.reads = []
    batches = []
    model = small_network()
    model.register_forward_pre_hook(lambda m, inputs: batches.append(len(inputs[0])))
    ntk(model, Counting(), outputs="trace", budget=TIGHT)
    assert max(batches) < 20 and set(Counting.reads) == set(range(40))


def test_blocks_go_on_where_they_stopped_and_make_up_the_kernel(tight, tmp_path):
    model, x = small_network(), torch.randn(15, 1, 8, 8, dtype=torch.float64)
    whole, found = ntk(model, x), torch.full((45, 45), torch.nan, dtype=torch.float64)
    blocks = list(ntk_blocks(model, x, budget=TIGHT))
    again = list(ntk_blocks(model, x, budget=TIGHT, start=2))
    assert [b.run for b in again] == [b.run for b in blocks if b.run >= 2]
    for block in [b for b in blocks if b.run < 2] + again:
        found[block.rows, block.columns] = block.values[""]
        found[block.columns, block.rows] = block.values[""].T
    assert_near(found, whole, 1e-12)
    mapped = torch.from_file(str(tmp_path / "kernel"), shared=True, size=45 * 45, dtype=torch.float64).reshape(45, 45)
    assert ntk(model, x, out=mapped) is mapped
    assert (tmp_path / "kernel").stat().st_size == 8 * 45 * 45
    assert_near(mapped, whole, 1e-15)


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    schedule.WORKSPACE = (2**16, 2**20)
    model, x = small_network(), torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    coupled = seq(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).double()
    torch.manual_seed(5)
    coupled = seq(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).double()
    found = {"whole": ntk(model, x), "parts": ntk(model, x, budget=TIGHT), "layers": ntk(model, x, by_layer=True)}
    found |= {"one": ntk(model, x[:1]), "coupled": ntk(coupled, x.flatten(1)[:, :3])}
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_gloo_ranks_have_the_kernel_of_one_process(tmp_path):
    mp.spawn(work, args=(free_port(), str(tmp_path)), nprocs=2)
    model, x = small_network(), torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    torch.manual_seed(5)
    coupled = seq(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).double()
    alone, met = ntk(model, x), ntk(coupled, x.flatten(1)[:, :3])
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for key in ("whole", "parts"):
            assert_near(found[key], alone, 1e-12)
        assert_near(sum(found["layers"].values()), alone, 1e-12)
        assert_near(found["one"], alone[:3, :3], 1e-12)
        assert_near(found["coupled"], met, 1e-12)


# errors


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Mean(nn.Linear):
    def forward(self, x):
        return super().forward(x).mean()


def broken_weight() -> nn.Module:
    model = nn.Linear(4, 2)
    model.weight.data[0, 0] = torch.nan
    return model


X = torch.ones(2, 4)
BAD = {
    "nan weight": (broken_weight, X, ValueError, "weight has entries that are NaN"),
    "nan input": (lambda: nn.Linear(4, 2), X * torch.nan, ValueError, "samples 0 to 1"),
    "meta": (lambda: nn.Linear(4, 2, device="meta"), X, ValueError, "weight has no values"),
    "lazy": (lambda: nn.LazyLinear(2), X, ValueError, "weight has no values"),
    "half": (lambda: nn.Linear(4, 2).half(), X.half(), TypeError, "float32 or all float64"),
    "no samples": (lambda: nn.Linear(4, 2), X[:0], ValueError, "no samples"),
    "generator": (lambda: nn.Linear(4, 2), (x for x in [X]), TypeError, "read only once"),
    "shuffled": (lambda: nn.Linear(4, 2), DataLoader(TensorDataset(X), shuffle=True), TypeError, "shuffle=False"),
    "frozen": (lambda: nn.Linear(4, 2).requires_grad_(False), X, ValueError, "no parameter requires"),
    "dropout": (lambda: seq(nn.Linear(4, 2), nn.Dropout()), X, ValueError, "1 is a Dropout in training mode"),
    "two outputs": (lambda: Pair(4, 2), X, TypeError, "one tensor of floats, got tuple"),
    "no first axis": (lambda: Mean(4, 2), X, ValueError, "first axis must count the samples"),
    "no module": (lambda: torch.sin, X, TypeError, "must be a torch.nn.Module"),
    "overflow": (lambda: seq(nn.Linear(4, 2), nn.Linear(2, 2)), X * 1e30, ValueError, "NaN or infinite"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_kernel_is_refused_with_a_reason(name):
    make, x, error, words = BAD[name]
    with pytest.raises(error, match=words):
        ntk(make(), x)


def test_options_out_of_range_are_named():
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="outputs must be one of all, sum, trace, got 'both'"):
        ntk(model, X, outputs="both")
    with pytest.raises(ValueError, match="does not hold two samples; at least"):
        ntk(model, X, budget=1000)
    with pytest.raises(ValueError, match="out must be float64 of shape"):
        ntk(model, X, out=torch.zeros(4, 4))


def test_progress_goes_to_stderr_alone(capsys):
    ntk(nn.Linear(4, 2), X, progress=True)
    assert capsys.readouterr().out == ""


# other packages


def test_nngeometry_agrees():
    pytest.importorskip("nngeometry")
    model = filled(SmallResNet(PreActBlock, 3, 3))
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    assert_near(ntk(model, x), kernel_by_nngeometry(model, x).double(), 1e-7)  # it keeps its result in float32


def test_curvlinops_agrees():
    pytest.importorskip("curvlinops")
    model = filled(SmallResNet(PostActBlock, 3, 3)).float()
    x = torch.randn(4, 3, 8, 8)
    forward, back = kernel_products_by_curvlinops(model, x)
    kernel = ntk(model, x)
    u = torch.randn(len(kernel), generator=torch.Generator().manual_seed(0))
    product = torch.as_tensor(forward @ (back @ u.numpy())).double()
    assert_near(kernel @ u.double(), product, 1e-5)
