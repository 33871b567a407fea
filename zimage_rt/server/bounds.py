"""Bounds of what clients send, checked before anything is decoded: JSON's size and depth, forms, pixels of images."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from ..errors import RequestError
from ..image.convert import FORMATS
from ..request.codec import IMAGES
from .forms import is_form

# Of a form: parts with files and without, and bytes of a part without. Files are bounded by the body.
MAX_FILES, MAX_FIELDS, MAX_FIELD_BYTES = 17, 100, 1 << 20
# Of JSON: bytes outside of texts, which bound the number of its values, and levels of lists and objects.
MAX_STRUCTURE, MAX_DEPTH = 256 << 10, 16
# Bodies up to here are parsed on the event loop's thread; it takes less time than to hand them over.
SMALL_BODY = 64 << 10
# A text with its quotes, to the end of the body if it is cut off: every start matches, so that the time is linear.
# Half of a character in JSON: of one that UTF-16 writes in two.
HALF = re.compile(rb"\\u[dD][89a-fA-F]")
TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


async def read_json(request: Request) -> dict[str, Any]:
    """The object in a request's body; an empty body is an empty one. Raises RequestError."""
    body = await request.body()
    try:
        return parse_json(body) if len(body) <= SMALL_BODY else await asyncio.to_thread(parse_json, body)
    except RequestError as error:
        # curl's -d says this type of JSON, too.
        if "x-www-form-urlencoded" in request.headers.get("content-type", "").lower() and body[:1] != b"{":
            raise RequestError(
                "body: expected JSON, or multipart/form-data (curl -F) if the route takes forms, got "
                "application/x-www-form-urlencoded"
            ) from error
        raise


def parse_json(body: bytes, max_structure: int = MAX_STRUCTURE, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """An object in JSON of bounded structure; an empty body is an empty one. Raises RequestError."""
    said = parse_json_value(body or b"{}", max_structure, max_depth)
    if not isinstance(said, dict):
        raise RequestError("body: expected a JSON object")
    return said


def parse_whole_json(body: bytes, max_structure: int, max_depth: int) -> Any:
    """A value in JSON whose texts can be written and sent again: without halves of characters. Raises RequestError."""
    said = parse_json_value(body, max_structure, max_depth)
    if HALF.search(body):
        try:
            json.dumps(said, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.start + 1].encode("unicode_escape").decode()
            raise RequestError(f"body: expected whole characters, got the half {half} of one; send it whole") from error
    return said


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def parse_json_value(body: bytes, max_structure: int = MAX_STRUCTURE, max_depth: int = MAX_DEPTH) -> Any:
    """A value in JSON of bounded structure. Raises RequestError."""
    structure = TEXT.sub(b"", body)
    if len(structure) > max_structure:
        raise RequestError(f"body: expected JSON with at most {max_structure} bytes outside of texts, got more")
    depth = 0
    for bracket in re.findall(rb"[\[\]{}]", structure):
        depth += 1 if bracket in b"[{" else -1
        if depth > max_depth:
            raise RequestError(f"body: expected JSON with at most {max_depth} levels, got more")
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"body: expected JSON: {error}") from error


class _FormParser(MultiPartParser):
    """Starlette's parser, which knows whether the form's closing boundary has come."""

    is_closed = False

    def on_end(self) -> None:
        """Called at the closing boundary, and after the body."""
        self.is_closed = True


async def read_form(request: Request) -> FormData:
    """A multipart form of bounded parts; empty for other bodies. Raises HTTPException with status 400."""
    if not is_form(request.headers.get("content-type", "")):
        return FormData()

    async def whole() -> AsyncGenerator[bytes, None]:
        async for chunk in request.stream():
            yield chunk
        if not parser.is_closed:  # starlette takes what came until then
            raise MultiPartException("the form is cut off: expected its closing boundary")

    parser = _FormParser(
        request.headers, whole(), max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
    )
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, error.message) from error


def check_pixels(image: Path | bytes, field: str, most: int) -> None:
    """Raise RequestError for an image with more pixels than `most`, by its header alone.

    What is no image is left to the reader of its pixels, which says what is wrong with it.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as opened:
            width, height = opened.size
    except Image.DecompressionBombError as error:
        raise RequestError(f"{field}: expected at most {most} pixels, got more: {error}") from error
    except Exception:  # Pillow has no error of its own for damaged files
        return
    if width * height > most:
        raise RequestError(f"{field}: expected at most {most} pixels, got {width}x{height}; scale it down")


def check_inputs(fields: Mapping[str, Any], most: int) -> None:
    """Raise RequestError for an input image of a request with more pixels than `most`."""
    for name in IMAGES:
        if isinstance(fields.get(name), Path):
            check_pixels(fields[name], name, most)
