"""The documents tell the truth: each page's code runs from top to bottom, links lead somewhere, the reference is current."""

import pathlib
import re
import warnings

import pytest

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the documents are not beside the tests")
PAGES = sorted(DOCS.rglob("*.md")) if DOCS.is_dir() else []
GUIDES = [page for page in PAGES if page.parent.name == "guides"]


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": f"docs.{page.stem}"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for number, code in enumerate(blocks_of(page), 1):
            exec(compile(code, f"{page.name}, block {number}", "exec"), names)  # noqa: S102, the documents of this tree


def test_there_is_a_guide_for_each_task_and_each_has_code():
    assert {page.stem for page in GUIDES} == {"convert", "certify", "step_size", "export", "extend"}
    assert all(len(blocks_of(page)) >= 3 for page in GUIDES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_reference_has_every_public_name_with_its_present_words():
    import inspect
    import sys

    sys.path.insert(0, str(DOCS))
    try:
        import make_reference
    finally:
        sys.path.remove(str(DOCS))
    page = (DOCS / "reference.md").read_text()
    rooms = make_reference.ROOMS.values()
    everything = [getattr(room, name) for _, room in rooms for name in make_reference.public_names(room)]
    assert len(everything) > 80
    silent = {value.__name__ for value in everything if not inspect.getdoc(value)}
    assert silent == set()
    stale = {value.__name__ for value in everything if inspect.getdoc(value) not in page}
    assert stale == set(), "run: python docs/make_reference.py"
