"""Train the text encoder alone, then the transformer and the text encoder together: the base model.

    python train.py text  --corpus corpus.npz --work state --seconds 80
    python train.py joint --corpus corpus.npz --work state --atlas atlas.npz --seconds 900

``joint`` needs ``vaes.pt`` and ``text.pt`` in the work folder. It saves regularly, and ``--resume``
continues from ``live.pt`` or else from ``average.pt``, which ``pack_state.py`` packs. The schedule is
``--seconds`` of training long, including those before a resume. A file ``stop`` in the work folder
with a number of seconds ends it after that time, with the learning rate falling to zero.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import architecture
import fast_models
import torch
from diffusers import AutoencoderTiny
from fast_models import FastTextEncoder, FastTransformer, patchify
from flow import (
    Data,
    Heads,
    attempt,
    batch_of,
    draw_sheet,
    draw_sigmas,
    flow_loss,
    halved,
    head_loss,
    smaller,
    widened,
    write,
)
from latents import LatentComposer
from optimiser import Average, Clock, Optimiser
from render import Renderer
from scenes import CANVASES
from torch import Tensor, nn

FEW_TOKENS_UNTIL = 0.8  # share of the schedule that trains on --tokens tokens instead of all


def choose_tokens(boxes: Tensor, count: int) -> Tensor:
    """Choose ``count`` of a canvas's tokens: mostly at drawings and glyphs, some anywhere.

    A plain background is learned quickly, and a third of the tokens costs a third of the time.
    """
    score = torch.rand_like(boxes, dtype=torch.float) + 0.6 * boxes
    return score.topk(count, dim=1).indices


class Trainer:
    """The two models, their heads, optimiser and average."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.args = arguments
        self.device = torch.device(arguments.device)
        torch.manual_seed(20)
        torch.set_float32_matmul_precision("high")
        self.encoder, self.transformer = FastTextEncoder(), FastTransformer()
        self.encoder.initialise()
        self.transformer.initialise()
        self.heads = Heads()
        self.modules: dict[str, nn.Module] = {
            "text_encoder": self.encoder,
            "transformer": self.transformer,
            "heads": self.heads,
        }
        for module in self.modules.values():
            module.to(self.device)
        self.curves: dict[str, list[dict[str, float]]] = {"text": [], "joint": []}
        self.seconds, self.samples, self.batch = 0.0, 0, arguments.batch
        self.most = 1.0 if self.device.type == "cuda" else 20.0
        if arguments.compile != "none":
            fast_models.compile_blocks(dynamic=arguments.compile == "blocks")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def clear(self) -> None:
        """Drop the gradients of a failed step."""
        for module in self.modules.values():
            module.zero_grad(set_to_none=True)

    def train_text(self, data: Data) -> None:
        """Train the encoder on captions alone, with the auxiliary heads."""
        optimiser = Optimiser([self.encoder, self.heads], 2e-3, self.args.muon_lr)
        clock, count = Clock(self.args.seconds, self.args.work / "stop-text", most=self.most), 0
        while not clock.done():
            tokens, lengths, index = data.captions(self.batch, data.canvas())
            targets = self.heads.targets(data.scenes[index])

            def step(tokens=tokens, lengths=lengths, targets=targets) -> Tensor:
                with self.autocast():
                    logits = self.heads(self.encoder(tokens), lengths)
                loss = head_loss(logits, targets)
                loss.backward()
                return loss.detach()

            loss = attempt(step, self.clear)
            optimiser.step(clock.factor(fall=0.6, floor=0.05))
            count += 1
            if count % 20 == 0 or count == 1:
                self.curves["text"].append({"s": round(clock.seconds, 1), "loss": round(loss.item(), 4)})
                if count % 100 == 0 or count == 1:
                    print("text", json.dumps(self.curves["text"][-1]), flush=True)
                clock.look()
            clock.tick()
        print(f"text: {count} steps, {self.curves['text'][-1:]}", flush=True)
        state = {"encoder": self.encoder.state_dict(), "heads": self.heads.state_dict()}
        write(state | {"curve": self.curves["text"]}, self.args.work / "text.pt")

    def joint_loss(
        self, tokens: Tensor, lengths: Tensor, targets: Tensor, patches: Tensor, canvas: int,
        keep: Tensor | None, boxes: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Flow matching: the model's output is data minus noise, at timestep 1 − sigma."""
        sigma = draw_sigmas(len(patches), self.device)
        noise = torch.randn_like(patches)
        level = sigma[:, None, None]
        noisy = (1 - level) * patches + level * noise
        with self.autocast():
            features = self.encoder(tokens)
            logits = self.heads(features, lengths)
            output = self.transformer(noisy, 1 - sigma, features, lengths, CANVASES[canvas], keep)
        return flow_loss(output, patches - noise, boxes), head_loss(logits, targets)

    def step(self, data: Data, composer: LatentComposer, few: bool) -> tuple[Tensor, Tensor]:
        """Draw a batch and accumulate its gradients; return both losses."""
        canvas = data.canvas()
        batch = batch_of(canvas, self.batch)
        tokens, lengths, index = data.captions(batch, canvas)
        scenes = data.scenes[index]
        targets = self.heads.targets(scenes)
        tokens, lengths, dropped = data.drop(tokens, lengths)
        targets = targets.masked_fill(dropped[:, None], -100)
        patches, keep = patchify(composer.compose(scenes, canvas)), None
        boxes = composer.boxes(scenes, canvas).float()
        if few:
            count = min(patches.shape[1], round(self.args.tokens * patches.shape[1] / 256 / 16) * 16)
            keep = choose_tokens(boxes, count)
            patches = patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
            boxes = boxes.gather(1, keep)

        def run() -> tuple[Tensor, Tensor]:
            flow, aside = self.joint_loss(tokens, lengths, targets, patches, canvas, keep, boxes)
            (flow + self.args.auxiliary * aside).backward()
            return flow.detach(), aside.detach()

        losses = attempt(run, self.clear)
        self.samples += batch
        return losses

    def train(self, data: Data, composer: LatentComposer, decoder: nn.Module, resumed: bool) -> None:
        """Train jointly until the schedule ends."""
        optimiser = Optimiser(list(self.modules.values()), self.args.lr, self.args.muon_lr)
        average = Average(list(self.modules.values()), self.args.ema, young=not resumed)
        clock = Clock(self.args.seconds, self.args.work / "stop", start=self.seconds, most=self.most)
        saved, count, begun = time.monotonic(), 0, self.seconds
        gentle = 1.0
        while not clock.done():
            few = bool(self.args.tokens) and clock.seconds < FEW_TOKENS_UNTIL * clock.total
            try:
                flow, aside = self.step(data, composer, few)
            except torch.OutOfMemoryError:
                self.clear()
                self.batch = smaller(self.batch)
                continue
            # A resumed run has no moments of the optimiser, so it warms up again.
            rising = min(1.0, 0.05 + (clock.seconds - begun) / 10) if resumed else 1.0
            optimiser.step(clock.factor(fall=0.4, floor=0.003) * rising * gentle)
            average.update()
            count += 1
            clock.tick()
            self.seconds = clock.seconds
            if count % 20 == 0 or count <= 2:
                point = {"s": round(self.seconds, 1), "samples": self.samples}
                point |= {"flow": round(flow.item(), 4), "heads": round(aside.item(), 4)}
                self.curves["joint"].append(point)
                if count % 100 == 0 or count <= 2:
                    print("joint", json.dumps(point), flush=True)
                clock.look()
                if not torch.isfinite(flow + aside) or not self.finite():
                    gentle = self.start_again(gentle)
                    optimiser = Optimiser(list(self.modules.values()), self.args.lr, self.args.muon_lr)
                    average = Average(list(self.modules.values()), self.args.ema, young=False)
                elif time.monotonic() - saved > self.args.save_every:
                    self.save(average, decoder)
                    saved = time.monotonic()
                    clock.skip()
        self.save(average, decoder)
        print(f"joint: {count} steps, {self.samples} samples, {self.seconds:.0f} s", flush=True)

    @torch.no_grad()
    def finite(self) -> bool:
        """Tell whether all weights are finite, so that a bad gradient is never saved."""
        weights = [p for m in self.modules.values() for p in m.parameters()]
        return bool(torch.stack(torch._foreach_norm(weights)).isfinite().all())

    def start_again(self, gentle: float) -> float:
        """Return to the last save after a loss that is not finite; return the halved factor of the rates."""
        if gentle < 0.2:
            raise FloatingPointError("the loss is not finite, again and again")
        print("the loss is not finite: going back to the last save at half the rates", flush=True)
        seconds, samples = self.seconds, self.samples
        if not self.resume():
            self.load_text()
            fresh = FastTransformer()
            fresh.initialise()  # it does not touch norms and biases, which a new model has
            self.transformer.load_state_dict(fresh.state_dict())
        self.seconds, self.samples = seconds, samples
        return gentle / 2

    def save(self, average: Average, decoder: nn.Module) -> None:
        """Write the averaged weights, which are released, as bf16, and the live weights for a resume."""
        progress = {"seconds": self.seconds, "samples": self.samples, "curves": self.curves}
        write({k: m.state_dict() for k, m in self.modules.items()} | progress, self.args.work / "live.pt")
        average.swap()
        write({k: halved(m) for k, m in self.modules.items()} | progress, self.args.work / "average.pt")
        draw_sheet(self.encoder, self.transformer, decoder, self.args.work / "samples.png")
        average.swap()
        (self.args.work / "curves.json").write_text(json.dumps(self.curves))

    def resume(self) -> bool:
        """Load weights and progress, if any; the optimiser's moments are not saved."""
        for name in ("live.pt", "average.pt"):
            if (self.args.work / name).exists():
                state = torch.load(self.args.work / name, map_location=self.device)
                for key, module in self.modules.items():
                    module.load_state_dict(widened(state[key]))
                self.seconds, self.samples, self.curves = state["seconds"], state["samples"], state["curves"]
                print(f"resuming from {name} at {self.seconds:.0f} s", flush=True)
                return True
        return False

    def load_text(self) -> None:
        """Load the text encoder of the first stage."""
        state = torch.load(self.args.work / "text.pt", map_location=self.device)
        self.encoder.load_state_dict(widened(state["encoder"]))
        self.heads.load_state_dict(widened(state["heads"]))
        self.curves["text"] = state["curve"]


def load_tiny(work: Path, device: torch.device) -> AutoencoderTiny:
    """Return the trained tiny autoencoder, frozen."""
    tiny = AutoencoderTiny(**architecture.TINY_VAE)
    tiny.load_state_dict(widened(torch.load(work / "vaes.pt", map_location="cpu")["tiny"]))
    return tiny.to(device, memory_format=torch.channels_last).requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["text", "joint"])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--atlas", type=Path, help="for the joint stage")
    parser.add_argument(
        "--seconds", type=float, required=True, help="length of the stage's schedule in seconds of training"
    )
    parser.add_argument("--batch", type=int, default=768, help="captions, or images of 256 × 256, per step")
    parser.add_argument(
        "--tokens", type=int, default=0, help="number of tokens, of 256, to train on at first; 0 for all"
    )
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--muon-lr", type=float, default=0.02, help="learning rate of Muon; 0 trains all with AdamW")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--save-every", type=float, default=100)
    parser.add_argument("--resume", action="store_true", help="resume from a save, if any")
    parser.add_argument("--auxiliary", type=float, default=0.1, help="weight of the heads")
    parser.add_argument("--compile", choices=["none", "blocks", "static"], default="none")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    trainer = Trainer(arguments)
    data = Data(arguments.corpus, trainer.device)
    if arguments.stage == "text":
        trainer.train_text(data)
        return
    tiny = load_tiny(arguments.work, trainer.device)
    resumed = arguments.resume and trainer.resume()
    if not resumed:
        trainer.load_text()
    composer = LatentComposer(Renderer(arguments.atlas, trainer.device), tiny.encoder)
    trainer.train(data, composer, tiny.decoder, resumed)


if __name__ == "__main__":
    main()
