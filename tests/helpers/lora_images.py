"""The same small image from the engine and from diffusers, to compare LoRAs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from shared import CHECKPOINT

import zimage_rt

PROMPT, SEED = "a panda on a blue background", 3


@torch.no_grad()
def image_of(pipeline: Any) -> np.ndarray:
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(SEED))
    settings = {"height": 128, "width": 128, "num_inference_steps": 4, "guidance_scale": 0.0}
    latents = pipeline(PROMPT, latents=noise, output_type="latent", **settings).images
    decoder = AutoencoderTiny.from_pretrained(str(CHECKPOINT / "tiny_vae"), dtype=torch.float32)
    image = (decoder.decode(latents).sample / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    return np.rint(image * 255).astype(np.uint8)


def ours(engine: zimage_rt.Engine) -> np.ndarray:
    return engine.generate(PROMPT, seed=SEED, height=128, width=128, num_inference_steps=4, vae="tiny").images[0]
