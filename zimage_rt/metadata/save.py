"""Saving of images with their records, under names that replace no other files."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..atomic_write import check_folder, check_path
from ..errors import RequestError
from ..image.formats import FORMATS, check_quality
from .image_file import check_sidecar, save_image
from .record import ImageRecord

log = logging.getLogger(__name__)

# A path that does not exist and has a suffix like a file's is more likely a mistake than a folder.
ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,4}")


def names_file(where: Path) -> bool:
    """Whether a path is of an image file; otherwise it is of a folder.

    Raises:
        RequestError: its suffix is of an unsupported format, or it is an existing folder with an image's suffix.
    """
    suffix = where.suffix.lower()
    if where.is_dir():
        if suffix in FORMATS:
            raise RequestError(f"output: expected an image's file, got the folder {where}; name a file inside it")
        return False
    if suffix in FORMATS:
        return True
    if ENDING.fullmatch(suffix):
        raise RequestError(
            f"output: expected a name that ends in {', '.join(FORMATS)}, or a folder, got {where.name}; for a folder "
            "of that name, make it first"
        )
    return False


def check_output(where: Path, *, quality: int | None = None, sidecar: bool = False) -> None:
    """Raise RequestError unless images can be written to the path; for use before drawing. Leaves no files."""
    check_path(where)
    if names_file(where):
        check_quality(where.suffix, quality)
        check_folder(where.parent)
        if sidecar:
            check_sidecar(where)
    else:
        check_quality(".png", quality)
        check_folder(where)


def save_images(
    images: np.ndarray,
    records: Sequence[ImageRecord],
    where: Path,
    *,
    sidecar: bool = True,
    quality: int | None = None,
) -> list[Path]:
    """Write images `[batch, height, width, 3]` with their records; see `GenerateResult.save`."""
    pairs = list(zip(images, records, strict=True))
    if names_file(where):
        check_quality(where.suffix, quality)
        paths = [where]
        if len(pairs) > 1:
            paths = [where.with_name(f"{where.stem}-{i:03d}{where.suffix}") for i in range(len(pairs))]
        where.parent.mkdir(parents=True, exist_ok=True)
        for path, (pixels, record) in zip(paths, pairs, strict=True):
            save_image(path, pixels, record, sidecar=sidecar, quality=quality)
        return paths
    check_quality(".png", quality)
    where.mkdir(parents=True, exist_ok=True)
    return _save_numbered(where, pairs, sidecar)


def _save_numbered(folder: Path, pairs: list[tuple[np.ndarray, ImageRecord]], sidecar: bool) -> list[Path]:
    """Save under the next numbers; a name that another process has taken meanwhile is skipped."""
    numbers = [int(match[1]) for path in folder.glob("*.png") if (match := re.match(r"(\d+)-", path.name))]
    number = max(numbers, default=-1) + 1
    paths: list[Path] = []
    for pixels, record in pairs:
        while True:
            path = folder / f"{number:03d}-{record.request['seed']}.png"
            number += 1
            try:
                save_image(path, pixels, record, sidecar=sidecar, replace=False)
            except FileExistsError:
                log.debug("%s was taken by another process; trying the next number", path)
                continue
            paths.append(path)
            break
    return paths
