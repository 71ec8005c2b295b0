"""Write docs/benchmarks.md: run every benchmark and keep what it prints. python docs/make_benchmarks.py [--full]

Without --full each runs in its short form (about a quarter of an hour on two cores), which shows that it runs, and roughly
what it says; with --full in the form whose figures the README quotes (about an hour, on a machine that does nothing else).
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import shlex
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
# what it measures, the command in short form, and in full
BENCHMARKS = (
    ("Normalisation of all weights of ResNet-18", "normalise.py --rounds 5", "normalise.py --compile --step"),
    ("Conversion", "convert.py --rounds 2", "convert.py"),
    ("Products of normalised convolutions", "products.py --rounds 9", "products.py"),
    ("Schatten normalisation", "schatten.py --rounds 1 --images 2 --widest 128", "schatten.py"),
    ("Proved operator norms", "operator_norm.py --threads 1 --truth 100000 --weights random spiked", "operator_norm.py --threads 1 --truth 100000"),
    ("Extreme singular values", "spectrum.py --threads 1 --layers 2", "spectrum.py --threads 1 --dense --large"),
    ("Bounded residuals in a training step", "residual.py --threads 1 --batch 128 --rounds 2", "residual.py --threads 1"),
    ("Exact tangent kernels", "ntk.py --samples 16 64 --outputs 1 --peers nngeometry torch.func --memory 4 --batch 16", "ntk.py --samples 16 64 128 --outputs 1 10"),
    ("Regularity constants", "regularity.py --networks 4 --steps 6 --reference 2,0.5", "regularity.py"),
    ("Certified steps", "certify.py --blocks 4 --steps 20 --descent 10", "certify.py"),
    ("Paper B's certificate", "linear_width.py --short", "linear_width.py"),
)
HEAD = """# Benchmarks

Written by `python docs/make_benchmarks.py{flag}` with torch {torch} on {threads} threads ({machine}). Ratios are of one
run each, and mean more than times: the machine may have been busy. What each column means stands in the benchmark's own file
under `tests/benchmarks`.
"""


def run(command: str, minutes: float) -> str:
    """What a benchmark prints; a failure or a stop is told of, in its place."""
    words = [sys.executable, str(ROOT / "tests" / "benchmarks" / command.split()[0]), *shlex.split(command)[1:]]
    environment = {**os.environ, "COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"}
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=60 * minutes, env=environment, cwd=ROOT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"(stopped after {minutes:g} minutes)"
    told = done.stdout.strip() if done.returncode == 0 else f"(failed)\n{done.stderr.strip()[-800:]}"
    return told.replace(str(ROOT), ".")


def processor() -> str:
    """Its name, where Linux tells it."""
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return f"{platform.machine()}, {names[0]}" if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--minutes", type=float, default=20.0, help="for each benchmark, at most")
    arguments = parser.parse_args()
    machine = f"{platform.system()}, {processor()}"
    flag = " --full" if arguments.full else ""
    parts = [HEAD.format(flag=flag, torch=torch.__version__, threads=torch.get_num_threads(), machine=machine)]
    for title, short, full in BENCHMARKS:
        command = full if arguments.full else short
        print(command, flush=True)
        parts.append(f"## {title}\n\n`python tests/benchmarks/{command}`\n\n```text\n{run(command, arguments.minutes)}\n```\n")
        PAGE.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
