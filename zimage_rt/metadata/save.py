"""Images and records to files: names that replace nothing by accident."""

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

# A name with an ending like a file's that is not there is rather a slip than a folder.
ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,4}")


def names_file(where: Path) -> bool:
    """Whether a name means an image's file; otherwise it means a folder.

    Raises:
        RequestError: it ends as the file of a format that is not written, or there is a folder of the name.
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
    """Raise RequestError unless images can be written there; before they are drawn. Leaves nothing behind."""
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
    pictures = list(zip(images, records, strict=True))
    if names_file(where):
        check_quality(where.suffix, quality)
        paths = [where]
        if len(pictures) > 1:
            paths = [where.with_name(f"{where.stem}-{i:03d}{where.suffix}") for i in range(len(pictures))]
        where.parent.mkdir(parents=True, exist_ok=True)
        for path, (pixels, record) in zip(paths, pictures, strict=True):
            save_image(path, pixels, record, sidecar=sidecar, quality=quality)
        return paths
    check_quality(".png", quality)
    where.mkdir(parents=True, exist_ok=True)
    return _save_all(where, pictures, sidecar)


def _save_all(folder: Path, pictures: list[tuple[np.ndarray, ImageRecord]], sidecar: bool) -> list[Path]:
    """Save under the next numbers. Others may be doing the same: who finds a name taken takes the one after."""
    numbers = [int(match[1]) for path in folder.glob("*.png") if (match := re.match(r"(\d+)-", path.name))]
    number = max(numbers, default=-1) + 1
    paths: list[Path] = []
    for pixels, record in pictures:
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
