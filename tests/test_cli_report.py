"""The command report: the page, the JSON, the grades and exit statuses."""

import json
import pathlib

import pytest
import torch
from report_reader import Page

import trainable_nn as tnn
from trainable_nn.cli import main
from trainable_nn.convert.tables import steps_table

pytest.importorskip("sklearn"), pytest.importorskip("matplotlib")

NET = """
import torch
from torch import nn
from torch.nn.functional import relu, adaptive_avg_pool2d
import trainable_nn as tnn

class Block(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()
    def forward(self, x):
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))) + self.downsample(x))

class ResNet(nn.Module):
    def __init__(self, channels=3, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4, 3, 1, 1, bias=False)
        self.layer1, self.layer2 = Block(4, 4), Block(4, 8, 2)
        self.fc = nn.Linear(8, classes)
    def forward(self, x):
        x = self.layer2(self.layer1(self.conv1(x)))
        return self.fc(adaptive_avg_pool2d(x, 1).flatten(1))

def provable():
    options = {"bias": False, "dtype": torch.float64}
    block = tnn.ContractiveResidual(nn.Sequential(tnn.WeightNormLinear(24, 24, **options), tnn.Tanh()), strength=0.2)
    first = tnn.EntryNormLinear(64, 24, leak=0.5, **options)
    return nn.Sequential(nn.Flatten(), first, block, tnn.OrthogonalReadout((24,), 10, dtype=torch.float64))
"""
FEW = ["--images", "2", "--steps", "3"]


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


def test_a_stock_resnet_is_converted_and_told_of(run):
    status, out, err = run("report", "net.py:ResNet", *FEW, "-o", "page.html")
    assert status == 0 and "Wrote page.html" in out and err == ""
    text = pathlib.Path("page.html").read_text(encoding="utf-8")
    found = Page(text)
    assert found.problems == [] and "the grey channel three times" in text
    torch.manual_seed(0)
    from trainable_nn.cli import models

    expected = tnn.plan(models.build("net.py:ResNet").eval())
    rows = next(rows for title, rows in found.tables.items() if title == steps_table(expected).title)
    assert [row[0][0] for row in rows] == ["layer1", "layer2"]
    assert "Block layer2" in text and "before:" in text and "after:" in text


def test_json_says_where_and_agrees_with_certify(run):
    status, out, _ = run("report", "net.py:provable", *FEW, "--json")
    found = json.loads(out)
    assert status == 0 and found["output"] == "report.html" and pathlib.Path("report.html").exists()
    assert "already converted" in found["missing"]["conversion"]
    _, out, _ = run("certify", "net.py:provable", "--images", "2", "--json")
    certificate = json.loads(out)
    assert (found["grade"], found["lambda_lower"]) == (certificate["grade"], certificate["lambda_lower"])
    rows = {row[0][0]: row[2][1] for row in Page(pathlib.Path("report.html").read_text()).tables["Numbers"]}
    assert rows["lambda_min(DF DF^T) at least"] == certificate["lambda_lower"] and found["step_size"] == rows["step size"]


def test_the_provable_recipe_reaches_a_grade_that_can_be_asked_for(run):
    arguments = ("report", "net.py:ResNet", *FEW, "--model-arg", "channels=1")
    status, out, _ = run(*arguments, "--recipe", "provable", "--at-least", "ball", "--json")
    assert status == 0 and json.loads(out)["grade"] in ("ball", "global")
    status, out, _ = run(*arguments, "--recipe", "none", "--at-least", "ball", "--json")
    assert status == 1 and "--recipe none" in json.loads(out)["missing"]["conversion"]
    assert pathlib.Path("report.html").exists()


def test_names_with_markup_are_escaped(run):
    pathlib.Path("a<b>&.py").write_text(NET)
    status, _, _ = run("report", "a<b>&.py:provable", *FEW, "-o", "p.html")
    text = pathlib.Path("p.html").read_text()
    assert status == 0 and "<b>&.py" not in text and "a&lt;b&gt;&amp;.py:provable" in text and Page(text).problems == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "imagenet"], "must be one of digits"),
        (["--at-least", "best"], "must be one of global, ball"),
        (["--size", "16"], "does not run on images (1, 16, 16)"),
        (["-o", "no/such/page.html"], "cannot be written"),
        (["-o", "."], "cannot be written"),
        (["--recipe", "papre"], "papre"),
        (["--loss", "hinge"], "hinge"),
        (["--steps", "0"], "steps"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_one_line_and_status_2(run, arguments, words):
    status, out, err = run("report", "net.py:provable", *FEW, *arguments)
    assert status == 2 and words in err and err.count("\n") == 1 and out == ""
    assert not pathlib.Path("report.html").exists()
