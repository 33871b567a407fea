"""`zimage keys`: API keys of a service, added, listed and revoked while it runs."""

from __future__ import annotations

import contextlib
import datetime
import sqlite3
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import RequestError
from .common import json_line, printable
from .options import AsJson

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Add, list and revoke the API keys of a service.")

Data = Annotated[
    Path | None,
    typer.Option(help="The folder of the service's record. By default the configuration's, or zimage-data."),
]
Config = Annotated[Path | None, typer.Option(help="The service's configuration, a TOML file.")]
Name = Annotated[str, typer.Argument(help="A name for the key; jobs and records have it.")]


def data_folder(data: Path | None, config: Path | None) -> Path:
    """The folder of a service's record. Raises ConfigError."""
    if data is not None:
        return data
    from ..server.config import DATA, read_config

    return Path(DATA if config is None else read_config(config).data)


def open_record(data: Path | None, config: Path | None, *, write: bool = False) -> sqlite3.Connection:
    """The database of a service that has run, or has keys. Raises RequestError if there is none."""
    from ..server.database import DATABASE, connect, open_reader

    folder = data_folder(data, config)
    if not (folder / DATABASE).is_file():
        raise RequestError(f"data: {folder} has no record of a service; name its folder with --data, or --config")
    return connect(folder) if write else open_reader(folder)


@app.command()
def add(
    name: Name,
    data: Data = None,
    config: Config = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Requests that ask for work.")] = None,
    megapixel_steps_per_minute: Annotated[
        int | None, typer.Option(help="Megapixels times steps, over all images.")
    ] = None,
    max_jobs: Annotated[int | None, typer.Option(help="Jobs at once; 0 for a key that only reads.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Width times height of an image.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps of an image.")] = None,
    models: Annotated[str | None, typer.Option(metavar="A,B,...", help="The models that it may use.")] = None,
) -> None:
    """Make a key and print it, once. Limits that are not given are those of the configuration's [keys]."""
    from ..server.database import connect
    from ..server.keys import add_key

    limits: dict[str, Any] = {
        "requests_per_minute": requests_per_minute,
        "megapixel_steps_per_minute": megapixel_steps_per_minute,
        "max_jobs": max_jobs,
        "max_pixels": max_pixels,
        "max_steps": max_steps,
        "models": None if models is None else models.split(","),
    }
    folder = data_folder(data, config)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(connect(folder)) as database:
        key = add_key(database, name, {field: value for field, value in limits.items() if value is not None})
    print(key)


@app.command("list")
def list_keys(data: Data = None, config: Config = None, as_json: AsJson = False) -> None:
    """List the keys by name, with their own limits."""
    from ..server.keys import read_keys

    with contextlib.closing(open_record(data, config)) as database:
        keys = read_keys(database)
    if as_json:
        for key in keys:
            print(
                json_line(
                    {"name": key.name, "created": key.created, "revoked": key.revoked, "limits": dict(key.limits)}
                )
            )
        return
    table = Table("name", "created", "revoked", "limits")
    for key in keys:
        limits = ", ".join(f"{field}={value}" for field, value in key.limits.items())
        table.add_row(printable(key.name), shown_time(key.created), shown_time(key.revoked), printable(limits))
    Console(markup=False).print(table)


@app.command()
def revoke(name: Name, data: Data = None, config: Config = None) -> None:
    """Revoke a key; a running service refuses it within a second."""
    from ..server.keys import revoke_key

    with contextlib.closing(open_record(data, config, write=True)) as database:
        revoke_key(database, name)


def shown_time(seconds: float | None) -> str:
    """A Unix time as local date and time; empty for none."""
    return "" if seconds is None else f"{datetime.datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
