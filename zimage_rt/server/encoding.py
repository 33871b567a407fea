"""JSON and server-sent events, with images in them as base64."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json


class Base64:
    """Bytes that `encode_json` writes as a base64 text."""

    def __init__(self, content: bytes) -> None:
        self.content = content


def encode_json(value: Any) -> bytes:
    """JSON in UTF-8, of what JSON has and of `Base64`.

    An image is megabytes of text. It has no characters to escape, so it is put into the finished text.
    """
    images: list[tuple[bytes, bytes]] = []

    def mark(unknown: Any) -> str:
        if not isinstance(unknown, Base64):
            raise TypeError(f"expected what JSON has, or Base64, got {type(unknown).__name__}")
        place = uuid.uuid4().hex
        images.append((place.encode(), unknown.content))
        return place

    rest, parts = to_json(value, fallback=mark), []
    for place, content in images:
        before, _, rest = rest.partition(place)
        parts += [before, base64.b64encode(content)]
    return b"".join((*parts, rest))


def encode_event(name: str, data: Mapping[str, Any], number: int | None = None) -> bytes:
    """A server-sent event; its data as `encode_json` writes them."""
    head = "" if number is None else f"id: {number}\n"
    return b"".join((f"{head}event: {name}\ndata: ".encode(), encode_json(data), b"\n\n"))
