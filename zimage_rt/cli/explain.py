"""`zimage explain`: a contact sheet of one prompt at several steps and guidance scales."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import RequestError
from ..explain import explain as draw_explanation
from ..metadata.save import check_output
from .common import given_fields, json_line, open_engine, printable, stderr
from .options import BACKEND, LORAS, REQUEST, AsJson, Bundle, Shared, select_options, with_options

SHEET = {
    "cell": Shared(
        Annotated[int, typer.Option(help="The longer side of an image on the sheet, 88 to 1024 pixels.")], 160
    ),
    "font": Shared(
        Annotated[
            Path | None,
            typer.Option(help="A TrueType file for the labels. By default a system font that has the characters."),
        ],
        None,
    ),
    "times": Shared(Annotated[bool, typer.Option(help="Write under each image the seconds that it took.")], True),
}
TAKEN = ("negative_prompt", "height", "width", "sampler", "schedule", "shift")

Number = TypeVar("Number", int, float)


@with_options(select_options(REQUEST, *TAKEN), SHEET, LORAS, BACKEND)
def explain(
    ctx: typer.Context,
    bundle: Bundle,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="What to draw.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A .png file for the sheet.")] = Path("sheet.png"),
    step_counts: Annotated[
        str | None,
        typer.Option(
            "--steps",
            metavar="1,2,4,8",
            help="The columns: numbers of steps, 1 to 1000. By default 1, 2, 4 and the bundle's own.",
        ),
    ] = None,
    guidance: Annotated[
        str, typer.Option("--guidance", help="The rows: guidance scales, 0 (none) or more each.")
    ] = "0,1,2,4",
    seed: Annotated[int, typer.Option(help="The seed of every image, 0 to 2^64 - 1.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show how a prompt's image comes about: step counts across, guidance down, and every step of the longest run."""
    if output.suffix.lower() != ".png":
        raise RequestError(f"output: expected a name that ends in .png, got {output.name}")
    check_output(output)
    counts = None if step_counts is None else _numbers(step_counts, "--steps", int)
    scales = _numbers(guidance, "--guidance", float)
    fields = given_fields(ctx)
    for name in ("prompt", "seed"):
        fields.pop(name, None)
    engine = open_engine(ctx, bundle)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr,
    ) as progress:
        task = progress.add_task(printable(prompt[:40]), total=None)
        sheet = draw_explanation(
            engine,
            prompt,
            steps=counts,
            guidance_scales=scales,
            seed=seed,
            **{name: ctx.params[name] for name in SHEET},
            on_image=lambda done, total: progress.update(task, completed=done, total=total),
            **fields,
        )
    path = sheet.save(output)
    if as_json:
        print(json_line({"file": str(path), **sheet.data}))
    else:
        print(printable(f"{path}  {prompt}  ({len(sheet.data['cells'])} images, seed {seed})"))


def _numbers(text: str, option: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [kind(item) for item in text.split(",")]
    except ValueError:
        raise RequestError(f"{option}: expected numbers with commas between them, got {text!r}") from None
