"""Real images as tensors: the embedded digits, and IDX and CIFAR files from a folder.

Nothing is downloaded, and no file can run code.
"""

from __future__ import annotations

import codecs
import gzip
import math
import pathlib
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .errors import DatasetError

IDX_UBYTE = 0x08  # the type byte of an IDX file of unsigned bytes
IDX_LAYOUTS = ("", "raw", "MNIST/raw", "FashionMNIST/raw")
CIFAR_PIXELS = 3 * 32 * 32
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class ImageData:
    """Images (N, C, H, W) in float32, with labels (N,) in int64, split in train and test.

    Each channel has mean 0 and standard deviation 1 over the training images;
    ``mean`` and ``std`` undo that: pixel = image * std + mean, on a scale of 0 to 1.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.train_images.shape[1:]))
        counts = f"{len(self.train_images)} train, {len(self.test_images)} test"
        return f"ImageData({self.name}: {counts}, {shape}, {len(self.classes)} classes)"


def digits(*, size: int = 8, test_fraction: float = 0.2, seed: int = 0) -> ImageData:
    """The 1797 handwritten digits of scikit-learn, 8 x 8 pixels, enlarged to ``size`` by bilinear interpolation.

    Raises:
        DatasetError: scikit-learn is missing, or an option is out of range.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError(
            "datasets.digits: scikit-learn is not installed, and it holds these images. "
            "Install it with: pip install 'trainable_nn[demo]'."
        ) from error
    if size < 8:
        raise DatasetError(f"datasets.digits: size must be at least 8, got {size}. Leave it out for 8.")
    if not 0.0 < test_fraction < 1.0:
        raise DatasetError(
            f"datasets.digits: test_fraction must lie between 0 and 1, got {test_fraction}. Leave it out for 0.2."
        )
    raw = load_digits()
    images = torch.from_numpy(raw.images).to(torch.float32)[:, None] / 16.0  # 17 grey levels
    labels = torch.from_numpy(raw.target).to(torch.int64)
    if size > 8:
        images = interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order.tensor_split([max(1, round(test_fraction * len(labels)))])
    return _standardised("digits", (images[train], labels[train]), (images[test], labels[test]), DIGITS)


def idx(folder: str | pathlib.Path, *, classes: tuple[str, ...] | None = None) -> ImageData:
    """MNIST, Fashion-MNIST and their kin from IDX files, plain or gzipped.

    The folder holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two
    ``t10k-`` files, themselves or under ``raw``, ``MNIST/raw`` or ``FashionMNIST/raw`` as
    torchvision leaves them. On Debian the package dataset-fashion-mnist puts Fashion-MNIST
    in /usr/share/datasets/fashion-mnist.

    Raises:
        DatasetError: a file is missing, cut short, of another format, or does not fit its partner.
    """
    home = _existing_folder(folder)
    splits = []
    for part in ("train", "t10k"):
        images = _read_idx(_find_idx(home, f"{part}-images", 3), 3)
        labels = _read_idx(_find_idx(home, f"{part}-labels", 1), 1)
        if len(images) != len(labels) or not len(images):
            raise DatasetError(
                f"{home}: {part} has {len(images)} images and {len(labels)} labels, where equal numbers above 0 "
                f"are needed. Take both files from one source."
            )
        splits.append((_pixels(images[:, None]), torch.from_numpy(labels.astype(np.int64))))
    fashion = "fashion" in str(home).lower()
    names = classes or (FASHION if fashion else DIGITS)
    return _standardised("fashion-mnist" if fashion else "idx", *splits, names)


def cifar10(folder: str | pathlib.Path) -> ImageData:
    """CIFAR-10 from the folder in which torchvision keeps it (its python batches); raises DatasetError."""
    home = _cifar_home(folder, "cifar-10-batches-py", "test_batch")
    batches = [_read_cifar(home / f"data_batch_{number}", "labels", 10) for number in range(1, 6)]
    train = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    test = _read_cifar(home / "test_batch", "labels", 10)
    return _standardised("cifar10", train, test, _class_names(home / "batches.meta", "label_names", 10))


def cifar100(folder: str | pathlib.Path) -> ImageData:
    """CIFAR-100 with its 100 fine labels, from the folder in which torchvision keeps it; raises DatasetError."""
    home = _cifar_home(folder, "cifar-100-python", "train")
    train, test = (_read_cifar(home / part, "fine_labels", 100) for part in ("train", "test"))
    return _standardised("cifar100", train, test, _class_names(home / "meta", "fine_label_names", 100))


def _standardised(name: str, train: tuple, test: tuple, classes: tuple[str, ...]) -> ImageData:
    """Standardise each channel by the training images alone, so that nothing leaks from the test images."""
    highest = int(max(train[1].max(), test[1].max()))
    if highest >= len(classes):
        raise DatasetError(
            f"{name}: label {highest} was found where {len(classes)} classes are named. Name all with classes=(...)."
        )
    mean = train[0].mean(dim=(0, 2, 3))
    std = train[0].std(dim=(0, 2, 3)).clamp_min(1e-6)  # a constant channel stays finite
    images = [(part[0] - mean[:, None, None]) / std[:, None, None] for part in (train, test)]
    return ImageData(name, images[0], train[1], images[1], test[1], tuple(classes), mean, std)


def _pixels(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)) / 255.0


def _existing_folder(folder: str | pathlib.Path) -> pathlib.Path:
    home = pathlib.Path(folder)
    if not home.is_dir():
        raise DatasetError(f"{home}: no such folder. Name the folder that holds the data files.")
    return home


def _find_idx(home: pathlib.Path, stem: str, dimensions: int) -> pathlib.Path:
    names = [f"{stem}{dash}idx{dimensions}-ubyte{end}" for dash in "-." for end in ("", ".gz")]
    for layout in IDX_LAYOUTS:
        for name in names:
            if (home / layout / name).is_file():
                return home / layout / name
    raise DatasetError(f"{home}: {names[0]} is missing, also with .gz. Put the four IDX files in this folder.")


def _read_idx(path: pathlib.Path, dimensions: int) -> np.ndarray:
    """Read one IDX file: two zero bytes, a type byte, the number of dimensions, the sizes, the values."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            head = file.read(4 + 4 * dimensions)
            if len(head) < 4 + 4 * dimensions or head[:4] != bytes((0, 0, IDX_UBYTE, dimensions)):
                raise DatasetError(
                    f"{path}: starts with {head[:4].hex() or 'nothing'}, where an IDX file of bytes in {dimensions} "
                    f"dimensions starts with 000008{dimensions:02x}. Get the file again."
                )
            shape = struct.unpack(f">{dimensions}I", head[4:])
            size = math.prod(shape)
            values = file.read(size + 1)  # one more than promised, and never all of a bomb
    except (OSError, EOFError, zlib.error, OverflowError, MemoryError) as error:
        raise DatasetError(f"{path}: cannot be read ({error}). Get the file again.") from error
    if len(values) != size:
        found = "more" if len(values) > size else f"{len(values)} bytes"
        raise DatasetError(f"{path}: holds {found}, where its header promises {size} bytes. Get the file again.")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _cifar_home(folder: str | pathlib.Path, inner: str, landmark: str) -> pathlib.Path:
    home = _existing_folder(folder)
    for place in (home / inner, home):
        if (place / landmark).is_file():
            return place
    raise DatasetError(f"{home}: holds neither {inner}/{landmark} nor {landmark}. Unpack the python version here.")


def _read_cifar(path: pathlib.Path, labels_key: str, classes: int) -> tuple[Tensor, Tensor]:
    batch = _unpickle(path)
    data, labels = batch.get("data"), batch.get(labels_key)
    good = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (CIFAR_PIXELS,) and len(data)
    whole = isinstance(labels, list) and all(type(label) is int and 0 <= label < classes for label in labels)
    if not good or not whole or len(data) != len(labels):
        raise DatasetError(
            f"{path}: needs 'data', bytes of shape (N, {CIFAR_PIXELS}), and '{labels_key}', N labels below {classes}; "
            f"found the keys {sorted(map(str, batch))}. Unpack the python version again."
        )
    return _pixels(data.reshape(-1, 3, 32, 32)), torch.tensor(labels)


def _class_names(path: pathlib.Path, key: str, classes: int) -> tuple[str, ...]:
    names = _unpickle(path).get(key) if path.is_file() else [str(number) for number in range(classes)]
    if not isinstance(names, list) or len(names) != classes or not all(isinstance(name, str) for name in names):
        raise DatasetError(f"{path}: '{key}' must list {classes} names. Unpack the python version again.")
    return tuple(names)


def _unpickle(path: pathlib.Path) -> dict:
    """Read a pickle of plain values and byte arrays; anything else in it is refused before it acts."""
    try:
        with open(path, "rb") as file:
            batch = _PlainUnpickler(file, encoding="latin1").load()
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from None
    except Exception as error:  # a broken pickle raises whatever its broken operation raises
        reason = str(error) or type(error).__name__
        raise DatasetError(f"{path}: cannot be read ({reason}). Unpack the python version again.") from error
    if not isinstance(batch, dict):
        raise DatasetError(f"{path}: holds a {type(batch).__name__}, where a dict is needed. Unpack it again.")
    return batch


_ARRAY = object()  # stands for numpy.ndarray, so that a pickle cannot call the class itself


def _empty_array(kind: object, shape: object, code: object) -> np.ndarray:
    if kind is not _ARRAY or shape != (0,):
        raise DatasetError("holds an array of a kind that CIFAR files do not have. Unpack the python version again.")
    return np.empty(0, np.uint8)


def _byte_dtype(code: object, align: object = False, copy: object = True) -> np.dtype:
    if code != "u1":
        raise DatasetError(f"holds an array of type {code!r}, where bytes are needed. Unpack the python version again.")
    return np.dtype("u1", False, True)  # a copy: the state that follows must not reach numpy's own


def _latin1(text: object, codec: object) -> bytes:
    if codec != "latin1" or not isinstance(text, str):
        raise DatasetError(f"holds text in the codec {codec!r}, where latin1 is needed. Get the data again.")
    return codecs.latin_1_encode(text)[0]


_ALLOWED: dict[tuple[str, str], Callable | object] = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,  # numpy 1
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,  # numpy 2
    ("numpy", "ndarray"): _ARRAY,
    ("numpy", "dtype"): _byte_dtype,
    ("_codecs", "encode"): _latin1,
}


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler for which the five names above are all that exists."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ALLOWED:
            raise DatasetError(f"asks for {module}.{name}, which image data never needs: do not trust this file.")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: object) -> object:
        raise DatasetError("refers to an object outside itself, which image data never needs: do not trust this file.")
