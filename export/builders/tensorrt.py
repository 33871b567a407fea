"""Builder for TensorRT 10 and 11: plans for this machine's GPU, without weights.

Plans are stripped, and refitted at load from the bundle's safetensors file, so nothing is stored twice. The build times
kernels and stores the timings next to the bundle for the next build.
"""

from __future__ import annotations

import functools
from typing import Any

from zimage_rt.backends import nvidia_driver

from ..errors import BuilderUnavailable, RecipeError
from ..recipe import ExportRecipe
from ..tensorrt_options import TensorRTOptions
from . import _tensorrt_common as common

vaes = common.VAES
tables = common.TABLES
quantize = None
precisions = common.PRECISIONS
simplify = common.simplify


def _capability() -> tuple[int, int]:
    driver = nvidia_driver.query()
    if driver.problem is not None:
        raise BuilderUnavailable(f"backend 'tensorrt' builds on the GPU that will run the plans: {driver.problem}")
    return driver.devices[0].compute_capability


def _target(trt: Any, config: Any, options: TensorRTOptions) -> tuple[str, ...]:
    major, minor = _capability()
    return (f"{major}.{minor}",)


PACKAGE = common.Package("tensorrt", "tensorrt", stripped=True, target=_target, timing_cache=True)
build = functools.partial(common.build, PACKAGE)


def check(recipe: ExportRecipe) -> None:
    """Checks a recipe.

    Raises:
        RecipeError: TensorRT cannot build it on this machine.
        BuilderUnavailable: the package or a GPU is missing.
    """
    common.check(PACKAGE, recipe)
    major, minor = _capability()
    here = 10 * major + minor
    if any(number != here for number in recipe.tensorrt.sm):
        raise RecipeError(
            f"tensorrt.sm: the tensorrt backend builds for the GPU of this machine, {here}, "
            f"got {', '.join(map(str, recipe.tensorrt.sm))}; leave it out, or use the tensorrt_rtx backend"
        )
