"""Fine-tune the base on realistic captions: vague ones, and some that belong to another image.

    python corpus.py --loose 0.6 --scenes 300000 --variants 4 --out state/corpus-loose.npz
    python base.py --corpus corpus-loose.npz --work state --atlas atlas.npz --seconds 200

Starts from ``average.pt`` and writes ``base.pt``, the transformer that ships in zimage-nano-base; Turbo does not
see it. If captions determine their images, guidance has no effect and a negative prompt has nothing to remove.
Models trained on the web differ: captions leave properties open, and some are wrong.
"""

from __future__ import annotations

import torch
from fast_models import patchify
from finetune import Stage, run, stage_parser
from flow import Data, attempt, batch_of, draw_sigmas, flow_loss
from latents import LatentComposer
from scenes import CANVASES
from torch import Tensor


class Base(Stage):
    """Flow matching as in the joint stage, with a frozen text encoder."""

    name, seed, fall = "base", 40, 0.6

    def step(self, data: Data, composer: LatentComposer) -> Tensor:
        canvas = data.canvas()
        tokens, lengths, index = data.captions(batch_of(canvas, self.batch), canvas)
        tokens, lengths, _ = data.drop(tokens, lengths)
        wrong = torch.rand(len(index), device=self.device) < self.args.wrong
        scenes = data.scenes[torch.where(wrong, index.roll(1), index)]
        clean = patchify(composer.compose(scenes, canvas))
        boxes = composer.boxes(scenes, canvas).float()
        sigma, noise = draw_sigmas(len(clean), self.device), torch.randn_like(clean)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])

        def learn() -> Tensor:
            with self.autocast():
                with torch.no_grad():
                    features = self.encoder(tokens)
                output = self.student(noisy, 1 - sigma, features, lengths, CANVASES[canvas])
            loss = flow_loss(output, clean - noise, boxes)
            loss.backward()
            return loss.detach()

        return attempt(learn, self.clear)


def main() -> None:
    parser = stage_parser(__doc__.splitlines()[0], seconds=200, batch=640, lr=7e-4, muon_lr=0.01, ema=0.995)
    parser.add_argument("--wrong", type=float, default=0.1, help="share of the captions that are another image's")
    run(Base(parser.parse_args()))


if __name__ == "__main__":
    main()
