"""Latents on which ranges of activations are measured: the bundle being exported draws the recipe's prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zimage_rt import Engine
from zimage_rt.bundle.manifest import Manifest, ShapeRange
from zimage_rt.denoise import DenoiseRequest, Prompt
from zimage_rt.sampling.noise import prepare_noise
from zimage_rt.sampling.schedules import flow_match_sigmas

# Pixels of a side. Ranges hardly depend on it, and a large model takes a minute per image of this size on a CPU.
SIDE = 256


def _side(allowed: ShapeRange) -> int:
    """The allowed size that is nearest to `SIDE`, from below if it can be."""
    return allowed.min + max(0, min(SIDE, allowed.max) - allowed.min) // allowed.multiple * allowed.multiple


def draw_latents(folder: Path, manifest: Manifest, prompts: tuple[str, ...]) -> np.ndarray:
    """Draw an image per prompt, but for its decoding, with ONNX Runtime: fp32 [prompts, channels, height, width].

    Args:
        folder: a bundle with `manifest` in it, which needs no VAE.
        manifest: its number of evaluations and guidance are used.
        prompts: what to draw.
    """
    pipeline = manifest.pipeline
    height, width = (
        _side(allowed) // pipeline.vae_scale_factor for allowed in (manifest.shapes.height, manifest.shapes.width)
    )
    sigmas = flow_match_sigmas(pipeline.num_inference_steps, pipeline.shift)
    drawn = []
    with Engine.load(folder, backend="onnxruntime", verify=False) as engine:
        for seed, prompt in enumerate(prompts):
            request = DenoiseRequest(
                latents=prepare_noise((seed,), (pipeline.latent_channels, height, width)),
                prompts=[Prompt(prompt)],
                negatives=[Prompt("")] if pipeline.guidance_scale > 0 else [],
                sigmas=sigmas,
                sampler="euler",
                shift=pipeline.shift,
                seed=seed,
                guidance_scale=pipeline.guidance_scale,
            )
            drawn.append(engine.denoise(request))
    return np.concatenate(drawn)
