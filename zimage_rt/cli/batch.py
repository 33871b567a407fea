"""`zimage batch`: a picture for each row of a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..batch import Batch, BatchOptions
from ..engine import Engine
from ..samplers import DEFAULT_SAMPLER
from ..schedule import DEFAULT_SCHEDULE
from ..tables import read_table
from .common import (
    Backend,
    BackendOptions,
    BatchNoise,
    FitSize,
    Height,
    LoraPartial,
    Loras,
    Sampler,
    Schedule,
    Shift,
    TruncatePrompt,
    Width,
    backend_options,
    fail,
    given_fields,
    load_loras,
    picture_line,
    stderr,
)


def batch(
    ctx: typer.Context,
    table: Annotated[Path, typer.Argument(help="CSV or JSON lines (.jsonl): a column for each request field.")],
    bundle: Annotated[Path, typer.Option("-b", "--bundle", help="A folder that zimage-export wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder of the pictures.")] = Path("out"),
    template: Annotated[str | None, typer.Option(help='The prompt, with columns in it: "a {animal}".')] = None,
    base_seed: Annotated[int, typer.Option("--seed", min=0, help="What rows without a seed get theirs from.")] = 0,
    negative_prompt: Annotated[str, typer.Option(help="Of rows that say nothing, as all that follow.")] = "",
    height: Height = None,
    width: Width = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Function evaluations.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="0 means none.")] = None,
    num_images: Annotated[int, typer.Option(help="Pictures for each row.")] = 1,
    vae: Annotated[str | None, typer.Option(help="tiny or full.")] = None,
    sampler: Sampler = DEFAULT_SAMPLER,
    schedule: Schedule = DEFAULT_SCHEDULE,
    shift: Shift = None,
    batch_noise: BatchNoise = "separate",
    fit_size: FitSize = "exact",
    truncate_prompt: TruncatePrompt = False,
    sidecar: Annotated[bool, typer.Option(help="Write each picture's record beside it, as JSON.")] = True,
    encoding: Annotated[str | None, typer.Option(help="Of the table; found out if it is not given.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Draw everything anew; removes what was drawn.")] = False,
    lora: Loras = None,
    lora_partial: LoraPartial = False,
    backend: Backend = "onnxruntime",
    backend_option: BackendOptions = None,
) -> None:
    """Draw a table of prompts; the same command goes on where a killed one stopped.

    Prints a JSON line a picture. A row that fails does not stop the others: the journal in the folder says why it did,
    and the exit status is 1.
    """
    rows = read_table(table, encoding)
    engine = Engine.load(bundle, backend=backend, backend_options=backend_options(backend_option or []))
    load_loras(engine, lora or [], lora_partial)
    options = BatchOptions(template=template, defaults=given_fields(ctx), seed=base_seed, sidecar=sidecar)
    work = Batch(engine, rows, output, options, restart=restart)
    with work.journal as journal:
        remaining = work.remaining
        done = len(rows.rows) - len(remaining)
        if done:
            stderr.print(f"{done} of {len(rows.rows)} rows are done already", highlight=False)
        try:
            _draw(work, done)
        except KeyboardInterrupt:
            stderr.print(f"stopped; {len(journal.pictures)} rows are done. The same command goes on", highlight=False)
            raise typer.Exit(130) from None
        if journal.errors:
            fail(f"{len(journal.errors)} of {len(rows.rows)} rows failed; {journal.path} says why")
            raise typer.Exit(1)


def _draw(work: Batch, done: int) -> None:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        # On one terminal lines go above the bar; elsewhere they must stay on standard output.
        redirect_stdout=sys.stdout.isatty(),
    ) as progress:
        task = progress.add_task(work.table.path.name, total=len(work.table.rows), completed=done)
        for row in work.remaining:
            drawn = work.draw(row)
            if isinstance(drawn, str):
                fail(f"row {row.number} (line {row.line}): {drawn}")
            else:
                result, paths = drawn
                for path, record in zip(paths, result.records, strict=True):
                    text, seed = record.request["prompt"], record.request["seed"]
                    more = {"row": row.number, "warnings": list(record.warnings)}
                    line = picture_line(path, text, seed, result.timings, result.bundle_id, **more)
                    print(line, flush=True)
            progress.advance(task)
