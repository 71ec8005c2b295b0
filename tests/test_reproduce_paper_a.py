"""The reproduction of paper A's tables: pairs, kills, processes, and the numbers of the table."""

import importlib.util
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

import trainable_nn as tnn

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "examples" / "reproduce_paper_a.py"
PACKAGE = str(pathlib.Path(tnn.__file__).resolve().parents[1])
TINY = ("--data", "digits", "--width", "2", "--images", "96", "--test-images", "50", "--batch-size", "32", "--downscale",
        "2", "--lrs", "0.1", "--trials", "1", "--epochs", "3")  # fmt: skip

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="the examples are not beside the tests")
for needed in ("sklearn", "rich", "matplotlib"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("reproduce_paper_a", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def start(*arguments, folder, **environment):
    path = os.pathsep.join(filter(None, (PACKAGE, os.environ.get("PYTHONPATH"))))
    whole = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(SCRIPT), *TINY, *arguments]
    return subprocess.Popen(command, cwd=folder, env=whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(*arguments, folder, **environment):
    process = start(*arguments, folder=folder, **environment)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-3000:]
    return out


def records(folder):
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*-trial*.json")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run("--output", "out", folder=folder), folder / "out"


def test_a_run_leaves_its_numbers_a_table_and_a_picture(whole):
    out, folder = whole
    assert sorted(records(folder)) == ["original-lr0.1-trial00.json", "paper-lr0.1-trial00.json"]
    for record in records(folder).values():
        assert len(record["loss"]) == len(record["accuracy"]) == 3 and not record["diverged"]
        assert all(0.5 < loss < 5.0 for loss in record["loss"])
    rows = (folder / "original-lr0.1-trial00.csv").read_text().splitlines()
    assert rows[0] == "epoch,training loss,test accuracy" and len(rows) == 4
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG") and "modified below original" in out
    assert not list(folder.glob("*.state"))


def test_a_killed_run_goes_on_to_the_same_result(whole, tmp_path):
    process = start("--output", "out", folder=tmp_path)
    states = tmp_path / "out"
    until = time.monotonic() + 120
    while not list(states.glob("*.state")) and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not records(states)  # it was killed in the middle of the first run
    run("--output", "out", folder=tmp_path)
    assert records(states) == records(whole[1])


def test_two_processes_divide_the_runs_and_the_last_shows_the_table(whole, tmp_path):
    first = run("--output", "out", folder=tmp_path, RANK="0", WORLD_SIZE="2")
    assert len(records(tmp_path / "out")) == 1 and "below original" not in first
    second = run("--output", "out", folder=tmp_path, RANK="1", WORLD_SIZE="2")
    assert records(tmp_path / "out") == records(whole[1]) and "below original" in second


def test_runs_of_another_protocol_are_refused(whole):
    process = start("--output", str(whole[1]), "--width", "4", folder=whole[1])
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "another protocol" in out and "--output" in out


def test_all_variants_of_a_trial_start_from_the_same_weights(script):
    protocol = script.Protocol("digits", 2, 1, 32, 96, 50, 2, False, False, 0)
    images = script.Images(tnn.datasets.digits(size=32), protocol, torch.device("cpu"))
    plain, modified = (script.build(script.Job(name, 0.1, 3), protocol, images) for name in ("original", "paper"))
    other = script.build(script.Job("original", 0.1, 4), protocol, images)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, modified.state_dict()[name])
    assert not torch.equal(plain.conv1.weight, other.conv1.weight)
    assert not torch.allclose(plain(images.test[0]), modified(images.test[0]))


def test_a_crop_is_a_window_of_the_image_in_a_black_border(script):
    protocol = script.Protocol("digits", 2, 1, 96, 96, 50, 2, True, False, 0)
    data = tnn.datasets.digits(size=32)
    images = script.Images(data, protocol, torch.device("cpu"))
    batch, labels = next(images.epoch(96, seed=5))
    black = float(-data.mean / data.std)
    windows = images.bordered.unfold(2, 16, 1).unfold(3, 16, 1).flatten(2, 3)[:, 0]  # every 16 x 16 window
    flips = 0
    for image, label in zip(batch[:, 0], labels, strict=True):
        same = windows[images.labels == label].flatten(0, 1)
        straight, mirrored = ((same == view).flatten(1).all(1).any() for view in (image, image.flip(1)))
        assert straight or mirrored
        flips += bool(mirrored and not straight)
    assert 20 < flips < 76  # half of 96, more or less
    assert images.bordered[:, :, 0].eq(black).all()


def test_the_table_takes_means_over_the_trials_that_did_not_diverge(script):
    def record(accuracy, loss, diverged=False):
        return {"accuracy": [0.1, accuracy], "loss": [2.0, loss], "diverged": diverged}

    runs = {
        script.Job("original", 0.1, 0): record(0.5, 1.0),
        script.Job("original", 0.1, 1): record(0.7, 2.0),
        script.Job("original", 0.1, 2): record(math.nan, math.nan, True),
        script.Job("paper", 0.1, 0): record(0.6, 0.5),
        script.Job("paper", 0.1, 1): record(0.6, 2.5),
        script.Job("paper", 0.1, 2): record(0.6, 1.0),
    }
    original, paper = script.summary(runs)
    assert (original["variant"], original["trials"], original["diverged"]) == ("original", 3, 1)
    assert original["accuracy"] == pytest.approx((60.0, math.sqrt(200.0)))
    assert original["loss"] == pytest.approx((1.5, math.sqrt(0.5)))
    assert paper["loss"] == pytest.approx((4.0 / 3.0, statistics_of((0.5, 2.5, 1.0))))
    lower = script.lower_per_epoch(runs, 0.1, "paper")
    assert lower[0][:2] == (0, 3)  # equal at the first epoch
    assert lower[1] == (1, 2, pytest.approx(0.0))  # -0.5 and +0.5; the diverged pair is not counted


def statistics_of(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
