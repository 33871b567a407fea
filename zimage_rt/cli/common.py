"""Shared functions of the commands: messages, loading of engines and LoRAs, JSON output."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .._version import __version__
from ..engine import Engine
from ..errors import RequestError
from ..request.types import GenerateRequest
from .options import FIELD_OF_OPTION

stderr = Console(stderr=True)


def printable(text: str) -> str:
    """Text for a terminal: control characters, which records and prompts may have, become escapes."""
    return "".join(
        character
        if character == "\n" or unicodedata.category(character) not in ("Cc", "Cf") or character == "\u200d"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def warn(text: str) -> None:
    """Print a warning on standard error, in one line."""
    stderr.print(f"warning: {printable(text)}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def fail(text: str) -> None:
    """Print an error on standard error, in one line."""
    stderr.print(printable(text), style="red", markup=False, highlight=False, soft_wrap=True)


def is_given(ctx: typer.Context, option: str) -> bool:
    """Whether an option was given on the command line."""
    source = ctx.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def given_fields(ctx: typer.Context) -> dict[str, Any]:
    """The request fields among the options that were given on the command line, without defaults."""
    known = {field.name for field in dataclasses.fields(GenerateRequest)}
    named = {FIELD_OF_OPTION.get(option, option): option for option in ctx.params}
    return {name: ctx.params[option] for name, option in named.items() if name in known and is_given(ctx, option)}


def open_engine(ctx: typer.Context, bundle: Path) -> Engine:
    """Load a bundle with the backend and the LoRAs of the command line (`options.BACKEND`, `options.LORAS`)."""
    engine = load_engine(bundle, ctx.params["backend"], backend_options(ctx.params["backend_option"] or []))
    load_loras(engine, ctx.params["lora"] or [], ctx.params["lora_partial"])
    return engine


def load_engine(bundle: Path, backend: str, options: dict[str, Any]) -> Engine:
    """Load a bundle; on a terminal a bar shows the progress of hashing and loading."""
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    ) as progress:
        task = progress.add_task(f"loading {bundle.name}", total=None)

        def tell(stage: str, done: int, total: int) -> None:
            progress.update(task, description=f"{bundle.name}: {stage}", completed=done, total=total)

        return Engine.load(bundle, backend=backend, backend_options=options, progress=tell)


def backend_options(texts: list[str]) -> dict[str, Any]:
    """Parse `name=value` options; values are JSON, or text if they are no JSON. Raises RequestError."""
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
    """Load LoRAs from `FILE` or `FILE=WEIGHT`. Raises RequestError and LoraError as `Engine.load_lora` does."""
    for text in texts:
        path, _, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:  # no weight: the "=", if any, is a part of the path
            path, weight = text, 1.0
        load_lora(engine, path or text, weight if path else 1.0, _free_name(engine, Path(path or text)), partly)


def _free_name(engine: Engine, path: Path) -> str | None:
    """A free name for a LoRA whose file name is in use, as diffusers gives all files one name; None if it is free."""
    own = path.name if path.is_dir() else path.stem
    if own not in engine.loras:
        return None
    return next(name for i in itertools.count(2) if (name := f"{own}-{i}") not in engine.loras)


def load_lora(engine: Engine, path: str | Path, weight: float, name: str | None = None, partly: bool = False) -> None:
    """Load a LoRA, and print its warnings on standard error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.load_lora(path, weight, name, strict=not partly)
    for warning in caught:
        warn(str(warning.message))


def image_line(path: Path, prompt: str, seed: int, timings: dict[str, float], bundle_id: str, **more: Any) -> str:
    """The JSON line of an image: its file, prompt, seed, bundle and timings."""
    return json_line(
        {"file": str(path), "prompt": prompt, "seed": seed, "bundle": bundle_id, "timings": timings, **more}
    )


def json_line(value: Any, indent: int | None = None) -> str:
    """JSON for standard output, with escapes unless its encoding is UTF-8; GBK, for one, lacks characters."""
    holds_all = (sys.stdout.encoding or "ascii").lower().replace("-", "") == "utf8"
    text = json.dumps(value, ensure_ascii=not holds_all, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can escape
        return json.dumps(value, indent=indent)
    # JSON escapes only control characters below the space; these control some terminals too.
    return re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)


def version_option(program: str) -> Any:
    """The option `--version`, which prints the program's name and version and exits."""

    def show(asked: bool) -> None:
        if asked:
            print(f"{program} {__version__}")
            raise typer.Exit

    return typer.Option("--version", callback=show, is_eager=True, help="Print the version, and end.")
