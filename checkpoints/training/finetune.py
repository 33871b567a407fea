"""Shared by the stages after the joint one: fine-tuning of the transformer with a frozen text encoder."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import fast_models
import torch
from fast_models import FastTextEncoder, FastTransformer
from flow import Data, draw_sheet, halved, smaller, widened, write
from latents import LatentComposer
from optimiser import Average, Clock, Optimiser
from render import Renderer
from torch import Tensor, nn
from train import load_tiny


class Stage:
    """Fine-tunes the transformer of ``average.pt``; a subclass defines the loss of a step.

    Attributes:
        name: prefix of log lines, and part of the outputs ``NAME.pt`` and ``samples-NAME.png``.
        seed: seed of all random numbers.
        fall: share of the schedule over which the learning rate falls.
    """

    name: str
    seed: int
    fall: float

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.args = arguments
        self.device = torch.device(arguments.device)
        torch.manual_seed(self.seed)
        torch.set_float32_matmul_precision("high")
        state = torch.load(arguments.work / "average.pt", map_location=self.device)
        self.encoder, self.student = FastTextEncoder().to(self.device), FastTransformer().to(self.device)
        self.encoder.load_state_dict(widened(state["text_encoder"]))
        self.student.load_state_dict(widened(state["transformer"]))
        self.seconds, self.curve, self.batch = 0.0, [], arguments.batch
        self.generator = torch.Generator().manual_seed(self.seed + 1)
        self.begin()
        if arguments.resume and self.saved.exists():
            state = torch.load(self.saved, map_location=self.device)
            self.student.load_state_dict(widened(state["transformer"]))
            self.seconds, self.curve = state["seconds"], state["curve"]
        if arguments.compile != "none":
            fast_models.compile_blocks(dynamic=arguments.compile == "blocks")

    @property
    def saved(self) -> Path:
        """Path of the saved weights."""
        return self.args.work / f"{self.name}.pt"

    def begin(self) -> None:
        """Set up a subclass, before resuming and compiling."""

    def autocast(self) -> torch.autocast:
        """Autocast without its cache, which would reuse weights that were cast without gradients."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)

    def step(self, data: Data, composer: LatentComposer) -> Tensor:
        """Draw a batch and accumulate its gradients; return the loss."""
        raise NotImplementedError

    def clear(self) -> None:
        """Drop the gradients of a failed step."""
        self.student.zero_grad(set_to_none=True)

    def train(self, data: Data, composer: LatentComposer, decoder: nn.Module) -> None:
        """Train until the schedule ends."""
        optimiser = Optimiser([self.student], self.args.lr, self.args.muon_lr)
        average = Average([self.student], self.args.ema, young=False)
        most = 2.0 if self.device.type == "cuda" else 60.0
        clock = Clock(self.args.seconds, self.args.work / "stop", start=self.seconds, most=most)
        saved, count = time.monotonic(), 0
        while not clock.done():
            try:
                loss = self.step(data, composer)
            except torch.OutOfMemoryError:
                self.clear()
                self.batch = smaller(self.batch)
                continue
            optimiser.step(clock.factor(fall=self.fall, floor=0.003))
            average.update()
            count += 1
            clock.tick()
            self.seconds = clock.seconds
            if count % 20 == 0 or count <= 2:
                self.curve.append({"s": round(self.seconds, 1), "loss": round(loss.item(), 4)})
                if count % 100 == 0 or count <= 2:
                    print(self.name, json.dumps(self.curve[-1]), flush=True)
                clock.look()
                if not torch.isfinite(loss):
                    raise FloatingPointError("the loss is not finite")
                if time.monotonic() - saved > self.args.save_every:
                    self.save(average, decoder)
                    saved = time.monotonic()
                    clock.skip()
        self.save(average, decoder)
        print(f"{self.name}: {count} steps, {self.seconds:.0f} s", flush=True)

    def save(self, average: Average, decoder: nn.Module) -> None:
        """Write the averaged weights and a contact sheet of their images."""
        average.swap()
        state = {"transformer": halved(self.student), "seconds": self.seconds, "curve": self.curve}
        write(state, self.saved)
        draw_sheet(self.encoder, self.student, decoder, self.args.work / f"samples-{self.name}.png")
        average.swap()


def stage_parser(description: str, **defaults: float) -> argparse.ArgumentParser:
    """Return a parser with the options of all stages; ``defaults`` are seconds, batch, lr, muon_lr and ema."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--atlas", type=Path, required=True)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--muon-lr", type=float)
    parser.add_argument("--ema", type=float)
    parser.add_argument("--save-every", type=float, default=100)
    parser.add_argument("--resume", action="store_true", help="resume from the stage's saved weights")
    parser.add_argument("--compile", choices=["none", "blocks", "static"], default="none")
    parser.add_argument("--device", default="cuda")
    parser.set_defaults(**defaults)
    return parser


def run(stage: Stage) -> None:
    """Load the data and train."""
    tiny = load_tiny(stage.args.work, stage.device)
    composer = LatentComposer(Renderer(stage.args.atlas, stage.device), tiny.encoder)
    stage.train(Data(stage.args.corpus, stage.device), composer, tiny.decoder)
