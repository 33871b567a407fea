"""Results to files: names that replace nothing by accident."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import RequestError
from .metadata import save_picture
from .request import GenerateResult

# Names that mean another format than PNG, not a folder.
OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".json")


def save_result(result: GenerateResult, where: Path, *, sidecar: bool = True) -> list[Path]:
    """See `GenerateResult.save`."""
    paths = picture_paths(where, result.seeds)
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path, pixels, record in zip(paths, result.images, result.records, strict=True):
        save_picture(path, pixels, record, sidecar=sidecar)
    return paths


def picture_paths(where: Path, seeds: tuple[int, ...]) -> list[Path]:
    """Where the pictures of a request go. Raises RequestError."""
    suffix = where.suffix.lower()
    if suffix in OTHER_FORMATS:
        raise RequestError(f"output: expected a name that ends in .png, or a folder, got {where.name}")
    if suffix == ".png" and not where.is_dir():
        if len(seeds) == 1:
            return [where]
        return [where.with_name(f"{where.stem}-{i:03d}{where.suffix}") for i in range(len(seeds))]
    numbers = [int(match[1]) for path in where.glob("*.png") if (match := re.match(r"(\d+)-", path.name))]
    first = max(numbers, default=-1) + 1
    return [where / f"{first + i:03d}-{seed}.png" for i, seed in enumerate(seeds)]
