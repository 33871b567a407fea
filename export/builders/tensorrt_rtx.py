"""Builder for TensorRT-RTX: plans for GeForce and RTX cards, built on any machine, also without a GPU.

A plan serves every compute capability that it was built for. Without a GPU the builder can neither strip the weights
nor make them refittable, so a plan is as large as the weight file.
"""

from __future__ import annotations

import functools
from typing import Any

from ..errors import RecipeError
from ..recipe import ExportRecipe
from ..tensorrt_options import TensorRTOptions
from . import _tensorrt_common as common

# GeForce 30, 40 and 50.
DEFAULT_SM = (86, 89, 120)

vaes = common.VAES
tables = common.TABLES
quantize = None
precisions = common.PRECISIONS
simplify = common.simplify


def _target(trt: Any, config: Any, options: TensorRTOptions) -> tuple[str, ...]:
    numbers = options.sm or DEFAULT_SM
    # The backend passes all memory to the runtime, so no request allocates any.
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    config.num_compute_capabilities = len(numbers)
    for index, number in enumerate(numbers):
        config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{number}"], index)
    return tuple(f"{number // 10}.{number % 10}" for number in numbers)


PACKAGE = common.Package("tensorrt_rtx", "tensorrt-rtx", stripped=False, target=_target)
build = functools.partial(common.build, PACKAGE)


def check(recipe: ExportRecipe) -> None:
    """Checks a recipe.

    Raises:
        RecipeError: TensorRT-RTX cannot build it.
        BuilderUnavailable: the package is not installed.
    """
    members = common.check(PACKAGE, recipe).ComputeCapability.__members__
    # The package lists Turing (SM75), but has no fp32 matrix product for it, which the timestep's modulation needs.
    known = sorted(int(name[2:]) for name in members if name.startswith("SM") and name != "SM75")
    for number in recipe.tensorrt.sm:
        if number not in known:
            raise RecipeError(f"tensorrt.sm: expected any of {', '.join(map(str, known))}, got {number}")
