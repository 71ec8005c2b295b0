"""The compiled kernels: which are loaded, and why the others are not.

The libraries hold no Python module. Each adds kernels to the schemas of this
package when it is loaded, so they are loaded after the schemas are defined.
"""

import ctypes
import json
import os
import pathlib
import warnings

import torch

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
SWITCH = "TRAINABLE_NN_NATIVE"

loaded: dict[str, str] = {}  # device type -> path of the library in use
reasons: dict[str, str] = {}  # device type -> why there is none


def _build_record() -> dict[str, str]:
    """What the build wrote down of the libraries it did not make."""
    path = PACKAGE / "_native_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load_one(device: str, record: dict[str, str]) -> str | None:
    """Load one library; the reason when that cannot be done."""
    path = PACKAGE / f"_native_{device}.so"
    if not path.exists():
        return record.get(device, "it was not built")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:  # built for a libtorch that this one is not
        return f"it does not load: {error.__cause__ or error}"
    loaded[device] = str(path)
    return None


def load() -> None:
    """Load what is there, and warn once of each device that goes without."""
    record = _build_record()
    for device in ("cpu", "cuda") if torch.version.cuda else ("cpu",):
        if os.environ.get(SWITCH) == "0":
            reasons[device] = f"{SWITCH}=0 is set"
            continue
        reason = _load_one(device, record)
        if reason:
            reasons[device] = reason
            warnings.warn(
                f"trainable_nn: no compiled {device} kernels, so pure PyTorch does the work, which is slower: "
                f"{reason}. Install again with a C++ compiler, or silence this with {SWITCH}=0.",
                stacklevel=2,
            )


def empty_cache() -> int:
    """Give the memory that is kept for coming outputs back to the system; returns the number of bytes.

    The compiled CPU kernels keep freed outputs of 256 KiB and more for the next call, up to
    TRAINABLE_NN_POOL_MIB (1024 by default, 0 for none), as CUDA's caching allocator does. Such an output
    cannot be resized in place (``Tensor.resize_``); everything else works as with any tensor.
    """
    if "cpu" not in loaded:
        return 0
    function = ctypes.CDLL(loaded["cpu"]).tnn_empty_cache
    function.restype = ctypes.c_uint64
    return function()


def report() -> str:
    """One line for each device type: compiled, or pure PyTorch and why."""
    lines = [f"torch {torch.__version__}"]
    for device in sorted({*loaded, *reasons}):
        state = f"compiled kernels, {loaded[device]}" if device in loaded else f"pure PyTorch: {reasons[device]}"
        lines.append(f"{device}: {state}")
    return "\n".join(lines)
