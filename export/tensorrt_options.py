"""Options of TensorRT: the `[tensorrt]` table of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from zimage_rt.bundle.manifest import ShapeRanges

from .errors import RecipeError


@dataclasses.dataclass(frozen=True)
class TensorRTOptions:
    """Options of a build.

    Attributes:
        sm: compute capabilities to build for, such as `86`; empty for the builder's default.
        split: number of plans per module; the plans of a module run in order.
        profiles: ranges of each optimization profile; empty for one profile of the recipe's shapes. TensorRT tunes
            each for its own `opt`.
        workspace_gb: the most scratch memory of one layer, in GiB; None for no limit.
        optimization_level: 0 (fastest build) to 5 (fastest plan); None for TensorRT's default.
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
    """Parses `86,89,120`. Raises RecipeError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(f"--sm: expected numbers as in 86,89,120, got {text!r}") from None


def parse_split(items: list[str]) -> dict[str, int]:
    """Parses `["transformer=4"]`. Raises RecipeError."""
    split = {}
    for item in items:
        module, _, count = item.partition("=")
        if not count.isdigit():
            raise RecipeError(f"--split: expected MODULE=COUNT as in transformer=4, got {item!r}")
        split[module] = int(count)
    return split
