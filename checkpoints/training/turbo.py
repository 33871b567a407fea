"""Fine-tune the base model for eight evaluations without guidance.

    python turbo.py --corpus corpus.npz --work state --atlas atlas.npz --seconds 150

Starts from ``average.pt``, the base, which is also the teacher; writes ``turbo.pt``. Only the
transformer is trained, and only at the schedule's eight sigmas. Some batches are interpolated between
image and noise, with a mix of the true target and the teacher's guided prediction. Others start from
states that the student reaches by itself, with a target that leads to the true image: a caption
determines its image, so the student can correct errors of its earlier steps.
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
        # It needs no gradients, but requires_grad_(False) would compile every graph again.
        self.teacher = copy.deepcopy(self.student)
        self.sigmas = torch.tensor(schedule()[:-1], device=self.device)

    @torch.no_grad()
    def on_line(self, clean: Tensor, features: Tensor, lengths: Tensor, empty: Tensor, canvas: tuple[int, int]):
        """Return states between image and noise, their sigmas, and mixed targets."""
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
        """Return states that the student reaches, their sigmas, and targets that lead to the true image."""
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
    parser.add_argument("--guidance", type=float, default=1.5, help="guidance scale of the teacher, as in diffusers")
    parser.add_argument("--teacher", type=float, default=0.4, help="share of the teacher's prediction in the target")
    parser.add_argument(
        "--own-path", type=float, default=0.5, help="share of the batches that start from states of the student"
    )
    run(Turbo(parser.parse_args()))


if __name__ == "__main__":
    main()
