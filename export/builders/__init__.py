"""Builders: one module per backend, which prepares a bundle's graphs for it and compiles them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from ..precision import Precision
    from ..recipe import ExportRecipe


class Builder(Protocol):
    """Names that a builder's module defines.

    Attributes:
        precisions: arithmetic per precision of a recipe.
        vaes: VAEs that the backend runs.
        tables: tables of a recipe that are for this backend.
        simplify: rewrites a traced graph in place, given the module's name; None for a backend that runs no graph.
        build: (plan, graph's path, folder, recipe, pipeline, progress) -> the module's engines; None for a backend
            that compiles nothing.
        quantize: (graph's path, weight file's path, samples) rewrites both in 8 bits, for a module whose plan is
            `calibrated`; None for a backend that has none.
    """

    precisions: Mapping[str, Precision]
    vaes: tuple[str, ...]
    tables: tuple[str, ...]
    simplify: Callable[..., None] | None
    build: Callable[..., Any] | None
    quantize: Callable[..., None] | None

    def check(self, recipe: ExportRecipe) -> None:
        """Raises RecipeError if the backend cannot serve the recipe, ExportError if it cannot be built for here."""


def builder_for(backend: str) -> Builder:
    """The builder of a backend, imported on demand because each needs libraries of its own."""
    return cast(Builder, importlib.import_module(f".{backend}", __name__))
