"""Train both autoencoders into one latent space.

The tiny encoder (TAEF1's architecture) defines the latents, both decoders learn to decode them, and
the full encoder (Flux's architecture) learns to produce the same. The tiny encoder has no norm across
the image, so a drawing has the same latents at every place. Model-space latents have a deviation near
one; the full autoencoder adds Flux's scale and shift. Later, ``decoders`` continues from the saved
averages with the tiny encoder frozen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import architecture
import scenes as S
import spelling
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from optimiser import Average, Clock, Optimiser
from phrases import COLOUR_NAMES
from render import Renderer, random_crop
from torch import Tensor

LATENT_NOISE = 0.06  # noise that decoders must tolerate in a diffusion model's latents
SCALING, SHIFT = 0.3611, 0.1159  # Flux's: model latents are (z − shift) × scaling


def random_scenes(batch: int, canvas: int, device: torch.device) -> Tensor:
    """Draw scenes without the limits of captions: any layout that fits, any row of glyphs."""

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (batch,), device=device)

    names, shares = S.layouts_of(canvas)
    known = torch.tensor([S.LAYOUTS.index(n) for n in names], device=device)
    layout = known[torch.multinomial(torch.tensor(shares, device=device), batch, replacement=True)]
    drawn = torch.tensor([len(S.PLACES[n]) for n in S.LAYOUTS], device=device)[layout]
    count = len(S.subjects())
    a = torch.where(drawn > 0, integers(0, count), -1)
    b = torch.where(drawn > 1, integers(0, count), -1)
    written = torch.tensor([n in ("word", "sign") for n in S.LAYOUTS], device=device)[layout]
    latin = torch.rand(batch, device=device) < 0.5
    room = S.CANVASES[canvas][0] - S.TEXT_ROOM
    most = torch.where(
        latin,
        min(spelling.MOST_LETTERS, room // spelling.LATIN_WIDTH),
        min(spelling.MOST_HAN, room // spelling.HAN_WIDTH),
    )
    length = (torch.rand(batch, device=device) * most).long() + 1
    alphabet = len(spelling.LATIN)
    letters = torch.randint(alphabet, (batch, spelling.MOST_LETTERS), device=device)
    han = torch.randint(alphabet, len(spelling.GLYPHS), (batch, spelling.MOST_LETTERS), device=device)
    glyphs = torch.where(latin[:, None], letters, han)
    place = torch.arange(spelling.MOST_LETTERS, device=device)
    glyphs = torch.where(written[:, None] & (place < length[:, None]), glyphs, -1)
    canvases = torch.full_like(a, canvas)
    record = torch.stack([layout, a, b, integers(0, len(COLOUR_NAMES)), integers(0, 2), canvases], dim=1)
    return torch.cat([record, glyphs], dim=1)


class Split:
    """Tells which scenes of a batch have a held-out combination."""

    def __init__(self, device: torch.device) -> None:
        places = sorted({p for names in S.PLACES.values() for p in names})
        shape = (len(S.subjects()), len(COLOUR_NAMES), 2, len(places) + 1)
        table = torch.zeros(shape, dtype=torch.bool)
        for subject, colour, style, place in itertools.product(*(range(n) for n in (*shape[:3], len(places)))):
            table[subject, colour, style, place] = S.is_held_out(subject, colour, style, places[place])
        self._table = table.to(device)  # the last place is none
        slots = [[places.index(p) for p in S.PLACES[n]] + [len(places)] * 2 for n in S.LAYOUTS]
        self._slots = torch.tensor([s[:2] for s in slots], device=device)

    def held_out(self, scenes: Tensor) -> Tensor:
        layout, a, b, colour, style = scenes[:, :5].unbind(1)
        place = self._slots[layout]
        return (
            self._table[a.clamp(min=0), colour, style, place[:, 0]]
            | self._table[b.clamp(min=0), colour, style, place[:, 1]]
        )

    def steer(self, scenes: Tensor, held_out: bool) -> Tensor:
        """Change backgrounds until nearly every scene is on the given side of the split."""
        scenes = scenes.clone()
        for _ in range(len(COLOUR_NAMES) - 1):
            wrong = self.held_out(scenes) != held_out
            scenes[:, 3] = torch.where(wrong, (scenes[:, 3] + 1) % len(COLOUR_NAMES), scenes[:, 3])
        return scenes


def recolour(images: Tensor) -> Tensor:
    """Swap channels and stretch the contrast of some images, to train on more colours."""
    order = torch.randperm(3, device=images.device)
    some = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.1
    gain = torch.empty(len(images), 3, 1, 1, device=images.device).uniform_(0.4, 1.0)
    shift = (1 - gain) * torch.empty_like(gain).uniform_(-1, 1)
    return torch.where(some, images[:, order] * gain + shift, images)


class Trainer:
    """Holds the models and draws the batches."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.args = arguments
        self.device = torch.device(arguments.device)
        self.renderer = Renderer(arguments.atlas, self.device)
        self.split = Split(self.device)
        torch.manual_seed(10)
        torch.backends.cudnn.benchmark = True  # few shapes, each met often
        torch.set_float32_matmul_precision("high")
        self.tiny = AutoencoderTiny(**architecture.TINY_VAE).to(self.device)
        self.full = AutoencoderKL(**architecture.VAE, scaling_factor=SCALING, shift_factor=SHIFT).to(self.device)
        last = self.full.encoder.conv_out  # 16 means, then 16 log-variances that stay at −8
        last.weight.data[16:], last.bias.data[16:] = 0, -8
        for model in (self.tiny, self.full):
            model.to(memory_format=torch.channels_last)

    def images(self, whole: bool, canvas: int = 0) -> Tensor:
        """Return new images, or windows of them, fp32 in [−1, 1].

        Most are plain scenes; some have content that is shifted and scaled, or other colours.
        """
        batch = self.args.batch
        if whole:
            side = S.CANVASES[canvas]
            batch = max(1, round(batch * self.args.crop**2 / (side[0] * side[1])))
        scenes = self.split.steer(random_scenes(batch, canvas, self.device), held_out=False)
        free = torch.rand(batch, 1, device=self.device) < 0.12
        jitter = torch.where(free, torch.randint(-20, 21, (batch, 6), device=self.device), 0)
        zoom = torch.where(free[:, 0], torch.empty(batch, device=self.device).uniform_(0.6, 1.4), 1.0)
        images = recolour(self.renderer.compose(scenes, canvas, jitter, zoom).float())
        images = images if whole else random_crop(images, self.args.crop)
        return images.contiguous(memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def loss(self, x: Tensor, frozen: bool) -> tuple[Tensor, Tensor]:
        """Return the loss, and both decoders' squared errors for the log."""
        with self.autocast():
            if frozen:
                with torch.no_grad():
                    latents = self.tiny.encoder(x).float()
            else:
                latents = self.tiny.encoder(x).float()
            means = self.full.encoder(x)[:, :16].float()
            mapped = (means - SHIFT) * SCALING
            noise = LATENT_NOISE * torch.rand(len(x), 1, 1, 1, device=x.device) * torch.randn_like(latents)
            # The full decoder must read what either encoder gives.
            from_full = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
            both = torch.where(from_full, mapped, latents) + noise
            by_tiny = self.tiny.decoder(latents + noise).float()
            by_full = self.full.decoder(both / SCALING + SHIFT).float()
        tiny, full = F.mse_loss(by_tiny, x), F.mse_loss(by_full, x)
        # A little absolute error for the edges.
        edges = 0.02 * (F.l1_loss(by_tiny, x) + F.l1_loss(by_full, x))
        agree = F.mse_loss(mapped, latents.detach())
        loss = tiny + full + edges + 0.1 * agree
        if not frozen:
            # The tiny decoder clamps softly at ±3, and the transformer wants a deviation near one.
            loss = loss + 1e-3 * F.relu(latents.abs() - 2.2).square().mean()
            loss = loss + 1e-2 * (latents.mean().square() + (latents.std() - 0.9).square())
        return loss, torch.stack([tiny.detach(), full.detach(), agree.detach()])

    def train(self, seconds: float, frozen: bool) -> list[dict[str, float]]:
        """Train all models, or with ``frozen`` all but the tiny encoder; they end with the averaged weights."""
        self.tiny.encoder.requires_grad_(not frozen)
        scale = 0.4 if frozen else 1.0
        optimiser = Optimiser([self.full], self.args.lr * scale, muon_lr=0.02 * scale)
        tiny = [p for p in self.tiny.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(
            tiny, lr=self.args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=self.device.type == "cuda"
        )
        average = Average([self.tiny, self.full], self.args.ema)
        most = 1.0 if self.device.type == "cuda" else 20.0
        clock, curve, count = Clock(seconds, self.args.work / "stop-vaes", most=most), [], 0
        name = "decoders" if frozen else "joint"
        last = self.full.encoder.conv_out
        generator = torch.Generator().manual_seed(11)
        while not clock.done():
            progress = clock.seconds / clock.total
            factor = clock.factor(fall=0.5, floor=0.005)
            # The full model normalises over the image, so it ends mostly on whole images.
            whole = torch.rand((), generator=generator).item() < (0.35 if progress < 0.5 and not frozen else 0.8)
            others = torch.rand((), generator=generator).item() < 0.2
            canvas = int(torch.randint(1, 4, (), generator=generator)) if whole and others else 0
            loss, errors = self.loss(self.images(whole, canvas), frozen)
            loss.backward()
            last.weight.grad[16:], last.bias.grad[16:] = 0, 0
            torch.nn.utils.clip_grad_norm_(tiny, 1.0, foreach=True)
            for group in adam.param_groups:
                group["lr"] = self.args.lr * scale * factor
            adam.step()
            adam.zero_grad(set_to_none=True)
            optimiser.step(factor)
            average.update()
            count += 1
            if count % 20 == 0 or count <= 2:
                point = {"s": round(clock.seconds, 1), "whole": int(whole), "loss": round(loss.item(), 5)}
                values = zip(("tiny", "full", "agree"), errors.tolist(), strict=True)
                curve.append(point | {k: round(v, 6) for k, v in values})
                if not torch.isfinite(loss):
                    raise FloatingPointError("the autoencoders' loss is not finite")
                if count % 200 == 0 or count <= 2:
                    print(name, json.dumps(curve[-1]), flush=True)
                clock.look()
            clock.tick()
        average.swap()
        print(f"{name}: {count} steps, {clock.seconds:.0f} s, {curve[-1:]}", flush=True)
        return curve

    @torch.no_grad()
    def measure(self, count: int) -> dict[str, float]:
        """Return the PSNR in dB of each encoder with each decoder on whole images, in fp32.

        Each image has a held-out combination of subject, colour, style and place, except for signs,
        which have no subject and a random text.
        """
        torch.manual_seed(99)
        errors: dict[str, list[float]] = {}
        values = []
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        for i in range(max(1, count // 16)):
            canvas = 0 if i % 5 < 4 else 1 + i // 5 % 3
            scenes = self.split.steer(random_scenes(16, canvas, self.device), held_out=True)
            x = self.renderer.compose(scenes, canvas).float()
            tiny = self.tiny.encoder(x)
            full = (self.full.encoder(x)[:, :16] - SHIFT) * SCALING
            if canvas == 0:
                values.append(tiny)
            for e, latents in (("tiny", tiny), ("full", full)):
                outputs = {
                    "tiny": self.tiny.decoder(latents),
                    "full": self.full.decoder(latents / SCALING + SHIFT),
                }
                for d, y in outputs.items():
                    error = (y.clamp(-1, 1) - x).square().mean((1, 2, 3)) / 4
                    key = f"{e}_encoder_{d}_decoder_dB" + ("" if canvas == 0 else "_other_canvases")
                    errors.setdefault(key, []).append(error.mean().item())
        torch.backends.cudnn.allow_tf32 = before
        torch.set_float32_matmul_precision("high")
        stacked = torch.cat(values)
        result = {k: -10 * torch.tensor(v).mean().log10().item() for k, v in errors.items()}
        result |= {"latent_mean": stacked.mean().item(), "latent_std": stacked.std().item()}
        return {k: round(v, 3) for k, v in result.items()}

    def save(self, path: Path, curves: dict[str, list[dict[str, float]]]) -> None:
        state = {"tiny": self.tiny.state_dict(), "full": self.full.state_dict(), "curves": curves}
        temporary = path.with_suffix(".tmp")
        torch.save(state | {"scaling_factor": SCALING, "shift_factor": SHIFT}, temporary)
        temporary.rename(path)

    def load(self, path: Path) -> dict[str, list[dict[str, float]]]:
        state = torch.load(path, map_location=self.device)
        self.tiny.load_state_dict({k: v.float() for k, v in state["tiny"].items()})
        self.full.load_state_dict({k: v.float() for k, v in state["full"].items()})
        return state["curves"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["joint", "decoders", "measure"])
    parser.add_argument("--atlas", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--batch", type=int, default=96, help="windows per step; fewer for whole images")
    parser.add_argument("--crop", type=int, default=128, help="pixels a side of the windows")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--measure", type=int, default=640, help="number of images to measure on")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    start = time.time()
    trainer = Trainer(arguments)
    path = arguments.work / "vaes.pt"
    curves = {} if arguments.stage == "joint" else trainer.load(path)
    if arguments.stage != "measure":
        before = curves.get(arguments.stage, [])
        passed = before[-1]["s"] if before else 0.0
        curve = trainer.train(arguments.seconds, frozen=arguments.stage == "decoders")
        curves[arguments.stage] = before + [{**p, "s": round(p["s"] + passed, 1)} for p in curve]
        trainer.save(path, curves)
    figures = trainer.measure(arguments.measure)
    (arguments.work / "vaes.json").write_text(json.dumps(figures | {"curves": curves}))
    print(json.dumps(figures), f"{time.time() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
