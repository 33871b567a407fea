"""The result of a request."""

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
    """The images of a request with their seeds, latents, timings and records.

    Attributes:
        images: uint8 `[batch, height, width, 3]`.
        seeds: one per image. A request for one image with its seed gives the same image, unless `batch_noise` was
            `comfyui`.
        timings: seconds by stage: encode_prompt, denoise, decode, total; encode_image, encode_control and upscale
            if they ran.
        bundle_id: the bundle that made it.
        latents: float32 `[batch, 16, height / 8, width / 8]`, from which the images were decoded.
        records: one per image: the whole request and its environment, which `save` writes into the file.
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
        """The result of one image, with the timings of the whole request. Raises IndexError."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"result: expected an index below {len(self)}, got {index}")
        part = slice(index % len(self), index % len(self) + 1)
        return GenerateResult(
            self.images[part], self.seeds[part], self.timings, self.bundle_id, self.latents[part], self.records[part]
        )

    def save(self, where: str | Path, *, sidecar: bool = True, quality: int | None = None) -> list[Path]:
        """Write the images with their records, from which they can be drawn again.

        Args:
            where: `panda.png` (or `.jpg`, `.webp`) for one image, which replaces a file of that name, and
                `panda-000.png`, … for several. Any other path is a folder, which gets `000-<seed>.png`, …, numbered
                after the files it holds; nothing is replaced.
            sidecar: also write each image's record beside it, as `<name>.json`.
            quality: 1 to 100 for JPEG and WebP; None takes 95 for JPEG and lossless WebP.

        Returns:
            The paths of the images.

        Raises:
            RequestError: the name has the ending of an unsupported format.
            OSError: the folder cannot be made or written, or the disk is full; no incomplete image is left.
        """
        sidecar, path = checks.flag(sidecar, "sidecar"), checks.path(where, "output")
        return save_images(self.images, self.records, path, sidecar=sidecar, quality=quality)
