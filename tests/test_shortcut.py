"""Laws of the pooled shortcut, against dense matrices."""

import copy
import pickle

import pytest
import torch
from paper_oracle import pooled
from small_resnets import distance, images
from torch import Tensor, nn

from trainable_nn.modules.preactivation import PreActivationBlock
from trainable_nn.modules.shortcut import PooledConv2d, PooledSequential, pooled_identity

STRIDES = [(1, 1), (2, 2), (3, 3), (2, 1), (1, 3), (2, 3)]


def dense(function, *shape: int) -> Tensor:
    """The matrix of a linear map of images, column by column."""
    basis = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).reshape(-1, *shape)
    return function(basis).flatten(1).T


def test_the_deterministic_map_has_rank_64_of_128_as_the_paper_uses_it():
    values = torch.linalg.svdvals(dense(lambda x: pooled_identity(x, 8, (2, 2)), 4, 8, 8))
    assert len(values) == 128
    torch.testing.assert_close(values[:64], torch.ones(64, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(values[64:], torch.zeros(64, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 8, 2), (3, 8, 2), (5, 20, 3), (4, 4, 2), (3, 7, 1)])
def test_it_is_the_mean_times_s_between_centred_zeros(inputs, outputs, stride):
    x = images(2, inputs, 6, 6)
    torch.testing.assert_close(pooled_identity(x, outputs, (stride, stride)), pooled(x, outputs, stride))


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 7), (6, 6)])
def test_odd_sizes_fit_a_strided_projection_and_the_norm_stays_below_1(stride, size):
    conv = PooledConv2d(2, 3, 1, stride, bias=False, dtype=torch.float64)
    assert conv(images(2, 2, *size)).shape == nn.Conv2d(2, 3, 1, stride)(torch.zeros(2, 2, *size)).shape
    values = torch.linalg.svdvals(dense(lambda x: pooled_identity(x, 3, stride), 2, *size))
    assert values.max() <= 1 + 1e-12


@pytest.mark.parametrize("stride", STRIDES)
def test_all_nonzero_singular_values_are_1_where_the_stride_divides_the_size(stride):
    values = torch.linalg.svdvals(dense(lambda x: pooled_identity(x, 3, stride), 2, 6, 6))
    assert torch.all((values < 1e-12) | ((values - 1).abs() < 1e-12))


def test_an_uncentred_padding_would_be_noticed():
    x = images(2, 3, 4, 4)
    uncentred = torch.cat([pooled(x, 3, 2), x.new_zeros(2, 5, 2, 2)], dim=1)
    assert distance(pooled_identity(x, 8, (2, 2)), uncentred) > 0.5


def test_the_pooled_convolution_adds_the_map_to_a_convolution_with_the_same_key():
    conv = PooledConv2d(4, 9, 3, 2, 1, dtype=torch.float64)
    plain = nn.Conv2d(4, 9, 3, 2, 1, dtype=torch.float64)
    plain.load_state_dict(conv.state_dict())
    x = images(2, 4, 8, 8)
    torch.testing.assert_close(conv(x), plain(x) + pooled(x, 9, 2))


def test_it_takes_an_image_without_a_batch_and_an_empty_batch():
    conv = PooledConv2d(2, 4, 1, 2)
    x = images(2, 6, 6, dtype=torch.float32)
    torch.testing.assert_close(conv(x), conv(x[None])[0])
    assert conv(torch.zeros(0, 2, 6, 6)).shape == (0, 4, 3, 3)


def test_the_pooled_path_goes_around_a_norm_in_the_shortcut():
    layers = nn.Conv2d(2, 4, 1, 2), nn.BatchNorm2d(4)
    shortcut = PooledSequential(*layers, in_channels=2, out_channels=4, stride=2).eval().double()
    x = images(3, 2, 6, 6)
    torch.testing.assert_close(shortcut(x), layers[1](layers[0](x)) + pooled(x, 4, 2))
    assert set(shortcut.state_dict()) == set(nn.Sequential(*layers).state_dict())


@pytest.mark.parametrize(
    "make", [PooledConv2d, lambda c, d, k: PooledSequential(in_channels=c, out_channels=d, stride=k)]
)
def test_fewer_channels_out_than_in_are_refused(make):
    with pytest.raises(ValueError, match=r"never drops them, got 4 channels in and 3 out"):
        make(4, 3, 1)


def test_a_projection_on_another_grid_is_refused():
    with pytest.raises(ValueError, match="another image size than the pooled path"):
        PooledConv2d(2, 4, 3, 2, padding=0)


def test_layout_copies_pickles_and_a_compiled_graph_agree():
    conv = PooledConv2d(4, 8, 1, 2).to(memory_format=torch.channels_last)
    x = images(2, 4, 8, 8, dtype=torch.float32).to(memory_format=torch.channels_last)
    y = conv(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(twin(x), y)
    torch.testing.assert_close(torch.compile(conv, fullgraph=True, backend="aot_eager")(x), y)
    torch.testing.assert_close(torch.func.vmap(conv)(x[:, None])[:, 0], y)


def block() -> PreActivationBlock:
    layers = {
        "norm": nn.BatchNorm2d(2),
        "act": nn.ReLU(),
        "conv1": nn.Conv2d(2, 4, 3, 2, 1),
        "deep": nn.Sequential(nn.Conv2d(4, 4, 1)),
        "skip": nn.Conv2d(2, 4, 1, 2),
    }
    return PreActivationBlock(layers, before=("norm", "act"), branch=("conv1", "act", "deep.0"), shortcut=("skip",))


def test_a_preactivation_block_is_the_formula_it_states():
    made = block().eval().double()
    x = images(2, 2, 6, 6)
    u = torch.relu(made.norm(x))
    expected = made.deep[0](torch.relu(made.conv1(u))) + made.skip(u)
    torch.testing.assert_close(made(x), expected)
    made.shortcut_reads_input = True
    torch.testing.assert_close(made(x), expected - made.skip(u) + made.skip(x))


def test_a_preactivation_block_compiles_whole_and_survives_pickle():
    made = block().eval()
    x = images(2, 2, 6, 6, dtype=torch.float32)
    assert torch.equal(pickle.loads(pickle.dumps(made))(x), made(x))
    torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x))


def test_a_preactivation_block_names_a_layer_that_does_not_exist():
    with pytest.raises(ValueError, match="no layer is named 'conv2'"):
        PreActivationBlock({"conv1": nn.Conv2d(1, 1, 1)}, branch=("conv1", "conv2"))
    with pytest.raises(ValueError, match="the branch names no layer"):
        PreActivationBlock({}, branch=())
