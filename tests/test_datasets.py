"""The data sets: what is read, how it is standardised, and what is refused without running anything."""

import builtins
import gzip
import os
import pathlib
import pickle
import struct

import numpy as np
import pytest
import torch

from trainable_nn import datasets
from trainable_nn.errors import DatasetError

FASHION = pathlib.Path("/usr/share/datasets/fashion-mnist")


def write_idx(folder, part="train", count=6, side=4, compress=False):
    opener, end = (gzip.open, ".gz") if compress else (open, "")
    pixels = np.arange(count * side * side, dtype=np.uint8)
    with opener(folder / f"{part}-images-idx3-ubyte{end}", "wb") as file:
        file.write(struct.pack(">4B3I", 0, 0, 8, 3, count, side, side) + pixels.tobytes())
    with opener(folder / f"{part}-labels-idx1-ubyte{end}", "wb") as file:
        file.write(struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(i % 10 for i in range(count)))


@pytest.fixture
def idx_folder(tmp_path):
    write_idx(tmp_path, "train", 6)
    write_idx(tmp_path, "t10k", 3, compress=True)
    return tmp_path


def write_cifar(folder, count=4, hundred=False):
    home = folder / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    home.mkdir()
    key, classes = ("fine_labels", 100) if hundred else ("labels", 10)
    names = ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for seed, name in enumerate(names):
        data = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
        (home / name).write_bytes(pickle.dumps({"data": data, key: [i % classes for i in range(count)]}, 2))
    meta = {"fine_label_names" if hundred else "label_names": [f"class {i}" for i in range(classes)]}
    (home / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps(meta, 2))
    return home


def test_digits_are_standardised_by_the_training_images_and_split_without_overlap():
    data = datasets.digits()
    assert data.train_images.shape == (1438, 1, 8, 8) and data.test_images.shape == (359, 1, 8, 8)
    assert data.train_images.dtype == torch.float32 and data.train_labels.dtype == torch.int64
    assert abs(data.train_images.mean()) < 1e-5 and abs(data.train_images.std() - 1) < 1e-4
    assert abs(data.test_images.mean()) > 1e-6  # not standardised by itself
    pixels = data.train_images * data.std + data.mean
    assert 0 <= pixels.min() + 1e-6 and pixels.max() <= 1 + 1e-6
    counts = torch.bincount(torch.cat([data.train_labels, data.test_labels]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert repr(data) == "ImageData(digits: 1438 train, 359 test, 1x8x8, 10 classes)"


def test_the_seed_decides_the_split():
    first, again, other = datasets.digits(seed=3), datasets.digits(seed=3), datasets.digits(seed=4)
    assert torch.equal(first.train_images, again.train_images) and torch.equal(first.test_labels, again.test_labels)
    assert not torch.equal(first.test_labels, other.test_labels)


def test_digits_can_be_enlarged():
    assert datasets.digits(size=16).test_images.shape == (359, 1, 16, 16)


def test_a_missing_scikit_learn_is_named_with_its_command(monkeypatch):
    real = builtins.__import__

    def without_sklearn(name, *rest, **more):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(DatasetError, match=r"pip install 'trainable_nn\[demo\]'"):
        datasets.digits()


@pytest.mark.parametrize("options", [{"size": 4}, {"test_fraction": 0.0}, {"test_fraction": 1.0}])
def test_digits_refuse_options_out_of_range(options):
    with pytest.raises(DatasetError, match=f"{next(iter(options))} must"):
        datasets.digits(**options)


def test_idx_reads_plain_and_gzipped_files(idx_folder):
    data = datasets.idx(idx_folder)
    assert data.train_images.shape == (6, 1, 4, 4) and data.test_images.shape == (3, 1, 4, 4)
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4, 5]
    pixels = (data.train_images * data.std + data.mean) * 255
    assert torch.allclose(pixels.flatten(), torch.arange(96.0), atol=1e-3)


def test_idx_finds_the_folder_that_torchvision_makes(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    write_idx(raw, "train"), write_idx(raw, "t10k")
    assert len(datasets.idx(tmp_path).train_images) == 6


@pytest.mark.skipif(not FASHION.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist_loads():
    data = datasets.idx(FASHION)
    assert data.train_images.shape == (60000, 1, 28, 28) and data.test_images.shape == (10000, 1, 28, 28)
    assert data.classes[9] == "Ankle boot" and torch.bincount(data.train_labels).tolist() == [6000] * 10
    assert abs(float(data.mean) - 0.2860) < 1e-4 and abs(float(data.std) - 0.3530) < 1e-4


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


IDX_DAMAGE = {
    "cut": (lambda b: b[:-5], "holds .* where its header promises"),
    "longer": (lambda b: b + b"x", "holds more"),
    "empty": (lambda b: b"", "starts with nothing"),
    "text": (lambda b: b"hello world, hello", "starts with 68656c6c"),
    "other type": (lambda b: b"\0\0\x0d\x03" + b[4:], "starts with 00000d03"),
    "huge": (lambda b: b[:4] + b"\xff" * 12 + b[16:], "cannot be read|promises"),
}


@pytest.mark.parametrize("change, words", IDX_DAMAGE.values(), ids=IDX_DAMAGE)
def test_a_damaged_idx_file_is_refused_by_name(idx_folder, change, words):
    damage(idx_folder / "train-images-idx3-ubyte", change)
    with pytest.raises(DatasetError, match=words) as caught:
        datasets.idx(idx_folder)
    assert "train-images-idx3-ubyte" in str(caught.value)


@pytest.mark.parametrize("change", [lambda b: b[:-9], lambda b: b"no gzip", lambda b: b[:30] + b"\0\0\0" + b[33:]])
def test_a_damaged_gzip_is_refused(idx_folder, change):
    damage(idx_folder / "t10k-images-idx3-ubyte.gz", change)
    with pytest.raises(DatasetError, match="t10k-images"):
        datasets.idx(idx_folder)


def test_images_without_their_labels_are_refused(idx_folder):
    write_idx(idx_folder / "..", "train", 5)
    os.replace(idx_folder / ".." / "train-labels-idx1-ubyte", idx_folder / "train-labels-idx1-ubyte")
    with pytest.raises(DatasetError, match="6 images and 5 labels"):
        datasets.idx(idx_folder)
    (idx_folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DatasetError, match="train-labels-idx1-ubyte is missing"):
        datasets.idx(idx_folder)


@pytest.mark.parametrize("load", [datasets.idx, datasets.cifar10, datasets.cifar100])
def test_a_missing_folder_is_refused(tmp_path, load):
    with pytest.raises(DatasetError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="missing|holds neither"):
        load(tmp_path)


def test_cifar10_reads_what_torchvision_unpacks(tmp_path):
    home = write_cifar(tmp_path)
    for folder in (tmp_path, home):
        data = datasets.cifar10(folder)
        assert data.train_images.shape == (20, 3, 32, 32) and data.test_images.shape == (4, 3, 32, 32)
        assert data.classes[3] == "class 3" and data.train_labels[:4].tolist() == [0, 1, 2, 3]
    raw = pickle.loads((home / "data_batch_1").read_bytes())["data"]
    pixels = (data.train_images[0] * data.std[:, None, None] + data.mean[:, None, None]) * 255
    assert np.allclose(pixels.numpy().ravel(), raw[0], atol=1e-3)


def test_cifar100_reads_what_torchvision_unpacks(tmp_path):
    write_cifar(tmp_path, hundred=True)
    data = datasets.cifar100(tmp_path)
    assert data.train_images.shape == (4, 3, 32, 32) and len(data.classes) == 100


def python2_pickle(count=4):
    """The opcodes that Python 2 and numpy 1 wrote into the real files: 'str' bytes, no numpy._core."""
    def text(value):
        return b"U" + bytes([len(value)]) + value

    pixels = bytes(range(256)) * (count * 3072 // 256)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0t" + text(b"b") + b"tR"
        + b"(K\1(" + b"M" + struct.pack("<H", count) + b"M" + struct.pack("<H", 3072) + b"t"
        + b"cnumpy\ndtype\n(" + text(b"u1") + b"K\0K\1tR(K\3" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        + b"\x89T" + struct.pack("<I", len(pixels)) + pixels + b"tb"
    )
    labels = b"](" + b"".join(b"K" + bytes([i]) for i in range(count)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + labels + b"u."


def test_a_batch_as_python_2_wrote_it_is_read(tmp_path):
    home = write_cifar(tmp_path)
    (home / "test_batch").write_bytes(python2_pickle())
    data = datasets.cifar10(tmp_path)
    pixels = (data.test_images * data.std[:, None, None] + data.mean[:, None, None]) * 255
    assert data.test_labels.tolist() == [0, 1, 2, 3]
    assert np.allclose(pixels.numpy().ravel(), np.tile(np.arange(256), 48), atol=1e-3)


class Malicious:
    """Pickled, this is an order to call ``function``."""

    def __init__(self, function, *arguments):
        self.order = (function, arguments)

    def __reduce__(self):
        return self.order


@pytest.mark.parametrize(
    "order",
    [
        Malicious(os.mkdir, "PLACE"),
        Malicious(eval, "__import__('os').mkdir('PLACE')"),
        Malicious(np.ndarray, (1 << 50,)),
        Malicious(np.dtype, "O"),
        np.array([object()], dtype=object),
        np.float32(1.0),
        pathlib.PurePosixPath("x"),
    ],
    ids=["os.mkdir", "eval", "huge array", "object dtype", "object array", "scalar", "path"],
)
def test_a_cifar_file_never_runs_code(tmp_path, monkeypatch, order):
    monkeypatch.chdir(tmp_path)
    home = write_cifar(tmp_path)
    (home / "data_batch_2").write_bytes(pickle.dumps({"data": order, "labels": [1]}, 2))
    with pytest.raises(DatasetError, match="data_batch_2"):
        datasets.cifar10(tmp_path)
    assert not (tmp_path / "PLACE").exists()


CIFAR_DAMAGE = {
    "cut": lambda b: b[:-100],
    "empty": lambda b: b"",
    "text": lambda b: b"hello",
    "a list": lambda b: pickle.dumps([1, 2]),
    "no data": lambda b: pickle.dumps({"labels": [1]}),
    "labels too high": lambda b: b.replace(b"K\x03", b"K\x63"),
    "other shape": lambda b: pickle.dumps({"data": np.zeros((2, 5), np.uint8), "labels": [1, 2]}, 2),
    "fewer labels": lambda b: pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, 2),
}


@pytest.mark.parametrize("change", CIFAR_DAMAGE.values(), ids=CIFAR_DAMAGE)
def test_a_damaged_cifar_file_is_refused_by_name(tmp_path, change):
    damage(write_cifar(tmp_path) / "data_batch_5", change)
    with pytest.raises(DatasetError, match="data_batch_5"):
        datasets.cifar10(tmp_path)
