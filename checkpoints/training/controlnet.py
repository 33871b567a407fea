"""Train a small ControlNet that places drawings at white silhouettes on black.

    python controlnet.py --work state --atlas atlas.npz --checkpoint ../zimage-nano --seconds 120

Writes the folder ``controlnet`` as diffusers does, and ``samples-controlnet.png``: each prompt's control image, then
the image without and with it. Drawings are shifted by whole tokens from their usual places and captions name no place,
so that only the control image determines it. The checkpoint is frozen.
"""

from __future__ import annotations

import random
import re
from functools import partial
from pathlib import Path

import captions
import numpy as np
import tokenizer as tokenizer_module
import torch
import torch.nn.functional as F
from adapter_training import AdapterTrainer, Base, Batch, Model, begin, draw, parser_of, write_sheet
from captions import CaptionWriter
from fast_controlnet import CHANNELS, PLACES, FastControlNet
from fast_models import CAPTION_LENGTHS, TOKEN, patchify
from flow import Data, batch_of
from latents import CELL, TILE, LatentComposer
from optimiser import Optimiser
from phrases import COLOUR_NAMES, STYLE_NAMES
from render import AWAY, Renderer, geometry
from scenes import (
    CANVAS_SHARES,
    CANVASES,
    COLUMNS,
    DRAWING,
    LAYOUTS,
    Scene,
    draw_scene,
    scene_held_out,
    subjects,
)
from torch import Tensor, nn

PAIRS = 0.25  # share of pairs on canvases that fit them side by side; captions name the left one first
NAMES_A_PLACE = re.compile(r"middle|cent(re|er)|中", re.IGNORECASE)
SINGLE, PAIR = LAYOUTS.index("single"), LAYOUTS.index("left_right")
EDGE = DRAWING // 2 + CELL  # pixels from a drawing's centre to the nearest that the canvas's edge may be
SHEET = 8  # cases


class Silhouettes(Renderer):
    """Renders control images: a scene's drawings in white on black."""

    def __init__(self, atlas: Path, device: torch.device) -> None:
        super().__init__(atlas, device)
        self._sprites[:, :3] = self._sprites[:, 3:]
        self._colours = torch.zeros_like(self._colours)


class ShiftedComposer(LatentComposer):
    """Composes scenes with shifted drawings."""

    def shifted(self, scenes: Tensor, canvas: int, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents and boxes of scenes without text; shifts [batch, 2, xy] in tokens."""
        layout, a, b, colour, style = scenes[:, :5].long().unbind(1)
        latents = self._grounds[canvas][colour].clone()
        marked = torch.zeros_like(latents[..., :1])
        tile, zero = marked.new_ones(1, TILE, TILE, 1), torch.zeros_like(a)
        corners = self._corners[canvas, layout] + shifts * (TOKEN // CELL)
        for number, slot in ((a, 0), (b, 1)):
            where = torch.where((number >= 0)[:, None], corners[:, slot], AWAY)
            self._add(latents, self._tiles, (colour, style, number.clamp(min=0)), where)
            self._add(marked, tile, (zero,), where)
        boxes = marked.squeeze(3).unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).amax((2, 4)).flatten(1) > 0
        return latents.permute(0, 3, 1, 2), boxes


class ControlComposer(ShiftedComposer):
    """Composes control images, which have one colour and no glyphs."""

    def __init__(self, renderer: Silhouettes, encoder: nn.Module) -> None:
        self._renderer, self._encoder, self.device = renderer, encoder, renderer.device
        black = torch.zeros(1, dtype=torch.long, device=self.device)
        self._grounds = [self._encode(renderer.ground(black, c)).permute(0, 2, 3, 1) for c in range(len(CANVASES))]
        middle = self._grounds[0].shape[1] // 2
        self._plain = self._grounds[0][:, middle, middle]
        styles, count = len(STYLE_NAMES), len(subjects())
        index = torch.cartesian_prod(torch.arange(styles), torch.arange(count))
        scenes = torch.full((len(index), COLUMNS), -1)
        scenes[:, 0], scenes[:, 1], scenes[:, 3], scenes[:, 4] = SINGLE, index[:, 1], 0, index[:, 0]
        x, y = (v // CELL - TILE // 2 for v in geometry(0)[0][SINGLE][0])
        self._tiles = self._cut(scenes, y, x, TILE, TILE).unflatten(0, (1, styles, count))
        places = torch.tensor([geometry(c)[0] for c in range(len(CANVASES))])
        self._corners = (places.div(CELL, rounding_mode="floor") - TILE // 2).to(self.device)

    def shifted(self, scenes: Tensor, canvas: int, shifts: Tensor) -> tuple[Tensor, Tensor]:
        scenes = scenes.clone()
        scenes[:, 3] = 0
        return super().shifted(scenes, canvas, shifts)


def draw_shifts(scenes: Tensor, canvas: int) -> Tensor:
    """Draw the shift of each drawing in tokens: anywhere for a single one, up or down for those of a pair."""
    size = torch.tensor(CANVASES[canvas], device=scenes.device)
    centres = torch.tensor(geometry(canvas)[0], device=scenes.device)[scenes[:, 0].long()]
    low = -((centres - EDGE) // TOKEN)
    high = (size - EDGE - centres).div(TOKEN, rounding_mode="floor")
    shifts = low + (torch.rand(low.shape, device=low.device) * (high - low + 1)).long()
    shifts[..., 0] *= (scenes[:, 0] == SINGLE)[:, None]
    # The missing drawing's place is outside every canvas.
    return torch.where((scenes[:, 1:3] >= 0)[..., None], shifts, 0)


def write_corpus(path: Path, count: int) -> None:
    """Write scenes with captions that name no place, in the format of ``corpus.py``."""
    rng, writer, tokenizer = random.Random("control"), CaptionWriter(), tokenizer_module.cached()
    captions.PLACE_LEFT_OUT = 1.0  # of pairs side by side: always
    rows, lines = [], []
    while len(rows) < count:
        canvas = rng.choices(range(len(CANVASES)), CANVAS_SHARES)[0]
        pair = canvas == 0 and rng.random() < PAIRS
        scene: Scene = draw_scene(rng, canvas, LAYOUTS[PAIR if pair else SINGLE])
        text = writer.write(scene, rng)
        ids = tokenizer.encode(tokenizer_module.chat(text)).ids
        if not scene_held_out(scene) and not NAMES_A_PLACE.search(text) and len(ids) <= CAPTION_LENGTHS[1]:
            rows.append(scene.as_row())
            lines.append(ids)
    tokens = np.zeros((count, 1, CAPTION_LENGTHS[1]), np.uint16)
    for i, ids in enumerate(lines):
        tokens[i, 0, : len(ids)] = ids
    lengths = np.array([[len(ids)] for ids in lines], np.uint8)
    temporary = path.with_suffix(".part.npz")
    np.savez(temporary, scenes=np.array(rows, np.int16), tokens=tokens, lengths=lengths)
    temporary.rename(path)


def widened_control(latents: Tensor) -> Tensor:
    """Return the ControlNet's input for a control image's latents: patches, with zeros for inpainting."""
    return patchify(F.pad(latents, (0, 0, 0, 0, 0, CHANNELS - latents.shape[1])))


def controlled(base: Base, net: FastControlNet, control: Tensor) -> Model:
    """Return the transformer with the ControlNet and this control image."""
    return lambda patches, *inputs: net(base.transformer, patches, control, *inputs)


def draw_batch(data: Data, composer: ShiftedComposer, silhouettes: ControlComposer, count: int) -> Batch:
    """Draw captions of one canvas, their shifted scenes, and control images."""
    canvas = data.canvas()
    tokens, lengths, index = data.captions(batch_of(canvas, count), canvas)
    scenes = data.scenes[index]
    shifts = draw_shifts(scenes, canvas)
    latents, boxes = composer.shifted(scenes, canvas, shifts)
    # Where the caption alone would put something matters as much: there shall be nothing.
    boxes = boxes | composer.boxes(scenes, canvas)
    control = widened_control(silhouettes.shifted(scenes, canvas, shifts)[0])
    return Batch(tokens, lengths, patchify(latents), boxes, CANVASES[canvas], control)


@torch.no_grad()
def write_samples(base: Base, net: FastControlNet, renderer: Silhouettes, path: Path) -> None:
    """Draw some subjects, each shifted along another diagonal."""
    colours = [n for n in ("blue", "yellow", "white", "green") if n in COLOUR_NAMES]
    prompts, images = [], []
    for i in range(SHEET):
        number, colour = 7 * i % len(subjects()), colours[i % len(colours)]
        prompts.append(f"{subjects()[number].english[0]}, {colour} background, flat style")
        row = torch.full((1, COLUMNS), -1, device=base.device)
        row[0, :6] = torch.tensor([SINGLE, number, -1, 0, STYLE_NAMES.index("flat"), 0])
        jitter = torch.zeros(1, 6, device=base.device)
        jitter[0, 0], jitter[0, 1] = (3 * TOKEN * (1 - i % 2 * 2)), 3 * TOKEN * (1 - i // 2 % 2 * 2)
        images.append(renderer.compose(row, 0, jitter).float())
    shown = torch.cat(images)
    control = widened_control(base.tiny.encoder(shown.contiguous(memory_format=torch.channels_last)))
    free, bound = (draw(base, model, prompts) for model in (base.transformer, controlled(base, net, control)))
    write_sheet(path, prompts, [shown, free, bound])


def main() -> None:
    parser = parser_of("controlnet", __doc__.splitlines()[0], seconds=120, batch=256, lr=1e-3)
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--captions", type=int, default=60_000, help="how many scenes and captions")
    parser.add_argument("--places", type=int, nargs="+", default=list(PLACES), help="layers that get a hint; 0 first")
    arguments = parser.parse_args()
    base = begin(arguments, seed=50)
    net = FastControlNet(tuple(arguments.places))
    net.begin_from(base.transformer.cpu())
    for module in (net, base.transformer):
        module.to(base.device)
    corpus = arguments.work / "controlnet-corpus.npz"
    if not corpus.exists():
        write_corpus(corpus, arguments.captions)
    data, renderer = Data(corpus, base.device), Silhouettes(arguments.atlas, base.device)
    composer = ShiftedComposer(Renderer(arguments.atlas, base.device), base.tiny.encoder)
    silhouettes = ControlComposer(renderer, base.tiny.encoder)
    training = AdapterTrainer(
        arguments,
        base,
        net,
        lambda control: controlled(base, net, control),
        partial(draw_batch, data, composer, silhouettes),
    )
    # Under this name the blocks' matrices are Muon's.
    blocks = nn.ModuleDict({"layers": net.control_layers})
    training.train(Optimiser([blocks, net.control_all_x_embedder], arguments.lr, arguments.muon_lr))
    folder = arguments.work / "controlnet"
    net.original().to(torch.bfloat16).save_pretrained(folder)
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.1f} MB", flush=True)
    write_samples(base, net, renderer, arguments.work / "samples-controlnet.png")


if __name__ == "__main__":
    main()
