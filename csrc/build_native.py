"""Builds the two native libraries of trainable_nn (setuptools commands).

Neither library is a Python module: each registers kernels with torch's
dispatcher when `torch.ops.load_library` loads it, and calls nothing but
libtorch's stable C ABI.  So one file serves every Python and every torch from
2.11 on, and building it takes a compiler and no torch.

No compiler, or a failing one, is not an error: the package then runs in pure
PyTorch, says so when it is imported, and `python -m trainable_nn` repeats the
reason recorded here.

Environment variables:
  TRAINABLE_NN_NATIVE   0: build no library; 1: fail where one cannot be built
  TRAINABLE_NN_CUDA     0 or 1: whether to build the CUDA library (default: if
                        nvcc is found and the installed torch is a CUDA build)
  TORCH_CUDA_ARCH_LIST  e.g. "8.0;9.0+PTX"
  C
"""
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel
from setuptools.command.build_py import build_py as _build_py

CSRC = pathlib.Path(__file__).resolve().parent

CXX_FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fvisibility=hidden", "-w"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
DEFAULT_ARCHS = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]

# The loops are compiled once for each set; which one runs is chosen when the library is loaded.
ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512 + ["-mprefer-vector-width=512"],
    "avx512_short": AVX512 + ["-mprefer-vector-width=256", "-DTNN_SHORT"],  # registers of 32 bytes
}


class NoBuild(Exception):
    """Why a library is not built."""


def find_cxx() -> list:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for c in candidates:
        command = shlex.split(c)
        if shutil.which(command[0]):
            return command
    raise NoBuild(f"no C++ compiler was found at build time (tried {', '.join(candidates)})")


def installed_torch() -> dict:
    """Version and CUDA version of the torch that will be used, read, not imported.

    pip's build isolation hides it from `import`, but runs the target's own
    interpreter, so its site-packages folder is still known.
    """
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for folder in folders:
        path = pathlib.Path(folder or ".", "torch", "version.py")
        if path.is_file():
            text = path.read_text()
            version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
            cuda = re.search(r"^cuda: [^=]*= '([^']+)'", text, re.MULTILINE)
            return {"version": version and version[1], "cuda": cuda and cuda[1]}
    return {}


def find_nvcc() -> str:
    choice = os.environ.get("TRAINABLE_NN_CUDA")
    if choice == "0":
        raise NoBuild("TRAINABLE_NN_CUDA=0 was set at build time")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    tried = [os.environ.get("CUDACXX"), *[h and os.path.join(h, "bin", "nvcc") for h in homes], "nvcc"]
    nvcc = next((p for p in map(shutil.which, filter(None, tried)) if p), None)
    if not nvcc:
        raise NoBuild("no nvcc was found at build time")
    if choice != "1":
        torch = installed_torch()
        if torch and not torch["cuda"]:
            raise NoBuild(f"torch {torch['version']} was a CPU build at build time (TRAINABLE_NN_CUDA=1 overrides)")
        if not torch and not os.path.exists("/dev/nvidiactl"):
            raise NoBuild("neither torch nor a GPU was found at build time (TRAINABLE_NN_CUDA=1 overrides)")
    return nvcc


def gencode(nvcc: str) -> list:
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
    flags = []
    for arch in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS).strip()):
        number = arch.replace("+PTX", "").replace(".", "")
        if f"compute_{number.rstrip('af')}" in known:
            codes = [f"sm_{number}"] + ([f"compute_{number}"] if arch.endswith("+PTX") else [])
            flags += ["-gencode", f"arch=compute_{number},code=[{','.join(codes)}]"]
    return flags


def run(command: list) -> None:
    command = [str(c) for c in command]
    print("trainable_nn:", shlex.join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise NoBuild(f"`{command[0]}` failed at build time: {' | '.join(done.stdout.strip().splitlines()[-3:])}")


def run_all(commands: list) -> None:
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(run, commands))


def stand_ins(cxx: list, temp: pathlib.Path, libraries: tuple) -> list:
    """Link flags for libraries under libtorch's names that define what torch_abi.h declares.

    The linker then finds every symbol that may be used, and no other.  At run time the
    loader takes the libtorch that `import torch` has loaded.
    """
    declared = re.findall(r"^AOTITorchError (\w+)\((?:[^;]|\n)*?;(.*)$", (CSRC / "torch_abi.h").read_text(), re.MULTILINE)
    flags = [f"-L{temp}"]
    for library in libraries:
        names = [n for n, comment in declared if ("libtorch_cuda" in comment) == (library == "torch_cuda")]
        source = temp / f"{library}.c"
        source.write_text("".join(f"void {n}(void) {{}}\n" for n in names))
        run([*cxx, "-x", "c", "-shared", "-nostdlib", "-fPIC", source, "-o", temp / f"lib{library}.so",
             f"-Wl,-soname,lib{library}.so"])
        flags.append(f"-l{library}")
    return flags


def build_cpu(out: pathlib.Path, temp: pathlib.Path) -> None:
    cxx = find_cxx()
    compile_ = [*cxx, *CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    x86 = platform.machine() in ("x86_64", "AMD64")
    sources = {"register": ["-DTNN_X86"] if x86 else []}
    for isa, flags in ISA_FLAGS.items():
        if isa == "scalar" or x86:
            sources |= {f"{name}:{isa}": [f"-DTNN_ISA={isa}", *flags] for name in ("entry_norm", "weight_norm")}
    objects = {key: temp / f"cpu_{key.replace(':', '_')}.o" for key in sources}
    run_all([[*compile_, *flags, "-c", CSRC / "cpu" / f"{key.partition(':')[0]}.cpp", "-o", objects[key]]
             for key, flags in sources.items()])
    run([*cxx, "-shared", "-Wl,-z,defs", *objects.values(), "-o", out, *stand_ins(cxx, temp, ("torch_cpu",))])


def build_cuda(out: pathlib.Path, temp: pathlib.Path) -> None:
    nvcc, cxx = find_nvcc(), find_cxx()
    objects = {name: temp / f"cuda_{name}.o" for name in ("entry_norm", "weight_norm", "register")}
    run_all([
        *([nvcc, *NVCC_FLAGS, "-ccbin", cxx[0], *gencode(nvcc), "-c", CSRC / "cuda" / f"{name}.cu", "-o", objects[name]]
          for name in ("weight_norm", "entry_norm")),
        [*cxx, *CXX_FLAGS, "-c", CSRC / "cuda" / "register.cpp", "-o", objects["register"]],
    ])
    run([nvcc, "-ccbin", cxx[0], "-shared", "-cudart", "static", *objects.values(), "-o", out,
         *stand_ins(cxx, temp, ("torch_cpu", "torch_cuda"))])


# device -> how to build its library, and the variable that makes a failure an error
LIBRARIES = {"cpu": (build_cpu, "TRAINABLE_NN_NATIVE"), "cuda": (build_cuda, "TRAINABLE_NN_CUDA")}


def build(folder: pathlib.Path, temp: pathlib.Path) -> list:
    """Build what can be built into `folder`; the files made there."""
    folder.mkdir(parents=True, exist_ok=True)
    temp.mkdir(parents=True, exist_ok=True)
    made, why_not = [], {}
    for device, (build_library, required) in LIBRARIES.items():
        out = folder / f"_native_{device}.so"
        out.unlink(missing_ok=True)
        try:
            if os.environ.get("TRAINABLE_NN_NATIVE") == "0":
                raise NoBuild("TRAINABLE_NN_NATIVE=0 was set at build time")
            build_library(out, temp)
            made.append(out)
        except NoBuild as reason:
            if os.environ.get(required) == "1":
                raise SystemExit(f"trainable_nn: {required}=1 is set and the library cannot be built: {reason}") from None
            print(f"trainable_nn: no {device} library: {reason}", flush=True)
            why_not[device] = str(reason)
    record = folder / "_native_build.json"
    record.write_text(json.dumps(why_not, indent=1) + "\n")
    return [*made, record]


class build_py(_build_py):
    native = ()

    def run(self):
        super().run()
        folder = pathlib.Path("trainable_nn") if self.editable_mode else pathlib.Path(self.build_lib, "trainable_nn")
        temp = pathlib.Path(self.get_finalized_command("build").build_temp)
        self.native = [str(p) for p in build(folder, temp)]

    def get_source_files(self):  # what an sdist holds
        files = (p for p in CSRC.rglob("*") if p.suffix in (".py", ".h", ".cpp", ".cu"))
        return [*super().get_source_files(), *sorted(str(p.relative_to(CSRC.parent)) for p in files)]

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), *self.native]


class bdist_wheel(_bdist_wheel):
    def finalize_options(self):
        self.distribution.has_ext_modules = lambda: True  # a wheel with platform files
        super().finalize_options()

    def get_tag(self):
        """py3-none-PLATFORM: the libraries depend on no Python."""
        built = any(name.endswith(".so") for name in self.get_finalized_command("build_py").native)
        return ("py3", "none", super().get_tag()[2] if built else "any")
