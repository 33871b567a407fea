"""The page at `/zimage`: static files of the package, under headers that let nothing else in.

It is at `/` too, unless ComfyUI's editor is there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .errors import NotFound

FOLDER = Path(__file__).parent / "web"
INDEX = "index.html"
MEDIA_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Previews are data URLs; finished images, which may need a key to be fetched, are blobs. `require-trusted-types-for`
# makes the browser refuse innerHTML and its like.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data: blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-cache",  # asked again by the ETag, so that a new version is seen at once
}

router = APIRouter(include_in_schema=False)
home = APIRouter(include_in_schema=False)


@dataclasses.dataclass(frozen=True)
class StaticFile:
    """A file of the page: its bytes, media type and ETag."""

    content: bytes
    media_type: str
    etag: str


@functools.cache
def static_files() -> Mapping[str, StaticFile]:
    """The page's files by their names, read once: a request names one of them and never a path."""
    found = {}
    for path in FOLDER.iterdir():
        if path.suffix in MEDIA_TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[path.name] = StaticFile(content, MEDIA_TYPES[path.suffix], etag)
    return found


@home.api_route("/", methods=["GET", "HEAD"])
@router.api_route("/zimage", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The page."""
    return answer(request, INDEX)


@router.api_route("/web/{name}", methods=["GET", "HEAD"])
async def file(name: str, request: Request) -> Response:
    """A file of the page."""
    return answer(request, name)


def answer(request: Request, name: str) -> Response:
    """A file with the page's headers; 304 if the browser has it. Raises NotFound."""
    found = static_files().get(name)
    if found is None:
        raise NotFound(f"web: there is no file {name[:64]!r}")
    headers = {**HEADERS, "ETag": found.etag}
    if request.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)
