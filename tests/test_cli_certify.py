"""The commands certify and verify: rows, JSON, files, exit status."""

import json
import pathlib

import pytest

import trainable_nn as tnn
from trainable_nn.certify import Certificate
from trainable_nn.cli import main

pytest.importorskip("sklearn")

NET = """
import torch
from torch import nn
import trainable_nn as tnn

def net(leak=0.5, outputs=10):
    options = {"bias": False, "dtype": torch.float64}
    branch = nn.Sequential(tnn.WeightNormLinear(24, 24, **options), tnn.Tanh())
    block = tnn.ContractiveResidual(branch, strength=0.2)
    first = tnn.EntryNormLinear(64, 24, leak=leak, **options)
    return nn.Sequential(nn.Flatten(), first, block, tnn.OrthogonalReadout((24,), outputs, dtype=torch.float64))

def kinked():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))
"""
FEW = ["--images", "3"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    pathlib.Path("net.py").write_text(NET)


@pytest.fixture
def run(capsys):
    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_certify_prints_rows_and_writes_what_verify_accepts(run):
    status, out, _ = run("certify", "net.py:net", *FEW, "--output", "c.json")
    assert status == 0 and "Grade global" in out and "linearly independent samples" in out and "Wrote c.json" in out
    assert Certificate.from_json(pathlib.Path("c.json").read_text()).grade == "global"
    status, out, _ = run("verify", "c.json", "net.py:net", *FEW)
    assert status == 0 and "holds: grade global" in out
    status, out, _ = run("verify", "c.json", "net.py:net", "--images", "2", "--json")
    assert status == 1 and not json.loads(out)["holds"] and "inputs" in json.loads(out)["reason"]
    status, out, _ = run("verify", "c.json", "net.py:net", *FEW, "--seed", "1")
    assert status == 1 and "does not hold" in out and "weights" in out


def test_a_certificate_that_was_edited_does_not_hold(run):
    run("certify", "net.py:net", *FEW, "-o", "c.json")
    found = json.loads(pathlib.Path("c.json").read_text())
    found["lambda_lower"] *= 2
    pathlib.Path("c.json").write_text(json.dumps(found))
    status, out, _ = run("verify", "c.json", "net.py:net", *FEW)
    assert status == 1 and "lambda_lower" in out


def test_a_path_is_certified_and_verified(run):
    status, out, _ = run("certify", "net.py:net", *FEW, "--path", "2000", "-o", "p.json")
    assert status == 0 and "Grade ball" in out and "steps of" in out and "linearly independent samples" in out
    status, out, _ = run("verify", "p.json", "net.py:net", *FEW)
    assert status == 0 and "holds: grade ball" in out
    found = json.loads(pathlib.Path("p.json").read_text())
    found["losses"][1] *= 0.5
    pathlib.Path("p.json").write_text(json.dumps(found))
    status, out, _ = run("verify", "p.json", "net.py:net", *FEW)
    assert status == 1 and "losses[1]" in out
    status, out, _ = run("certify", "net.py:net", *FEW, "--path", "20", "--step-size", "1e4")
    assert status == 1 and "no constant step is proved" in out


def test_the_step_of_a_path_needs_a_path(run):
    for arguments, words in ((("--step-size", "0.1"), "--path"), (("--path", "9", "--step-size", "-1"), "step_size")):
        status, _, err = run("certify", "net.py:net", *FEW, *arguments)
        assert status == 2 and words in err


def test_status_1_where_the_grade_is_not_reached(run):
    status, out, _ = run("certify", "net.py:kinked", *FEW, "--json")
    assert status == 1
    found = json.loads(out)
    assert found["grade"] == "measured"
    kink = next(row for row in found["hypotheses"] if row["name"] == "smooth activations")
    assert kink["path"] == "2" and "SmoothReLU" in kink["remedy"] and not kink["holds"]
    status, _, _ = run("certify", "net.py:kinked", *FEW, "--at-least", "measured", "--json")
    assert status == 0


def test_cross_entropy_takes_the_labels(run):
    status, out, _ = run("certify", "net.py:net", *FEW, "--loss", "cross_entropy", "--model-arg", "leak=1.0")
    assert status == 0 and "1 / loss" in out


def test_verify_reads_a_certificate_from_a_checkpoint(run):
    run("certify", "net.py:net", *FEW, "-o", "c.json")
    certificate = Certificate.from_json(pathlib.Path("c.json").read_text())
    import torch

    from trainable_nn.cli import models

    torch.manual_seed(0)
    net = models.build("net.py:net").eval()
    tnn.save(net, "net.safetensors", certificate=certificate)
    status, out, _ = run("verify", "net.safetensors", "net.py:net", *FEW, "--seed", "5")  # weights from the file
    assert status == 0 and "holds" in out
    tnn.save(net, "plain.safetensors")
    status, _, err = run("verify", "plain.safetensors", "net.py:net", *FEW)
    assert status == 2 and "holds no certificate" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["certify", "net.py:net", "--data", "imagenet"], "must be one of digits"),
        (["certify", "net.py:net", "--data", "cifar10"], "needs --folder"),
        (["certify", "net.py:net", "--at-least", "best"], "must be one of global, ball"),
        (["certify", "net.py:net", "--size", "16"], "does not run on images"),
        (["certify", "net.py:net", "--loss", "hinge"], "unknown"),
        (["certify", "net.py:net", *FEW, "--model-arg", "outputs=7"], "Give it 10 outputs"),
        (["certify", "net.py:net", *FEW, "-o", "no/such/c.json"], "cannot be written"),
        (["verify", "none.json", "net.py:net"], "cannot be read"),
        (["verify", "net.py", "net.py:net"], "damaged"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_one_line_and_status_2(run, arguments, words):
    status, out, err = run(*arguments)
    assert status == 2 and words in err and err.count("\n") == 1 and out == ""
