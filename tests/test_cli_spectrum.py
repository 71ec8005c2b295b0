"""The command `spectrum`: its table, its JSON, its figure and its statuses, against dense matrices."""

import copy
import json
import pathlib

import oracles
import pytest
import torch
from torch import nn

import trainable_nn as tnn
from trainable_nn.cli import main
from trainable_nn.cli.spectrum import Request, Row, _holds, _spectra
from trainable_nn.cli.spectrum_plot import spectrum_figure
from trainable_nn.demo.resnet import PreActResNet18
from trainable_nn.linop import operator_norms_at_most

pytest.importorskip("matplotlib")

NET = ["trainable_nn.demo.resnet:PreActResNet18", "--model-arg", "width=2", "--input-shape", "1,3,8,8"]
STRANGE = """
from torch import nn
class Twice(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)
def net():
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Twice(2, 2, 3))
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def run(capsys):
    def call(*arguments):
        torch.manual_seed(0)
        status = main(["spectrum", *arguments])
        return status, *capsys.readouterr()

    return call


def test_each_layer_is_bounded_measured_and_compared_with_torch(run):
    status, out, _ = run(*NET, "--json")
    layers = {row["path"]: row for row in json.loads(out)["layers"]}
    torch.manual_seed(0)
    model = PreActResNet18(width=2)
    linear = {path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert status == 0
    assert set(layers) == set(linear)
    for path, layer in linear.items():
        row = layers[path]
        matrix = oracles.matrix_of(layer.double(), tuple(row["input_shape"]))
        truth = torch.linalg.svdvals(matrix)
        assert row["norm_at_most"] >= float(truth[0]) * (1 - 1e-12)
        assert row["largest"] == pytest.approx(float(truth[0]), rel=1e-6)
        assert row["smallest"] == pytest.approx(float(truth[-1]), rel=1e-6, abs=1e-15)
        assert row["side"] == ("outputs" if matrix.shape[0] < matrix.shape[1] else "inputs")
        assert row["torch_norm"] == pytest.approx(oracles.norm_of(layer.weight.flatten(1)), rel=1e-6)


def test_what_torchs_spectral_norm_leaves_is_what_its_own_layer_has_when_converged(run):
    _, out, _ = run(*NET, "--json", "--no-smallest")
    row = next(r for r in json.loads(out)["layers"] if r["path"] == "layer1.0.conv1")
    torch.manual_seed(0)
    layer = PreActResNet18(width=2).layer1[0].conv1.double()
    normed = nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=500).eval()
    left = oracles.norm_of(oracles.matrix_of(normed, tuple(row["input_shape"])))
    assert left > 1.1  # or the column would say nothing
    assert row["after_torch"] == pytest.approx(left, rel=1e-6)
    assert row["smallest"] is None


def test_the_table_names_every_layer_and_the_figure_is_a_picture(run, tmp_path):
    status, out, _ = run(*NET, "--plot", "s.png")
    assert status == 0
    for word in ("layer4.0.shortcut", "at most", "torch's spectral norm leaves up to", "Wrote s.png"):
        assert word in out
    assert pathlib.Path(tmp_path, "s.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_shortcut_that_a_conversion_puts_in_a_layers_place_is_drawn_after_it():
    request = Request("net", [], None, "1,3,8,8", "paper", 0.05, False, None)
    torch.manual_seed(0)
    model, shape = PreActResNet18(width=2).eval(), (1, 3, 8, 8)
    panels = _spectra(model, operator_norms_at_most(model, shape), request, shape)
    panels = panels["layer2.0.shortcut"]
    converted = tnn.convert_model(copy.deepcopy(model), recipe="paper").layer2[0].shortcut.double()
    truth = torch.linalg.svdvals(oracles.matrix_of(converted, (2, 8, 8)))
    assert list(panels) == ["before", "after (paper)"]
    assert torch.allclose(torch.tensor(panels["after (paper)"]), truth.float(), atol=1e-6)
    assert sum(value < 1e-12 for value in panels["before"]) > 0 < truth[-1]


def test_the_figure_has_a_curve_for_each_network_and_at_most_24_panels():
    spectra = {f"layer{i}": {"before": [2.0, 1.0], "after (paper)": [1.0, 0.5]} for i in range(30)}
    figure = spectrum_figure(spectra)
    assert len(figure.axes) == 24
    assert [axes.get_title() for axes in figure.axes][:: 23] == ["layer0", "layer29"]
    assert all(len(axes.get_legend().get_texts()) == 2 for axes in figure.axes)
    assert [list(line.get_ydata()) for line in figure.axes[0].lines[:2]] == [[2.0, 1.0], [1.0, 0.5]]


def test_a_layer_that_nothing_bounds_is_named_with_status_1(run, tmp_path):
    pathlib.Path(tmp_path, "strange.py").write_text(STRANGE)
    status, out, _ = run("strange.py:net", "--input-shape", "1,1,6,6")
    assert status == 1
    assert "1: operator_norm_at_most: Twice has a forward or a weight of its own" in " ".join(out.split())


def test_a_measured_value_above_its_bound_is_status_1():
    row = Row("a", "Linear", (2,), 1.0, 1.0, 0.5, (0.0, 0.0), (True, True), "inputs", 1.0, 1.0, "", ())
    assert _holds(row)
    assert not _holds(Row(**{**vars(row), "largest": 1.001}))
    assert not _holds(Row(**{**vars(row), "norm_at_most": None}))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input-shape", "a,b"], "--input-shape a,b: needs a batch and sizes above 0"),
        (["--input-shape", "1,0,8,8"], "needs a batch and sizes above 0"),
        (["--input-shape", "1,5,8,8"], "--input-shape 1,5,8,8: the model does not take it"),
        ([], "input-shape"),
        (["--input-shape", "1,3,8,8", "--plot", "nowhere/s.png"], "--plot nowhere/s.png: there is no such folder"),
        (["--input-shape", "1,3,8,8", "--rtol", "0"], "rtol must be a number above 0"),
    ],
)
def test_a_wrong_option_is_one_line_with_status_2(run, arguments, words):
    status, out, err = run("trainable_nn.demo.resnet:PreActResNet18", "--model-arg", "width=2", *arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and words in err
