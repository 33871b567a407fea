"""Image files with records: a PNG has the record as text, and a sidecar `<name>.json` has it beside any image.

A PNG has two texts: `zimage_rt`, JSON that `read_record` reads back, and `parameters` in AUTOMATIC1111's format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..atomic_write import atomic_write_all
from ..bundle.json_codec import from_json, parse_json
from ..errors import MetadataError, RequestError
from ..image.formats import FORMATS, encode_image, sidecar_path
from ..request.codec import IMAGES
from ..sampling.samplers import FORMER_SAMPLERS, FORMER_SCHEDULES
from .a1111 import parameters_text
from .record import SCHEMA_VERSION, ImageRecord
from .references import pixels_sha256
from .schema import MAX_BYTES, check_parts

KEY = "zimage_rt"
# Fields that records of older schemas lack, with their default: schema 1 had no `warnings`.
ADDED_FIELDS: Mapping[str, Any] = {"warnings": []}


def save_image(
    path: Path,
    pixels: np.ndarray,
    record: ImageRecord,
    *,
    sidecar: bool = True,
    replace: bool = True,
    quality: int | None = None,
) -> int:
    """Write uint8 `[height, width, 3]` in the format of the path's suffix, with its record.

    A PNG has the record; JPEG and WebP have only AUTOMATIC1111's parameters. The sidecar has the record too, see
    `sidecar_path`. The files are written atomically, the image last, so that an image always has its sidecar.
    `quality` is for JPEG and WebP, see `encode_image`. Returns the size of the image file in bytes.

    Raises:
        RequestError: a file that is no record has the sidecar's name.
        FileExistsError: one of the names is taken, and `replace` is False; nothing was written.
        OSError: the folder is missing, cannot be written, or is full; existing files are unchanged.
    """
    # The hash is computed here, so that images that are not saved cost nothing.
    record = dataclasses.replace(record, pixels_sha256=pixels_sha256(pixels))
    encoded, text = encode_with_record(pixels, record, path.suffix, quality), record.to_json()
    contents = {path: encoded}
    if sidecar:
        if replace:
            check_sidecar(path)
        contents = {sidecar_path(path): text.encode() + b"\n", **contents}
    atomic_write_all(contents, replace=replace)
    return len(encoded)


def encode_with_record(pixels: np.ndarray, record: ImageRecord, suffix: str, quality: int | None = None) -> bytes:
    """The bytes of an image's file, uint8 `[height, width, 3]`; see `save_image`. Raises RequestError."""
    if not record.pixels_sha256:
        record = dataclasses.replace(record, pixels_sha256=pixels_sha256(pixels))
    parameters = parameters_text(record)
    return encode_image(pixels, suffix, {"parameters": parameters, KEY: record.to_json()}, parameters, quality)


def check_sidecar(path: Path) -> None:
    """Raise RequestError if the path of an image's sidecar is a file that is no record and must not be replaced."""
    beside = sidecar_path(path)
    if not beside.exists():
        return
    try:
        read_record(beside)
    except MetadataError as error:
        raise RequestError(
            f"output: {beside} is there and is no record of an image, so that it is not replaced ({error}); "
            "name another output, move it away, or write no sidecar (sidecar=False, --no-sidecar)"
        ) from error


def read_record(path: str | Path) -> ImageRecord:
    """Read an image's record from a PNG, from the sidecar beside an image, or from the path of a sidecar.

    Raises:
        MetadataError: the file is missing, is no PNG, is cut off or damaged, or has no record.
    """
    path = Path(path)
    is_sidecar = path.suffix == ".json"
    sidecar = path if is_sidecar else sidecar_path(path)
    try:
        if FORMATS.get(path.suffix.lower(), "PNG") != "PNG":
            if path.is_file() and not sidecar.is_file():
                raise MetadataError(
                    f"{path}: expected {sidecar.name} beside it, which holds its record; {path.suffix} holds none"
                )
            path.stat()
        elif not is_sidecar:
            text = _png_text(path)
            if text is not None:
                return _parse(text, path)
            if not sidecar.is_file():
                raise MetadataError(
                    f"{path}: expected a PNG that zimage_rt wrote, got one without its text `{KEY}`, and there is no "
                    f"{sidecar.name} beside it; some programs strip such text: use the file as it was saved"
                )
        if sidecar.stat().st_size > MAX_BYTES:
            raise MetadataError(f"{sidecar}: expected a record of at most {MAX_BYTES >> 20} MiB, got more")
        return _parse(sidecar.read_bytes(), sidecar)
    except FileNotFoundError:
        raise MetadataError(f"{path}: there is no such file; name a PNG that zimage_rt wrote, or its sidecar") from None
    except (OSError, ValueError) as error:
        raise MetadataError(f"{path} cannot be read: {error}") from error


def _png_text(path: Path) -> str | None:
    """The PNG's text `zimage_rt`, or None. The whole file is checked, so that an incomplete image is refused."""
    from PIL import Image

    with path.open("rb") as file:
        signature = file.read(8)
    if signature != b"\x89PNG\r\n\x1a\n":
        raise MetadataError(
            f"{path}: expected a PNG, got something else; other formats carry no record: use the PNG, or its sidecar"
        )
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()  # compares all checksums; the image cannot be used afterwards
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # text chunks may follow the pixels
            return image.info.get(KEY)
    # The errors that Pillow raises for damaged files, for which it has no class of its own.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise MetadataError(f"{path}: this PNG is cut off or damaged ({error}); copy it again, whole") from error


def _parse(text: str | bytes, path: Path) -> ImageRecord:
    try:
        data = parse_json(text)
    except ValueError as error:
        raise MetadataError(f"{path}: its record cannot be read ({error}); it was damaged") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise MetadataError(f"{path}: expected a record that zimage_rt wrote, got other JSON; name an image's sidecar")
    if version > SCHEMA_VERSION:
        raise MetadataError(f"{path}: expected a record of schema {SCHEMA_VERSION}, got {version}; upgrade zimage_rt")
    if version < SCHEMA_VERSION:
        data = {**ADDED_FIELDS, **data}
    todo = "it was damaged, or written by another version"
    from_json(ImageRecord, data, f"{path}: record", MetadataError, todo)
    check_parts(data, __version__, path, IMAGES)
    return ImageRecord(**{**data, "request": _with_todays_names(data["request"])})


def _with_todays_names(request: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded request with the current names of its sampler and schedule.

    Version 0.1 used ComfyUI's names for diffusers' samplers and schedules. Its requests have no `shift`; all later
    ones have.
    """
    if "shift" in request:
        return dict(request)
    names = {"sampler": FORMER_SAMPLERS, "schedule": FORMER_SCHEDULES}
    return {name: names.get(name, {}).get(value, value) if name in names else value for name, value in request.items()}
