"""Shared by the training stages and the fast judge: data, heads, sampling, state."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import architecture
import fast_models
import numpy as np
import spelling
import tokenizer as tokenizer_module
import torch
import torch.nn.functional as F
from fast_models import CAPTION_LENGTHS, FastTransformer, patchify, unpatchify
from phrases import COLOUR_NAMES, STYLE_NAMES
from scenes import CANVAS_SHARES, CANVASES, LAYOUTS, subjects
from torch import Tensor, nn

SHIFT = 3.0
EVALUATIONS = 8
CAPTION_DROPOUT = 0.1
ON_SCHEDULE = 0.3  # share of the sigmas taken from the schedule's eight
CONTENT_WEIGHT = 1.0  # added to the loss weight of tokens with a drawing or a glyph
TAIL = 5  # tokens of the chat suffix, which attend to the whole caption
TOKENS = [w // 16 * (h // 16) for w, h in CANVASES]
Result = TypeVar("Result")


class Heads(nn.Module):
    """Auxiliary classifiers of the scene's attributes on the features of the chat suffix."""

    def __init__(self) -> None:
        super().__init__()
        count = len(subjects())
        self.sizes = [len(LAYOUTS), count + 1, count + 1, len(COLOUR_NAMES), len(STYLE_NAMES)]
        self.sizes += [len(spelling.GLYPHS) + 1] * spelling.MOST_LETTERS
        self.norm = nn.LayerNorm(TAIL * architecture.TEXT_WIDTH)
        self.linear = nn.Linear(TAIL * architecture.TEXT_WIDTH, sum(self.sizes))
        self.register_buffer("none", torch.tensor(self.sizes) - 1, persistent=False)  # the last class

    def forward(self, features: Tensor, lengths: Tensor) -> list[Tensor]:
        index = lengths[:, None] - TAIL + torch.arange(TAIL, device=features.device)
        tail = features[torch.arange(len(features), device=features.device)[:, None], index]
        return list(self.linear(self.norm(tail.flatten(1))).float().split(self.sizes, dim=1))

    def targets(self, scenes: Tensor) -> Tensor:
        """Return class numbers [batch, 12]; "none" is the last class."""
        read = torch.cat([scenes[:, :5], scenes[:, 6:]], dim=1).long()  # captions do not name the canvas
        return torch.where(read < 0, self.none, read)


def head_loss(logits: list[Tensor], targets: Tensor) -> Tensor:
    """Sum of the cross-entropies; target −100 is a dropped caption."""
    losses = [F.cross_entropy(x, y) for x, y in zip(logits, targets.unbind(1), strict=True)]
    return torch.stack(losses).sum()


class Data:
    """The corpus on the device."""

    def __init__(self, corpus: Path, device: torch.device) -> None:
        arrays = np.load(corpus)
        self.scenes = torch.from_numpy(arrays["scenes"]).to(device)
        tokens = arrays["tokens"]  # each access reads the file again
        self.variants = tokens.shape[1]
        self.tokens = torch.from_numpy(tokens.view(np.int16)).flatten(0, 1).to(device)
        self.lengths = torch.from_numpy(arrays["lengths"]).flatten().to(device)
        short = self.lengths <= CAPTION_LENGTHS[0]
        canvas = self.scenes[:, 5].repeat_interleave(self.variants)
        # [canvas][bucket] → captions
        self.pools = [
            [((canvas == c) & (short == s)).nonzero().squeeze(1) for s in (True, False)] for c in range(len(CANVASES))
        ]
        self.short_shares = [len(p[0]) / max(1, len(p[0]) + len(p[1])) for p in self.pools]
        self.drop_rate = min(0.4, CAPTION_DROPOUT / max(1e-6, short.float().mean().item()))
        empty = tokenizer_module.cached().encode(tokenizer_module.chat("")).ids
        self.empty = torch.tensor(empty, device=device)
        self.device = device
        self._rng = random.Random(21)
        # Batches of larger canvases are smaller; the shares are of images, not of batches.
        self._weights = [s * t for s, t in zip(CANVAS_SHARES, TOKENS, strict=True)]

    def canvas(self) -> int:
        """Draw the canvas of a batch."""
        return self._rng.choices(range(len(CANVASES)), self._weights)[0]

    def captions(self, batch: int, canvas: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens [batch, 32 or 64], lengths and scene indices; a batch is from one bucket."""
        bucket = int(self._rng.random() >= self.short_shares[canvas])
        pool = self.pools[canvas][bucket]
        chosen = pool[torch.randint(len(pool), (batch,), device=self.device)]
        tokens = self.tokens[chosen, : CAPTION_LENGTHS[bucket]].long()
        return tokens, self.lengths[chosen].long(), chosen // self.variants

    def drop(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Empty some short captions, so that the model learns unconditional generation as well."""
        dropped = torch.zeros_like(lengths, dtype=torch.bool)
        if tokens.shape[1] == CAPTION_LENGTHS[0]:
            dropped = torch.rand(len(tokens), device=self.device) < self.drop_rate
            tokens = torch.where(dropped[:, None], self.empty_row(), tokens)
            lengths = torch.where(dropped, len(self.empty), lengths)
        return tokens, lengths, dropped

    def empty_row(self) -> Tensor:
        """Return the empty caption's padded tokens."""
        return F.pad(self.empty, (0, CAPTION_LENGTHS[0] - len(self.empty)))


def flow_loss(output: Tensor, target: Tensor, boxes: Tensor) -> Tensor:
    """Return the mean squared error of patches, weighted towards drawings and glyphs.

    ``output`` and ``target`` [batch, tokens, values], ``boxes`` [batch, tokens].
    """
    error = (output.float() - target).square().mean(2)
    weight = 1 + CONTENT_WEIGHT * boxes
    return (error * weight).sum() / weight.sum()


def batch_of(canvas: int, batch: int) -> int:
    """Return the batch size of a canvas that costs as much as ``batch`` images of 256 × 256."""
    return max(1, round(batch * TOKENS[0] / TOKENS[canvas]))


def shift(u: Tensor) -> Tensor:
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def draw_sigmas(batch: int, device: torch.device) -> Tensor:
    """Return noise levels: a share at the schedule's eight sigmas, the rest uniform along it.

    The first sigmas, which decide the image, get a little more weight.
    """
    free = torch.rand(batch, device=device) ** 0.8
    steps = (torch.randint(EVALUATIONS, (batch,), device=device) + 1) / EVALUATIONS
    return shift(torch.where(torch.rand(batch, device=device) < ON_SCHEDULE, steps, free))


def schedule(evaluations: int = EVALUATIONS) -> list[float]:
    """Return the sampler's sigmas, with the final zero."""
    return [*shift(torch.linspace(1, 1 / evaluations, evaluations, dtype=torch.double)).tolist(), 0.0]


@torch.no_grad()
def sample(
    transformer: FastTransformer,
    patches: Tensor,
    features: Tensor,
    lengths: Tensor,
    canvas: tuple[int, int],
    *,
    evaluations: int = EVALUATIONS,
    stop: int | None = None,
    guidance: float = 0.0,
    empty: Tensor | None = None,
) -> Tensor:
    """Run the sampler from noise, for ``stop`` evaluations or all; guidance as in diffusers."""
    for now, following in list(itertools.pairwise(schedule(evaluations)))[:stop]:
        t = torch.full((len(patches),), 1 - now, device=patches.device)
        output = transformer(patches, t, features, lengths, canvas).float()
        if guidance > 0 and empty is not None:
            count = torch.full_like(lengths, TAIL + 3)
            plain = transformer(patches, t, empty.expand(len(patches), -1, -1), count, canvas).float()
            output = output + guidance * (output - plain)
        patches = patches + (now - following) * output
    return patches


def encode_texts(texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens and lengths of prompts, padded to the smaller of the two lengths that fits all."""
    ids = [tokenizer_module.cached().encode(tokenizer_module.chat(t)).ids[: CAPTION_LENGTHS[1]] for t in texts]
    padded = CAPTION_LENGTHS[int(max(map(len, ids)) > CAPTION_LENGTHS[0])]
    tokens = torch.tensor([x + [0] * (padded - len(x)) for x in ids], device=device)
    return tokens, torch.tensor([len(x) for x in ids], device=device)


def noise_of(seeds: list[int], canvas: tuple[int, int], device: torch.device) -> Tensor:
    """Return the noise of seeds as patches, the same as that of the benchmarked systems."""
    shape = (1, 16, canvas[1] // 8, canvas[0] // 8)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return patchify(torch.cat(rows).to(device))


@torch.no_grad()
def draw_sheet(encoder: nn.Module, transformer: FastTransformer, decoder: nn.Module, path: Path) -> None:
    """Write a contact sheet of a few prompts, drawn with eight evaluations."""
    from sheet import PROMPTS, write_sheet

    device = next(transformer.parameters()).device
    tokens, lengths = encode_texts(PROMPTS, device)
    patches = noise_of(list(range(len(PROMPTS))), CANVASES[0], device)
    with fast_models.eager():
        patches = sample(transformer, patches, encoder(tokens), lengths, CANVASES[0])
    write_sheet(decoder(unpatchify(patches, CANVASES[0])), path)


def halved(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.bfloat16() for k, v in module.state_dict().items()}


def widened(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.float() for k, v in state.items()}


def write(state: object, path: Path) -> None:
    """Save atomically."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.rename(path)


def smaller(batch: int) -> int:
    """Return a smaller batch size, after the device ran out of memory."""
    torch.cuda.empty_cache()
    batch = batch * 3 // 4
    print(f"out of memory: batch {batch}", flush=True)
    return batch


def attempt(step: Callable[[], Result], undo: Callable[[], None]) -> Result:
    """Run a step; if it fails with compiled blocks, switch to eager and run it again."""
    try:
        return step()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not fast_models.compiling():
            raise
        print(f"compiling failed, going on without: {type(error).__name__}: {str(error)[:2000]}", flush=True)
    fast_models.stop_compiling()
    undo()
    return step()
