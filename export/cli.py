"""Command line of `zimage-export`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from zimage_rt.bundle.manifest import Manifest, ModuleSpec
from zimage_rt.cli.common import version_option
from zimage_rt.cli.options import Shared, with_options
from zimage_rt.cli.start import INTERRUPTED, show_every_character
from zimage_rt.errors import ZImageError

from .builders import builder_for
from .errors import RecipeError
from .recipe import ExportRecipe, read_recipe
from .tensorrt_options import parse_sm, parse_split

# Plain help does not cut the names of options in a narrow terminal.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def build_recipe(path: Path | None, changes: Mapping[str, Any], tensorrt: Mapping[str, Any]) -> ExportRecipe:
    """The recipe of a file, or one at its defaults, with the command line's changes.

    Args:
        path: a TOML file; None for a recipe of `checkpoint` and `out` alone.
        changes: fields of `ExportRecipe`; None keeps the recipe's value. `controlnet` is a part.
        tensorrt: fields of `TensorRTOptions`; None keeps the recipe's value.

    Raises:
        RecipeError: neither a file nor both paths, or an option that the backend does not have.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    controlnet = given.pop("controlnet", None)
    if path is not None:
        recipe = read_recipe(path)
    elif "checkpoint" in given and "out" in given:
        recipe = ExportRecipe(given["checkpoint"], given["out"], given["out"].name)
    else:
        raise RecipeError("give a recipe, or both --checkpoint and --out")
    recipe = dataclasses.replace(recipe, **given)
    if controlnet is not None:
        recipe = dataclasses.replace(recipe, parts={**recipe.parts, "controlnet": controlnet})
    options = {name: value for name, value in tensorrt.items() if value is not None}
    if not options:
        return recipe
    if "tensorrt" not in builder_for(recipe.backend).tables:
        raise RecipeError(f"{', '.join(options)}: backend {recipe.backend} builds no plans; add --backend tensorrt_rtx")
    return dataclasses.replace(recipe, tensorrt=dataclasses.replace(recipe.tensorrt, **options))


def run_export(recipe: ExportRecipe, console: Console, quiet: bool) -> Manifest:
    """Export a bundle with a progress bar, or with one line per step if the console is no terminal.

    Args:
        recipe: what to export.
        console: standard error.
        quiet: show no progress.
    """
    from .bundle import export  # onnx loads here, not for --help

    columns = (
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bars:
        task = bars.add_task("reading the checkpoint", total=None)
        last = ""

        def progress(step: str, module: str, done: int, total: int) -> None:
            nonlocal last
            description = f"{module}: {step}"
            bars.update(task, description=description, completed=done, total=total)
            if description != last and not (quiet or console.is_terminal):
                console.print(description)  # a log file shows no moving bar
            last = description

        return export(recipe, progress)


def _print_report(manifest: Manifest, out: Path, console: Console) -> None:
    for name, module in manifest.modules.items():
        size = manifest.files[module.weights].size / 1e6
        error = _relative_error(module)
        parity = "parity skipped" if error is None else f"relative error {error:.1e}"
        console.print(f"{name:<18} {module.precision}  {size:9.1f} MB  {parity}")
    console.print(f"{out}  bundle {manifest.bundle_id}")


def _relative_error(module: ModuleSpec) -> float | None:
    """The largest error of a module's parity cases; None if parity was skipped."""
    return max(case.relative_error for case in module.parity.cases) if module.parity else None


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
                "relative_error": _relative_error(module),
            }
            for name, module in manifest.modules.items()
        },
    }


# Options of the command.
RecipePath = Annotated[
    Path | None,
    typer.Argument(help="Recipe: a TOML file such as engines/nano.toml. Without one, give --checkpoint and --out."),
]
CheckpointPath = Annotated[
    Path | None,
    typer.Option(
        help="Z-Image checkpoint: a diffusers folder, or a single .safetensors or .gguf file. By default the recipe's."
    ),
]
OutPath = Annotated[
    Path | None,
    typer.Option(help="Folder to write the bundle to; an older bundle there is replaced. By default the recipe's."),
]
PrecisionName = Annotated[
    str | None,
    typer.Option(
        help="Number format of matrices and their products: fp32, fp16, bf16, int8 or fp8. "
        "By default the recipe's, or fp32 without a recipe."
    ),
]
VaeNames = Annotated[
    list[str] | None,
    typer.Option(
        help="VAE to include: tiny (TAEF1, fast) or full; may be repeated. "
        "By default the recipe's, or each VAE that the checkpoint has and the backend runs."
    ),
]
ControlNetPath = Annotated[
    Path | None,
    typer.Option(
        help="ControlNet to include: diffusers' folder, or a Fun-Union .safetensors file. By default the recipe's."
    ),
]
BackendName = Annotated[
    str | None,
    typer.Option(
        help="Backend that will serve the bundle: onnxruntime (graphs and weights), cuda (weights alone), tensorrt "
        "or tensorrt_rtx (graphs, weights, plans). By default the recipe's, or onnxruntime."
    ),
]
Sm = Annotated[
    str | None,
    typer.Option(
        metavar="86,89,120",
        help="TensorRT-RTX: compute capabilities to build plans for, without the dot. "
        "By default the recipe's, or 86,89,120.",
    ),
]
Split = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE=N",
        help="TensorRT: build the transformer or the text_encoder as N plans, which needs less memory, e.g. "
        "transformer=4; may be repeated. By default the recipe's, or one plan per module.",
    ),
]
Workspace = Annotated[
    float | None,
    typer.Option(help="TensorRT: the most scratch memory of one layer, in GiB. By default the recipe's, or no limit."),
]
OptimizationLevel = Annotated[
    int | None,
    typer.Option(
        help="TensorRT: optimization level, from 0 (fastest build) to 5 (fastest plan). "
        "By default the recipe's, or TensorRT's own."
    ),
]
SkipParity = Annotated[
    bool,
    typer.Option(
        "--skip-parity",
        help="Do not compare each module with diffusers' or transformers' own. By default every module that has a "
        "graph is compared, and one outside of its tolerance fails the export.",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object on standard output, and no progress.")
]
Version = Annotated[bool, version_option("zimage-export")]


# Options in place of a recipe's keys, and those of its table `tensorrt`.
RECIPE = {
    "precision": Shared(PrecisionName, None),
    "vae": Shared(VaeNames, None),
    "controlnet": Shared(ControlNetPath, None),
    "backend": Shared(BackendName, None),
}
TENSORRT = {
    "sm": Shared(Sm, None),
    "split": Shared(Split, None),
    "workspace": Shared(Workspace, None),
    "optimization_level": Shared(OptimizationLevel, None),
}


@app.command()
@with_options(RECIPE, TENSORRT)
def export_command(
    ctx: typer.Context,
    recipe: RecipePath = None,
    checkpoint: CheckpointPath = None,
    out: OutPath = None,
    skip_parity: SkipParity = False,
    as_json: AsJson = False,
    version: Version = False,
) -> None:
    """Export a Z-Image checkpoint to a bundle that zimage serves."""
    given = ctx.params
    changes = {
        "checkpoint": checkpoint,
        "out": out,
        "precision": given["precision"],
        "vae": tuple(given["vae"] or ()) or None,
        "controlnet": given["controlnet"],
        "backend": given["backend"],
        "parity": False if skip_parity else None,
    }
    tensorrt = {
        "sm": None if given["sm"] is None else parse_sm(given["sm"]),
        "split": parse_split(given["split"]) if given["split"] else None,
        "workspace_gb": given["workspace"],
        "optimization_level": given["optimization_level"],
    }
    chosen = build_recipe(recipe, changes, tensorrt)
    console = Console(stderr=True, markup=False)
    manifest = run_export(chosen, console, quiet=as_json)
    if as_json:
        print(json.dumps(_summary(manifest, chosen.out)))
    else:
        _print_report(manifest, chosen.out, console)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 the export failed, 2 wrong usage or recipe, 130 interrupted."""
    show_every_character()
    try:
        code = app(standalone_mode=False) or 0  # click returns its own exits, as for Ctrl-C
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
        raise  # a missing extra: the entry point names it
    except Exception as error:
        show = getattr(error, "show", None)  # click's usage errors print themselves
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
