"""The cuda backend runs the weights themselves: nothing is traced, and a bundle is as large as its tensors."""

from __future__ import annotations

from ..errors import RecipeError
from ..precision import PRECISIONS
from ..recipe import ExportRecipe

# No graph, and so no parity: that is measured where a graph runs, on the same weights.
simplify = None
build = None
vaes = ("tiny",)
tables = ()
precisions = PRECISIONS


def check(recipe: ExportRecipe) -> None:
    """Raise RecipeError for what the cuda programs do not run."""
    if recipe.precision not in ("fp16", "bf16"):
        raise RecipeError(f"precision: the cuda backend runs fp16 and bf16, got {recipe.precision!r}")
    if recipe.vae is not None and "full" in recipe.vae:
        raise RecipeError("vae: the cuda backend has no full VAE; ask for vae = ['tiny'], or export for onnxruntime")
