"""`zimage-export`: the command line."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from zimage_rt.errors import ZImageError
from zimage_rt.manifest import Manifest

from .builders import builder_for
from .builders._tensorrt_options import parse_sm, parse_split
from .errors import RecipeError
from .recipe import ExportRecipe, read_recipe

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _recipe(
    recipe: Path | None,
    checkpoint: Path | None,
    out: Path | None,
    precision: str | None,
    vae: list[str] | None,
    controlnet: Path | None,
    backend: str | None,
    skip_parity: bool,
) -> ExportRecipe:
    if recipe is not None:
        base = read_recipe(recipe)
        if checkpoint is not None:
            base = dataclasses.replace(base, checkpoint=checkpoint)
        if out is not None:
            base = dataclasses.replace(base, out=out)
    elif checkpoint is not None and out is not None:
        base = ExportRecipe(checkpoint, out, out.name)
    else:
        raise RecipeError("give a recipe, or both --checkpoint and --out")
    if precision is not None:
        base = dataclasses.replace(base, precision=precision)
    if vae:
        base = dataclasses.replace(base, vae=tuple(vae))
    if controlnet is not None:
        base = dataclasses.replace(base, parts={**base.parts, "controlnet": controlnet})
    if backend is not None:
        base = dataclasses.replace(base, backend=backend)
    return dataclasses.replace(base, parity=False) if skip_parity else base


def _with_tensorrt(
    recipe: ExportRecipe,
    sm: str | None,
    split: list[str] | None,
    workspace: float | None,
    optimization_level: int | None,
) -> ExportRecipe:
    """The recipe with what the command line says of TensorRT."""
    given = {
        "sm": None if sm is None else parse_sm(sm),
        "split": parse_split(split) if split else None,
        "workspace_gb": workspace,
        "optimization_level": optimization_level,
    }
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if not changes:
        return recipe
    if "tensorrt" not in builder_for(recipe.backend).tables:
        raise RecipeError(f"{', '.join(changes)}: backend {recipe.backend} builds no plans; add --backend tensorrt_rtx")
    return dataclasses.replace(recipe, tensorrt=dataclasses.replace(recipe.tensorrt, **changes))


def _summary(manifest: Manifest, out: Path) -> dict[str, object]:
    return {
        "bundle": str(out),
        "bundle_id": manifest.bundle_id,
        "name": manifest.name,
        "precision": manifest.precision,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "modules": {
            name: {
                "precision": module.precision,
                "bytes": manifest.files[module.weights].size,
                "relative_error": max(case.relative_error for case in module.parity.cases) if module.parity else None,
            }
            for name, module in manifest.modules.items()
        },
    }


@app.command()
def export_command(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (*.toml).")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A diffusers folder or a single .safetensors file.")] = None,
    out: Annotated[Path | None, typer.Option(help="The bundle's folder.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16.")] = None,
    vae: Annotated[list[str] | None, typer.Option(help="tiny, full; may be repeated.")] = None,
    controlnet: Annotated[
        Path | None, typer.Option(help="A ControlNet: diffusers' folder, or a Fun-Union .safetensors file.")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="onnxruntime: graphs and weights. cuda: weights alone. tensorrt, tensorrt_rtx: graphs, weights, plans."
        ),
    ] = None,
    sm: Annotated[str | None, typer.Option(help="TensorRT-RTX: compute capabilities to build for: 86,89,120.")] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="TensorRT: build a module as several plans, transformer=4; repeatable.")
    ] = None,
    workspace: Annotated[float | None, typer.Option(help="TensorRT: GiB that one layer may take for itself.")] = None,
    optimization_level: Annotated[int | None, typer.Option(help="TensorRT: 0 (fastest build) to 5.")] = None,
    skip_parity: Annotated[bool, typer.Option("--skip-parity", help="Do not compare with the reference.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")] = False,
) -> None:
    """Turn a Z-Image checkpoint into a bundle for zimage_rt."""
    from .bundle import export  # torch loads here, not for --help

    chosen = _recipe(recipe, checkpoint, out, precision, vae, controlnet, backend, skip_parity)
    chosen = _with_tensorrt(chosen, sm, split, workspace, optimization_level)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=as_json or not console.is_terminal, transient=True) as bars:
        task = bars.add_task("reading the checkpoint", total=None)
        last = ""

        def progress(step: str, module: str, done: int, total: int) -> None:
            nonlocal last
            description = f"{module}: {step}"
            bars.update(task, description=description, completed=done, total=total)
            if description != last and not (as_json or console.is_terminal):
                console.print(description)  # a log file shows no moving bar
            last = description

        manifest = export(chosen, progress)
    summary = _summary(manifest, chosen.out)
    if as_json:
        print(json.dumps(summary))
        return
    for name, module in manifest.modules.items():
        size = manifest.files[module.weights].size / 1e6
        error = (
            f"relative error {max(c.relative_error for c in module.parity.cases):.1e}"
            if module.parity
            else "parity skipped"
        )
        console.print(f"{name:<18} {module.precision}  {size:9.1f} MB  {error}")
    console.print(f"{chosen.out}  bundle {manifest.bundle_id}")


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 the export failed, 2 wrong usage or recipe, 130 interrupted."""
    try:
        sys.exit(app(standalone_mode=False) or 0)  # an exit of its own, as for Ctrl-C, is returned here
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except RecipeError as error:
        _fail(error, 2)
    except ZImageError as error:
        _fail(error, 1)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        show = getattr(error, "show", None)  # click's usage errors know how to print themselves
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))


def _fail(error: ZImageError, code: int) -> None:
    if "--json" in sys.argv:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
    print(f"zimage-export: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
