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

from zimage_rt.bundle.manifest import Manifest
from zimage_rt.cli.common import version_option
from zimage_rt.cli.start import INTERRUPTED, show_every_character
from zimage_rt.errors import ZImageError

from .builders import builder_for
from .errors import RecipeError
from .recipe import ExportRecipe, read_recipe
from .tensorrt_options import parse_sm, parse_split

# Plain help: it cuts no option's name, however narrow the terminal.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


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
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (*.toml); or give --checkpoint and --out.")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A diffusers folder or a single .safetensors file. By default the recipe's."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The bundle's folder. By default the recipe's.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16. By default the recipe's, or fp32 without a recipe.")
    ] = None,
    vae: Annotated[
        list[str] | None,
        typer.Option(help="tiny or full; may be repeated. By default the recipe's, or what the checkpoint has."),
    ] = None,
    controlnet: Annotated[
        Path | None,
        typer.Option(
            help="A ControlNet: diffusers' folder, or a Fun-Union .safetensors file. By default the recipe's."
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="onnxruntime (graphs and weights), cuda (weights alone), tensorrt or tensorrt_rtx (graphs, weights, "
            "plans). By default the recipe's, or onnxruntime."
        ),
    ] = None,
    sm: Annotated[
        str | None,
        typer.Option(
            metavar="86,89,120",
            help="TensorRT-RTX: compute capabilities to build for, without their dot. By default the recipe's.",
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE=N",
            help="TensorRT: build a module as N plans, e.g. transformer=4; may be repeated. By default the recipe's.",
        ),
    ] = None,
    workspace: Annotated[
        float | None, typer.Option(help="TensorRT: GiB that one layer may take for itself. By default the recipe's.")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(help="TensorRT: from 0, the fastest build, to 5. By default the recipe's.")
    ] = None,
    skip_parity: Annotated[
        bool,
        typer.Option("--skip-parity", help="Do not compare with the reference. By default every module is compared."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    version: Annotated[bool, version_option("zimage-export")] = False,
) -> None:
    """Turn a Z-Image checkpoint into a bundle for zimage_rt."""
    from .bundle import export  # torch loads here, not for --help

    chosen = _recipe(recipe, checkpoint, out, precision, vae, controlnet, backend, skip_parity)
    chosen = _with_tensorrt(chosen, sm, split, workspace, optimization_level)
    console = Console(stderr=True, markup=False)
    columns = (
        TextColumn("{task.description:<28}", markup=False),
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
    show_every_character()
    try:
        code = app(standalone_mode=False) or 0  # an exit of its own, as for Ctrl-C, is returned here
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except RecipeError as error:
        _fail(error, 2)
    except ZImageError as error:
        _fail(error, 1)
    except (KeyboardInterrupt, typer.Abort):
        print("zimage-export: stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except ModuleNotFoundError:
        raise  # an extra that is not installed: the entry point names it
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
