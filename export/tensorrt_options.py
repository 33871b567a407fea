"""What a recipe can ask of TensorRT: its `[tensorrt]` table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from zimage_rt.bundle.manifest import ShapeRanges

from .errors import RecipeError


@dataclasses.dataclass(frozen=True)
class TensorRTOptions:
    """How plans are built.

    Attributes:
        sm: compute capabilities to build for, as in `86`; none means the package's default.
        split: modules to build as several plans that run in order, and how many.
        profiles: the ranges of each optimisation profile; none means one, the recipe's shapes. TensorRT tunes each
            for its own `opt`.
        workspace_gb: the most device memory that one layer may take for itself; None means no limit.
        optimization_level: 0 (fastest build) to 5; None means the package's default.
    """

    sm: tuple[int, ...] = ()
    split: Mapping[str, int] = dataclasses.field(default_factory=dict)
    profiles: tuple[ShapeRanges, ...] = ()
    workspace_gb: float | None = None
    optimization_level: int | None = None

    def __post_init__(self) -> None:
        for number in self.sm:
            if not isinstance(number, int) or isinstance(number, bool):
                raise RecipeError(f"tensorrt.sm: expected numbers as in [86, 120], got {number!r}")
        if len(set(self.sm)) != len(self.sm):
            raise RecipeError(f"tensorrt.sm: {', '.join(map(str, self.sm))} names one twice")
        for module, count in self.split.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise RecipeError(f"tensorrt.split: {module}: expected how many plans, 1 or more, got {count!r}")
        if self.workspace_gb is not None and not self.workspace_gb > 0:
            raise RecipeError(f"tensorrt.workspace_gb: expected more than 0, got {self.workspace_gb:g}")
        if self.optimization_level is not None and self.optimization_level not in range(6):
            raise RecipeError(f"tensorrt.optimization_level: expected 0 to 5, got {self.optimization_level}")


def parse_sm(text: str) -> tuple[int, ...]:
    """`86,89,120` to numbers. Raises RecipeError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(f"--sm: expected numbers as in 86,89,120, got {text!r}") from None


def parse_split(items: list[str]) -> dict[str, int]:
    """`["transformer=4"]` to a mapping. Raises RecipeError."""
    split = {}
    for item in items:
        module, _, count = item.partition("=")
        if not count.isdigit():
            raise RecipeError(f"--split: expected MODULE=COUNT as in transformer=4, got {item!r}")
        split[module] = int(count)
    return split
