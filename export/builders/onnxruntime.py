"""ONNX Runtime runs the bundle's graphs as they are; this makes them lean first."""

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
    """ONNX Runtime runs whatever a recipe can ask for."""
