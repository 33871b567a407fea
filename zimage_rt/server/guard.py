"""Guards before the application: the Host that a client calls, the pages that may call, and the size of a body."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import LOOPBACK, ServiceConfig
from .errors import Forbidden, TooLarge, answer_to


class HostGuard:
    """Refuses requests under a foreign host name, and those that another origin's page sends.

    A page of a stranger can make a browser call a service on the loopback address, under a name of its own that leads
    there (DNS rebinding); the Host header has that name. A service at all addresses (0.0.0.0) whose names are not
    listed takes any name if a key is needed, which such a page has not; an open one takes addresses alone, to which no
    name was bound.
    """

    def __init__(self, app: ASGIApp, config: ServiceConfig) -> None:
        self._app = app
        self._hosts = {*LOOPBACK, config.host.lower(), *(host.lower() for host in config.hosts)}
        at_all = config.host in ("0.0.0.0", "::") and not config.hosts
        self._any_host, self._any_address = at_all and not config.open, at_all
        if at_all:
            self._hosts.add(socket.gethostname().lower())
        self._origins = set(config.origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI. A websocket is refused before it is accepted."""
        if scope["type"] in ("http", "websocket"):
            problem = self._problem(scope["headers"])
            if problem is not None:
                await answer_to(Forbidden(problem))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _problem(self, headers: list[tuple[bytes, bytes]]) -> str | None:
        hosts = [value.decode("latin-1") for name, value in headers if name.lower() == b"host"]
        origins = [value.decode("latin-1") for name, value in headers if name.lower() == b"origin"]
        if len(hosts) != 1 or len(origins) > 1:
            return f"host: expected one Host header and at most one Origin, got {len(hosts)} and {len(origins)}"
        name = _name(f"//{hosts[0]}")
        if not (name in self._hosts or (self._any_host and name) or (self._any_address and _is_address(name))):
            return f"host: {name or 'none'} is not a name of this service; list it under `hosts`"
        if not origins or origins[0] in self._origins:
            return None
        # `null`, of sandboxed pages and files, has no place to compare.
        if _place(origins[0]) == hosts[0].lower():
            return None
        return f"origin: {origins[0][:200]} may not call this service; list it under `origins`"


class BodyGuard:
    """Refuses bodies of too many bytes: by their Content-Length at once, chunked ones when they exceed the limit.

    Starlette has such a guard, whose answer is a plain text.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"")
        problem = TooLarge(f"body: expected at most {self._max} bytes, got more")
        if length.isdigit() and int(length[:20]) > self._max:
            await answer_to(problem)(scope, receive, send)
            return
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max:
                # FastAPI makes a fault of the body's form of all but its own exceptions.
                raise HTTPException(413, str(problem))
            return message

        await self._app(scope, bounded, send)


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _place(origin: str) -> str | None:
    """The host and port of a page's origin; None if it has none."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
