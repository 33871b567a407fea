"""Builder for the cuda backend, whose bundles hold weights without graphs."""

from __future__ import annotations

from ..errors import RecipeError
from ..precision import PRECISIONS
from ..recipe import ExportRecipe

# Without a graph there is no parity check: a bundle for onnxruntime measures it on the same weights.
simplify = None
build = None
vaes = ("tiny", "full")
tables = ()
quantize = None
precisions = PRECISIONS


def check(recipe: ExportRecipe) -> None:
    """Raises RecipeError: fp32, which the backend does not run."""
    if recipe.precision == "fp32":
        raise RecipeError("precision: the cuda backend runs bf16, fp16, int8 and fp8, got 'fp32'")
