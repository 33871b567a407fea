"""What comes of a request."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import checks
from .metadata.record import ImageRecord
from .metadata.save import save_images

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclasses.dataclass(frozen=True)
class GenerateResult:
    """What came of a request.

    Attributes:
        images: uint8 `[batch, height, width, 3]`.
        seeds: one an image: asking for it alone with that seed gives the same picture, unless `batch_noise` was
            `comfyui`.
        timings: seconds by stage: encode_prompt, denoise, decode, total; encode_image, encode_control and upscale
            where they are.
        bundle_id: which bundle made it.
        latents: float32 `[batch, 16, height / 8, width / 8]`, what the images were decoded from.
        records: one an image: how it was made, which `save` writes into it.
    """

    images: np.ndarray
    seeds: tuple[int, ...]
    timings: dict[str, float]
    bundle_id: str
    latents: np.ndarray
    records: tuple[ImageRecord, ...] = ()

    @property
    def pil_images(self) -> list[Image]:
        """The images as `PIL.Image.Image`."""
        from PIL import Image

        return [Image.fromarray(image) for image in self.images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> GenerateResult:
        """One image as a result of its own, with the timings of the whole request. Raises IndexError."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"result: expected an index below {len(self)}, got {index}")
        part = slice(index % len(self), index % len(self) + 1)
        return GenerateResult(
            self.images[part], self.seeds[part], self.timings, self.bundle_id, self.latents[part], self.records[part]
        )

    def save(self, where: str | Path, *, sidecar: bool = True, quality: int | None = None) -> list[Path]:
        """Write the images with all it takes to draw them again; see `metadata/save.py`.

        Args:
            where: `panda.png` (or `.jpg`, `.webp`) for one image, which replaces what has that name, `panda-000.png`, …
                for several; anything else is a folder: `000-<seed>.png`, …, counting on from what it holds and
                replacing nothing.
            sidecar: write each one's record beside it too, as `<name>.json`.
            quality: of a JPEG or a WebP, 1 to 100; None takes 95 for JPEG, and WebP without loss.

        Returns:
            where the pictures are.

        Raises:
            RequestError: the name asks for another format.
            OSError: the folder cannot be made or written, or is full; no picture is there by half.
        """
        sidecar, path = checks.flag(sidecar, "sidecar"), checks.path(where, "output")
        return save_images(self.images, self.records, path, sidecar=sidecar, quality=quality)
