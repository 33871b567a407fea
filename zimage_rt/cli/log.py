"""`zimage log`: the record of a service's requests, searched, exported, and drawn again."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RequestError
from .common import backend_options, is_given, json_line, load_engine, printable, warn
from .keys import Config, Data, data_folder, open_record, shown_time
from .options import BACKEND, with_options

app = typer.Typer(rich_markup_mode=None, help="Search the record of a service's requests, and draw one again.")


@app.callback(invoke_without_command=True)
def log(
    ctx: typer.Context,
    data: Data = None,
    config: Config = None,
    since: Annotated[str | None, typer.Option(help="A time ago such as 30m, 2h or 7d, or a date.")] = None,
    key: Annotated[str | None, typer.Option(help="The name of a key; empty for requests without one.")] = None,
    state: Annotated[str | None, typer.Option(help="queued, running, done, failed or cancelled.")] = None,
    model: Annotated[str | None, typer.Option(help="The name of a model.")] = None,
    grep: Annotated[str | None, typer.Option(help="A text in the prompt or in the error.")] = None,
    limit: Annotated[int, typer.Option(help="The most records, the newest; 0 for all.", min=0)] = 50,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print each record whole, a JSON object per line.")] = False,
) -> None:
    """Search the record of a service's requests, the newest first; `repeat` draws one again."""
    if ctx.invoked_subcommand is not None:
        return
    from ..server.log_queries import Search, read_since, search_jobs

    search = Search(None if since is None else read_since(since), key, state, model, grep, limit)
    with contextlib.closing(open_record(data, config)) as database:
        for row in search_jobs(database, search):
            print(json_line(row) if jsonl else printable(shown_row(row)))


def shown_row(row: Mapping[str, Any]) -> str:
    """A record on one line."""
    seconds = "" if row["finished"] is None else f"{row['finished'] - row['created']:.2f} s"
    result = f"{len(row['images'])} images" if row["error"] is None else row["error"]["code"]
    prompt = row["prompt"] if row["prompt"] is not None else f"sha256 {row['prompt_sha256'][:16]}"
    columns = (shown_time(row["created"]), row["state"], row["model"], row["owner"] or "-", seconds, result)
    return f"{row['id']}  {'  '.join(columns)}  {' '.join(prompt.split())[:80]}"


@app.command()
@with_options(BACKEND)
def repeat(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(metavar="ID", help="The id of a job.")],
    data: Data = None,
    config: Config = None,
    bundle: Annotated[Path | None, typer.Option(help="The bundle. By default that of the configuration.")] = None,
    loras: Annotated[Path | None, typer.Option(help="The folder of LoRAs. By default the configuration's.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A file or folder for the images. By default none is written.")
    ] = None,
) -> None:
    """Draw a recorded request again; exit status 1 if an image is not the same to the byte."""
    from ..metadata.references import pixels_sha256
    from ..server.log_queries import find_job, pixels_recorded, request_again
    from ..server.worker import load_loras

    assert ctx.parent is not None
    data, config = data or ctx.parent.params["data"], config or ctx.parent.params["config"]
    with contextlib.closing(open_record(data, config)) as database:
        row = find_job(database, job)
    request = request_again(row, data_folder(data, config))
    model = _model(row, config, bundle, loras)
    backend, options = model.backend, dict(model.backend_options)
    if is_given(ctx, "backend") or ctx.params["backend_option"]:
        backend, options = ctx.params["backend"], backend_options(ctx.params["backend_option"] or [])
    engine = load_engine(Path(model.bundle), backend, options)
    if engine.bundle_id != row["bundle_id"]:
        warn(f"the images were drawn by bundle {row['bundle_id']}; this is {engine.bundle_id}")
    load_loras(engine, model.loras, request)
    result = engine.run(request)
    if output is not None:
        for path in result.save(output):
            print(printable(str(path)))
    recorded = pixels_recorded(row)
    same = [pixels_sha256(image) == sha256 for image, sha256 in zip(result.images, recorded, strict=True)]
    for number, is_same in enumerate(same):
        print(f"image {number}: {'the same to the byte' if is_same else 'not the recorded one to the byte'}")
    if not all(same):
        raise typer.Exit(1)


def _model(row: Mapping[str, Any], config: Path | None, bundle: Path | None, loras: Path | None) -> Any:
    """The model to draw a record with, a ModelConfig. Raises RequestError if nothing names its bundle."""
    from ..server.config import ModelConfig, read_config

    models = {} if config is None else read_config(config).models
    own = models.get(row["model"])
    if bundle is None and own is None:
        raise RequestError(f"bundle: expected the bundle of model {row['model']!r}; name it with --bundle or --config")
    found = own if bundle is None or own is not None else ModelConfig(str(bundle))
    assert found is not None
    return ModelConfig(
        str(bundle or found.bundle),
        backend=found.backend,
        backend_options=found.backend_options,
        loras=found.loras if loras is None else str(loras),
    )
