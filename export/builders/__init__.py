"""What each backend needs of a bundle; one file per backend.

A builder has `precisions`, by name in the recipe; `vaes`, those its backend runs; `tables`, those of the recipe that
are for it; `check(recipe)`, which raises RecipeError for what it cannot serve; `simplify(model, plan)`, or None where
it runs no graph; and `build(plan, graph, folder, recipe, pipeline, progress)`, which compiles a module's graph and
returns its engines, or None where nothing is compiled.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def builder_for(backend: str) -> ModuleType:
    """The builder's module, imported only when asked for: each needs libraries of its own."""
    return importlib.import_module(f".{backend}", __name__)
