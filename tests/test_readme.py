"""The README tells the truth: its Python runs, its commands stand where scripts look for them, its names exist."""

import pathlib
import re
import shlex
import warnings

import pytest
from real_models import MISSING
from real_models import _import as import_real

import trainable_nn as tnn
from trainable_nn import cli

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="the README is not beside the tests")
TEXT = README.read_text() if README.is_file() else ""
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def command(name):
    """What a script extracts: the fenced line below a marker."""
    return re.search(rf"<!-- command: {name} -->\n```sh\n(.*)\n```", TEXT).group(1)


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block {index + 1}" for index in range(len(BLOCKS))])
def test_every_python_block_runs_by_itself(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "torchvision" in code:
        if MISSING:
            pytest.skip(f"not installed: {', '.join(MISSING)}")
        import_real("torchvision")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(compile(code, str(README), "exec"), {"__name__": "readme"})  # noqa: S102, the README of this tree


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 4


def test_each_of_the_two_commands_does_its_own_set_up():
    assert command("demo").startswith("python3 -m venv .venv && ") and command("demo").endswith("trainable-nn demo")
    assert command("tests").startswith("python3 -m venv .venv && ") and command("tests").endswith("-m pytest")
    assert all("torch==2.13.0" in command(name) for name in ("demo", "tests"))


def test_the_extras_in_the_commands_exist():
    project = README.with_name("pyproject.toml").read_text()
    for extra in re.findall(r"\.\[([a-z,]+)\]", TEXT):
        for name in extra.split(","):
            assert re.search(rf"^{name} = ", project, re.MULTILINE), name


def test_the_layers_in_the_table_exist():
    rows = [line.split("|")[2] for line in TEXT.splitlines() if line.startswith("| ") and line.count("|") == 4]
    names = {name for row in rows for name in re.findall(r"`([A-Z]\w+)", row)}
    assert len(names) >= 18
    assert [name for name in sorted(names) if not hasattr(tnn, name)] == []
    for name in re.findall(r"`parametrizations\.(\w+)`", TEXT):
        assert hasattr(tnn.parametrizations, name)


def test_the_options_in_the_shell_examples_exist(capsys):
    lines = re.findall(r"^trainable-nn (.*)$", TEXT, re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line, comments=True)
        cli.main([words[0], "--help"])
        shown = capsys.readouterr().out
        assert [word for word in words if word.startswith("-") and word not in shown] == [], line


def test_the_links_lead_to_files():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target.startswith("https://") or (README.parent / target).exists(), target


def test_the_changelog_knows_this_version():
    assert f"## [{tnn.__version__}]" in README.with_name("CHANGELOG.md").read_text()
