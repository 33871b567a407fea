"""Runs the service: the configuration of the command line, and uvicorn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from ..errors import RequestError
from .app import create_app
from .config import ModelConfig, QueueConfig, ServiceConfig, read_config


def service_config(
    bundle: Path | None,
    config: Path | None,
    *,
    backend: str,
    backend_options: Mapping[str, Any],
    devices: Sequence[int] | None = None,
    drain_seconds: int | None = None,
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
    return dataclasses.replace(base, **changes)


def run(config: ServiceConfig, tell: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises RequestError for an address that strangers reach without keys."""
    if not config.is_local and not config.open:
        raise RequestError(
            f"host: {config.host} can be reached by others, and there are no API keys; add one with `zimage keys add`, "
            "or serve everybody with `open = true` in the configuration"
        )
    app = create_app(config)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=config.queue.drain_seconds,
        )
    )
    server.run()


__all__ = ["QueueConfig", "run", "service_config"]
