"""What each backend needs of a bundle; one file per backend.

A builder has `vaes`, those its backend runs; `check(recipe)`, which raises RecipeError for what it cannot serve; and
`simplify(model, plan)`, or None where it runs no graph.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# Backends that zimage-export knows. A bundle for onnxruntime serves the cuda backend too, if its precision does.
BUILDERS = ("onnxruntime", "cuda")


def builder_for(backend: str) -> ModuleType:
    """The builder's module, imported only when asked for: each needs libraries of its own."""
    return importlib.import_module(f".{backend}", __name__)
