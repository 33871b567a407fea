"""The step kernel of the `cuda` backend against ComfyUI's numbers: every sampler, every schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from comfyui_cases import COMFYUI, check_small, load_reference, small_cases, start
from cuda_reference import patches_of, require_kernels

from zimage_rt.sampling.tables import HISTORY

pytestmark = pytest.mark.gpu
cuda_kernels = require_kernels()


def draw(arguments: dict[str, Any]) -> np.ndarray:
    """The loop: an evaluation on the host, then a step on the GPU."""
    latents, steps, drawn = arguments["latents"], arguments["steps"], arguments["step_noise"]
    kept = np.zeros((HISTORY, *latents.shape), np.float32)
    noise_pred, nothing = np.empty_like(latents), np.zeros_like(latents)
    draws = iter(() if drawn is None else drawn)
    for row, step in enumerate(steps):
        arguments["predict"](latents, 1 - step[0], False, noise_pred)
        noise = next(draws) if step[7] else nothing
        patches = np.ascontiguousarray(patches_of(-noise_pred))
        latents, kept = cuda_kernels.sampler_update(
            patches, latents, kept, 2, steps, row, False, 0.0, 0.0, np.ascontiguousarray(noise), []
        )
    assert next(draws, None) is None
    return latents


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return load_reference()


@pytest.mark.parametrize("name", COMFYUI)
def test_every_schedule_step_count_and_denoise(name: str, reference: dict[str, np.ndarray]) -> None:
    for row in small_cases(reference, name):
        arguments = start(str(reference["small_cases"][row]))
        check_small(reference, row, draw(arguments), len(arguments["steps"]))
