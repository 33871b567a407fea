"""ComfyUI's editor at `/`: the files of its package as they are, under headers that let nothing else in."""

from __future__ import annotations

import base64
import hashlib
import mimetypes
import re
from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response

from ..errors import NotFound
from .packages import FRONTEND, folder_of, version_of

INDEX = "index.html"
# Those that differ between systems, or that mimetypes does not know.
MEDIA_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".map": "application/json",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".webp": "image/webp",
    ".ico": "image/x-icon",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
    ".ttf": "font/ttf",
    ".eot": "application/vnd.ms-fontobject",
    ".webm": "video/webm",
}
# A file whose name has the hash of its content.
HASHED = re.compile(r"assets/.*-[\w-]{8}\.\w+")
INLINE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
PAGE_HEADERS: Mapping[str, str] = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class EditorFiles:
    """The files of the editor's package. A request names one of them and never a path. Raises ConfigError."""

    def __init__(self) -> None:
        folder = folder_of(FRONTEND)
        self._version = version_of(FRONTEND)
        self._paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        self._page_headers = {**PAGE_HEADERS, "Content-Security-Policy": policy(self._paths[INDEX].read_text("utf-8"))}

    @property
    def tops(self) -> dict[str, bool]:
        """The names in the package's folder, and whether each is a folder."""
        return {name.partition("/")[0]: "/" in name for name in self._paths}

    def answer(self, request: Request, name: str) -> Response:
        """A file; 304 if the browser has it. Raises NotFound."""
        path = self._paths.get(name)
        if path is None:
            raise NotFound(f"the editor has no file {name[-64:]!r}")
        etag = f'"{self._version}-{path.stat().st_size:x}"'
        # With API keys a browser sends the key for every file: no cache between may keep one.
        cache = "private, max-age=31536000, immutable" if HASHED.fullmatch(name) else "private, no-cache"
        headers = {**HEADERS, "Cache-Control": cache, "ETag": etag, **(self._page_headers if name == INDEX else {})}
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return FileResponse(path, media_type=media_type(path), headers=headers)


def media_type(path: Path) -> str:
    """The media type of a file by its ending."""
    suffix = path.suffix.lower()
    return MEDIA_TYPES.get(suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"


def policy(page: str) -> str:
    """The Content-Security-Policy of the editor's page, which has scripts in its text.

    The editor draws with styles that it makes, and its previews and finished images are blobs. It would ask other
    hosts for news, accounts and the registry of custom nodes; none of that is needed here, and nothing is sent.
    """
    hashes = [hashlib.sha256(script.encode()).digest() for script in INLINE_SCRIPT.findall(page)]
    scripts = " ".join(f"'sha256-{base64.b64encode(each).decode()}'" for each in hashes)
    return "; ".join(
        (
            "default-src 'self'",
            f"script-src 'self' {scripts} 'wasm-unsafe-eval'",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "media-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self' data: blob:",
            "worker-src 'self' blob:",
            "object-src 'none'",
            "frame-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def editor_router(files: EditorFiles) -> APIRouter:
    """The routes of the editor's page and files."""
    router = APIRouter(include_in_schema=False)

    async def index(request: Request) -> Response:
        """The editor."""
        return files.answer(request, INDEX)

    def add(top: str, is_folder: bool) -> None:
        async def file(request: Request, name: str = "") -> Response:
            """A file of the editor."""
            return files.answer(request, f"{top}/{name}" if is_folder else top)

        router.add_api_route(f"/{top}/{{name:path}}" if is_folder else f"/{top}", file, methods=["GET", "HEAD"])

    router.add_api_route("/", index, methods=["GET", "HEAD"])
    for top, is_folder in files.tops.items():
        add(top, is_folder)
    return router
