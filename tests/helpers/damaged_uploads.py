"""Damaged and hostile uploads by seed: what a service must refuse by name, before a worker sees it."""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# Beyond what any service takes: 40 MP by its configuration, 89 MP by the library.
HUGE = ((20_000, 20_000), (65_535, 65_535), (2**31 - 1, 1), (100_000, 1_000), (2**31 - 1, 2**31 - 1))
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><rect/></svg>'
HTML = b"<!doctype html><title>an image?</title><script>alert(1)</script>"
ENTITIES = b'<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;&b;">]><svg><text>&c;</text></svg>'


def encoded(rng: random.Random, kind: str) -> bytes:
    """An undamaged file of 64x64 noise."""
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG with its checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG of grey pixels whose header says any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def truncated(rng: random.Random) -> bytes:
    """The first part of a file: its header, or more."""
    content = encoded(rng, rng.choice(("PNG", "JPEG", "WEBP", "BMP")))
    return content[: rng.randrange(8, len(content) - 200)]


def flipped(rng: random.Random) -> bytes:
    """A PNG with some flipped bits, which its checksums find."""
    content = bytearray(encoded(rng, "PNG"))
    for _ in range(rng.randrange(1, 30)):
        # Not in the last chunk, whose checksum Pillow does not read.
        content[rng.randrange(8, len(content) - 16)] ^= 1 << rng.randrange(8)
    return bytes(content)


def wrong_magic(rng: random.Random) -> bytes:
    """A file whose first bytes are another format's, or nothing's."""
    kind, other = rng.sample(("PNG", "JPEG", "WEBP", "GIF"), 2)
    return (
        encoded(rng, other)[:8] + encoded(rng, kind)[8:] if rng.random() < 0.5 else rng.randbytes(rng.randrange(4000))
    )


def bomb(rng: random.Random) -> bytes:
    """A header of many pixels, and a few bytes behind it."""
    width, height = rng.choice(HUGE)
    return png(width, height, bytes(rng.randrange(1000)))


def text_bomb(rng: random.Random) -> bytes:
    """A small PNG with a compressed text of 64 MB."""
    text = chunk(b"zTXt", b"Comment\0\0" + packed(64 << 20))
    return png(64, 64, bytes(64 * 65)).replace(chunk(b"IEND", b""), text + chunk(b"IEND", b""))


@functools.cache
def packed(size: int) -> bytes:
    """So many zeros, compressed."""
    return zlib.compress(bytes(size))


def huge(rng: random.Random) -> bytes:
    """A side that no bundle draws and no request scales, in a file that is whole."""
    file = io.BytesIO()
    size = rng.choice(((16_000, 1), (1, 16_000), (3, 2), (1, 1)))
    Image.new("L", size, 99).save(file, rng.choice(("PNG", "BMP", "WEBP") if max(size) < 16_000 else ("PNG", "BMP")))
    return file.getvalue()


def empty(rng: random.Random) -> bytes:
    """Nothing, or a signature alone."""
    return rng.choice((b"", b"\0", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBP", b"GIF89a", b"BM"))


def text(rng: random.Random) -> bytes:
    """SVG, HTML, XML with entities, and other texts."""
    others = (b"%PDF-1.7\n%%EOF", b"PK\x03\x04" + bytes(26), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    return rng.choice((SVG, HTML, ENTITIES, *others, "一只熊猫".encode(), b"{}", b"P6 64 64 255\n" + bytes(12288)))


def polyglot(rng: random.Random) -> bytes:
    """Two things in one file, of which the image is damaged: HTML or an archive behind half an image."""
    content = encoded(rng, rng.choice(("PNG", "JPEG")))
    return content[: len(content) // 3] + rng.choice((SVG, HTML, b"PK\x05\x06" + bytes(18)))


KINDS: tuple[Callable[[random.Random], bytes], ...] = (
    truncated, flipped, wrong_magic, bomb, text_bomb, huge, empty, text, polyglot,
)  # fmt: skip


def damaged_uploads(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Uploads with the names of their kinds, each kind as often as the others."""
    for number in range(count):
        make = KINDS[number % len(KINDS)]
        yield make.__name__, make(random.Random(f"{seed} {number}"))
