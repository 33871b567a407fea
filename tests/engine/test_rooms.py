"""Rooms of the package import downwards only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from shared import ROOT

PACKAGE = ROOT / "zimage_rt"
# From the lowest up: a room, or a module of the top, imports what stands before it, and its own room.
ORDER = (
    ("_version", "errors", "limits", "checks", "atomic_write", "rwlock", "gate", "not_finite", "_core", "_cuda"),
    ("sampling",),
    ("bundle",),
    ("image",),
    ("request",),
    ("backends",),
    ("lora",),
    ("metadata",),
    ("result",),
    ("stages", "prompts"),
    ("generation",),
    ("engine",),
    ("session", "explain", "batch"),
    ("server",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def imports(path: Path) -> list[tuple[str, int]]:
    """The rooms and top-level modules that a module of the package imports, with the lines."""
    package = ["zimage_rt", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [(name.split(".")[1], node.lineno) for name in names if name.startswith("zimage_rt.")]
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_downwards(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name, line in imports(path):
        assert name == own or LEVEL[name] < LEVEL[own] or (LEVEL[name] == LEVEL[own] == 0), (
            f"{path.relative_to(ROOT)}:{line}: {own} imports {name}, which stands above it"
        )


def test_every_room_has_its_place() -> None:
    found = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__init__", "__pycache__"} <= set(LEVEL)
    for room in PACKAGE.iterdir():
        if room.is_dir() and room.name != "__pycache__":
            assert (room / "__init__.py").is_file(), room
