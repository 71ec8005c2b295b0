"""examples/reproduce_paper_b.py from end to end, in its quick setting."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import pytest

import trainable_nn as tnn

EXAMPLE = pathlib.Path(__file__).resolve().parents[1] / "examples" / "reproduce_paper_b.py"
PACKAGE = str(pathlib.Path(tnn.__file__).resolve().parents[1])

pytestmark = pytest.mark.skipif(not EXAMPLE.is_file(), reason="the examples are not beside the tests")


def run(*arguments, folder):
    path = os.pathsep.join(filter(None, (PACKAGE, os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *map(str, arguments)], cwd=folder, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip


def test_the_quick_setting_leaves_its_tables_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    done = run("--quick", "--output", "b", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "b" / "paper_b.json").read_text())
    assert [row["samples"] for row in found["widths"]] == [2, 4]
    for row in found["widths"]:
        assert row["fits"] < row["claimed"]
        assert row["certified"] is not None or row["needed_over_available"] > 1
    two = found["widths"][0]
    assert two["fits"] <= two["certified"] <= 128 < two["claimed"] / 10
    constants = {row["constant"]: row for row in found["constants"]}
    assert constants["alpha"]["certified"] <= constants["alpha"]["measured"]
    for name in ("beta", "L", "radius"):
        assert constants[name]["measured"] <= constants[name]["certified"] <= constants[name]["claimed"]
    assert constants["beta"]["measured"] < constants["beta"]["corrected"]
    assert constants["L"]["measured"] < constants["L"]["claimed"] < constants["L"]["corrected"]
    start = {row["width"]: row for row in found["loss"] if row["step"] == 0}
    assert all(row["predicted"] == pytest.approx(row["measured"], rel=1e-9) for row in start.values())
    with (tmp_path / "b" / "loss.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found["loss"]) > 10
    for name in ("widths", "constants", "loss"):
        assert (tmp_path / "b" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (tmp_path / "b" / f"{name}.csv").stat().st_size > 50
    assert "Width needed" in done.stdout and "not stated" in done.stdout


def test_a_setting_that_makes_no_sense_is_refused_with_a_reason(tmp_path):
    done = run("--samples", "0", folder=tmp_path)
    assert done.returncode == 2 and "at least 1" in done.stderr
