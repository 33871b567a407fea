"""Train both autoencoders into one latent space.

First the tiny one (TAEF1's structure) alone; its encoder is then frozen, and scale and shift are
measured and folded in, so that it lives in model-space latents of mean 0 and deviation 1. Then the
full one (Flux's kind) learns the same latents, unscaled, while both decoders learn to decode what
either encoder gives. The tiny encoder goes first because it normalises nothing across the picture:
a drawing has the same latents wherever it stands.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import architecture
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from optimiser import Optimiser, warm_cosine
from phrases import COLOUR_NAMES, WORDS
from render import Renderer, random_crop
from scenes import subjects
from torch import Tensor

LATENT_NOISE = 0.08  # decoders must bear what a diffusion model leaves behind


def random_scenes(batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Draw scenes, jitter and zoom without the captions' limits."""

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (batch,), device=device)

    layout, count = integers(0, 4), len(subjects())
    pair = (layout == 1) | (layout == 2)
    none = torch.full_like(layout, -1)
    scenes = torch.stack(
        [
            layout,
            integers(0, count),
            torch.where(pair, integers(0, count), none),
            integers(0, len(COLOUR_NAMES)),
            integers(0, 2),
            integers(0, 3),
            torch.where(layout == 3, integers(0, len(WORDS)), none),
        ],
        dim=1,
    )
    on_grid = torch.rand(batch, 1, device=device) < 0.5
    free = torch.randint(-20, 21, (batch, 4), device=device)
    zoom = torch.where(on_grid[:, 0], 1.0, torch.empty(batch, device=device).uniform_(0.6, 1.4))
    return scenes, torch.where(on_grid, free // 8 * 8, free), zoom


def recolour(images: Tensor) -> Tensor:
    """Exchange channels and stretch some pictures, so that other colours are not foreign."""
    order = torch.randperm(3, device=images.device)
    some = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.25
    gain = torch.empty(len(images), 3, 1, 1, device=images.device).uniform_(0.4, 1.0)
    shift = (1 - gain) * torch.empty_like(gain).uniform_(-1, 1)
    return torch.where(some, images[:, order] * gain + shift, images)


class Trainer:
    """Holds the models and draws the batches."""

    def __init__(self, atlas: Path, device: str, batch: int, crop: int) -> None:
        self.device, self.batch, self.crop = torch.device(device), batch, crop
        self.renderer = Renderer(atlas, device)
        torch.manual_seed(10)
        self.tiny = AutoencoderTiny(**architecture.TINY_VAE).to(device)
        self.full = AutoencoderKL(**architecture.VAE).to(device)
        for model in (self.tiny, self.full):
            model.to(memory_format=torch.channels_last)

    def images(self, batch: int, crop: int | None) -> Tensor:
        """Return fresh pictures, or windows of them, fp32 in [−1, 1]."""
        images = recolour(self.renderer.compose(*random_scenes(batch, self.device)).float())
        return (random_crop(images, crop) if crop else images).contiguous(memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def train_tiny(self, seconds: float, lr: float) -> list[dict[str, float]]:
        """Train encoder and decoder together, then fold the measured scale into the encoder."""
        optimiser = torch.optim.AdamW(self.tiny.parameters(), lr=lr, weight_decay=0.0)
        forward = torch.compile(self.tiny_loss) if self.device.type == "cuda" else self.tiny_loss

        def step(factor: float) -> Tensor:
            for group in optimiser.param_groups:
                group["lr"] = lr * factor
            loss = forward(self.images(self.batch, self.crop))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.tiny.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            return loss

        curve = self.run(step, seconds, "tiny")
        with torch.no_grad():
            pictures = [self.images(32, None) for _ in range(16)]
            samples = torch.cat([self.tiny.encoder(x) for x in pictures])
        mean, deviation = samples.mean().item(), samples.std().item()
        last = self.tiny.encoder.layers[-1]
        last.weight.data /= deviation
        last.bias.data.sub_(mean).div_(deviation)
        # The decoder gets what the encoder now gives. (Its soft clamp sits before the convolution,
        # so this costs a few tenths of a decibel, which the second stage wins back.)
        first = self.tiny.decoder.layers[0]
        first.bias.data += mean * first.weight.data.sum((1, 2, 3))
        first.weight.data *= deviation
        # The full autoencoder keeps the raw scale: model latents = (z − shift) × scaling.
        self.full.register_to_config(scaling_factor=1 / deviation, shift_factor=mean)
        return curve

    def tiny_loss(self, x: Tensor) -> Tensor:
        with self.autocast():
            latents = self.tiny.encoder(x)
            decoded = self.tiny.decoder(latents + LATENT_NOISE * torch.randn_like(latents))
        # The decoder clamps softly at ±3: keep the latents well inside.
        return distance(decoded, x) + 1e-3 * F.relu(latents.float().abs() - 2).square().mean()

    def train_decoders(self, seconds: float, lr: float) -> list[dict[str, float]]:
        """Fit the full autoencoder to the frozen latents, and both decoders to both encoders."""
        encoder = self.tiny.encoder.eval().requires_grad_(False)
        scale, shift = self.full.config.scaling_factor, self.full.config.shift_factor
        last = self.full.encoder.conv_out  # 16 means, then 16 log-variances that stay at −8
        last.weight.data[16:], last.bias.data[16:] = 0, -8
        tiny_too = self.device.type == "cuda"  # on a CPU the time is better spent on the full one
        self.tiny.decoder.requires_grad_(tiny_too)
        trained = [self.full, self.tiny.decoder] if tiny_too else [self.full]
        optimiser = Optimiser(trained, lr, muon_lr=0.02)

        def loss_of(x: Tensor) -> Tensor:
            with self.autocast():
                target = encoder(x)
                means = self.full.encoder(x)[:, :16]
                mapped = (means - shift) * scale
                half = (torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5).to(mapped.dtype)
                latents = torch.lerp(target, mapped, half)
                latents = latents + LATENT_NOISE * torch.randn_like(latents)
                loss = distance(self.full.decoder(latents / scale + shift), x)
                if tiny_too:
                    loss = loss + distance(self.tiny.decoder(latents.detach()), x)
            return loss + 0.3 * F.mse_loss(mapped.float(), target.float())

        def step(factor: float) -> Tensor:
            loss = loss_of(self.images(self.batch, self.crop))
            loss.backward()
            last.weight.grad[16:], last.bias.grad[16:] = 0, 0
            optimiser.step(factor)
            return loss

        return self.run(step, seconds, "decoders")

    def run(self, step: Callable[[float], Tensor], seconds: float, name: str) -> list[dict[str, float]]:
        """Call ``step`` with the schedule's factor until the time is up; return the loss curve."""
        curve, start, count = [], time.time(), 0
        while (elapsed := time.time() - start) < seconds:
            loss = step(warm_cosine(elapsed / seconds, floor=0.01))
            count += 1
            if count % 50 == 0 or count <= 2:
                curve.append({"s": round(time.time() - start, 1), "loss": round(loss.item(), 5)})
        print(f"{name}: {count} steps, {curve[-1:]}", flush=True)
        return curve

    @torch.no_grad()
    def measure(self, count: int = 256) -> dict[str, float]:
        """Return dB of each encoder with each decoder on whole pictures, in fp32."""
        torch.manual_seed(99)
        scale, shift = self.full.config.scaling_factor, self.full.config.shift_factor
        errors: dict[str, list[float]] = {}
        values = []
        for _ in range(max(1, count // 32)):
            scenes, jitter, _ = random_scenes(32, self.device)
            x = self.renderer.compose(scenes, jitter).float()
            tiny = self.tiny.encoder(x)
            full = (self.full.encoder(x)[:, :16] - shift) * scale
            values.append(tiny)
            for e, latents in (("tiny", tiny), ("full", full)):
                outputs = {
                    "tiny": self.tiny.decoder(latents),
                    "full": self.full.decoder(latents / scale + shift),
                }
                for d, y in outputs.items():
                    error = (y.clamp(-1, 1) - x).square().mean((1, 2, 3)) / 4
                    errors.setdefault(f"{e}_encoder_{d}_decoder_dB", []).append(error.mean().item())
        stacked = torch.cat(values)
        result = {k: -10 * torch.tensor(v).mean().log10().item() for k, v in errors.items()}
        result |= {"latent_mean": stacked.mean().item(), "latent_std": stacked.std().item()}
        return {k: round(v, 3) for k, v in result.items()}

    def save(self, path: Path, **extra: object) -> None:
        torch.save(
            {
                "tiny": self.tiny.state_dict(),
                "full": self.full.state_dict(),
                "scaling_factor": self.full.config.scaling_factor,
                "shift_factor": self.full.config.shift_factor,
                **extra,
            },
            path,
        )

    def load(self, path: Path) -> dict:
        state = torch.load(path, map_location=self.device)
        self.tiny.load_state_dict(state["tiny"])
        if "full" in state:
            self.full.load_state_dict(state["full"])
        self.full.register_to_config(scaling_factor=state["scaling_factor"], shift_factor=state["shift_factor"])
        return state


def distance(decoded: Tensor, x: Tensor) -> Tensor:
    """Squared error for the decibels, a little absolute error for the edges."""
    decoded = decoded.float()
    return F.mse_loss(decoded, x) + 0.1 * F.l1_loss(decoded, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["tiny", "decoders", "measure"])
    parser.add_argument("--atlas", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--crop", type=int, default=128, help="pixels a side of the windows")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    trainer = Trainer(arguments.atlas, arguments.device, arguments.batch, arguments.crop)
    path = arguments.work / "vaes.pt"
    if arguments.stage == "tiny":
        curve = trainer.train_tiny(arguments.seconds, arguments.lr)
        trainer.save(path, curves={"tiny": curve})
    else:
        curves = trainer.load(path).get("curves", {})
        if arguments.stage == "decoders":
            before = curves.get("decoders", [])
            passed = before[-1]["s"] if before else 0.0
            curve = trainer.train_decoders(arguments.seconds, arguments.lr)
            curves["decoders"] = before + [{**p, "s": round(p["s"] + passed, 1)} for p in curve]
            trainer.save(path, curves=curves)
        figures = trainer.measure(256 if arguments.device == "cuda" else 32)
        (arguments.work / "vaes.json").write_text(json.dumps(figures | {"curves": curves}))
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
