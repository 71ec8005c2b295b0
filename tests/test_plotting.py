"""The figures: what stands in them, that they need no screen, and that they leave matplotlib's state alone."""

import builtins
import io
import math
import subprocess
import sys

import pytest

from trainable_nn import plotting
from trainable_nn.errors import OptionError

pytest.importorskip("matplotlib")

LOSSES = {"original": [1.0, 0.5, 0.2], "converted": [0.9, 0.4, 0.1]}
SHARES = {"original": [0.5, 0.7, 0.9], "converted": [0.6, 0.8, 0.95]}
SPECTRA = {"shortcut": {"original": [1.0, 0.5, 1e-17, 0.0], "converted": [2.0, 1.0, 0.5, 0.1]}}


def axes():
    return plotting.new_figure(4, 3).add_subplot()


def drawn(panel):
    return {line.get_label(): line for line in panel.get_lines()}


def test_loss_curves_hold_the_numbers_and_name_the_axes():
    panel = axes()
    plotting.loss_curves(panel, LOSSES, steps={"original": [1.2, 1.0, 0.6, 0.4, 0.3, 0.2]})
    assert list(drawn(panel)["original"].get_ydata()) == [1.0, 0.5, 0.2]
    assert list(drawn(panel)["original"].get_xdata()) == [1, 2, 3]
    assert panel.get_yscale() == "log"
    assert panel.get_xlabel() == "epoch" and "loss" in panel.get_ylabel() and panel.get_title()
    names = [text.get_text() for text in panel.get_legend().get_texts()]
    assert names == ["original", "converted", "thin: single batches"]
    steps = next(line for line in panel.get_lines() if len(line.get_xdata()) == 6)
    assert list(steps.get_xdata()) == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


def test_lines_differ_without_colour():
    panel = axes()
    plotting.loss_curves(panel, LOSSES)
    first, second = (drawn(panel)[name] for name in LOSSES)
    assert first.get_linestyle() != second.get_linestyle() and first.get_marker() != second.get_marker()


def test_accuracy_is_in_percent():
    panel = axes()
    plotting.accuracy_curves(panel, SHARES)
    assert list(drawn(panel)["original"].get_ydata()) == pytest.approx([50, 70, 90])
    assert "%" in panel.get_ylabel()


def test_singular_values_that_are_zero_are_counted_not_drawn():
    panel = axes()
    plotting.singular_value_curves(panel, SPECTRA["shortcut"], title="shortcut")
    lines = drawn(panel)
    assert list(lines["original (2 of 4 are 0)"].get_ydata()) == [1.0, 0.5]
    assert list(lines["converted"].get_xdata()) == [25, 50, 75, 100]


@pytest.mark.parametrize("spectra, panels", [({}, 2), (SPECTRA, 3), ({"a": SPECTRA["shortcut"], "b": SPECTRA["shortcut"]}, 4)])
def test_a_comparison_is_a_png_with_every_panel(tmp_path, spectra, panels):
    figure = plotting.comparison(LOSSES, SHARES, spectra, title="a title")
    assert len(figure.axes) == panels
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_diverged_run_and_an_empty_one_are_drawn_as_far_as_they_go():
    nothing = {"original": [1.0, math.nan, math.inf], "converted": []}
    plotting.comparison(nothing, nothing, {"a": {"original": [], "converted": [0.0]}}).savefig(io.BytesIO())


def test_drawing_touches_neither_pyplot_nor_the_backend():
    code = (
        "import sys, io; from trainable_nn import plotting\n"
        "plotting.comparison({'a': [1.0]}, {'a': [0.5]}, {}).savefig(io.BytesIO())\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_missing_matplotlib_is_named_with_its_command(monkeypatch):
    real = builtins.__import__

    def without_matplotlib(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(OptionError, match=r"pip install 'trainable_nn\[plot\]'"):
        plotting.new_figure(1, 1)
