"""The nano bundle against diffusers.ZImagePipeline: same checkpoint, prompts, latents and evaluations."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import CHECKPOINT
from zimage_rt.benchmarks.quality.__main__ import read_prompts
from zimage_rt.benchmarks.systems.diffusers import DiffusersSystem

import zimage_rt


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return 10 * np.log10(255.0**2 / max(error, 1e-3))


@pytest.mark.parametrize(("vae", "guidance_scale", "count"), [("tiny", 0.0, 8), ("full", 0.0, 4), ("tiny", 2.0, 4)])
def test_fp32_equals_diffusers(engine: zimage_rt.Engine, vae: str, guidance_scale: float, count: int) -> None:
    prompts = read_prompts(count)
    captions, seeds = [p["caption"] for p in prompts], [p["seed"] for p in prompts]
    options = {"vae": vae, "guidance_scale": guidance_scale}
    expected = DiffusersSystem(str(CHECKPOINT)).generate(captions, seeds, **options)
    scores = [
        psnr(engine.generate(caption, seed=seed, **options).images[0], picture)
        for caption, seed, picture in zip(captions, seeds, expected, strict=True)
    ]
    assert np.mean(scores) >= 50, scores
