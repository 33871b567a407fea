"""`zimage_rt.Engine` as a benchmarked system."""

from __future__ import annotations

import numpy as np

import zimage_rt


class ZImageRtSystem:
    """`zimage_rt.Engine` over a bundle."""

    def __init__(self, bundle: str = "engines/nano", backend: str = "onnxruntime") -> None:
        self.engine = zimage_rt.Engine.load(bundle, backend=backend)
        self.name = f"zimage_rt {backend} {self.engine.manifest.precision}"

    def generate(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        height: int = 256,
        width: int = 256,
        num_inference_steps: int = 8,
        guidance_scale: float = 0.0,
        vae: str = "tiny",
        negative_prompt: str = "",
    ) -> list[np.ndarray]:
        """Return a uint8 [height, width, 3] image per prompt."""
        images: list[np.ndarray] = []
        batch = self.engine.manifest.shapes.batch.max
        for start in range(0, len(prompts), batch):
            result = self.engine.generate(
                prompts[start : start + batch],
                negative_prompt,
                seed=seeds[start : start + batch],
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                vae=vae,
            )
            images.extend(result.images)
        return images
