"""Image files: encoding of PNG, JPEG and WebP with their texts, and the check whether a file is complete."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RequestError

# Pillow's name of the format, by the file's suffix.
FORMATS: Mapping[str, str] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
JPEG_QUALITY = 95
# EXIF: the directory with UserComment, and its tag.
EXIF_FOLDER, USER_COMMENT = 0x8769, 0x9286
# EXIF data of a JPEG is one segment of 64 KiB; a longer text is only in the sidecar.
MAX_COMMENT = 60_000
# First and last bytes of a complete file; the header of a WebP file has its length instead.
MARKS: Mapping[str, tuple[bytes, bytes]] = {
    "PNG": (b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"),
    "JPEG": (b"\xff\xd8\xff", b"\xff\xd9"),
    "WEBP": (b"RIFF", b""),
}


def media_type(suffix: str) -> str:
    """The media type of a suffix: `image/jpeg` of `.jpg`."""
    return f"image/{FORMATS[suffix.lower()].lower()}"


def check_quality(suffix: str, quality: int | None) -> None:
    """Raise RequestError unless `quality` is None, or 1 to 100 for a format that has one."""
    if quality is None:
        return
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise RequestError(f"quality: expected a whole number from 1 to 100, got {quality!r}")
    if FORMATS[suffix.lower()] == "PNG":
        raise RequestError("quality: a PNG keeps every pixel and has none; leave it out, or write .jpg or .webp")


def encode_image(
    pixels: np.ndarray, suffix: str, texts: Mapping[str, str], comment: str, quality: int | None = None
) -> bytes:
    """Encode uint8 `[height, width, 3]` in the format of a suffix.

    Args:
        pixels: the image.
        suffix: a key of FORMATS.
        texts: the texts of a PNG, by keyword.
        comment: EXIF's UserComment of JPEG and WebP, which holds AUTOMATIC1111's parameters.
        quality: 1 to 100 for JPEG (95 if None) and WebP (lossless if None).

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
        # ComfyUI's level takes half the time of Pillow's default for a few per cent more bytes.
        options = {"pnginfo": info, "compress_level": 4}
    else:
        exif = Image.Exif()
        encoded_comment = b"UNICODE\0" + comment.encode("utf-16-be")
        if len(encoded_comment) <= MAX_COMMENT:
            exif.get_ifd(EXIF_FOLDER)[USER_COMMENT] = encoded_comment
        options = {"exif": exif}
        if kind == "JPEG":
            # No chroma subsampling, which smears red text on green.
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
    """The path of an image's sidecar: `panda.json` for `panda.png`, `panda.jpg.json` for `panda.jpg`.

    For JPEG and WebP the sidecar is the only copy of the record, so that a PNG of the same stem must not replace it.
    """
    return path.with_suffix(".json") if path.suffix.lower() == ".png" else path.with_name(f"{path.name}.json")


def is_whole(path: Path, size: int) -> bool:
    """Whether an image file is complete: it has the `size` of when it was written, or it was changed and decodes."""
    kind = FORMATS.get(path.suffix.lower())
    try:
        actual = path.stat().st_size
        if kind is None or actual == 0:
            return False
        with path.open("rb") as file:
            head = file.read(12)
            file.seek(max(0, actual - 12))
            tail = file.read()
        return _is_marked(kind, head, tail, actual) and (actual == size or _decodes(path))
    except OSError:
        return False


def is_cut_off(content: bytes, suffix: str) -> bool:
    """Whether an image file lacks its first or last bytes, as after a loss of power."""
    return not _is_marked(FORMATS[suffix.lower()], content[:12], content[-12:], len(content))


def _is_marked(kind: str, head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file has the first and last bytes of its kind; `head` and `tail` are 12 bytes."""
    begin, end = MARKS[kind]
    marked = head.startswith(begin) and tail.endswith(end)
    if kind == "WEBP":
        marked = marked and head[8:] == b"WEBP" and int.from_bytes(head[4:8], "little") + 8 == size
    return marked


def _decodes(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except Exception:  # Pillow's readers raise errors of any class for damaged files
        return False
    return True
