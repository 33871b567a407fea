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
from ..sampling.samplers import DEFAULT_SAMPLER
from ..sampling.schedules import DEFAULT_SCHEDULE
from . import interrupt
from .common import backend_options, fail, given_fields, load_engine, load_loras, picture_line, stderr
from .options import (
    AgainOver,
    Backend,
    BackendOptions,
    BatchNoise,
    CfgNormalization,
    CfgTruncation,
    ControlImage,
    ControlScale,
    Denoise,
    DynamicCfg,
    Fit,
    FitSize,
    GuidanceScale,
    Height,
    LiteralPrompt,
    LoraPartial,
    Loras,
    Mask,
    MaskFeather,
    NegativePrompt,
    Quality,
    Sampler,
    Schedule,
    Shift,
    Sidecar,
    Sigmas,
    StartImage,
    Steps,
    Strength,
    TruncatePrompt,
    Vae,
    VaeTile,
    Width,
)


def batch(
    ctx: typer.Context,
    table: Annotated[
        Path, typer.Argument(help="CSV, .xlsx or JSON lines (.jsonl); docs/cli.md says which columns there are.")
    ],
    bundle: Annotated[Path, typer.Option("-b", "--bundle", help="A folder that zimage-export wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder of the images; it is made.")] = Path("out"),
    template: Annotated[
        str | None,
        typer.Option(help='The prompt, with columns in it: "a {animal}". By default the column prompt is the prompt.'),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The files' names, with columns in them: \"{sku}.png\". By default the rows' numbers."),
    ] = None,
    image_format: Annotated[
        str | None, typer.Option("--format", help="png, jpg or webp. By default the ending of --name, or png.")
    ] = None,
    quality: Quality = None,
    base_seed: Annotated[
        int, typer.Option("--seed", min=0, help="What rows without a seed get theirs from: a whole number, 0 or more.")
    ] = 0,
    negative_prompt: NegativePrompt = "",
    height: Height = None,
    width: Width = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    cfg_truncation: CfgTruncation = 1.0,
    cfg_normalization: CfgNormalization = 0.0,
    dynamic_cfg: DynamicCfg = 0.0,
    num_images: Annotated[int, typer.Option(help="Images for each row, 1 or more.")] = 1,
    vae: Vae = None,
    sampler: Sampler = DEFAULT_SAMPLER,
    schedule: Schedule = DEFAULT_SCHEDULE,
    shift: Shift = None,
    sigmas: Sigmas = None,
    image: StartImage = None,
    strength: Strength = 0.6,
    denoise: Denoise = None,
    mask: Mask = None,
    mask_feather: MaskFeather = 0.0,
    fit: Fit = "crop",
    control_image: ControlImage = None,
    control_scale: ControlScale = 0.75,
    second_pass: AgainOver = None,
    batch_noise: BatchNoise = "separate",
    fit_size: FitSize = "exact",
    truncate_prompt: TruncatePrompt = False,
    literal_prompt: LiteralPrompt = False,
    vae_tile: VaeTile = None,
    sidecar: Sidecar = True,
    sheet: Annotated[str | None, typer.Option(help="Of an .xlsx file, by its name. By default the first.")] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Of a CSV file or JSON lines, e.g. gb18030. By default it is found out.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Draw everything anew, and remove what was drawn. By default it is kept.")
    ] = False,
    lora: Loras = None,
    lora_partial: LoraPartial = False,
    backend: Backend = "onnxruntime",
    backend_option: BackendOptions = None,
) -> None:
    """Draw a table of prompts; the same command resumes where a killed one stopped.

    Options are for rows that say nothing else. Prints a JSON line for each image. A row that fails does not stop the
    others: the journal in the folder says why it did, and the exit status is 1.
    """
    options = BatchOptions(
        template=template,
        defaults=given_fields(ctx),
        seed=base_seed,
        sidecar=sidecar,
        name=name,
        format=image_format,
        quality=quality,
    )
    check_quality(options.suffix, quality)
    check_folder(output)
    rows = read_table(table, encoding, sheet)
    engine = load_engine(bundle, backend, backend_options(backend_option or []))
    load_loras(engine, lora or [], lora_partial)
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
        # On one terminal lines go above the bar; elsewhere they must stay on standard output.
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
                    line = picture_line(path, text, seed, result.timings, result.bundle_id, **more)
                    print(line, flush=True)
            progress.advance(task)
