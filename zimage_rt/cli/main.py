"""`zimage`: draw images and inspect bundles from the command line."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from .._version import __version__
from ..backends.registry import probe_backends
from ..bundle.folders import find_leftovers
from ..bundle.manifest import Manifest, read_manifest
from ..bundle.verify import check_file
from ..engine import Engine
from ..errors import RequestError, RequestWarning, ZImageError
from ..metadata.image_file import read_record
from ..metadata.save import check_output, names_file
from ..request.types import GenerateRequest
from ..result import GenerateResult
from . import doctor as doctor_report
from . import interrupt
from .batch import batch
from .common import (
    fail,
    given_fields,
    image_line,
    json_line,
    open_engine,
    printable,
    stderr,
    version_option,
    warn,
)
from .explain import explain
from .keys import app as keys
from .like import open_engine_like, requests_of, select_and_compare
from .log import app as log
from .options import BACKEND, LORAS, REQUEST, SAVING, AsJson, Bundle, Shared, with_options
from .serve import serve
from .start import INTERRUPTED, show_every_character
from .workflow import workflow

# Plain help: it cuts no option's name on narrow terminals and works on any console.
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(batch)
app.command()(explain)
app.command()(serve)
app.command()(workflow)
app.add_typer(keys, name="keys")
app.add_typer(log, name="log")


def main() -> None:
    """The entry point: ZImageError and OSError are printed in one line, with exit status 1.

    Warnings about requests are printed in one line too.
    """
    show_every_character()
    interrupt.install()
    show = warnings.showwarning
    warnings.showwarning = lambda message, category, *where, **more: (
        warn(str(message)) if issubclass(category, RequestWarning) else show(message, category, *where, **more)
    )
    try:
        app()
    except SystemExit as error:
        if error.code == INTERRUPTED:  # Typer's exit code for Ctrl-C in a command
            fail("zimage: stopped")
        raise
    except (ZImageError, OSError) as error:
        fail(f"{type(error).__name__}: {error}")
        sys.exit(1)


@app.callback()
def program(version: Annotated[bool, version_option("zimage")] = False) -> None:
    """Draw images and inspect bundles from the command line."""


IMAGES = {
    "seed": Shared(
        Annotated[
            int | None,
            typer.Option(help="Of the first image, 0 to 2^64 - 1; others count up. By default random, and printed."),
        ],
        None,
    ),
    "num_images": Shared(Annotated[int, typer.Option(help="Images for each prompt, 1 or more.")], 1),
}


@app.command()
@with_options(IMAGES, REQUEST, SAVING, LORAS, BACKEND)
def generate(
    ctx: typer.Context,
    bundle: Bundle,
    prompt: Annotated[
        list[str] | None, typer.Option("-p", "--prompt", help="What to draw; repeat it for several images.")
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="A .png, .jpg or .webp file, with a number added for several; else a folder for PNGs.",
        ),
    ] = Path("out"),
    like: Annotated[
        Path | None,
        typer.Option(help="An image of zimage_rt's to draw again; options given here come first. By default none."),
    ] = None,
    like_backend: Annotated[
        bool,
        typer.Option(
            "--like-backend",
            help="Take the backend and its plain options from --like, too; never paths or libraries. Default: neither.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Draw images; prints where they are and what each stage took."""
    saving = {name: ctx.params[name] for name in SAVING}
    check_output(output, **saving)
    record = None if like is None else read_record(like)
    if like_backend and record is None:
        raise RequestError("--like-backend: expected --like beside it, with the image whose backend to take")
    fields = given_fields(ctx)
    fields.pop("prompt", None)  # each prompt is a request of its own
    requests = requests_of(prompt or [], fields, record, like)
    if record is None or like is None:
        engine = open_engine(ctx, bundle)
    else:
        engine = open_engine_like(ctx, bundle, record, like, take_backend=like_backend)
    again = record is not None and not prompt and not fields and not ctx.params["lora"]
    for number, request in enumerate(requests):
        interrupt.check()
        result, more = _draw(engine, request, quiet=as_json), {}
        if record is not None and again:
            result, more["same"] = select_and_compare(result, record)
        named = names_file(output) and len(requests) > 1
        where = output.with_name(f"{output.stem}-{number:03d}{output.suffix}") if named else output
        paths = result.save(where, **saving)
        for path, drawn in zip(paths, result.records, strict=True):
            text, image_seed = drawn.request["prompt"], drawn.request["seed"]
            if as_json:
                told = {"warnings": list(drawn.warnings), **more}
                print(image_line(path, text, image_seed, result.timings, result.bundle_id, **told))
            else:
                stages = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in result.timings.items())
                print(printable(f"{path}  {text}  (seed {image_seed}; {stages})"))


def _draw(engine: Engine, request: GenerateRequest, *, quiet: bool) -> GenerateResult:
    """Run a request, with a progress bar of its steps on standard error."""
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr,
        disable=not stderr.is_terminal and quiet,
    ) as progress:
        text = printable(str(request.prompt)[:40])
        task = progress.add_task(text, total=request.num_inference_steps)
        result = engine.run(request, on_stage=partial(_show_stage, progress, task, text))
        progress.update(task, description=text)
    return result


def _show_stage(progress: Progress, task: TaskID, text: str, stage: str, done: int, total: int) -> None:
    """Show the steps on the bar, and other stages by their name."""
    if stage == "denoise":
        progress.update(task, description=text, total=total, completed=done)
    else:
        progress.update(task, description=f"{text}: {stage} {done}/{total}" if total > 1 else f"{text}: {stage}")


@app.command()
def inspect(
    bundle: Bundle,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a bundle holds and whether every file is as it was written."""
    manifest = read_manifest(bundle)
    states: dict[str, str] = {}
    for name, entry in manifest.files.items():
        try:
            check_file(bundle, name, entry)
            states[name] = "ok"
        except ZImageError as error:
            states[name] = str(error)
    damaged = {name: state for name, state in states.items() if state != "ok"}
    if as_json:
        from ..bundle.json_codec import to_json

        report = to_json(manifest) | {"bundle_id": manifest.bundle_id, "file_states": states, "ok": not damaged}
        print(json_line(report, indent=1))
    else:
        _print_bundle(manifest, states)
    for folder in find_leftovers(bundle):
        warn(f"{folder} was left by an export that was stopped; the next export to {bundle} removes it")
    if damaged:
        raise typer.Exit(1)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say which backends can run on this machine, and why the others cannot; exit status 1 if none can."""
    probes = probe_backends()
    if as_json:
        print(doctor_report.as_json(probes))
    else:
        doctor_report.print_table(probes)
    if all(probe.problem is not None for probe in probes):
        raise typer.Exit(1)


def _print_bundle(manifest: Manifest, states: dict[str, str]) -> None:
    console = Console(markup=False)
    shapes = manifest.shapes
    console.print(
        f"{manifest.name}  {manifest.precision}  bundle {manifest.bundle_id}  (zimage_rt {__version__})\n"
        f"height {shapes.height.min}-{shapes.height.max}, width {shapes.width.min}-{shapes.width.max} "
        f"in steps of {shapes.height.multiple}; batch up to {shapes.batch.max}; "
        f"prompt up to {shapes.prompt_tokens.max} tokens",
        highlight=False,
    )
    modules = Table("module", "precision", "weights", "parity (relative error)", "tolerance")
    for name, module in manifest.modules.items():
        parity = module.parity
        worst = max((case.relative_error for case in parity.cases), default=0.0) if parity else None
        modules.add_row(
            name,
            module.precision,
            f"{manifest.files[module.weights].size / 1e6:.1f} MB",
            "not measured" if worst is None else f"{worst:.2e}",
            "" if parity is None else f"{parity.tolerance:.0e}",
        )
    console.print(modules)
    files = Table("file", "bytes", "sha256", "state")
    for name, entry in manifest.files.items():
        files.add_row(name, str(entry.size), entry.sha256[:16], states[name])
    console.print(files)


if __name__ == "__main__":
    main()
