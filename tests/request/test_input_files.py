"""Files of input images: which formats, how large, what of several frames, and what is refused before it is decoded."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import zimage_rt
from zimage_rt.errors import RequestError
from zimage_rt.image.convert import FORMATS, flatten, read_image
from zimage_rt.limits import MAX_INPUT_PIXELS
from zimage_rt.request.resolve import resolve
from zimage_rt.request.types import GenerateRequest

RED, BLUE = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")


def png(width: int, height: int, *chunks: tuple[bytes, bytes], pixels: bytes = b"") -> bytes:
    """A greyscale PNG by hand, of any size and with any chunks before its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts:
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return out


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_of_the_list_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image.bin"  # the content says what it is, not the name
    RED.save(path, kind)
    np.testing.assert_allclose(np.asarray(flatten(read_image(path, "image")))[5, 5], (255, 0, 0), atol=3)


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "PCX", "SGI", "EPS", "JPEG2000", "ICNS"])
def test_other_formats_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    RED.save(path, kind)
    with pytest.raises(RequestError, match=r"control_image: .*image\.png cannot be read.*PNG, JPEG, WEBP, TIFF, BMP"):
        read_image(path, "control_image")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_used_and_said(engine: zimage_rt.Engine, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"two.{kind.lower()}"
    RED.save(path, kind, save_all=True, append_images=[BLUE])
    notes: list[str] = []
    np.testing.assert_allclose(np.asarray(flatten(read_image(path, "image", notes)))[5, 5], (255, 0, 0), atol=3)
    assert notes == [f"image: {path.name} has several frames or pages; the first one is used"]
    RED.save(tmp_path / "one", kind)
    request = GenerateRequest("a panda", image=path, height=64, width=64, strength=0.5)
    assert resolve(request, engine.manifest).warnings == tuple(notes)
    read_image(tmp_path / "one", "image", notes)
    assert len(notes) == 1


def test_too_many_pixels_are_refused_by_the_header(tmp_path: Path) -> None:
    """The pixels are not there: whoever decoded them first would say that the file is cut off."""
    path = tmp_path / "huge.png"
    for width, height in ((10_000, 8_901), (30_000, 30_000)):
        path.write_bytes(png(width, height))
        with pytest.raises(RequestError, match=f"image: .*expected at most {MAX_INPUT_PIXELS} pixels"):
            read_image(path, "image")
    path.write_bytes(png(10_000, 8_900))
    with pytest.raises(RequestError, match="damaged, cut off"):
        read_image(path, "image")


def test_the_limit_holds_for_images_and_arrays_in_memory() -> None:
    class Huge(Image.Image):
        """An image that says it is large and cannot be decoded."""

        @property
        def size(self) -> tuple[int, int]:
            return (10_000, 8_901)

    with pytest.raises(RequestError, match=r"mask: expected at most .* got 10000x8901"):
        read_image(Huge(), "mask")
    array = np.broadcast_to(np.uint8(0), (8_901, 10_000))
    with pytest.raises(RequestError, match=r"image: expected at most .* got 10000x8901"):
        read_image(array, "image")


@pytest.mark.parametrize("kind", ["zTXt", "iTXt"])
def test_text_that_unpacks_to_very_much_is_refused(kind: str, tmp_path: Path) -> None:
    packed = zlib.compress(b"a" * (PngImagePlugin.MAX_TEXT_CHUNK * 20), 9)
    body = b"key\0\0" + packed if kind == "zTXt" else b"key\0\x01\0\0\0" + packed
    path = tmp_path / "text.png"
    path.write_bytes(png(64, 64, (kind.encode(), body), pixels=zlib.compress(bytes(65 * 64))))
    with pytest.raises(RequestError, match=r"image: .* cannot be read as an image: .*[Tt]oo large"):
        read_image(path, "image")


def test_very_much_text_in_many_chunks_is_refused(tmp_path: Path) -> None:
    text = b"key\0" + b"a" * (1 << 20)
    count = PngImagePlugin.MAX_TEXT_MEMORY // (1 << 20) + 1
    path = tmp_path / "text.png"
    path.write_bytes(png(64, 64, *[(b"tEXt", text)] * count, pixels=zlib.compress(bytes(65 * 64))))
    with pytest.raises(RequestError, match=r"image: .*Too much memory used in text chunks"):
        read_image(path, "image")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.0, 0.02, 0.3, 0.7, 0.9])
def test_truncated_files_are_refused(kind: str, part: float, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    noise = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path, kind)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(RequestError, match=r"image: .*cut cannot be read as an image"):
        read_image(path, "image")
    file = path.open("rb")
    try:
        image = Image.open(file)
    except Exception:
        return
    with pytest.raises(RequestError, match=r"image cannot be read as an image: .*cut off or closed"):
        read_image(image, "image")


def _closed(path: Path) -> Image.Image:
    RED.save(path, "PNG")
    image = Image.open(path)
    image.close()
    return image


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_closed, " cannot be read as an image: .*closed"),
        (lambda path: path, "there is no such file"),
        (lambda path: path.parent, "cannot be read as an image"),
        (lambda path: f"{path}\0.png", "is no path: it has a NUL character"),
        (lambda path: "\ud800.png", "is no path: surrogates not allowed"),
        (lambda path: "a" * 5000, "cannot be read as an image: .*too long"),
        (lambda path: bytes(path), "expected a PIL image, an array or a path, got bytes"),
        (lambda path: Image.new("RGB", (0, 5)), "expected an image with pixels, got 0x5"),
        (lambda path: [[1, 2], [3]], "expected a PIL image, an array or a path, got list"),
    ],
)
def test_what_is_no_image_is_refused(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"^image.*{message}"):
        read_image(make(tmp_path / "image.png"), "image")


def _written(array: np.ndarray, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **settings)
    return file.getvalue()


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    """Bytes changed, cut out and doubled at random: an image of our modes comes out, or a RequestError."""
    chance, noise = random.Random(5), np.random.default_rng(5).integers(0, 256, (24, 24, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [_written(noise, kind) for kind in FORMATS]
    files += [_written(noise, kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP", "TIFF")]
    files += [_written(noise, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_deflate", "jpeg")]
    files += [_written(noise[..., 0].astype(np.uint16) * 257, kind) for kind in ("PNG", "TIFF")]
    path = tmp_path / "damaged"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(400):
        data = bytearray(chance.choice(files))
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(min(len(data), chance.choice((64, 400, len(data)))))
            length = chance.randrange(1, 40)
            change = chance.choice((bytes([chance.randrange(256)]), b"\xff\xff\xff\xff", b"", bytes(data[at : at + 9])))
            data[at : at + (length if not change else len(change) % 9)] = change
        path.write_bytes(data or b"x")
        try:
            assert read_image(path, "image").mode in ("L", "LA", "RGB", "RGBA")
            outcomes["read"] += 1
        except RequestError as error:
            assert str(error).startswith("image: ")
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 40


def test_a_png_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    """Pillow decodes it: a flipped bit inside of the pixels is another image, and no error."""
    gradient = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(np.stack([gradient] * 3, -1)).save(path)
    content = path.read_bytes()
    start, end = content.index(b"IDAT") + 6, content.index(b"IEND") - 12
    for place in range(start, end, 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(RequestError, match="cannot be read as an image"):
            read_image(path, "image")
    path.write_bytes(content)
    assert read_image(path, "image").size == (64, 64)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(RequestError, match="cannot be read as an image: it is no file"):
            read_image(path, "image")


def test_a_large_image_is_refused_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    Image.new("1", (10_000, 10_000)).save(tmp_path / "a.png")
    with pytest.raises(RequestError, match="at most 89000000 pixels"):
        read_image(tmp_path / "a.png", "image")
    assert not recwarn.list
