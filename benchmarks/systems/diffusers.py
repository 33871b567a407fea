"""The reference system: ``diffusers.ZImagePipeline`` in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, ZImagePipeline


class DiffusersSystem:
    """Runs a checkpoint folder in diffusers' own pipeline."""

    name = "diffusers"

    def __init__(self, checkpoint: str, device: str | None = None, batch: str = "16") -> None:
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._batch = int(batch)
        self._pipeline = ZImagePipeline.from_pretrained(checkpoint, dtype=torch.float32)
        self._pipeline.to(self._device)
        self._pipeline.set_progress_bar_config(disable=True)
        tiny = Path(checkpoint) / "tiny_vae"
        self._tiny: AutoencoderTiny | None = None
        if tiny.is_dir():
            self._tiny = AutoencoderTiny.from_pretrained(tiny, dtype=torch.float32)
            self._tiny.to(self._device)

    @torch.no_grad()
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
        """Return a uint8 [height, width, 3] image per prompt.

        Raises:
            ValueError: the checkpoint has no such VAE.
        """
        if vae not in ("tiny", "full") or (vae == "tiny" and self._tiny is None):
            raise ValueError(f"vae: expected tiny or full, and a tiny_vae folder, got {vae!r}")
        result: list[np.ndarray] = []
        for i in range(0, len(prompts), self._batch):
            noise = [
                torch.randn(1, 16, height // 8, width // 8, generator=torch.Generator().manual_seed(s))
                for s in seeds[i : i + self._batch]
            ]
            latents = self._pipeline(
                list(prompts[i : i + self._batch]),
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                negative_prompt=[negative_prompt] * len(prompts[i : i + self._batch]),
                latents=torch.cat(noise).to(self._device),
                output_type="latent",
            ).images
            result += list(self._decode(latents, vae))
        return result

    def _decode(self, latents: torch.Tensor, vae: str) -> np.ndarray:
        if vae == "tiny" and self._tiny is not None:
            images = self._tiny.decode(latents).sample
        else:
            config = self._pipeline.vae.config
            latents = latents / config.scaling_factor + config.shift_factor
            images = self._pipeline.vae.decode(latents).sample
        images = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return (images * 255).round().astype(np.uint8)
