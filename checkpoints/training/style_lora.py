"""Train a small LoRA for the style of cyanotypes.

    python style_lora.py --corpus corpus.npz --work state --atlas atlas.npz --checkpoint ../zimage-nano --seconds 60

Writes ``style_lora.safetensors``, as diffusers and PEFT name its tensors, and ``samples-style-lora.png``: each prompt
without and with the LoRA. The checkpoint is frozen; captions are unchanged, and target images are in the style.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from adapter_training import AdapterTrainer, Base, Batch, Model, begin, draw, parser_of, write_sheet
from cyanotype import StyledRenderer
from fast_models import FastTransformer, patchify
from flow import Data, batch_of
from latents import LatentComposer
from optimiser import Optimiser
from safetensors.torch import save_file
from scenes import CANVASES
from sheet import PROMPTS
from torch import Tensor, nn
from torch.func import functional_call

RANK = 8


def linears(transformer: FastTransformer) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the layers that the LoRA changes: attention and feed-forward of all blocks with image tokens."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(("layers.", "noise_refiner.")) and "adaLN" not in name:
            yield name, module


class Lora(nn.Module):
    """Two matrices per layer; a weight changes by ``up @ down``, which starts at zero."""

    def __init__(self, transformer: FastTransformer, rank: int) -> None:
        super().__init__()
        self.names = [name for name, _ in linears(transformer)]
        sizes = [module.weight.shape for _, module in linears(transformer)]
        self.down = nn.ParameterList([torch.randn(rank, s[1]) * s[1] ** -0.5 for s in sizes])
        self.up = nn.ParameterList([torch.zeros(s[0], rank) for s in sizes])

    def weights(self, transformer: FastTransformer) -> dict[str, Tensor]:
        """Return the patched weights by name."""
        return {
            f"{name}.weight": transformer.get_submodule(name).weight + up @ down
            for name, down, up in zip(self.names, self.down, self.up, strict=True)
        }

    def save(self, path: Path) -> None:
        """Write the tensors under the names that ``ZImagePipeline.load_lora_weights`` reads."""
        tensors = {}
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            tensors[f"transformer.{name}.lora_A.weight"] = down.detach().half().cpu().contiguous()
            tensors[f"transformer.{name}.lora_B.weight"] = up.detach().half().cpu().contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB", flush=True)


def adapted(base: Base, lora: Lora) -> Model:
    """Return the transformer with the LoRA."""
    weights = lora.weights(base.transformer)
    return lambda *inputs: functional_call(base.transformer, weights, inputs)


def draw_batch(data: Data, composer: LatentComposer, count: int) -> Batch:
    """Draw captions of one canvas and their scenes in the style."""
    canvas = data.canvas()
    tokens, lengths, index = data.captions(batch_of(canvas, count), canvas)
    scenes = data.scenes[index]
    clean = patchify(composer.compose(scenes, canvas))
    return Batch(tokens, lengths, clean, composer.boxes(scenes, canvas), CANVASES[canvas])


def main() -> None:
    parser = parser_of("style_lora", __doc__.splitlines()[0], seconds=60, batch=256, lr=2e-3)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=RANK)
    arguments = parser.parse_args()
    base = begin(arguments, seed=40)
    lora = Lora(base.transformer, arguments.rank).to(base.device)
    composer = LatentComposer(StyledRenderer(arguments.atlas, base.device), base.tiny.encoder)
    data = Data(arguments.corpus, base.device)
    training = AdapterTrainer(arguments, base, lora, lambda _: adapted(base, lora), partial(draw_batch, data, composer))
    training.train(Optimiser([lora], arguments.lr, muon_lr=0))
    lora.save(arguments.work / "style_lora.safetensors")
    prompts = [p for p in PROMPTS if p.isascii()]
    with torch.no_grad():
        images = [draw(base, model, prompts) for model in (base.transformer, adapted(base, lora))]
    write_sheet(arguments.work / "samples-style-lora.png", prompts, images)


if __name__ == "__main__":
    main()
