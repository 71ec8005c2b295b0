"""The examples run from end to end, as a user would start them."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

import trainable_nn as tnn

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
PACKAGE = str(pathlib.Path(tnn.__file__).resolve().parents[1])  # the very package that this process tests

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not beside the tests")


def run(*command, folder):
    """Standard output of a command that must succeed."""
    path = os.pathsep.join(filter(None, (PACKAGE, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_layers_are_swapped_in_an_existing_loop(tmp_path):
    pytest.importorskip("sklearn")
    out = run(EXAMPLES / "swap_layers.py", "--epochs", 1, folder=tmp_path)
    assert "plain layers" in out and "normalised layers" in out
    assert out.count("test accuracy") == 2 and out.count("operator norm at most") == 4


def test_a_converted_model_trains_with_torch_optimizer_and_is_read_back(tmp_path):
    pytest.importorskip("sklearn"), pytest.importorskip("torch_optimizer")
    path = tmp_path / "a.safetensors"
    arguments = ("--epochs", 1, "--width", 2, "--optimizer", "Yogi", "--output", path)
    out = run(EXAMPLES / "convert_and_train.py", *arguments, folder=tmp_path)
    trained, again = (line.rsplit(" ", 1)[1] for line in out.splitlines() if "test accuracy" in line)
    assert trained == again
    assert tnn.load(path).conversion["recipe"]["name"] == "paper"


TINY = ("--arch", "trainable_nn.demo.resnet:PreActResNet18", "--width", 2, "--image-size", 16, "--batch-size", 16,
        "--workers", 0, "--convert", "paper")  # fmt: skip


LAUNCHER = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", "--rdzv_backend=c10d",
            "--rdzv_endpoint=127.0.0.1:0", "--local_addr=127.0.0.1")  # fmt: skip


def torchrun(*arguments, folder):
    return run(*LAUNCHER, EXAMPLES / "imagenet.py", *TINY, *arguments, folder=folder)


def test_imagenet_trains_on_two_processes_and_resumes_as_if_never_stopped(tmp_path):
    out = torchrun("--synthetic", 48, "--epochs", 2, "--output", "whole", folder=tmp_path)
    assert "3 of 8 paths change" in out and "epoch 2/2: loss" in out
    torchrun("--synthetic", 48, "--epochs", 1, "--output", "parts", folder=tmp_path)
    out = torchrun("--synthetic", 48, "--epochs", 2, "--output", "parts", "--resume", folder=tmp_path)
    assert "epoch 1/2" not in out and "epoch 2/2" in out
    whole, parts = (tnn.load(tmp_path / name / "epoch_002.safetensors") for name in ("whole", "parts"))
    assert whole.tensors.keys() == parts.tensors.keys()
    for name, value in whole.tensors.items():
        assert torch.equal(value, parts.tensors[name]), name


def write_images(folder, count):
    image = pytest.importorskip("PIL.Image")
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            image.new("RGB", (40, 30), (200 * label, 10 * index, 90)).save(folder / name / f"{index}.JPEG")
    (folder / "cat" / "notes.txt").write_text("no image")


def descendants(process):
    """Processes below this one; torchrun gives its workers sessions of their own, so no signal reaches them all."""
    children = pathlib.Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children] + [pid for child in children for pid in descendants(int(child))]


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").is_dir(), reason="needs Linux's /proc to kill every worker")
def test_imagenet_on_a_folder_killed_and_resumed_has_the_same_weights_bit_for_bit(tmp_path):
    write_images(tmp_path / "data" / "train", 12)
    write_images(tmp_path / "data" / "val", 2)
    torchrun(tmp_path / "data", "--epochs", 2, "--output", "whole", folder=tmp_path)
    path = os.pathsep.join(filter(None, (PACKAGE, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, *LAUNCHER, EXAMPLES / "imagenet.py", *TINY, tmp_path / "data", "--epochs", 50, "--output", "parts"]
    killed = subprocess.Popen(
        [str(word) for word in command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 200
    while not (tmp_path / "parts" / "state.pt").is_file() and time.monotonic() < until and killed.poll() is None:
        time.sleep(0.002)
    for process in (killed.pid, *descendants(killed.pid)):
        os.kill(process, signal.SIGKILL)
    killed.wait()
    reached = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["epoch"]
    assert 1 <= reached < 50
    torchrun(tmp_path / "data", "--epochs", reached + 1, "--output", "parts", "--resume", folder=tmp_path)
    if reached > 1:  # the kill came late: so the whole run must be as long
        torchrun(tmp_path / "data", "--epochs", reached + 1, "--output", "whole", folder=tmp_path)
    name = f"epoch_{reached + 1:03d}.safetensors"
    whole, parts = (tnn.load(tmp_path / folder / name) for folder in ("whole", "parts"))
    assert whole.tensors.keys() == parts.tensors.keys()
    assert all(torch.equal(value, parts.tensors[key]) for key, value in whole.tensors.items())


def test_imagenet_reads_a_folder_of_images_in_one_process(tmp_path):
    write_images(tmp_path / "data" / "train", 8)
    write_images(tmp_path / "data" / "val", 2)
    out = run(EXAMPLES / "imagenet.py", tmp_path / "data", *TINY, "--epochs", 1, "--output", "run", folder=tmp_path)
    assert "epoch 1/1: loss" in out
    assert tnn.load(tmp_path / "run" / "epoch_001.safetensors").tensors["linear.weight"].shape == (2, 16)


@pytest.fixture(scope="module")
def idx_folder(tmp_path_factory):
    """Forty images for training and twenty for tests, in the files of Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("idx")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 40), ("t10k", 20)):
        labels = torch.arange(count, dtype=torch.uint8) % 10
        images = torch.randint(0, 200, (count, 28, 28), generator=generator, dtype=torch.uint8) + 5 * labels[:, None, None]
        head = bytes((0, 0, 8, 3)) + count.to_bytes(4, "big") + 2 * (28).to_bytes(4, "big")
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images.numpy().tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1)) + count.to_bytes(4, "big") + labels.numpy().tobytes())
    return folder


def test_a_provable_network_trains_beside_the_original_and_is_read_back(idx_folder, tmp_path):
    small = ("--width", 2, "--blocks", 1, "--epochs", 2, "--batch-size", 20, "--folder", idx_folder)
    out = run(EXAMPLES / "train_provable.py", *small, folder=tmp_path)
    assert out.count("test accuracy") == 5 and "EntryNormLinear 784 -> 392" in out
    assert tnn.load(tmp_path / "provable" / "provable.safetensors").conversion["recipe"]["name"] == "provable"
    for name in ("original", "provable"):
        assert len(json.loads((tmp_path / "provable" / f"{name}.json").read_text())["history"]) == 2


def test_certified_descent_keeps_every_promise_on_images(idx_folder, tmp_path):
    small = ("--images", 4, "--width", 1, "--steps", 3, "--folder", idx_folder)
    out = run(EXAMPLES / "certified_descent.py", *small, folder=tmp_path)
    result = json.loads((tmp_path / "certified-descent.json").read_text())
    assert "Grade global" in out and result["certificate"]["grade"] == "global"
    losses = [row["loss"] for row in result["steps"]]
    assert losses == sorted(losses, reverse=True) and all(row["loss"] <= row["at_most"] for row in result["steps"])
    assert losses[-1] < 0.9 * losses[0] and 0.0 < result["guarantee"] < 1.0


def test_the_singular_values_of_three_variants_are_drawn(idx_folder, tmp_path):
    small = ("--images", 6, "--trials", 1, "--steps", 3, "--early", 2, "--folder", idx_folder)
    out = run(EXAMPLES / "reproduce_paper_a_spectra.py", *small, folder=tmp_path)
    result = json.loads((tmp_path / "paper-a-spectra" / "spectra.json").read_text())
    assert "projection + 3 AvgPool_3" in out and (tmp_path / "paper-a-spectra" / "spectra.png").is_file()
    values = {name: rows[0]["values"] for name, rows in result["trials"][0].items()}
    assert {len(found) for found in values.values()} == {60}
    assert values["projection"] != values["projection + 3 AvgPool_3"] != values["no skips"]
    assert len({rows[0]["loss"] for rows in result["trials"][0].values()}) == 3
