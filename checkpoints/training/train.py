"""Train the text encoder alone, then the transformer and the text encoder together.

    python train.py --atlas atlas.npz --corpus corpus.npz --work state --seconds 900

Needs ``vaes.pt`` in the work folder (``vaes.py``). Saves its whole state there every so often; with
``--resume`` it goes on from it. The schedule runs over ``--seconds`` of training time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import architecture
import numpy as np
import tokenizer as tokenizer_module
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from fast_models import (
    CAPTION_LENGTHS,
    LATENT_SIDE,
    FastTextEncoder,
    FastTransformer,
    patchify,
    unpatchify,
)
from latents import LatentComposer
from optimiser import Average, Optimiser, warm_cosine
from phrases import COLOUR_NAMES, SIZE_NAMES, STYLE_NAMES, WORDS
from render import Renderer
from scenes import LAYOUTS, subjects
from torch import Tensor, nn

SHIFT = 3.0
EVALUATIONS = 8
CAPTION_DROPOUT = 0.1
FEW_TOKENS_UNTIL = 0.88  # share of the schedule after which --tokens gives way to all of them
TAIL = 5  # tokens of the chat suffix: behind the caption, so they have seen all of it


class Heads(nn.Module):
    """Throw-away readers of the scene's attributes from the features of the chat suffix."""

    def __init__(self) -> None:
        super().__init__()
        count = len(subjects())
        sizes = [len(LAYOUTS), count, count + 1, len(COLOUR_NAMES), len(STYLE_NAMES)]
        self.sizes = [*sizes, len(SIZE_NAMES), len(WORDS) + 1]
        self.norm = nn.LayerNorm(TAIL * architecture.TEXT_WIDTH)
        self.linear = nn.Linear(TAIL * architecture.TEXT_WIDTH, sum(self.sizes))

    def forward(self, features: Tensor, lengths: Tensor) -> list[Tensor]:
        index = lengths[:, None] - TAIL + torch.arange(TAIL, device=features.device)
        tail = features[torch.arange(len(features), device=features.device)[:, None], index]
        return self.linear(self.norm(tail.flatten(1))).float().split(self.sizes, dim=1)

    def targets(self, scenes: Tensor) -> Tensor:
        """Return class numbers [batch, 7]; "none" is the last class."""
        size = torch.tensor(self.sizes, device=scenes.device)
        return torch.where(scenes < 0, size - 1, scenes.long())


def head_loss(logits: list[Tensor], targets: Tensor) -> Tensor:
    """Sum the cross-entropies; target −100 means that the caption was dropped."""
    losses = [F.cross_entropy(x, y) for x, y in zip(logits, targets.unbind(1), strict=True)]
    return torch.stack(losses).sum()


class Data:
    """The corpus on the device."""

    def __init__(self, corpus: Path, device: torch.device) -> None:
        arrays = np.load(corpus)
        self.scenes = torch.from_numpy(arrays["scenes"]).to(device)
        self.jitter = torch.from_numpy(arrays["jitter"]).to(device)
        self.variants = arrays["tokens"].shape[1]
        self.tokens = torch.from_numpy(arrays["tokens"].astype(np.int16)).flatten(0, 1).to(device)
        self.lengths = torch.from_numpy(arrays["lengths"]).flatten().to(device)
        short = self.lengths <= CAPTION_LENGTHS[0]
        self.buckets = [short.nonzero().squeeze(1), (~short).nonzero().squeeze(1)]
        self.short_share = len(self.buckets[0]) / len(short)
        empty = tokenizer_module.train().encode(tokenizer_module.chat("")).ids
        self.empty = torch.tensor(empty, device=device)
        self.device = device

    def captions(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens [batch, 32 or 64], lengths and the scenes' numbers, one bucket a batch."""
        bucket = int(torch.rand(()).item() >= self.short_share)
        pool = self.buckets[bucket]
        chosen = pool[torch.randint(len(pool), (batch,), device=self.device)]
        tokens = self.tokens[chosen, : CAPTION_LENGTHS[bucket]].long()
        return tokens, self.lengths[chosen].long(), chosen // self.variants

    def drop(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Empty some short captions, so that the model knows the unconditional picture too."""
        dropped = torch.zeros_like(lengths, dtype=torch.bool)
        if tokens.shape[1] == CAPTION_LENGTHS[0]:
            dropped = torch.rand(len(tokens), device=self.device) < CAPTION_DROPOUT
            empty = F.pad(self.empty, (0, tokens.shape[1] - len(self.empty)))
            tokens = torch.where(dropped[:, None], empty, tokens)
            lengths = torch.where(dropped, len(self.empty), lengths)
        return tokens, lengths, dropped


def choose_tokens(boxes: Tensor, count: int) -> Tensor:
    """Choose ``count`` of the 256 tokens a picture: mostly where a drawing stands, some anywhere.

    A plain background is learned in no time, and a third of the tokens costs a third.
    """
    score = torch.rand_like(boxes, dtype=torch.float) + 0.6 * boxes
    return score.topk(count, dim=1).indices


def draw_sigmas(batch: int, device: torch.device) -> Tensor:
    """Return noise levels: half on the eight of the schedule, half anywhere along it.

    The first are the ones at which the picture is decided, and get a little more.
    """
    free = torch.rand(batch, device=device) ** 0.8
    steps = (torch.randint(EVALUATIONS, (batch,), device=device) + 1) / EVALUATIONS
    u = torch.where(torch.rand(batch, device=device) < 0.5, steps, free)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


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
        for module in (self.encoder, self.transformer, self.heads):
            module.to(self.device)
        self.curves: dict[str, list[dict[str, float]]] = {"text": [], "joint": []}
        self.seconds = 0.0
        self.samples = 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def compiled(self, function):
        return torch.compile(function, dynamic=False) if self.device.type == "cuda" else function

    def text_loss(self, tokens: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        with self.autocast():
            logits = self.heads(self.encoder(tokens), lengths)
        return head_loss(logits, targets)

    def joint_loss(
        self,
        tokens: Tensor,
        lengths: Tensor,
        targets: Tensor,
        patches: Tensor,
        sigma: Tensor,
        keep: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Flow matching: the model's output is data minus noise, at timestep 1 − sigma."""
        noise = torch.randn_like(patches)
        level = sigma[:, None, None]
        with self.autocast():
            features = self.encoder(tokens)
            logits = self.heads(features, lengths)
            noisy = (1 - level) * patches + level * noise
            output = self.transformer(noisy, 1 - sigma, features, lengths, keep)
        flow = F.mse_loss(output.float(), patches - noise)
        return flow, head_loss(logits, targets)

    def pretrain_text(self, data: Data, seconds: float) -> None:
        """Teach the encoder the captions' language before there are pictures."""
        optimiser = Optimiser([self.encoder, self.heads], 2e-3, self.args.muon_lr)
        loss_of, start, count = self.compiled(self.text_loss), time.time(), 0
        while (elapsed := time.time() - start) < seconds:
            tokens, lengths, index = data.captions(self.args.text_batch)
            targets = self.heads.targets(data.scenes[index])
            loss = loss_of(tokens, lengths, targets)
            loss.backward()
            optimiser.step(warm_cosine(elapsed / seconds, floor=0.2))
            count += 1
            if count % 20 == 0:
                self.curves["text"].append({"s": round(elapsed, 1), "loss": round(loss.item(), 4)})
        print(f"text: {count} steps, {self.curves['text'][-1:]}", flush=True)
        state = {"encoder": self.encoder.state_dict(), "heads": self.heads.state_dict()}
        torch.save(state | {"curve": self.curves["text"]}, self.args.work / "text.pt")

    def train(self, data: Data, composer: LatentComposer, deadline: float) -> None:
        """Train jointly until ``--seconds`` of training or the deadline (wall clock)."""
        modules = [self.encoder, self.transformer]
        optimiser = Optimiser([*modules, self.heads], self.args.lr, self.args.muon_lr)
        average = Average(modules, self.args.ema)
        loss_of = self.compiled(self.joint_loss)
        batch, last, saved, count = self.args.batch, time.time(), time.time(), 0
        while self.seconds < self.args.seconds and time.time() < deadline:
            tokens, lengths, index = data.captions(batch)
            targets = self.heads.targets(data.scenes[index])
            tokens, lengths, dropped = data.drop(tokens, lengths)
            targets = targets.masked_fill(dropped[:, None], -100)
            scenes, jitter = data.scenes[index], data.jitter[index]
            patches, keep = patchify(composer.compose(scenes, jitter)), None
            if self.args.tokens and self.seconds < FEW_TOKENS_UNTIL * self.args.seconds:
                keep = choose_tokens(composer.boxes(scenes, jitter), self.args.tokens)
                patches = patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
            sigmas = draw_sigmas(batch, self.device)
            flow, aside = loss_of(tokens, lengths, targets, patches, sigmas, keep)
            (flow + self.args.auxiliary * aside).backward()
            optimiser.step(warm_cosine(self.seconds / self.args.seconds, floor=0.003))
            average.update()
            count += 1
            self.samples += batch
            now = time.time()
            # Compiling is not training: it must not use the schedule up.
            self.seconds += min(now - last, 10.0 if self.device.type == "cpu" else 1.0)
            last = now
            if count % 20 == 0:
                point = {
                    "s": round(self.seconds, 1),
                    "samples": self.samples,
                    "flow": round(flow.item(), 4),
                    "heads": round(aside.item(), 4),
                }
                self.curves["joint"].append(point)
                if count % 100 == 0 or count <= 60:
                    print(json.dumps(point), flush=True)
            if now - saved > self.args.save_every:
                self.save(average, optimiser)
                saved = last = time.time()
        self.save(average, optimiser)
        print(f"joint: {count} steps, {self.samples} samples, {self.seconds:.0f} s", flush=True)

    def save(self, average: Average, optimiser: Optimiser) -> None:
        """Write the average (what ships) as bf16 and the live weights to go on from."""
        average.swap()
        modules = {"text_encoder": self.encoder, "transformer": self.transformer}
        shipped = {n: {k: v.bfloat16() for k, v in m.state_dict().items()} for n, m in modules.items()}
        self.sample_sheet(self.args.work / "samples.png")
        average.swap()
        live = {n: m.state_dict() for n, m in modules.items()} | {"heads": self.heads.state_dict()}
        temporary = self.args.work / "joint.tmp"
        torch.save(shipped, temporary)
        temporary.rename(self.args.work / "average.pt")
        torch.save({"live": live, "seconds": self.seconds, "samples": self.samples}, temporary)
        temporary.rename(self.args.work / "live.pt")
        (self.args.work / "curves.json").write_text(json.dumps(self.curves))

    def resume(self) -> None:
        """Take up weights and progress; the optimiser's moments start afresh."""
        state = torch.load(self.args.work / "live.pt", map_location=self.device)
        self.encoder.load_state_dict(state["live"]["text_encoder"])
        self.transformer.load_state_dict(state["live"]["transformer"])
        self.heads.load_state_dict(state["live"]["heads"])
        self.seconds, self.samples = state["seconds"], state["samples"]
        self.curves = json.loads((self.args.work / "curves.json").read_text())

    def load_text(self) -> None:
        """Take the text encoder of an earlier run's first stage."""
        state = torch.load(self.args.work / "text.pt", map_location=self.device)
        self.encoder.load_state_dict(state["encoder"])
        self.heads.load_state_dict(state["heads"])
        self.curves["text"] = state["curve"]

    @torch.no_grad()
    def sample_sheet(self, path: Path) -> None:
        """Draw a few prompts with eight evaluations, for the eye."""
        from sheet import PROMPTS, write_sheet

        tokenizer = tokenizer_module.train()
        ids = [tokenizer.encode(tokenizer_module.chat(p)).ids for p in PROMPTS]
        padded = CAPTION_LENGTHS[int(max(map(len, ids)) > CAPTION_LENGTHS[0])]
        tokens = torch.tensor([x + [0] * (padded - len(x)) for x in ids], device=self.device)
        lengths = torch.tensor([len(x) for x in ids], device=self.device)
        features = self.encoder(tokens)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(len(ids), 16, LATENT_SIDE, LATENT_SIDE, generator=generator)
        patches = patchify(latents.to(self.device))
        u = torch.linspace(1, 1 / EVALUATIONS, EVALUATIONS)
        sigmas = [*(SHIFT * u / (1 + (SHIFT - 1) * u)).tolist(), 0.0]
        for now, following in itertools.pairwise(sigmas):
            t = torch.full((len(ids),), 1 - now, device=self.device)
            output = self.transformer(patches, t, features, lengths)
            patches = patches + (now - following) * output
        write_sheet(self.tiny.decoder(unpatchify(patches)), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--atlas", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--text-seconds", type=float, default=60)
    parser.add_argument("--seconds", type=float, default=900, help="length of the joint schedule")
    parser.add_argument("--wall", type=float, default=1e9, help="stop this long after the start")
    parser.add_argument("--batch", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=0, help="train on so many of 256 at first")
    parser.add_argument("--text-batch", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--muon-lr", type=float, default=0.02, help="0 trains all with AdamW")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--save-every", type=float, default=120)
    parser.add_argument("--resume", action="store_true", help="go on from live.pt")
    parser.add_argument("--more-text", type=float, default=0, help="text alone first, on resuming")
    parser.add_argument("--auxiliary", type=float, default=0.1, help="weight of the heads")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    start = time.time()
    trainer = Trainer(arguments)
    tiny = AutoencoderTiny(**architecture.TINY_VAE)
    tiny.load_state_dict(torch.load(arguments.work / "vaes.pt", map_location="cpu")["tiny"])
    trainer.tiny = tiny.to(trainer.device).requires_grad_(False)
    data = Data(arguments.corpus, trainer.device)
    if arguments.resume:
        trainer.resume()
        if arguments.more_text:
            trainer.pretrain_text(data, arguments.more_text)
    elif (arguments.work / "text.pt").exists():
        trainer.load_text()
    else:
        trainer.pretrain_text(data, arguments.text_seconds)
    encoder = trainer.tiny.encoder.to(memory_format=torch.channels_last)
    composer = LatentComposer(Renderer(arguments.atlas, trainer.device), encoder)
    trainer.train(data, composer, start + arguments.wall)


if __name__ == "__main__":
    main()
