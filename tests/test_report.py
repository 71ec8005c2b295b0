"""The page of a report: its numbers are the findings', it stands alone, and every reader can read it."""

import copy
import dataclasses
import json
import math
import re
import shutil
import subprocess
from html import escape

import pytest
import torch
from report_reader import Page
from rich.console import Console
from small_resnets import PostActBlock, SmallResNet
from torch import nn

import trainable_nn as tnn
from trainable_nn import plotting, tables
from trainable_nn.report import Findings, Losses, Missing, examine, numbers, page
from trainable_nn.report import examine as the_function
from trainable_nn.report.blocks import evenly
from trainable_nn.report.style import CSS

pytest.importorskip("matplotlib")

EVIL = '<script>alert("1")</script> & <img src=x>'
HEADINGS = 8


_written = {}


def written(findings: Findings) -> str:
    """Its page, made once."""
    if id(findings) not in _written:
        _written[id(findings)] = (findings, page(findings))  # kept, so that no other gets its id
    return _written[id(findings)][1]


def provable(**options):
    torch.manual_seed(0)
    options = {"bias": False, "dtype": torch.float64, **options}
    branch = nn.Sequential(tnn.WeightNormLinear(6, 6, **options), tnn.Tanh())
    first = tnn.EntryNormLinear(8, 6, leak=0.5, **options)
    block = tnn.ContractiveResidual(branch, strength=0.2)
    return nn.Sequential(nn.Flatten(), first, block, tnn.OrthogonalReadout((6,), 2, dtype=torch.float64))


def samples(count, *shape, outputs):
    generator = torch.Generator().manual_seed(1)
    numbers = {"generator": generator, "dtype": torch.float64}
    return torch.randn(count, *shape, **numbers), torch.randn(count, outputs, **numbers)


@pytest.fixture(scope="module")
def proved() -> Findings:
    return examine(provable(), *samples(3, 8, outputs=2), steps=12, title=EVIL, facts=(("Model", EVIL),))


@pytest.fixture(scope="module")
def converted() -> Findings:
    torch.manual_seed(0)
    original = SmallResNet(PostActBlock, 2, 3).double().eval()
    model = tnn.convert_model(original, sample_input=torch.randn(2, 3, 8, 8))
    return examine(model, *samples(2, 3, 8, 8, outputs=3), original=original, steps=5, title="small")


@pytest.fixture(scope="module")
def empty() -> Findings:
    nothing = Missing(f"Because {EVIL}.")
    return Findings("nothing", (), *(nothing,) * 7)


@pytest.fixture(params=["proved", "converted", "empty"])
def findings(request) -> Findings:
    return request.getfixturevalue(request.param)


def test_the_page_is_balanced_and_its_ids_are_its_own(findings):
    found = Page(written(findings))
    assert found.problems == []
    assert len(found.ids) == len(set(found.ids))
    assert set(found.labels) <= set(found.ids) and len(found.headings) == HEADINGS
    assert "script" not in found.tags and "img" not in found.tags


def test_the_reader_of_pages_sees_what_is_wrong():
    assert Page("<p><b>x</p>").problems and Page("<p onclick='x'>x</p>").problems
    assert Page("<img src='http://x'>").fetched == [("img", "src", "http://x")]


def test_the_page_fetches_nothing(findings):
    text = written(findings)
    found = Page(text)
    assert found.fetched == [] and "link" not in found.tags and "@import" not in text
    assert not re.search(r"https?://", text)
    assert all(target.startswith("#") and target[1:] in found.ids for target in found.targets)
    assert all(name in found.ids for name in re.findall(r"url\(#([^)]*)\)", text)) and not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text and 'name="viewport" content="width=device-width' in text


def test_every_chart_has_words_and_the_pages_colours(findings):
    found = Page(written(findings))
    assert len(found.charts) == {EVIL: 5, "small": 7, "nothing": 0}[findings.title]
    for chart in found.charts:
        assert chart["role"] == "img" and len(chart["aria-labelledby"].split()) == 2
        assert len(chart["said-title"]) > 5 and re.search(r"\d", chart["said-desc"])
    drawn = "".join(re.findall(r"<svg.*?</svg>", written(findings), re.DOTALL))
    assert not re.search(r"#[0-9a-fA-F]{6}\b", drawn)  # a fixed colour would vanish in one of the schemes


def test_texts_are_escaped(proved, empty):
    for findings, times in ((proved, 3), (empty, 7)):
        assert "<script" not in written(findings)
        assert written(findings).count("&lt;script&gt;") >= times


def test_numbers_on_the_page_are_the_certificates(proved):
    certificate = proved.certificate
    assert certificate.grade == "global"
    rows = {row[0][0]: row[2][1] for row in Page(written(proved)).tables["Numbers"]}
    assert rows == {
        "loss now": certificate.initial_loss,
        "lambda_min(DF DF^T) at least": certificate.lambda_lower,
        "norm of DF at most": certificate.jacobian_upper,
        "step size": certificate.step_size,
        "loss factor a step at most": certificate.rate,
        "radius": certificate.radius,
        "smoothness at most": certificate.smoothness_upper,
        "proved down to a loss of": certificate.goal,
    }


def test_every_row_stands_on_the_page_with_its_mark_and_remedy(converted):
    certificate = converted.certificate
    found = Page(written(converted)).tables
    for holds, word in ((True, "✓ holds"), (False, "✗ fails")):
        rows = [row for row in certificate.hypotheses if row.holds is holds]
        title = next(name for name in found if name.startswith(f"Every row that {'holds' if holds else 'fails'}"))
        assert rows and str(len(rows)) in title and len(found[title]) == len(rows)
        for row, cells in zip(rows, found[title], strict=True):
            assert cells[0][0] == word or (row.grade == "" and "no grade needs it" in cells[0][0])
            assert (cells[1][0], cells[3][0], cells[4][1], cells[5][1]) == (row.name, row.kind, row.value, row.bound)
            assert cells[7][0] == ("" if holds else " ".join(row.remedy.split()))
    near = found["In the way of grade ball"]
    assert {cells[1][0] for cells in near} == {row.name for row in certificate.failing if row.grade == "ball"}


def test_the_plan_and_what_the_blocks_were_before(converted):
    found = Page(written(converted)).tables
    plan = next(rows for title, rows in found.items() if "places change" in title)
    assert [row[0][0] for row in plan] == [step.path for step in converted.conversion.steps]
    assert set(converted.spectra) == {"before", "after"}
    blocks = {row[0][0]: [cell[1] for cell in row[1:]] for row in found["Each block"]}
    for path, values in blocks.items():
        before, after = ({s.path: s for s in those}[path] for those in converted.spectra.values())
        assert values[4:] == [before.largest, after.largest]
    assert any(s.largest != t.largest for s, t in zip(*converted.spectra.values(), strict=True))


def test_spectra_are_those_of_a_dense_jacobian(proved):
    model, (inputs, _) = provable().eval(), samples(3, 8, outputs=2)
    point = model[1](inputs[:1])
    dense = torch.autograd.functional.jacobian(model[2], point).reshape(6, 6)
    (spectrum,) = proved.spectra["now"]
    torch.testing.assert_close(spectrum.values, torch.linalg.svdvals(dense), rtol=1e-12, atol=1e-12)


def gradient_descent(model, inputs, targets, step, steps):
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = []
    for _ in range(steps + 1):
        loss = (model(inputs) - targets).square().mean()
        losses.append(float(loss.detach()))
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= step * gradient
    return losses


def test_measured_losses_are_those_of_real_descent_and_stay_under_the_proved_ones(proved):
    for losses in (proved.prediction, proved.descent):
        expected = gradient_descent(provable().train(), *samples(3, 8, outputs=2), losses.step_size, 12)
        assert list(losses.measured) == pytest.approx(expected, rel=1e-9)
    assert list(proved.descent.said) == proved.certificate.loss_curve(range(13))
    assert "never stands above" in numbers.above(proved.descent)
    assert proved.prediction.measured[-1] < 0.1 * proved.prediction.measured[0]


def test_a_loss_above_its_bound_is_said():
    assert "above the bound at 1 steps, first at 1" in numbers.above(Losses(0.1, (1.0, 0.5), (1.0, 0.6)))
    assert "first at 1" in numbers.above(Losses(0.1, (1.0, 0.5), (1.0, math.nan)))


def test_the_prediction_is_exact_for_a_network_linear_in_its_parameters():
    linear = nn.Linear(5, 2).double()
    found = examine(linear, *samples(3, 5, outputs=2), steps=20)
    assert list(found.prediction.measured) == pytest.approx(list(found.prediction.said), rel=1e-9, abs=1e-15)
    assert isinstance(found.spectra, Missing) and "No residual block" in found.spectra.reason


def test_norms_on_the_page_bound_the_layers(converted):
    rows = {row[0][0]: row[3][1] for row in Page(written(converted)).tables["Each linear layer"]}
    assert len(rows) > 5 and all(bound > 0 for bound in rows.values())
    torch.manual_seed(0)
    linear = SmallResNet(PostActBlock, 2, 3).double().linear
    true = float(torch.linalg.matrix_norm(linear.weight.detach(), 2))
    assert true <= rows["linear"] < 1.1 * true  # so a layer a tenth larger would be told from it


def test_a_part_that_cannot_be_computed_says_why_and_stops_no_other(monkeypatch):
    monkeypatch.setitem(the_function.__globals__, "MOST_ROWS", 5)
    inputs, _ = samples(3, 8, outputs=2)
    model = provable()

    def refuses(*arguments, **options):
        raise RuntimeError("no <rule> here")

    monkeypatch.setitem(the_function.__globals__, "operator_norms_at_most", refuses)
    found = examine(model, inputs, torch.tensor([0, 1, 0]), loss="cross_entropy", steps=2)
    assert set(found.missing()) == {"conversion", "kernel", "prediction", "norms"}
    assert "kernel of 6 rows" in found.kernel.reason and "RuntimeError: no <rule> here" in found.norms.reason
    assert "kernel of 6 rows" in written(found) and "no &lt;rule&gt; here" in written(found)
    assert found.certificate.grade == "global" and len(found.descent.measured) == 3


def test_the_squared_loss_alone_is_predicted():
    inputs, _ = samples(2, 8, outputs=2)
    found = examine(provable(), inputs, torch.tensor([0, 1]), loss="cross_entropy", steps=2)
    assert "cross_entropy" in found.prediction.reason and found.kernel.extremes.smallest > 0


def test_wrong_options_are_refused():
    for options in ({"loss": "hinge"}, {"steps": 0}):
        with pytest.raises(ValueError, match="loss must be one of mse, cross_entropy"):
            examine(provable(), *samples(2, 8, outputs=2), **options)


def test_the_model_and_the_generator_stay_as_they_are():
    torch.manual_seed(3)
    model = SmallResNet(PostActBlock, 2, 3).double().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    examine(model, *samples(2, 3, 8, 8, outputs=3), steps=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_page_is_the_same_twice_and_the_summary_is_json(proved):
    assert page(proved) == written(proved)
    summary = json.loads(json.dumps(proved.summary()))
    assert summary["grade"] == "global" and summary["step_size"] == proved.certificate.step_size
    assert summary["last_losses"]["descent"]["said"] == proved.descent.said[-1]


def test_a_curve_that_stays_where_it_is_is_told_and_not_drawn(proved):
    flat = dataclasses.replace(proved, descent=Losses(1e-20, (1.0, 0.9999), (1.0, 0.99)))
    assert "no curve to draw" not in written(flat)
    flat = dataclasses.replace(proved, descent=Losses(1e-20, (1.0, 0.9999), (0.9999, 0.9998)))
    assert "no curve to draw" in written(flat) and len(Page(written(flat)).charts) == len(Page(written(proved)).charts) - 1


def test_few_are_chosen_with_both_ends():
    assert evenly([1, 2, 3], 4) == [1, 2, 3]
    assert evenly(range(101), 5) == [0, 25, 50, 75, 100]


# colours


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_both_schemes_have_the_contrast_that_reading_needs():  # WCAG 2.1, 1.4.3 and 1.4.11
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#888888") < 3
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in CSS.split("@media (prefers")[:2])
    assert set(light) == set(dark) and light["card"] != dark["card"]
    for scheme in (light, dark):
        for name in ("ink", "soft", "good", "bad", "doubt", "accent"):
            assert contrast(scheme[name], scheme["card"]) >= 4.5, name
        for name in (f"series-{i}" for i in range(1, 5)):
            assert contrast(scheme[name], scheme["card"]) >= 3.0, name


# tables in notebooks and terminals


def printed(value) -> str:
    console = Console(width=200, color_system=None, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(value)
    return console.export_text()


def test_certificates_plans_and_kernels_show_in_notebooks_and_terminals(proved, converted):
    certificate, plan, kernel = proved.certificate, converted.conversion, proved.kernel
    shown = {
        certificate: ("Grade global", f"{certificate.step_size:.6g}", "linearly independent samples"),
        plan: ("places change", "layer2.0", "moved to pre-activation"),
        kernel.extremes: ("smallest", f"{kernel.extremes.smallest:.6g}", "proved at least"),
        kernel.prediction: ("condition number", f"{kernel.prediction.condition_number:.6g}", "effective dimension"),
    }
    for value, parts in shown.items():
        text = value._repr_html_()
        assert Page(text).problems == [] and all(part in text for part in parts)
        assert all(part in " ".join(printed(value).split()) for part in parts)


def test_marks_are_read_without_colours():
    table = tables.Table("T", ("a", "b"), ((tables.Cell("holds", "good"), "[bold]x<y"), (tables.Cell("no", "bad"), "")))
    assert "✓ holds" in printed(table) and "✗ no" in printed(table) and "[bold]x<y" in printed(table)
    assert "<b>✓</b> holds" in table.to_html() and "x&lt;y" in table.to_html()
    with pytest.raises(ValueError, match="1 cells stands under 2 columns"):
        tables.Table("T", ("a", "b"), (("x",),))


# the same plots as figures


def test_the_plots_stand_in_plotting():
    figure = plotting.new_figure(8, 3)
    kernel, losses, norms = figure.subplots(1, 3)
    plotting.kernel_spectrum(kernel, [3.0, 0.0, 1.0], noise_floor=1e-9)
    assert list(kernel.get_lines()[0].get_ydata()) == [3.0, 1.0]
    assert "1 of 3 are not positive" in kernel.get_legend().get_texts()[0].get_text()
    plotting.descent_curves(losses, {"predicted": [1.0, 0.1], "measured": [1.0, 0.2]}, title="losses")
    assert losses.get_yscale() == "log" and list(losses.get_lines()[1].get_ydata()) == [1.0, 0.2]
    plotting.norm_bounds(norms, [0.5, 2.0], title="norms")
    assert list(norms.get_lines()[0].get_xdata()) == [1, 2] and norms.get_lines()[1].get_ydata()[0] == 1.0
    flat = plotting.new_figure(4, 3).add_subplot()
    plotting.descent_curves(flat, {"proved": [1.0, 0.99]}, title="flat")
    assert flat.get_yscale() == "linear"


# a real browser

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
WIDTHS = (320, 390, 820, 1280)
PROBE = """<!DOCTYPE html><meta charset="utf-8"><body>FRAMES<script>onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => { const root = frame.contentDocument.documentElement;
    const inner = [...root.querySelectorAll(".scroll")].map(part => part.scrollWidth - part.clientWidth);
    return {width: frame.contentWindow.innerWidth, content: root.scrollWidth, inner: Math.max(0, ...inner)}; });
  document.title = JSON.stringify(found); };</script>"""


def browse(*arguments, url) -> subprocess.CompletedProcess:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    return subprocess.run([BROWSER, *options, *arguments, url], capture_output=True, text=True, timeout=120, check=True)


def widths(texts: list[str], folder) -> list[dict]:
    """What each page holds in frames of each width, everything opened."""
    sources = [escape(text.replace("<details>", "<details open>")) for text in texts]
    frame = '<iframe width="{}" height="800" frameborder="0" srcdoc="{}"></iframe>'.format
    frames = "".join(frame(width, source) for source in sources for width in WIDTHS)
    (folder / "probe.html").write_text(PROBE.replace("FRAMES", frames), encoding="utf-8")
    done = browse("--dump-dom", "--window-size=1400,900", url=(folder / "probe.html").as_uri())
    assert ":CONSOLE" not in done.stderr
    return json.loads(re.search(r"<title>(.*?)</title>", done.stdout).group(1))


@pytest.mark.skipif(BROWSER is None, reason="no chromium; Debian has it as the package chromium")
def test_nothing_is_wider_than_the_screen_and_the_console_is_silent(converted, tmp_path):
    title = "a.very.long.module.path:" + "Network" * 20
    long = written(converted).replace("<h1>small</h1>", f"<h1>{title}</h1>")
    wide = long.replace("<main>", '<main><div style="width:900px">x</div>')
    found = widths([long, wide], tmp_path)
    assert title in long and [frame["width"] for frame in found] == 2 * list(WIDTHS)
    for frame in found[: len(WIDTHS)]:
        assert frame["content"] <= frame["width"] and (frame["inner"] == 0 or frame["width"] > 768), frame
    assert found[len(WIDTHS)]["content"] > 320  # the law above can fail


@pytest.mark.skipif(BROWSER is None, reason="no chromium; Debian has it as the package chromium")
def test_screenshots_for_a_person(converted, tmp_path):
    """Phone and desk, light and dark: look at them under pytest's --basetemp."""
    pillow = pytest.importorskip("PIL.Image")
    (tmp_path / "report.html").write_text(written(converted), encoding="utf-8")
    corners = {}
    for scheme, setting in (("light", 1), ("dark", 0)):
        for width, height in ((390, 844), (1280, 900)):
            file = tmp_path / f"report-{scheme}-{width}.png"
            options = (f"--blink-settings=preferredColorScheme={setting}", f"--window-size={width},{height}")
            browse(*options, f"--screenshot={file}", url=(tmp_path / "report.html").as_uri())
            shot = pillow.open(file).convert("RGB")
            assert shot.size == (width, height) and len(shot.getcolors(2**24)) > 50
            corners[scheme, width] = sum(shot.getpixel((2, 2)))
    assert all(corners["light", width] > 600 and corners["dark", width] < 150 for width in (390, 1280))
