"""Make the base model's eight evaluations without guidance as good as they get.

    python turbo.py --corpus corpus.npz --work state --atlas atlas.npz --seconds 150

Starts from ``average.pt``, the base, which stays as the teacher; writes ``turbo.pt``. Only the
transformer changes, and only at the schedule's own eight sigmas. Some batches stand between a picture
and noise, and learn a mix of the true answer and the teacher's guided one. The others stand where the
model's own first steps lead, and learn the answer that still ends at the true picture: a caption
determines its picture, so the student can mend what its earlier steps got wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import fast_models
import torch
from fast_models import FastTextEncoder, FastTransformer, patchify
from flow import (
    EVALUATIONS,
    TAIL,
    Data,
    attempt,
    batch_of,
    draw_sheet,
    halved,
    sample,
    schedule,
    smaller,
    widened,
    write,
)
from latents import LatentComposer
from optimiser import Average, Clock, Optimiser
from render import Renderer
from scenes import CANVASES
from torch import Tensor, nn
from train import CONTENT_WEIGHT, load_tiny


class Turbo:
    """Student, teacher and the frozen text encoder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.args = arguments
        self.device = torch.device(arguments.device)
        torch.manual_seed(30)
        torch.set_float32_matmul_precision("high")
        state = torch.load(arguments.work / "average.pt", map_location=self.device)
        self.encoder, self.student = FastTextEncoder().to(self.device), FastTransformer().to(self.device)
        self.encoder.load_state_dict(widened(state["text_encoder"]))
        self.student.load_state_dict(widened(state["transformer"]))
        # No gradient is ever asked of it, but to say so would compile every graph once more.
        self.teacher = copy.deepcopy(self.student)
        self.seconds, self.curve, self.batch = 0.0, [], arguments.batch
        self.generator = torch.Generator().manual_seed(31)
        self.sigmas = torch.tensor(schedule()[:-1], device=self.device)
        if arguments.resume and (arguments.work / "turbo.pt").exists():
            state = torch.load(arguments.work / "turbo.pt", map_location=self.device)
            self.student.load_state_dict(widened(state["transformer"]))
            self.seconds, self.curve = state["seconds"], state["curve"]
        if arguments.compile != "none":
            fast_models.compile_blocks(dynamic=arguments.compile == "blocks")

    def autocast(self) -> torch.autocast:
        """Without its cache: weights cast while gradients are off must not serve where they are on."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)

    @torch.no_grad()
    def on_line(self, clean: Tensor, features: Tensor, lengths: Tensor, empty: Tensor, canvas: tuple[int, int]):
        """Return states between picture and noise, their sigmas, and the mixed answers."""
        noise = torch.randn_like(clean)
        sigma = self.sigmas[torch.randint(EVALUATIONS, (len(clean),), device=self.device)]
        level = sigma[:, None, None]
        noisy = (1 - level) * clean + level * noise
        said = self.teacher(noisy, 1 - sigma, features, lengths, canvas).float()
        count = torch.full_like(lengths, TAIL + 3)
        plain = self.teacher(noisy, 1 - sigma, empty.expand(len(clean), -1, -1), count, canvas).float()
        guided = said + self.args.guidance * (said - plain)
        return noisy, sigma, torch.lerp(clean - noise, guided, self.args.teacher)

    @torch.no_grad()
    def on_path(self, clean: Tensor, features: Tensor, lengths: Tensor, canvas: tuple[int, int]):
        """Return states that the student itself reaches, their sigmas, and the answers that mend them."""
        passed = int(torch.randint(1, EVALUATIONS, (), generator=self.generator))
        noisy = sample(self.student, torch.randn_like(clean), features, lengths, canvas, stop=passed)
        sigma = torch.full((len(clean),), schedule()[passed], device=self.device)
        return noisy, sigma, (clean - noisy) / sigma[:, None, None]

    def step(self, data: Data, composer: LatentComposer) -> Tensor:
        """Draw a batch and leave its gradients behind; return the loss."""
        canvas = data.canvas()
        size = CANVASES[canvas]
        tokens, lengths, index = data.captions(batch_of(canvas, self.batch), canvas)
        clean = patchify(composer.compose(data.scenes[index], canvas))
        weight = 1 + CONTENT_WEIGHT * composer.boxes(data.scenes[index], canvas).float()
        own = torch.rand((), generator=self.generator).item() < self.args.own_path

        def run() -> Tensor:
            with self.autocast():
                with torch.no_grad():
                    features = self.encoder(tokens)
                    with fast_models.eager():  # a batch of one would be another graph
                        empty = self.encoder(data.empty_row()[None])
                if own:
                    noisy, sigma, target = self.on_path(clean, features, lengths, size)
                else:
                    noisy, sigma, target = self.on_line(clean, features, lengths, empty, size)
                output = self.student(noisy, 1 - sigma, features, lengths, size)
            error = (output.float() - target).square().mean(2)
            loss = (error * weight).sum() / weight.sum()
            loss.backward()
            return loss.detach()

        return attempt(run, lambda: self.student.zero_grad(set_to_none=True))

    def train(self, data: Data, composer: LatentComposer, decoder: nn.Module) -> None:
        """Train until the schedule's end."""
        optimiser = Optimiser([self.student], self.args.lr, self.args.muon_lr)
        average = Average([self.student], self.args.ema, young=False)
        most = 2.0 if self.device.type == "cuda" else 60.0
        clock = Clock(self.args.seconds, self.args.work / "stop", start=self.seconds, most=most)
        saved, count = time.monotonic(), 0
        while not clock.done():
            try:
                loss = self.step(data, composer)
            except torch.OutOfMemoryError:
                self.student.zero_grad(set_to_none=True)
                self.batch = smaller(self.batch)
                continue
            optimiser.step(clock.factor(fall=0.85, floor=0.003))
            average.update()
            count += 1
            clock.tick()
            self.seconds = clock.seconds
            if count % 20 == 0 or count <= 2:
                self.curve.append({"s": round(self.seconds, 1), "loss": round(loss.item(), 4)})
                if count % 100 == 0 or count <= 2:
                    print("turbo", json.dumps(self.curve[-1]), flush=True)
                clock.look()
                if not torch.isfinite(loss):
                    raise FloatingPointError("the loss is not finite")
                if time.monotonic() - saved > self.args.save_every:
                    self.save(average, decoder)
                    saved = time.monotonic()
                    clock.skip()
        self.save(average, decoder)
        print(f"turbo: {count} steps, {self.seconds:.0f} s", flush=True)

    def save(self, average: Average, decoder: nn.Module) -> None:
        average.swap()
        state = {"transformer": halved(self.student), "seconds": self.seconds, "curve": self.curve}
        write(state, self.args.work / "turbo.pt")
        draw_sheet(self.encoder, self.student, decoder, self.args.work / "samples-turbo.png")
        average.swap()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--atlas", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--muon-lr", type=float, default=0.005)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--guidance", type=float, default=1.5, help="the teacher's, as in diffusers")
    parser.add_argument("--teacher", type=float, default=0.4, help="share of the teacher's answer in the mix")
    parser.add_argument("--own-path", type=float, default=0.5, help="share of the batches on the student's path")
    parser.add_argument("--save-every", type=float, default=100)
    parser.add_argument("--resume", action="store_true", help="go on from turbo.pt")
    parser.add_argument("--compile", choices=["none", "blocks", "static"], default="none")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    turbo = Turbo(arguments)
    tiny = load_tiny(arguments.work, turbo.device)
    data = Data(arguments.corpus, turbo.device)
    composer = LatentComposer(Renderer(arguments.atlas, turbo.device), tiny.encoder)
    turbo.train(data, composer, tiny.decoder)


if __name__ == "__main__":
    main()
