"""What several commands share."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..engine import Engine
from ..errors import RequestError
from ..request import GenerateRequest
from ..rows import read_numbers, read_parts
from ..samplers import SAMPLERS
from ..schedule import SCHEDULES

stderr = Console(stderr=True)

# Options whose name is not the request field's.
FIELD_OF_OPTION = {"steps": "num_inference_steps"}


# Options of every command that draws.
Height = Annotated[int | None, typer.Option(help="Pixels.")]
Width = Annotated[int | None, typer.Option(help="Pixels.")]
Sampler = Annotated[
    str, typer.Option(help=f"Plain names are ComfyUI's; docs/samplers.md says more: {', '.join(SAMPLERS)}.")
]
Schedule = Annotated[
    str, typer.Option(help=f"Plain names are ComfyUI's; docs/samplers.md says more: {', '.join(SCHEDULES)}.")
]
Shift = Annotated[float | None, typer.Option(help="Of the schedule, more than 0; the bundle's if it is not given.")]
BatchNoise = Annotated[
    str, typer.Option(help="separate: each image has its own seed's; comfyui: one stream of the first seed's for all.")
]
FitSize = Annotated[
    str, typer.Option(help="exact refuses a size that is no multiple of the bundle's step, nearest takes the nearest.")
]
TruncatePrompt = Annotated[
    bool, typer.Option("--truncate-prompt", help="Cut prompts that are too long, as diffusers does.")
]
# Parsed as they are read: what follows takes options for the request's fields.
Sigmas = Annotated[
    Any,
    typer.Option(
        parser=partial(read_numbers, "sigmas"), metavar="1.0,0.6,…", help="A schedule of your own, without the last 0."
    ),
]
AgainOver = Annotated[
    Any,
    typer.Option(
        parser=partial(read_parts, "second_pass"),
        metavar="scale=2,strength=0.4,…",
        help="Draw again over the result: scale (1 refines), strength or denoise (as --strength and --denoise), "
        "method (pixel, latent), "
        "num_inference_steps.",
    ),
]
Loras = Annotated[list[str] | None, typer.Option("--lora", help="A LoRA's file, or file=weight; repeat for several.")]
LoraPartial = Annotated[
    bool, typer.Option("--lora-partial", help="Use what fits of a LoRA that does not fit whole, and say what does not.")
]
Backend = Annotated[str, typer.Option(help="What runs the bundle.")]
BackendOptions = Annotated[
    list[str] | None,
    typer.Option("-O", "--backend-option", help="name=value, e.g. provider=cuda; repeat for several."),
]


def warn(text: str) -> None:
    """One line on standard error."""
    stderr.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def fail(text: str) -> None:
    """One line on standard error, of something that went wrong."""
    stderr.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def is_given(ctx: typer.Context, option: str) -> bool:
    """Whether an option stands on the command line."""
    source = ctx.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def given_fields(ctx: typer.Context) -> dict[str, Any]:
    """The request fields among the options that stand on the command line; what is not there is left to defaults."""
    known = {field.name for field in dataclasses.fields(GenerateRequest)}
    named = {FIELD_OF_OPTION.get(option, option): option for option in ctx.params}
    return {name: ctx.params[option] for name, option in named.items() if name in known and is_given(ctx, option)}


def backend_options(texts: list[str]) -> dict[str, Any]:
    """`name=value` by name; a value that is JSON is read as such, any other is text. Raises RequestError."""
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise RequestError(f"--backend-option: expected name=value, got {text!r}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def load_loras(engine: Engine, texts: list[str], partly: bool = False) -> None:
    """Put LoRAs on: `FILE`, or `FILE=WEIGHT`. Raises RequestError and LoraError as `Engine.load_lora` does."""
    for text in texts:
        path, _, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:  # no weight: a "=" belongs to the name
            path, weight = text, 1.0
        load_lora(engine, path or text, weight if path else 1.0, partly=partly)


def load_lora(engine: Engine, path: str | Path, weight: float, name: str | None = None, partly: bool = False) -> None:
    """Put one LoRA on, and say on standard error what its file leaves in doubt."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.load_lora(path, weight, name, strict=not partly)
    for warning in caught:
        warn(str(warning.message))


def picture_line(path: Path, prompt: str, seed: int, timings: dict[str, float], bundle_id: str, **more: Any) -> str:
    """The JSON line that says of a picture where it is and how it came."""
    return json_line(
        {"file": str(path), "prompt": prompt, "seed": seed, "bundle": bundle_id, "timings": timings, **more}
    )


def json_line(value: Any) -> str:
    """JSON for standard output: characters as they are where it can hold all of them, which GBK cannot."""
    return json.dumps(value, ensure_ascii=(sys.stdout.encoding or "ascii").lower().replace("-", "") != "utf8")
