"""Rooms of `export/` import downwards only."""

from __future__ import annotations

from pathlib import Path

import pytest
from rooms import levels_of, upward_imports
from shared import ROOT

FOLDER, PACKAGE = ROOT / "export", "zimage_rt.export"
# From the lowest level up: a room, or a module of the top, imports from lower levels and from itself.
ORDER = (
    ("errors", "precision", "calibration"),
    ("modeling", "graph", "replace_folder", "tensorrt_options"),
    ("checkpoint",),
    ("recipe", "plan", "weights", "tokenizer"),
    ("parity", "builders"),
    ("bundle",),
    ("cli",),
)
LEVEL = levels_of(ORDER)
FILES = sorted(path for path in FOLDER.rglob("*.py") if path != FOLDER / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_module_imports_downwards(path: Path) -> None:
    assert upward_imports(path, FOLDER, PACKAGE, LEVEL) == []


def test_every_room_has_a_level() -> None:
    found = {path.name.removesuffix(".py") for path in FOLDER.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__init__", "__pycache__"} == set(LEVEL)
