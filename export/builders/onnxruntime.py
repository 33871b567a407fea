"""Builder for ONNX Runtime, which runs the bundle's graphs."""

from __future__ import annotations

from ..graph.optimize import simplify
from ..precision import PRECISIONS
from ..recipe import ExportRecipe

__all__ = ["build", "check", "precisions", "simplify", "tables", "vaes"]

build = None
vaes = ("tiny", "full")
tables = ()
precisions = PRECISIONS


def check(recipe: ExportRecipe) -> None:
    """Accepts every recipe."""
