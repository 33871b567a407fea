"""`zimage serve`: a service over HTTP for one bundle, or for those of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import RequestError
from .common import backend_options, warn
from .options import BACKEND, with_options


@with_options(BACKEND)
def serve(
    ctx: typer.Context,
    bundle: Annotated[Path | None, typer.Argument(help="A folder that zimage-export wrote; or give --config.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file with models, limits and devices; docs/serving.md describes it.")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="The address to listen at. By default 127.0.0.1: this machine alone reaches it."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="The port to listen at; 0 takes a free one. By default 8188.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The folder of the record and the finished images. By default zimage-data.")
    ] = None,
    devices: Annotated[
        str | None, typer.Option(metavar="0,1,...", help="One worker process per GPU. By default one worker.")
    ] = None,
    drain_seconds: Annotated[
        int | None,
        typer.Option(help="Seconds that jobs may take to finish when the service ends. By default 30."),
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(help="text, or json: one object per line. By default text.", metavar="text|json")
    ] = None,
    comfyui: Annotated[
        bool, typer.Option("--comfyui", help="ComfyUI's editor at /, and the page at /zimage; docs/comfyui.md.")
    ] = False,
) -> None:
    """Serve images over HTTP: OpenAI's protocol, jobs with progress, and a page in the browser."""
    try:
        from ..server.logs import configure
        from ..server.main import run, service_config
    except ModuleNotFoundError as error:
        raise RequestError(
            f"zimage serve needs {error.name}, which is not installed; install it with: pip install 'zimage-rt[server]'"
        ) from error
    service = service_config(
        bundle,
        config,
        backend=ctx.params["backend"],
        backend_options=backend_options(ctx.params["backend_option"] or []),
        host=host,
        port=port,
        data=None if data is None else str(data),
        devices=None if devices is None else [int(item) for item in devices.split(",")],
        drain_seconds=drain_seconds,
        log_format=log_format,
        editor=comfyui,
    )
    configure(service.log_format)
    run(service, warn)
