"""The command `ntk`: its table, its JSON, its figure, its status."""

import json

import pytest
import torch

from trainable_nn.cli import main

pytest.importorskip("sklearn")

NET = "net.py:Net"
SOURCE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=20, bias=True):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))
        self.requires_grad_(bias)
        self[3].requires_grad_(True)
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(SOURCE)


def test_the_table_shows_spectrum_layers_and_losses_and_the_figure_is_written(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    status = main(["ntk", NET, "--images", "6", "--steps", "8", "--by-layer", "--plot", "kernel.png"])
    out = capsys.readouterr().out
    assert status == 0
    for words in ("lambda(DF)", "noise floor", "By layer", "predicted loss", "measured loss", "DF has full rank"):
        assert words in out
    assert (tmp_path / "kernel.png").read_bytes()[:4] == b"\x89PNG"


def test_json_holds_the_numbers_and_the_prediction_starts_where_training_does(capsys):
    assert main(["ntk", NET, "--images", "6", "--steps", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 6 and found["outputs"] == 10 and len(found["eigenvalues"]) == 60
    assert found["predicted_loss"][0] == pytest.approx(found["measured_loss"][0], rel=1e-9)
    assert found["measured_loss"][5] < found["measured_loss"][0]
    assert 0 < found["extremes"]["smallest_at_least"] <= found["eigenvalues"][0] * (1 + 1e-9)
    assert found["full_rank"] is True


def test_a_kernel_without_full_rank_has_status_1(capsys):
    # only the last layer trains, 3 features and a bias for 6 images: rank 40 of 60
    assert main(["ntk", NET, "--model-arg", "width=3", "--model-arg", "bias=False", "--images", "6", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["full_rank"] is False and found["condition_number"] is None or found["condition_number"] > 1e12


def test_a_question_without_an_answer_has_status_2(capsys):
    assert main(["ntk", NET, "--data", "nothing"]) == 2
    assert main(["ntk", NET, "--images", "4", "--step-size", "-1"]) == 2
    err = capsys.readouterr().err
    assert "--data nothing" in err and "--step-size -1" in err


def test_float32_says_so(capsys):
    assert main(["ntk", NET, "--images", "3", "--steps", "1", "--float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dtype"] == "float32" and found["noise_floor"] > torch.finfo(torch.float32).eps
