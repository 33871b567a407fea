"""Access: the key of a request, the owner of a job, and what a key may do."""

from __future__ import annotations

import base64
import dataclasses
import math

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import ZImageError
from ..request.types import ResolvedRequest
from .config import KeyLimits
from .errors import Forbidden, RateLimited, Unauthorized, answer_to
from .keys import find_key
from .rate import UNITS
from .service import Service, last_pass, total_steps

# Paths that need no key: the page, which asks for one, and what tells a balancer whether the service lives.
OPEN_PATHS = ("/", "/zimage", "/favicon.ico", "/healthz", "/readyz")
OPEN_PREFIXES = ("/web/",)
# Any user's name with the key as its password; clients may send the key as a bearer token all the same.
BASIC = 'Basic realm="zimage", charset="UTF-8"'
# Methods of requests that ask for work.
COUNTED_METHODS = ("POST", "PUT", "PATCH")
# Those of ComfyUI's protocol that do not, with or without `/api` before them.
FREE_PREFIXES = (
    "/settings", "/userdata", "/users", "/queue", "/history", "/interrupt", "/free", "/jobs", "/internal", "/logs",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Caller:
    """The client of a request.

    Attributes:
        service: that it calls.
        name: of its key; empty without one.
        limits: of its key.
    """

    service: Service
    name: str = ""
    limits: KeyLimits = dataclasses.field(default_factory=KeyLimits)

    @property
    def title(self) -> str:
        """The caller in a message."""
        return f"key {self.name!r}" if self.name else "a caller without a key"

    def may_see(self, owner: str) -> bool:
        """Whether a job of an owner is this caller's."""
        return owner == self.name

    def may_use(self, model: str) -> bool:
        """Whether the key may draw with a model."""
        return self.limits.models is None or model in self.limits.models

    def check_model(self, model: str) -> None:
        """Raise Forbidden for a model that the key may not use."""
        if not self.may_use(model):
            allowed = ", ".join(self.limits.models or ()) or "none"
            raise Forbidden(f"model: {self.title} may use {allowed} (models), got {model}")

    def check_draws(self) -> None:
        """Raise Forbidden for a key that only reads."""
        if self.limits.max_jobs == 0:
            raise Forbidden(f"{self.title} may read alone and draw nothing (max_jobs is 0)")

    def count_request(self) -> None:
        """Count a request that asks for work. Raises RateLimited."""
        most = self.limits.requests_per_minute
        if most is None:
            return
        wait = self.service.rates.spend("requests", self.name, most) if most else 60
        if wait:
            raise RateLimited(
                f"{self.title} may send {most} requests per minute (requests_per_minute), and has; ask again in "
                f"{wait} s",
                wait,
            )

    def admit(self, request: ResolvedRequest) -> None:
        """Count a request that is about to wait against the key's limits.

        Raises:
            Forbidden: it is larger than the key may ask for at any time.
            RateLimited: the key has too much of it now.
        """
        limits, last, steps = self.limits, last_pass(request), total_steps(request)
        pixels = max(request.height * request.width, last.height * last.width)
        if limits.max_pixels is not None and pixels > limits.max_pixels:
            size = f"{last.width}x{last.height}"
            raise Forbidden(f"size: {self.title} may draw {limits.max_pixels} pixels (max_pixels), got {size}")
        if limits.max_steps is not None and steps > limits.max_steps:
            raise Forbidden(
                f"num_inference_steps: {self.title} may ask for {limits.max_steps} (max_steps), got {steps}"
            )
        self.check_draws()
        self._check_jobs()
        self.spend_megapixel_steps(megapixel_steps(request))

    def admit_workflow(self) -> None:
        """Count a workflow that is about to wait; what it draws counts when it draws. Raises what `admit` does."""
        self.check_draws()
        self._check_jobs()

    def _check_jobs(self) -> None:
        most = self.limits.max_jobs
        if most is None:
            return
        jobs = self.service.unfinished_of(self.name)
        if jobs >= most:
            wait = max(1, math.ceil(self.service.queue.seconds_per_job))
            raise RateLimited(
                f"{self.title} may have {most} jobs at once (max_jobs), and has {jobs}; ask again in {wait} s", wait
            )

    def spend_megapixel_steps(self, asked: float) -> None:
        """Count what is drawn against the key's rate. Raises Forbidden, RateLimited."""
        most = self.limits.megapixel_steps_per_minute
        if most is None:
            return
        cost = math.ceil(asked * UNITS)
        what = f"{self.title} may draw {most} megapixel-steps per minute (megapixel_steps_per_minute)"
        if cost > most * UNITS:
            raise Forbidden(f"{what}, and this request alone has {asked:.3g}")
        wait = self.service.rates.spend("megapixel-steps", self.name, most * UNITS, cost)
        if wait:
            raise RateLimited(f"{what}, and this request has {asked:.3g}; ask again in {wait} s", wait)


def megapixel_steps(request: ResolvedRequest) -> float:
    """Megapixels times steps of a request, over its passes and images."""
    second = request.second_pass
    steps = request.height * request.width * (len(request.sigmas) - 1)
    steps += 0 if second is None else second.height * second.width * (len(second.sigmas) - 1)
    return steps * len(request.seeds) / 1e6


class KeyGuard:
    """Finds out who calls before anything of a request's body is read; `caller` has it then.

    A service on the loopback address needs no key before the first one is made. From then on, and on any other
    address, a key is needed, unless the configuration says `open`.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] not in ("http", "websocket") or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        try:
            who = await self._caller(dict(scope["headers"]).get(b"authorization", b"").decode("latin-1"))
            scope.setdefault("state", {})["caller"] = who
            if scope["type"] == "http" and scope["method"] in COUNTED_METHODS and not _asks_no_work(scope["path"]):
                who.count_request()
                who.check_draws()
        except ZImageError as error:
            answer = answer_to(error)
            if isinstance(error, Unauthorized) and self._asks_the_user(scope["path"]):
                answer.headers.append("WWW-Authenticate", BASIC)  # not in one line: Chromium takes the first alone
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _asks_the_user(self, path: str) -> bool:
        """Whether a browser is to ask its user for the key, and to send it from then on, also with websockets.

        Our own page asks for the key itself, and calls `/v1` alone.
        """
        return self._service.config.comfyui.editor and not path.startswith("/v1/")

    async def _caller(self, authorization: str) -> Caller:
        config = self._service.config
        keys = await self._service.keyring.keys()
        text = key_of(authorization)
        key = None if text is None else find_key(keys, text)
        if key is not None:
            return Caller(self._service, key.name, key.limits_over(config.keys))
        if config.open or (config.is_local and not keys):
            return Caller(self._service, "", config.keys)
        if not authorization:
            raise Unauthorized("a key is needed here; send the header `Authorization: Bearer KEY`")
        raise Unauthorized("the key is unknown or revoked; `zimage keys add` makes one")

    def _is_open(self, scope: Scope) -> bool:
        path = scope["path"]
        if path == "/" and self._service.config.comfyui.editor:
            return False  # so that the browser asks for the key before the editor starts
        return scope["type"] == "http" and (path in OPEN_PATHS or path.startswith(OPEN_PREFIXES))


def key_of(authorization: str) -> str | None:
    """The key in an Authorization header: a bearer token, or Basic's password, which browsers ask their user for."""
    scheme, _, text = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return text.strip()
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(text.strip(), validate=True).decode().partition(":")[2]
    except ValueError:
        return None


def _asks_no_work(path: str) -> bool:
    """Whether a route of ComfyUI's protocol, which is not counted, keeps settings, files or the queue."""
    return path.removeprefix("/api").startswith(FREE_PREFIXES)


async def caller(request: Request) -> Caller:
    """The caller of an HTTP request, whom `KeyGuard` has found."""
    return request.state.caller
