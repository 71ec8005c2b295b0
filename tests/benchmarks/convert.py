"""How long a conversion takes, beside a deep copy of the same model: the copy is part of every conversion.

    python tests/benchmarks/convert.py [--model resnet50] [--rounds 5]
"""

import argparse
import copy
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from real_models import torchvision_model

import trainable_nn as tnn


def seconds(f: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model = torchvision_model(arguments.model)
    converted = tnn.convert_model(model)
    print(f"{arguments.model}: {len(converted.conversion_report.steps)} paths change")
    convert = seconds(lambda: tnn.convert_model(model), arguments.rounds)
    clone = seconds(lambda: copy.deepcopy(model), arguments.rounds)
    print(f"convert_model {convert:.3f} s, {convert / clone:.1f} times a deep copy ({clone:.3f} s)")
    print(f"plan {seconds(lambda: tnn.plan(model), arguments.rounds):.3f} s")
    print(f"fold {seconds(lambda: tnn.fold(converted), arguments.rounds):.3f} s")


if __name__ == "__main__":
    main()
