"""Builder for the cuda backend, whose bundles hold weights without graphs."""

from __future__ import annotations

from ..errors import RecipeError
from ..precision import PRECISIONS
from ..recipe import ExportRecipe

# Without a graph there is no parity check: a bundle for onnxruntime measures it on the same weights.
simplify = None
build = None
vaes = ("tiny",)
tables = ()
precisions = PRECISIONS


def check(recipe: ExportRecipe) -> None:
    """Raises RecipeError: fp32 or the full VAE, which the backend does not run."""
    if recipe.precision == "fp32":
        raise RecipeError("precision: the cuda backend runs bf16, fp16, int8 and fp8, got 'fp32'")
    if recipe.vae is not None and "full" in recipe.vae:
        raise RecipeError("vae: the cuda backend has no full VAE; ask for vae = ['tiny'], or export for onnxruntime")
