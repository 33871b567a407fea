"""`zimage batch`: an image for each row of a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..atomic_write import check_folder
from ..batch.batch import Batch, BatchOptions
from ..batch.table import read_table
from ..image.formats import check_quality
from . import interrupt
from .common import fail, given_fields, image_line, open_engine, stderr
from .options import BACKEND, LORAS, REQUEST, SAVING, Shared, with_options

ROWS = {
    "template": Shared(
        Annotated[
            str | None,
            typer.Option(help='The prompt, with columns in it: "a {animal}". By default the column prompt.'),
        ],
        None,
    ),
    "name": Shared(
        Annotated[
            str | None,
            typer.Option(help="The files' names, with columns in them: \"{sku}.png\". By default the rows' numbers."),
        ],
        None,
    ),
    "image_format": Shared(
        Annotated[
            str | None,
            typer.Option("--format", help="png, jpg or webp. By default the ending of --name, or png."),
        ],
        None,
    ),
    "base_seed": Shared(
        Annotated[
            int,
            typer.Option("--seed", min=0, help="Decides the seeds of rows without one: a whole number, 0 or more."),
        ],
        0,
    ),
    "num_images": Shared(Annotated[int, typer.Option(help="Images for each row, 1 or more.")], 1),
    "sheet": Shared(
        Annotated[str | None, typer.Option(help="The sheet of an .xlsx file, by name. By default the first.")], None
    ),
    "encoding": Shared(
        Annotated[
            str | None, typer.Option(help="Of a CSV file or JSON lines, e.g. gb18030. By default it is detected.")
        ],
        None,
    ),
}


@with_options(ROWS, REQUEST, SAVING, LORAS, BACKEND)
def batch(
    ctx: typer.Context,
    table: Annotated[
        Path, typer.Argument(help="CSV, .xlsx or JSON lines (.jsonl); docs/cli.md says which columns there are.")
    ],
    bundle: Annotated[Path, typer.Option("-b", "--bundle", help="A folder that zimage-export wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder of the images; it is made.")] = Path("out"),
    restart: Annotated[
        bool, typer.Option("--restart", help="Draw everything anew, and remove what was drawn. By default it is kept.")
    ] = False,
) -> None:
    """Draw a table of prompts; the same command resumes where a killed one stopped.

    Options are for rows that say nothing else. Prints a JSON line for each image. A row that fails does not stop the
    others: the journal in the folder says why it did, and the exit status is 1.
    """
    given = ctx.params
    options = BatchOptions(
        template=given["template"],
        defaults=given_fields(ctx),
        seed=given["base_seed"],
        sidecar=given["sidecar"],
        name=given["name"],
        format=given["image_format"],
        quality=given["quality"],
    )
    check_quality(options.suffix, options.quality)
    check_folder(output)
    rows = read_table(table, given["encoding"], given["sheet"])
    engine = open_engine(ctx, bundle)
    work = Batch(engine, rows, output, options, restart=restart)
    with work.journal as journal:
        done = len(rows.rows) - len(work.remaining)
        for note in work.notes:
            stderr.print(note, markup=False, highlight=False, soft_wrap=True)
        if done:
            stderr.print(f"{done} of {len(rows.rows)} rows are done already", highlight=False)
        try:
            _draw(work, done)
        except KeyboardInterrupt:
            done = len(rows.rows) - len(work.remaining)
            stderr.print(f"{done} of {len(rows.rows)} rows are done; the same command resumes", highlight=False)
            raise
        if work.errors:
            fail(f"{len(work.errors)} of {len(rows.rows)} rows failed; {journal.path} says why")
            raise typer.Exit(1)


def _draw(work: Batch, done: int) -> None:
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        # On a terminal lines are printed above the bar; otherwise they must go to standard output.
        redirect_stdout=sys.stdout.isatty(),
    ) as progress:
        task = progress.add_task(work.table.path.name, total=len(work.table.rows), completed=done)
        for row in work.remaining:
            interrupt.check()
            drawn = work.draw(row)
            if isinstance(drawn, str):
                fail(f"row {row.number} (line {row.line}): {drawn}")
            else:
                result, paths = drawn
                for path, record in zip(paths, result.records, strict=True):
                    text, seed = record.request["prompt"], record.request["seed"]
                    more = {"row": row.number, "warnings": list(record.warnings)}
                    line = image_line(path, text, seed, result.timings, result.bundle_id, **more)
                    print(line, flush=True)
            progress.advance(task)
