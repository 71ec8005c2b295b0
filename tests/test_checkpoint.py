"""Checkpoints: what comes back, what is refused, and that nothing in a file ever runs."""

import json
import os
import pathlib
import pickle
import stat
import struct

import pytest
import safetensors.torch
import torch
from torch import nn

import trainable_nn as tnn
from trainable_nn import checkpoint
from trainable_nn.convert import Recipe
from trainable_nn.demo.resnet import PreActResNet18
from trainable_nn.errors import CheckpointError


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def resnet(seed=0):
    torch.manual_seed(seed)
    return PreActResNet18(width=2, in_channels=1)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_state(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name


@pytest.fixture
def saved(tmp_path):
    """A file of a small net, with the net."""
    model = small_net()
    tnn.save(model, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors", model


# What comes back


def test_every_tensor_comes_back_bit_for_bit(saved):
    path, model = saved
    other = small_net(seed=1)
    assert tnn.load(path, other) is other
    assert_state(other, snapshot(model))


def test_without_a_model_tensors_and_metadata_come_back(saved):
    path, model = saved
    found = tnn.load(path)
    assert found.tensors.keys() == model.state_dict().keys()
    assert found.metadata["package"] == tnn.__version__ and found.metadata["format"] == 1
    assert found.metadata["model"] == "torch.nn.modules.container:Sequential"
    assert found.conversion is None and found.origin is None and len(found.hash) == 64


def test_the_origin_is_kept_as_a_note(tmp_path):
    tnn.save(small_net(), tmp_path / "a", origin={"factory": "nets:small", "arguments": ["n=3"]})
    assert tnn.load(tmp_path / "a").origin == {"factory": "nets:small", "arguments": ["n=3"]}
    with pytest.raises(CheckpointError, match="origin must hold JSON values"):
        tnn.save(small_net(), tmp_path / "a", origin={"factory": small_net})


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_survives(tmp_path, dtype):
    def holder(values):
        model = nn.Module()
        model.register_buffer("values", values)
        return model

    values = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    tnn.save(holder(values), tmp_path / "a")
    assert_state(tnn.load(tmp_path / "a", holder(torch.zeros_like(values))), {"values": values})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_of_another_dtype_with_integer_buffers_survives(tmp_path, dtype):
    model = small_net().to(dtype)
    model[1].num_batches_tracked += 7
    tnn.save(model, tmp_path / "a")
    assert_state(tnn.load(tmp_path / "a", small_net(1).to(dtype)), snapshot(model))


def test_scalars_empty_strided_and_channels_last_tensors_survive(tmp_path):
    def holder(fill):
        model = nn.Module()
        model.register_buffer("scalar", torch.tensor(float(fill)))
        model.register_buffer("empty", torch.zeros(0, 3))
        model.register_buffer("strided", torch.full((6, 4), fill)[::2, ::2] + torch.arange(2.0))
        model.weight = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        return model

    model, other = holder(1.0), holder(2.0)
    tnn.save(model, tmp_path / "a")
    assert_state(tnn.load(tmp_path / "a", other), snapshot(model))
    assert other.weight.is_contiguous(memory_format=torch.channels_last)


def tied():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    return model


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    model = tied()
    tnn.save(model, tmp_path / "a")
    assert len(safetensors.torch.load_file(tmp_path / "a")) == 1
    other = tnn.load(tmp_path / "a", tied())
    assert other[0].weight is other[1].weight
    assert_state(other, snapshot(model))


def test_a_file_whose_ties_differ_from_the_models_is_refused(tmp_path):
    untied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    tnn.save(untied, tmp_path / "a")
    with pytest.raises(CheckpointError, match="differ in the file, and are one tensor in the model"):
        tnn.load(tmp_path / "a", tied())


def test_views_that_overlap_are_saved_apart(tmp_path):
    def holder(base):
        model = nn.Module()
        model.register_buffer("whole", base)
        model.register_buffer("part", base[2:])
        return model

    model = holder(torch.arange(6.0))
    tnn.save(model, tmp_path / "a")
    assert_state(tnn.load(tmp_path / "a", holder(torch.zeros(6))), snapshot(model))


def test_any_reader_of_safetensors_opens_the_file(saved):
    path, model = saved
    assert safetensors.torch.load_file(path).keys() == model.state_dict().keys()


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name in "ab":
        tnn.save(small_net(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# Converted models


def test_a_converted_model_comes_back_into_the_plain_and_into_the_converted_one(tmp_path):
    model = tnn.convert_model(resnet(), "paper").eval()
    tnn.save(model, tmp_path / "a")
    plain, before = resnet(1), snapshot(resnet(1))
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for given in (plain, tnn.convert_model(resnet(1), "paper")):
        loaded = tnn.load(tmp_path / "a", given).eval()
        assert loaded.conversion_report.recipe == Recipe("paper")
        assert torch.equal(loaded(x), model(x))
    assert_state(plain, before)  # converted into a copy
    assert not hasattr(plain, "conversion_report")
    assert tnn.load(tmp_path / "a").conversion["recipe"] == Recipe("paper").to_dict()


def test_another_conversion_with_the_same_keys_is_refused(tmp_path):
    tnn.save(tnn.convert_model(resnet(), "paper"), tmp_path / "a")
    other = tnn.convert_model(resnet(), "paper", keep=("layer2.0",))
    with pytest.raises(CheckpointError, match="layer2.0.* in the file, and .* in the given model"):
        tnn.load(tmp_path / "a", other)
    other = tnn.convert_model(resnet(), Recipe("paper", skip="conv"))
    with pytest.raises(CheckpointError, match="was converted by"):
        tnn.load(tmp_path / "a", other)


def test_a_plain_file_is_not_loaded_into_a_converted_model(tmp_path):
    tnn.save(resnet(), tmp_path / "a")
    with pytest.raises(CheckpointError, match="holds a plain model.*then convert"):
        tnn.load(tmp_path / "a", tnn.convert_model(resnet(), "paper"))


def test_kept_paths_are_recorded(tmp_path):
    model = tnn.convert_model(resnet(), "paper", keep=("layer2.0",))
    tnn.save(model, tmp_path / "a")
    loaded = tnn.load(tmp_path / "a", resnet(1))
    assert loaded.conversion_report.keep == ("layer2.0",)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]


def test_constants_that_are_no_tensors_must_agree(tmp_path):
    tnn.save(nn.Sequential(tnn.EntryNormLinear(3, 4, eps=2.0)), tmp_path / "a")
    with pytest.raises(CheckpointError, match="'eps': 2.0.* in the file, and .*'eps': 1.0.* in the model"):
        tnn.load(tmp_path / "a", nn.Sequential(tnn.EntryNormLinear(3, 4)))
    with pytest.raises(CheckpointError, match="no layer of trainable_nn in the model"):
        tnn.load(tmp_path / "a", nn.Sequential(nn.Linear(3, 4)))
    tnn.load(tmp_path / "a", nn.Sequential(tnn.EntryNormLinear(3, 4, eps=2.0)))


# What does not fit


MISFITS = {
    "missing key": (lambda: nn.Sequential(*small_net(), nn.PReLU()), r"1 missing \(4.weight\)"),
    "unexpected key": (lambda: small_net()[:3], r"2 unexpected \(3.bias, 3.weight\)"),
    "shape": (lambda: nn.Sequential(*small_net()[:3], nn.Linear(16, 4)), r"float32 \(3,?.*where the model has"),
    "dtype": (lambda: small_net().double(), r"0.weight is float32 .*where the model has float64.*model.to\(torch.float32\)"),
    "wrapped": (lambda: nn.ModuleDict({"module": small_net()}), "give model.module"),
}


@pytest.mark.parametrize("build, words", MISFITS.values(), ids=MISFITS)
def test_a_model_that_does_not_fit_is_refused_and_untouched(saved, build, words):
    path, _ = saved
    model = build()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=words) as caught:
        tnn.load(path, model)
    assert str(path) in str(caught.value) and str(caught.value).endswith(".")
    assert_state(model, before)


def test_a_model_without_memory_is_refused(saved):
    with torch.device("meta"):
        model = small_net()
    with pytest.raises(CheckpointError, match="0.weight is a tensor without values"):
        tnn.load(saved[0], model)


def test_a_loading_hook_that_raises_leaves_the_model_untouched(saved):
    path, _ = saved
    model = small_net(1)
    before = snapshot(model)

    def refuse(module, incompatible):
        raise RuntimeError("no")

    model.register_load_state_dict_post_hook(refuse)
    with pytest.raises(CheckpointError, match="the model refuses the tensors: no"):
        tnn.load(path, model)
    assert_state(model, before)


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"anything": 1}

    def set_extra_state(self, state):
        pass


UNSAVABLE = {
    "extra state": (lambda: WithExtraState(2, 2), "_extra_state is a dict"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "without values"),
    "lazy": (lambda: nn.LazyLinear(2), "without values"),
}


@pytest.mark.parametrize("build, words", UNSAVABLE.values(), ids=UNSAVABLE)
def test_a_state_that_is_not_all_tensors_is_not_saved(tmp_path, build, words):
    with pytest.raises(CheckpointError, match=words):
        tnn.save(build(), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_sparse_buffer_is_not_saved(tmp_path):
    model = nn.Module()
    model.register_buffer("mask", torch.eye(3).to_sparse())
    with pytest.raises(CheckpointError, match="mask is a tensor of layout torch.sparse_coo"):
        tnn.save(model, tmp_path / "a")


# Damaged, edited and foreign files


def header_of(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header, body):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def edit_metadata(data, **changes):
    """Change the entry and leave the hash as it was."""
    header, body = header_of(data)
    entry = json.loads(header["__metadata__"]["trainable_nn"]) | changes
    header["__metadata__"]["trainable_nn"] = json.dumps(entry)
    return with_header(header, body)


def edit_header(data, change):
    header, body = header_of(data)
    change(header)
    return with_header(header, body)


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def swap_names(header):
    header["0.bias"], header["1.bias"] = header["1.bias"], header["0.bias"]


def rename(header):
    header["0.other"] = header.pop("0.bias")


def reinterpret(header):
    header["0.bias"]["dtype"] = "I32"


def foreign(header):
    del header["__metadata__"]


DAMAGE = {
    "empty": (lambda d: b"", "is empty"),
    "text": (lambda d: b"not a checkpoint at all", "is no safetensors file"),
    "cut in the header": (lambda d: d[:100], "is damaged"),
    "cut in the tensors": (lambda d: d[:-1], "is damaged"),
    "longer": (lambda d: d + b"\0", "is damaged"),
    "header length": (lambda d: b"\xff" * 7 + d[7:], "is damaged"),
    "last byte": (lambda d: flip(d, len(d) - 1), "do not fit its hash"),
    "first tensor byte": (lambda d: flip(d, 8 + struct.unpack("<Q", d[:8])[0]), "do not fit its hash"),
    "swapped names": (lambda d: edit_header(d, swap_names), "do not fit its hash"),
    "renamed": (lambda d: edit_header(d, rename), "do not fit its hash"),
    "reinterpreted": (lambda d: edit_header(d, reinterpret), "do not fit its hash"),
    "edited metadata": (lambda d: edit_metadata(d, model="other:Net"), "do not fit its hash"),
    "added metadata": (lambda d: edit_metadata(d, more=1), "do not fit its hash"),
    "other format": (lambda d: edit_metadata(d, format=2), "has format 2, and this release reads format 1"),
    "wrong field": (lambda d: edit_metadata(d, aliases=[]), "is not what trainable_nn.save writes"),
    "foreign": (lambda d: edit_header(d, foreign), "no entry 'trainable_nn'"),
}


@pytest.mark.parametrize("change, words", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_or_edited_file_is_refused_and_the_model_untouched(saved, change, words):
    path, _ = saved
    path.write_bytes(change(path.read_bytes()))
    model = small_net(1)
    before = snapshot(model)
    for given in ((), (model,)):
        with pytest.raises(CheckpointError, match=words) as caught:
            tnn.load(path, *given)
        assert str(path) in str(caught.value) and str(caught.value).endswith(".")
    assert_state(model, before)


def test_every_single_flipped_bit_is_found(tmp_path):
    path = tmp_path / "a"
    tnn.save(nn.Linear(2, 1), path)
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(flip(data, at))
        with pytest.raises(CheckpointError):
            tnn.load(path)


def test_a_recipe_that_does_not_exist_is_refused_even_with_a_right_hash(tmp_path):
    path = tmp_path / "a"
    tnn.save(tnn.convert_model(resnet(), "paper"), path)
    header, body = header_of(path.read_bytes())
    entry = json.loads(header["__metadata__"]["trainable_nn"])
    entry["conversion"]["recipe"]["name"] = "soup"
    tensors = safetensors.torch.load_file(path)
    entry["hash"] = checkpoint.file.content_hash(tensors, entry)
    header["__metadata__"]["trainable_nn"] = json.dumps(entry)
    path.write_bytes(with_header(header, body))
    with pytest.raises(CheckpointError, match="soup"):
        tnn.load(path, resnet())


class Malicious:
    """Unpickled, this makes a folder."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_pickle_is_refused_and_never_run(tmp_path):
    mark = tmp_path / "was run"
    for name, write in (("pickle", lambda p: p.write_bytes(pickle.dumps(Malicious(mark)))),
                        ("zip", lambda p: torch.save({"weight": Malicious(mark)}, p)),
                        ("old", lambda p: torch.save(Malicious(mark), p, _use_new_zipfile_serialization=False))):  # fmt: skip
        write(tmp_path / name)
        for given in ((), (small_net(),)):
            with pytest.raises(CheckpointError, match="is a pickle or a file of torch.save.*was not opened"):
                tnn.load(tmp_path / name, *given)
    assert not mark.exists()
    pickle.loads((tmp_path / "pickle").read_bytes())
    assert mark.exists()  # the order in the file was a real one


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        tnn.load(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        tnn.load(tmp_path / "nothing")


# Writing


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    path, _ = saved
    before = path.read_bytes()

    def full(*_, **__):
        pathlib.Path(_[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match="cannot be written.*No space left"):
        tnn.save(small_net(2), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_the_file_has_the_rights_of_any_new_file(saved):
    plain = saved[0].with_name("plain")
    plain.touch()
    assert stat.S_IMODE(saved[0].stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_link_is_followed_when_saving(saved):
    path, _ = saved
    link = path.with_name("link")
    link.symlink_to(path)
    tnn.save(small_net(3), link)
    assert link.is_symlink()
    assert_state(tnn.load(path, small_net()), snapshot(small_net(3)))


@pytest.mark.parametrize("place", [".", "nowhere/net.safetensors"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, place):
    with pytest.raises(CheckpointError, match="a file is written here"):
        tnn.save(small_net(), tmp_path / place)
