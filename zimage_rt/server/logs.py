"""Logs: text, or a JSON object per line, with a line per job that ended and per request that was answered."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .jobs import Job

if TYPE_CHECKING:  # workers and commands log without the server's packages
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("zimage_rt.server.jobs")
access_log = logging.getLogger("zimage_rt.server.access")

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# What a record of `logging` has of its own; all else was given as `extra`.
OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Routes that are asked every few seconds, or hundreds of times by one page, and are told at level DEBUG.
QUIET_ROUTES = ("/healthz", "/readyz", "/metrics", "/assets/{name:path}")
# The route of a path that none has.
NO_ROUTE = "none"

# Called with the method, the route, the status and the seconds of every request that was answered.
OnAnswer = Callable[[str, str, int, float], None]


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON: `time`, `level`, `logger`, `message`, `error`, and what it was given."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        said: dict[str, Any] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        said |= {name: value for name, value in vars(record).items() if name not in OWN}
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False, default=str)


def configure(log_format: str) -> None:
    """Log to standard error from level INFO on, as `text` or `json`."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def log_job(job: Job) -> None:
    """A line for a job that has ended. Prompts are in the record alone."""
    code = "ok" if job.error is None else job.error["code"]
    seconds = (job.finished or time.time()) - job.created
    extra = {"job": job.id, "key": job.owner, "model": job.model, "code": code, "seconds": round(seconds, 4)}
    log.info("job %s of %s is %s (%s) after %.3f s", job.id, job.model, job.state, code, seconds, extra=extra)


class AccessLog:
    """Times every request and tells its route, which has no ids, beside its path, which has."""

    def __init__(self, app: ASGIApp, on_answer: OnAnswer) -> None:
        self._app, self._on_answer = app, on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            self._tell(scope, status, time.perf_counter() - started)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        method, route = scope["method"], route_of(scope)
        self._on_answer(method, route, status, seconds)
        who = scope.get("state", {}).get("caller")
        extra = {
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            "key": getattr(who, "name", ""),
        }
        level = logging.DEBUG if route in QUIET_ROUTES else logging.INFO
        # An id of 10 kB is a client's, and so are line ends in a path.
        path = ascii(scope["path"][:200])[1:-1]
        access_log.log(level, "%s %s %d %.4f s", method, path, status, seconds, extra=extra)


def route_of(scope: Scope) -> str:
    """The route of an answered request as it is declared: `/v1/jobs/{job_id}`."""
    route = scope.get("route")
    return getattr(route, "path", NO_ROUTE) if route is not None else NO_ROUTE
