"""What pip builds: the files in the wheel and the sdist, with a compiler, without one, and with nvcc."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = ("csrc", "trainable_nn", "pyproject.toml", "setup.cfg", "README.md", "LICENSE")

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="runs in a source tree only"),
    pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools"),
]
needs_cxx = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources, with nothing built."""
    left = shutil.ignore_patterns("_native_*", "__pycache__", "*.egg-info")
    for name in FILES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / "tree" / name, ignore=left)
        else:
            shutil.copy(source, tmp_path / "tree" / name)
    return tmp_path / "tree"


def pip_wheel(source: pathlib.Path, out: pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TRAINABLE_NN_") and k not in ("CC", "CXX")}
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(out), str(source)]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, cwd=out.parent, check=False)


def built(source: pathlib.Path, out: pathlib.Path, **environment: str) -> tuple[str, zipfile.ZipFile]:
    done = pip_wheel(source, out, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel.name, zipfile.ZipFile(wheel)


@needs_cxx
def test_one_wheel_for_every_python_with_the_library_and_no_sources_of_it(tree, tmp_path):
    name, wheel = built(tree, tmp_path / "out", TRAINABLE_NN_NATIVE="1")
    assert "-py3-none-" in name and not name.endswith("-any.whl")
    names = wheel.namelist()
    assert "trainable_nn/_native_cpu.so" in names and "trainable_nn/modules/linear.py" in names
    assert not [n for n in names if n.startswith(("csrc", "tests"))]
    metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "Requires-Dist: torch>=2.11" in metadata  # no upper end: pip never exchanges a user's torch


@needs_cxx
def test_the_sdist_holds_all_that_the_build_needs(tree, tmp_path):
    code = "from setuptools import build_meta; print(build_meta.build_sdist('../sdist'))"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    (archive,) = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    wanted = {p.relative_to(tree) for p in (tree / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".py")}
    assert wanted and all((source / p).is_file() for p in wanted)
    _, wheel = built(source, tmp_path / "out", TRAINABLE_NN_NATIVE="1")
    assert "trainable_nn/_native_cpu.so" in wheel.namelist()


def test_without_a_compiler_the_wheel_is_pure_and_says_why(tree, tmp_path):
    name, wheel = built(tree, tmp_path / "out", CXX="no-such-compiler")
    assert name.endswith("-py3-none-any.whl")
    assert "trainable_nn/_native_cpu.so" not in wheel.namelist()
    reasons = json.loads(wheel.read("trainable_nn/_native_build.json"))
    assert reasons["cpu"] == "no C++ compiler was found at build time (tried no-such-compiler)"


def test_a_compiler_that_fails_is_a_reason_and_an_error_where_the_library_is_required(tree, tmp_path):
    _, wheel = built(tree, tmp_path / "out", CXX="false")
    assert "`false` failed at build time" in json.loads(wheel.read("trainable_nn/_native_build.json"))["cpu"]
    done = pip_wheel(tree, tmp_path / "required", CXX="false", TRAINABLE_NN_NATIVE="1")
    assert done.returncode != 0
    assert "TRAINABLE_NN_NATIVE=1 is set and the library cannot be built" in done.stdout + done.stderr


@needs_cxx
@needs_nvcc
def test_nvcc_builds_the_cuda_library_without_a_gpu_and_without_a_cuda_torch(tree, tmp_path):
    _, wheel = built(tree, tmp_path / "out", TRAINABLE_NN_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX")
    assert "trainable_nn/_native_cuda.so" in wheel.namelist()
    library = wheel.extract("trainable_nn/_native_cuda.so", tmp_path)
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = [line.partition("[")[2].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line]
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    assert not any("cudart" in n or "python" in n for n in needed)  # no version of either is asked for
