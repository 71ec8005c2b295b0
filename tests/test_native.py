"""Checks of the compiled part: the ABI that it assumes, the CUDA sources without a GPU, and how it is loaded."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from trainable_nn.ops import native

ROOT = pathlib.Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
INCLUDE = pathlib.Path(torch.__file__).parent / "include"
OPERATORS = ("entry_norm", "weight_norm")

needs_sources = pytest.mark.skipif(not CSRC.is_dir(), reason="runs in a source tree only")
needs_cxx = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def compiles(*command) -> bool:
    return subprocess.run([*map(str, command)], capture_output=True, check=False).returncode == 0


@needs_sources
@needs_cxx
def test_the_declarations_of_the_abi_are_those_of_the_installed_torch(tmp_path):
    """Beside torch's own headers a differing declaration does not compile; nor does a changed copy of ours."""
    header = (CSRC / "torch_abi.h").read_text()
    changed = header.replace("get_numel(AtenTensorHandle t, int64_t* ret)", "get_numel(AtenTensorHandle t, int32_t* ret)")
    assert changed != header
    outcomes = []
    for name, text in (("ours.h", header), ("changed.h", changed)):
        (tmp_path / name).write_text(text)
        source = tmp_path / f"{name}.cpp"
        source.write_text(f'#define USE_CUDA\n#include <torch/csrc/stable/c/shim.h>\n#include "{name}"\n')
        outcomes.append(compiles("c++", "-std=c++20", "-fsyntax-only", f"-I{INCLUDE}", source))
    assert outcomes == [True, False]


@needs_sources
@needs_nvcc
def test_the_bodies_of_the_cuda_kernels_compute_the_closed_forms(tmp_path):
    binary = tmp_path / "cuda_on_host"
    subprocess.run(["nvcc", "-std=c++17", "-gencode", "arch=compute_90,code=sm_90",
                    ROOT / "tests/cuda_on_host.cu", "-o", binary], check=True)
    done = subprocess.run([binary], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("ok") == 4, done.stdout


@needs_sources
@needs_nvcc
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_cuda_kernels_load_and_store_sixteen_bytes(operator, tmp_path):
    ptx = tmp_path / "kernel.ptx"
    subprocess.run(["nvcc", "-std=c++17", "-O3", "-arch=compute_90", "-ptx", CSRC / f"cuda/{operator}.cu", "-o", ptx],
                   check=True)
    text = ptx.read_text()
    assert "ld.global.nc.v4" in text and "st.global.v" in text


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (5, 7), (1000, 1), (3, 4099), (0, 3)])
@pytest.mark.parametrize("name", OPERATORS)
def test_cuda_gives_the_values_of_the_cpu(name, shape, dtype):
    constants = (0.3, 1.5, 0.25)[: 3 if name == "entry_norm" else 2]
    w, g, v = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(3))
    for suffix, operands in (("", (w,)), ("_backward", (g, w)), ("_double_backward", (v, g, w)), ("_pair", (g, w))):
        op = getattr(torch.ops.trainable_nn, name + suffix)
        found, expected = op(*(t.cuda() for t in operands), *constants), op(*operands, *constants)
        pairs = zip(found, expected) if isinstance(found, tuple) else [(found, expected)]
        for a, b in pairs:
            torch.testing.assert_close(a.cpu(), b, rtol=32 * torch.finfo(dtype).eps, atol=32 * torch.finfo(dtype).eps)


def in_a_new_process(code: str, folder: pathlib.Path, **environment) -> subprocess.CompletedProcess:
    """In a folder that holds a package, so that this one is imported and not the tested one."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder,
                          env=os.environ | environment | {"PYTHONPATH": str(folder)})


def a_copy_of_the_package(folder: pathlib.Path) -> pathlib.Path:
    package = pathlib.Path(native.PACKAGE)
    shutil.copytree(package, folder / "trainable_nn", ignore=shutil.ignore_patterns("_native_*", "__pycache__"))
    return folder / "trainable_nn"


def test_without_a_library_it_warns_once_with_the_reason_and_works(tmp_path):
    package = a_copy_of_the_package(tmp_path)
    (package / "_native_build.json").write_text(json.dumps({"cpu": "no C++ compiler was found at build time"}))
    code = ("import trainable_nn as tnn, torch, trainable_nn.functional\n"
            "print(tnn.ops.native.report())\n"
            "print(tnn.functional.entry_norm(torch.tensor([3.0]), 16.0).item())")
    done = in_a_new_process(code, tmp_path, TRAINABLE_NN_NATIVE="1")
    assert done.stderr.count("UserWarning") == 1
    assert "no compiled cpu kernels" in done.stderr and "no C++ compiler was found at build time" in done.stderr
    assert "cpu: pure PyTorch: no C++ compiler was found at build time" in done.stdout
    assert abs(float(done.stdout.split()[-1]) - 0.6) < 1e-6
    quiet = in_a_new_process(code, tmp_path, TRAINABLE_NN_NATIVE="0")
    assert "UserWarning" not in quiet.stderr and "TRAINABLE_NN_NATIVE=0 is set" in quiet.stdout


def test_a_library_that_does_not_load_is_named_and_replaced_by_pure_pytorch(tmp_path):
    (a_copy_of_the_package(tmp_path) / "_native_cpu.so").write_bytes(b"not a library")
    done = in_a_new_process("import trainable_nn; print(trainable_nn.ops.native.report())", tmp_path,
                            TRAINABLE_NN_NATIVE="1")
    assert "cpu: pure PyTorch: it does not load" in done.stdout and "UserWarning" in done.stderr
