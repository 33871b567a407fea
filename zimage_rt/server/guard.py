"""Guards before the application: the Host that a client calls, and the pages that may call from a browser."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .config import LOOPBACK, ServiceConfig
from .errors import error_body


class HostGuard:
    """Refuses requests under a foreign host name, and those that another origin's page sends.

    A page of a stranger can make a browser call a service on the loopback address, under a name of its own that leads
    there (DNS rebinding); the Host header has that name.
    """

    def __init__(self, app: ASGIApp, config: ServiceConfig) -> None:
        self._app = app
        self._hosts = {*LOOPBACK, config.host.lower(), *(host.lower() for host in config.hosts)}
        self._any_host = config.host in ("0.0.0.0", "::") and not config.hosts
        self._origins = set(config.origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        problem = self._problem(headers)
        if problem is None or scope["type"] == "websocket":
            await self._app(scope, receive, send)
        else:
            await JSONResponse(error_body("forbidden", problem), 403)(scope, receive, send)

    def _problem(self, headers: dict[str, str]) -> str | None:
        host = _name(f"//{headers.get('host', '')}")
        if not self._any_host and host not in self._hosts:
            return f"host: {host or 'none'} is not a name of this service; list it under `hosts`"
        origin = headers.get("origin")
        if origin is None or origin in self._origins:
            return None
        if urlsplit(origin).netloc.lower() == headers.get("host", "").lower():
            return None
        return f"origin: {origin} may not call this service; list it under `origins`"


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
