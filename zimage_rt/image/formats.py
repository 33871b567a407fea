"""Image files: PNG, JPEG and WebP with what they say of themselves, and whether a file is whole."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RequestError

# Pillow's names by a file's ending.
FORMATS: Mapping[str, str] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
JPEG_QUALITY = 95
# EXIF: the folder of tags with UserComment, and that tag.
EXIF_FOLDER, USER_COMMENT = 0x8769, 0x9286
# A JPEG's EXIF data is one segment of 64 KiB; longer text is in the sidecar alone.
MAX_COMMENT = 60_000
# Beginning and end of a whole file. A WebP file says its length.
MARKS: Mapping[str, tuple[bytes, bytes]] = {
    "PNG": (b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"),
    "JPEG": (b"\xff\xd8\xff", b"\xff\xd9"),
    "WEBP": (b"RIFF", b""),
}


def check_quality(suffix: str, quality: int | None) -> None:
    """Raise RequestError unless a format takes a quality, from 1 to 100."""
    if quality is None:
        return
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise RequestError(f"quality: expected a whole number from 1 to 100, got {quality!r}")
    if FORMATS[suffix.lower()] == "PNG":
        raise RequestError("quality: a PNG keeps every pixel and has none; leave it out, or write .jpg or .webp")


def encode_image(
    pixels: np.ndarray, suffix: str, texts: Mapping[str, str], comment: str, quality: int | None = None
) -> bytes:
    """Encode uint8 `[height, width, 3]` in the format of a file's ending.

    Args:
        pixels: the image.
        suffix: a key of FORMATS.
        texts: by keyword; a PNG holds them.
        comment: in JPEG and WebP, as EXIF's UserComment, where AUTOMATIC1111 keeps its parameters.
        quality: 1 to 100, of JPEG (95 if None) and WebP (every pixel is kept if None).

    Raises:
        RequestError: this Pillow cannot write the format, or it cannot hold so many pixels.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    kind = FORMATS[suffix.lower()]
    options: dict[str, Any]
    if kind == "PNG":
        info = PngInfo()
        for key, text in texts.items():
            info.add_text(key, text)
        # ComfyUI's level: half the time of Pillow's own for a few per cent more bytes.
        options = {"pnginfo": info, "compress_level": 4}
    else:
        exif = Image.Exif()
        encoded_comment = b"UNICODE\0" + comment.encode("utf-16-be")
        if len(encoded_comment) <= MAX_COMMENT:
            exif.get_ifd(EXIF_FOLDER)[USER_COMMENT] = encoded_comment
        options = {"exif": exif}
        if kind == "JPEG":
            # Colours at full resolution: red writing on green would be smeared otherwise.
            options |= {"quality": JPEG_QUALITY if quality is None else quality, "subsampling": 0, "optimize": True}
        else:
            options |= {"lossless": True} if quality is None else {"quality": quality}
    encoded = io.BytesIO()
    try:
        Image.fromarray(pixels).save(encoded, kind, **options)
    except (KeyError, ValueError, OSError) as error:
        raise RequestError(f"output: this Pillow cannot write these pixels as {kind} ({error}); use .png") from error
    return encoded.getvalue()


def sidecar_path(path: Path) -> Path:
    """Where an image's record is beside it: `panda.json` of `panda.png`, `panda.jpg.json` of `panda.jpg`.

    A PNG holds its record itself; another format's is there alone, and must not be replaced by that of a PNG of the
    same name.
    """
    return path.with_suffix(".json") if path.suffix.lower() == ".png" else path.with_name(f"{path.name}.json")


def is_whole(path: Path, size: int) -> bool:
    """Whether a file of `size` bytes as it was written is there whole, or an image that somebody changed since."""
    kind = FORMATS.get(path.suffix.lower())
    try:
        actual = path.stat().st_size
        if kind is None or actual == 0:
            return False
        begin, end = MARKS[kind]
        with path.open("rb") as file:
            head = file.read(12)
            file.seek(max(0, actual - len(end)))
            tail = file.read()
        marked = head.startswith(begin) and tail.endswith(end)
        if kind == "WEBP":
            marked = marked and head[8:] == b"WEBP" and int.from_bytes(head[4:8], "little") + 8 == actual
        return marked and (actual == size or _decodes(path))
    except OSError:
        return False


def _decodes(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except Exception:  # Pillow raises whatever its readers meet in damaged files
        return False
    return True
