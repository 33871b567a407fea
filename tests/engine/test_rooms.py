"""Rooms of the package import downwards only."""

from __future__ import annotations

from pathlib import Path

import pytest
from rooms import levels_of, upward_imports
from shared import ROOT

PACKAGE = ROOT / "zimage_rt"
# From the lowest level up: a room, or a module of the top, imports from lower levels and from itself.
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
    ("decoding",),
    ("generation", "denoise"),
    ("engine",),
    ("session", "explain", "batch", "comfyui"),
    ("server",),
    ("cli",),
)
LEVEL = levels_of(ORDER)
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_downwards(path: Path) -> None:
    assert upward_imports(path, PACKAGE, "zimage_rt", LEVEL) == []


def test_every_room_has_a_level() -> None:
    found = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__init__", "__pycache__"} <= set(LEVEL)
    for room in PACKAGE.iterdir():
        if room.is_dir() and room.name != "__pycache__":
            assert (room / "__init__.py").is_file(), room
