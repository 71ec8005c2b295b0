"""Imports go strictly down the floors, and files stay small enough to be one idea."""

import ast
import pathlib

import pytest

import trainable_nn

PACKAGE = pathlib.Path(trainable_nn.__file__).parent
FLOORS = {
    "errors": -1, "tables": -1,  # every room raises and prints them
    "ops": 0, "theory": 0, "tracing": 0,
    "linop": 0.5,  # its fused products are operators
    "functional": 1, "spectra": 1,
    "modules": 2, "parametrizations": 2,
    "convert": 3, "certify": 3,
    "checkpoint": 4, "optim": 4, "plotting": 4,  # a file holds what was converted and certified
    "datasets": 5, "report": 5,
    "demo": 6,
    "cli": 7,
}  # fmt: skip
TOP = {"__init__", "__main__"}  # names and the way in: they may import anything


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: pathlib.Path) -> set[str]:
    """Rooms of this package that a file imports, however deep in the code the import stands."""
    package = ["trainable_nn", *path.relative_to(PACKAGE).parts[:-1]]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*stem, alias.name]) for alias in node.names]
        parts = [name.split(".") for name in names]
        rooms |= {p[1] for p in parts if p[0] == "trainable_nn" and len(p) > 1 and p[1] in FLOORS}
    return rooms


def violations(room: str, imports: set[str]) -> set[str]:
    return {other for other in imports - {room} if FLOORS[other] >= FLOORS[room]}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if room_of(p) not in TOP)


def test_every_room_of_the_package_has_a_floor():
    assert {room_of(p) for p in FILES} <= set(FLOORS)
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    assert violations(room_of(path), imported_rooms(path)) == set()


def test_an_import_that_goes_up_or_sideways_is_seen():
    assert violations("ops", {"modules"}) == {"modules"}
    assert violations("convert", {"certify", "errors"}) == {"certify"}
    assert violations("functional", {"modules", "ops"}) == {"modules"}
    assert violations("modules", {"functional", "theory", "errors"}) == set()


def test_the_reader_of_imports_sees_each_form(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "modules").mkdir()
    path = tmp_path / "modules" / "linear.py"
    path.write_text(
        "import trainable_nn.ops\nfrom .. import functional\nfrom ..theory.pl import x\nfrom . import conv\n"
        "def f():\n    from trainable_nn import convert\nfrom torch import nn\n"
    )
    assert imported_rooms(path) == {"ops", "functional", "theory", "modules", "convert"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_is_one_idea(path):
    assert len(path.read_text().splitlines()) <= 400


def test_importing_the_package_leaves_the_command_line_and_its_libraries_alone():
    import subprocess
    import sys

    code = (
        "import sys, trainable_nn\n"
        "print([m for m in ('typer', 'matplotlib', 'sklearn', 'torch_optimizer', 'trainable_nn.cli') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
