"""Make the base model's eight evaluations without guidance as good as they get.

    python turbo.py --corpus corpus.npz --work state --atlas atlas.npz --seconds 150

Starts from ``average.pt``, the base, which stays as the teacher; writes ``turbo.pt``. Only the
transformer changes, and only at the schedule's own eight sigmas. Some batches stand between a picture
and noise, and learn a mix of the true answer and the teacher's guided one. The others stand where the
model's own first steps lead, and learn the answer that still ends at the true picture: a caption
determines its picture, so the student can mend what its earlier steps got wrong.
"""

from __future__ import annotations

import copy

import fast_models
import torch
from fast_models import patchify
from finetune import Stage, run, stage_parser
from flow import EVALUATIONS, TAIL, Data, attempt, batch_of, flow_loss, sample, schedule
from latents import LatentComposer
from scenes import CANVASES
from torch import Tensor


class Turbo(Stage):
    """Student, teacher and the frozen text encoder."""

    name, seed, fall = "turbo", 30, 0.85

    def begin(self) -> None:
        # No gradient is ever asked of it, but to say so would compile every graph once more.
        self.teacher = copy.deepcopy(self.student)
        self.sigmas = torch.tensor(schedule()[:-1], device=self.device)

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
        canvas = data.canvas()
        size = CANVASES[canvas]
        tokens, lengths, index = data.captions(batch_of(canvas, self.batch), canvas)
        clean = patchify(composer.compose(data.scenes[index], canvas))
        boxes = composer.boxes(data.scenes[index], canvas).float()
        own = torch.rand((), generator=self.generator).item() < self.args.own_path

        def learn() -> Tensor:
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
            loss = flow_loss(output, target, boxes)
            loss.backward()
            return loss.detach()

        return attempt(learn, self.clear)


def main() -> None:
    parser = stage_parser(__doc__.splitlines()[0], seconds=150, batch=512, lr=4e-4, muon_lr=0.005, ema=0.99)
    parser.add_argument("--guidance", type=float, default=1.5, help="the teacher's, as in diffusers")
    parser.add_argument("--teacher", type=float, default=0.4, help="share of the teacher's answer in the mix")
    parser.add_argument("--own-path", type=float, default=0.5, help="share of the batches on the student's path")
    run(Turbo(parser.parse_args()))


if __name__ == "__main__":
    main()
