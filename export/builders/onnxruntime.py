"""Builder for ONNX Runtime, which runs the bundle's graphs."""

from __future__ import annotations

from ..errors import RecipeError
from ..graph.optimize import simplify
from ..graph.static_int8 import quantize_convolutions as quantize
from ..precision import INT8_CPU, PRECISIONS
from ..recipe import ExportRecipe

__all__ = ["build", "check", "precisions", "quantize", "simplify", "tables", "vaes"]

build = None
vaes = ("tiny", "full")
tables = ()
precisions = {**PRECISIONS, "int8": INT8_CPU}


def check(recipe: ExportRecipe) -> None:
    """Raises RecipeError: fp8, for which ONNX Runtime has no product."""
    if recipe.precision == "fp8":
        raise RecipeError("precision: onnxruntime has no product in fp8; export in int8, or for the cuda backend")
