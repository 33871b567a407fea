"""Results to files: names that replace nothing by accident."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from .errors import RequestError
from .metadata import PictureRecord, save_picture
from .request import GenerateResult

# Names that mean another format than PNG, not a folder.
OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".json")


def save_result(result: GenerateResult, where: Path, *, sidecar: bool = True) -> list[Path]:
    """See `GenerateResult.save`."""
    pictures = list(zip(result.images, result.records, strict=True))
    suffix = where.suffix.lower()
    if suffix in OTHER_FORMATS:
        raise RequestError(f"output: expected a name that ends in .png, or a folder, got {where.name}")
    if suffix == ".png" and not where.is_dir():
        paths = [where]
        if len(pictures) > 1:
            paths = [where.with_name(f"{where.stem}-{i:03d}{where.suffix}") for i in range(len(pictures))]
        where.parent.mkdir(parents=True, exist_ok=True)
        for path, (pixels, record) in zip(paths, pictures, strict=True):
            save_picture(path, pixels, record, sidecar=sidecar)
        return paths
    where.mkdir(parents=True, exist_ok=True)
    return [_save_next(where, pixels, record, sidecar) for pixels, record in pictures]


def _save_next(folder: Path, pixels: np.ndarray, record: PictureRecord, sidecar: bool) -> Path:
    """Save under the next number. Others may be doing the same: who finds the name taken takes the one after."""
    numbers = [int(match[1]) for path in folder.glob("*.png") if (match := re.match(r"(\d+)-", path.name))]
    number = max(numbers, default=-1) + 1
    while True:
        path = folder / f"{number:03d}-{record.request['seed']}.png"
        try:
            save_picture(path, pixels, record, sidecar=sidecar, replace=False)
            return path
        except FileExistsError:
            number += 1
