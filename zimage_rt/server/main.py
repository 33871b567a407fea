"""Runs the service: the configuration of the command line, and uvicorn."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from ..errors import RequestError
from .app import create_app
from .config import ConfigError, ModelConfig, ServiceConfig, read_config
from .database import exclusive
from .keys import has_key

log = logging.getLogger(__name__)

# Seconds for answers that are on their way when the service has drained.
ANSWER_SECONDS = 5


def service_config(
    bundle: Path | None,
    config: Path | None,
    *,
    backend: str,
    backend_options: Mapping[str, Any],
    devices: Sequence[int] | None = None,
    drain_seconds: int | None = None,
    editor: bool = False,
    **given: Any,
) -> ServiceConfig:
    """The configuration of one bundle or of a file, with what the command line says over it. Raises RequestError."""
    if (bundle is None) == (config is None):
        raise RequestError("bundle: expected a bundle's folder, or --config with a file; give one of them")
    if config is not None:
        base = read_config(config)
    else:
        assert bundle is not None
        base = ServiceConfig({bundle.resolve().name: ModelConfig(str(bundle), "turbo", backend, backend_options)})
    changes = {name: value for name, value in given.items() if value is not None}
    if devices is not None:
        changes["devices"] = tuple(devices)
    if drain_seconds is not None:
        changes["queue"] = dataclasses.replace(base.queue, drain_seconds=drain_seconds)
    if editor:
        changes["comfyui"] = dataclasses.replace(base.comfyui, editor=True)
    return dataclasses.replace(base, **changes)


def run(config: ServiceConfig, tell: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        RequestError: strangers reach the address, and there are no keys.
        ConfigError: another service has the folder of the data, or another program the port.
    """
    refuse_strangers(config)
    check_port(config)
    app = create_app(config)
    server = Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            log_level="warning",
            log_config=None,  # its warnings go where ours go, in their format
            access_log=False,
            # Node's clients inflate every message on a thread, and hear of a workflow's end over HTTP before that: one
            # of them then waits for ever for the messages that it no longer listens for.
            ws_per_message_deflate=False,
            # Longer than the idle time of clients and proxies: who closes first is sure that nothing is on its way.
            timeout_keep_alive=75,
            # The service has drained before uvicorn ends: what is left are answers on their way.
            timeout_graceful_shutdown=ANSWER_SECONDS,
        ),
        app.state.service.drain,
    )
    # uvicorn raises the signal again when it has ended; a service that was told to end has ended well.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with exclusive(Path(config.data)):
        server.run()


def check_port(config: ServiceConfig) -> None:
    """Raise ConfigError if the address cannot be listened at, before anything is loaded."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        socket.create_server((config.host, config.port), family=family).close()
    except OSError as error:
        address = f"{config.host}:{config.port}"
        raise ConfigError(
            f"port: {address} cannot be listened at: {error.strerror or error}; name another with --port"
        ) from error


def refuse_strangers(config: ServiceConfig) -> None:
    """Raise RequestError if others than this machine reach the service and none of them would need a key."""
    if not config.is_local and not config.open and not has_key(Path(config.data)):
        raise RequestError(
            f"host: {config.host} can be reached by others, and {config.data} has no API keys; add one with "
            "`zimage keys add`, or serve everybody with `open = true` in the configuration"
        )


class Server(uvicorn.Server):
    """uvicorn, which logs where it listens, and drains the service before it ends.

    While the service drains it still answers: `/readyz` says that it ends, and finished images can be fetched.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain = drain
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; end at once at the second."""
        if self._loop is None or self._draining is not None:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        try:
            await self._drain()
        finally:
            self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for server in self.servers:
            for each in server.sockets:
                host, port = each.getsockname()[:2]
                log.info("listening at http://%s:%d", f"[{host}]" if ":" in host else host, port)
