"""Shared by the scripts that train adapters: the frozen checkpoint, the training loop and the contact sheet."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from fast_models import FastTextEncoder, FastTransformer, unpatchify
from flow import EVALUATIONS, encode_texts, flow_loss, noise_of, sample, schedule, smaller, widened
from optimiser import Average, Clock, Optimiser
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from scenes import CANVASES
from torch import Tensor, nn

# (noisy patches, 1 − sigma, features, lengths, canvas) → data minus noise, like FastTransformer.
Model = Callable[[Tensor, Tensor, Tensor, Tensor, tuple[int, int]], Tensor]


class Base:
    """The released checkpoint, frozen."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self.encoder, self.transformer = FastTextEncoder(), FastTransformer()
        self.encoder.load_state_dict(widened(load_file(folder / "text_encoder" / "model.safetensors")))
        weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        self.transformer.load_state_dict(widened(weights))
        for module in (self.encoder, self.transformer):
            module.to(device).requires_grad_(False)
        tiny = AutoencoderTiny.from_pretrained(folder / "tiny_vae")
        self.tiny = tiny.float().to(device, memory_format=torch.channels_last).requires_grad_(False)


@dataclass(frozen=True)
class Batch:
    """Captions, target images as patches, and the control image of a ControlNet."""

    tokens: Tensor
    lengths: Tensor
    clean: Tensor  # patches
    boxes: Tensor  # [batch, patches], True at drawings and glyphs
    size: tuple[int, int]  # width and height in pixels
    control: Tensor | None = None  # patches


class AdapterTrainer:
    """Trains ``adapter``; ``model`` returns the adapted transformer for a batch's control patches."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        base: Base,
        adapter: nn.Module,
        model: Callable[[Tensor | None], Model],
        draw: Callable[[int], Batch],
    ) -> None:
        self.args, self.base, self.adapter, self.model, self.draw = arguments, base, adapter, model, draw
        self.batch = arguments.batch
        self.generator = torch.Generator().manual_seed(41)
        self.sigmas = torch.tensor(schedule()[:-1], device=base.device)

    def step(self) -> Tensor:
        """Draw a batch and accumulate its gradients; return the loss.

        As in ``turbo.py``, some batches are interpolated between image and noise. Others start from
        states that the adapted model reaches by itself, with a target that leads to the true image.
        """
        batch = self.draw(self.batch)
        model, clean, device = self.model(batch.control), batch.clean, self.base.device
        own = torch.rand((), generator=self.generator).item() < self.args.own_path
        passed = int(torch.randint(1, EVALUATIONS, (), generator=self.generator))
        noise = torch.randn_like(clean)
        # Without the cache, which would reuse weights that were cast without gradients.
        with torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False):
            with torch.no_grad():
                features = self.base.encoder(batch.tokens)
            if own:
                noisy = sample(model, noise, features, batch.lengths, batch.size, stop=passed)
                sigma = torch.full((len(clean),), schedule()[passed], device=device)
                target = (clean - noisy) / sigma[:, None, None]
            else:
                sigma = self.sigmas[torch.randint(EVALUATIONS, (len(clean),), device=device)]
                noisy, target = torch.lerp(clean, noise, sigma[:, None, None]), clean - noise
            output = model(noisy, 1 - sigma, features, batch.lengths, batch.size)
        loss = flow_loss(output, target, batch.boxes)
        loss.backward()
        return loss.detach()

    def train(self, optimiser: Optimiser) -> None:
        """Train until the schedule ends; the adapter gets the averaged weights."""
        average = Average([self.adapter], self.args.ema)
        most = 2.0 if self.base.device.type == "cuda" else 60.0
        clock = Clock(self.args.seconds, self.args.work / f"stop-{self.args.name}", most=most)
        count, images, recent = 0, 0, []
        while not clock.done():
            try:
                loss = self.step()
            except torch.OutOfMemoryError:
                self.adapter.zero_grad(set_to_none=True)
                self.batch = smaller(self.batch)
                continue
            optimiser.step(clock.factor(fall=0.6, floor=0.003))
            average.update()
            count, images = count + 1, images + self.batch
            clock.tick()
            recent = [*recent[-49:], loss]  # averaged, because sigmas differ between batches
            if count % 20 == 0 or count <= 2:
                mean = torch.stack(recent).mean().item()
                if count % 100 == 0 or count <= 2:
                    point = {"s": round(clock.seconds, 1), "pictures": images, "loss": round(mean, 4)}
                    print(self.args.name, json.dumps(point), flush=True)
                clock.look()
                if mean != mean:
                    raise FloatingPointError("the loss is not finite")
        average.swap()
        print(f"{self.args.name}: {count} steps, {images} images, {clock.seconds:.0f} s", flush=True)


@torch.no_grad()
def draw(base: Base, model: Model, prompts: list[str]) -> Tensor:
    """Return an image of 256 × 256 per prompt, with fixed seeds and the schedule's evaluations."""
    tokens, lengths = encode_texts(prompts, base.device)
    noise = noise_of(list(range(len(prompts))), CANVASES[0], base.device)
    patches = sample(model, noise, base.encoder(tokens), lengths, CANVASES[0])
    return base.tiny.decoder(unpatchify(patches, CANVASES[0]))


def write_sheet(path: Path, prompts: Sequence[str], columns: Sequence[Tensor], across: int = 2) -> None:
    """Write a PNG of prompts with an image of each column; ``across`` prompts are side by side."""
    above, gap = 16, 8
    pixels = [((c.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu() for c in columns]
    height, width = pixels[0].shape[1] + above, pixels[0].shape[2] * len(columns) + gap
    sheet = Image.new("RGB", (across * width - gap, -(-len(prompts) // across) * height), "white")
    for number, prompt in enumerate(prompts):
        x, y = number % across * width, number // across * height
        ImageDraw.Draw(sheet).text((x + 2, y + 2), prompt, fill="black")
        for place, images in enumerate(pixels):
            sheet.paste(Image.fromarray(images[number].numpy()), (x + place * images.shape[2], y + above))
    sheet.save(path)


def parser_of(name: str, about: str, seconds: float, batch: int, lr: float) -> argparse.ArgumentParser:
    """Return a parser with the options of both scripts."""
    parser = argparse.ArgumentParser(description=about)
    parser.set_defaults(name=name)
    parser.add_argument("--work", type=Path, required=True, help="folder for the results and the stop file")
    parser.add_argument("--atlas", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder that assemble.py wrote")
    parser.add_argument("--seconds", type=float, default=seconds)
    parser.add_argument("--batch", type=int, default=batch, help="images of 256 × 256 per step")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument(
        "--own-path", type=float, default=0.5, help="share of the batches that start from states of the model itself"
    )
    parser.add_argument("--device", default="cuda")
    return parser


def begin(arguments: argparse.Namespace, seed: int) -> Base:
    """Set the seed and load the checkpoint."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    arguments.work.mkdir(parents=True, exist_ok=True)
    return Base(arguments.checkpoint, torch.device(arguments.device))
