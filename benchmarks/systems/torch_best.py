"""The system `torch_best`: the transformer in hand-fused torch, transformers' text encoder, diffusers' tiny VAE."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from zimage_rt.benchmarks.systems.reference_models import load_model, run_encoder, shorter_encoder
from zimage_rt.benchmarks.systems.torch_best_transformer import COMPILE_MODES, TorchBestTransformer
from zimage_rt.export.checkpoint import Checkpoint, Component, open_checkpoint
from zimage_rt.export.precision import BF16, PRECISIONS
from zimage_rt.export.tokenizer import chat_template, tokenizer_file

from zimage_rt.sampling.schedules import flow_match_sigmas


class TinyDecoder:
    """The tiny VAE's decoder to uint8, optionally in channels-last and compiled."""

    def __init__(
        self, component: Component, precision: str, device: str, *, channels_last: bool, compiled: bool
    ) -> None:
        self._dtype = PRECISIONS[precision].storage
        self._model = load_model(component, self._dtype, device)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._model.to(memory_format=self._format)
        self._run = torch.compile(self._decode, dynamic=False) if compiled else self._decode

    def _decode(self, latents: Tensor) -> Tensor:
        config = self._model.config
        latents = latents / (config.get("scaling_factor") or 1.0) + (config.get("shift_factor") or 0.0)
        image = self._model.decode(latents.to(self._dtype, memory_format=self._format)).sample
        return ((image.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """latents fp32 [batch, channels, h, w] -> uint8 [batch, height, width, 3] on the device."""
        return self._run(latents)


class TorchBestSystem:
    """Hand-fused torch as a benchmarked system (`systems.base.System`), without guidance, with the tiny VAE."""

    def __init__(
        self,
        checkpoint: str | Checkpoint = "checkpoints/zimage-nano",
        precision: str = BF16.name,
        device: str | None = None,
        mode: str = COMPILE_MODES[-1],
    ) -> None:
        self.name = f"torch_best {precision}"
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        source = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(Path(checkpoint))
        if source.tiny_vae is None:
            raise ValueError(f"{source.path}: it has no tiny_vae, the only decoder of this system")
        self._prefix, self._suffix = chat_template(source.tokenizer)
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file(source.tokenizer)))
        self._shift = float(source.scheduler.get("shift", 3.0))
        self.transformer = TorchBestTransformer(source.transformer, precision, self.device, mode)
        # The last layer is not needed. bf16 also for an fp16 transformer: the encoder's residual stream overflows fp16.
        config = shorter_encoder(source.text_encoder)
        dtype = torch.float32 if precision == "fp32" else BF16.storage
        self.text_encoder = load_model(source.text_encoder, dtype, self.device, config)
        self.decoder = TinyDecoder(
            source.tiny_vae, precision, self.device, channels_last=True, compiled=mode != COMPILE_MODES[0]
        )

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Context of a prompt, [1, context_tokens, dim]."""
        ids = self._tokenizer.encode(self._prefix + prompt + self._suffix, add_special_tokens=False).ids
        return self.transformer.context(run_encoder(self.text_encoder, torch.tensor([ids], device=self.device)))

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
            ValueError: guidance or the full VAE is asked for.
        """
        if guidance_scale > 0 or vae != "tiny":
            raise ValueError(f"torch_best draws without guidance and with the tiny VAE, got {guidance_scale}, {vae!r}")
        sigmas = flow_match_sigmas(num_inference_steps, self._shift)
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            context = self.encode(prompt)
            size = (1, self.transformer.config.in_channels, height // 8, width // 8)
            latents = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(self.device)
            for sigma, following in itertools.pairwise(sigmas):
                timestep = torch.full((1,), float(1 - sigma), device=self.device)
                latents.add_(self.transformer(latents, timestep, context), alpha=float(following - sigma))
            images.append(self.decoder(latents)[0].cpu().numpy())
        return images
