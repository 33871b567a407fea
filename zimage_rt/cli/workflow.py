"""`zimage workflow`: runs a workflow of ComfyUI."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from ..comfyui.execute import execute
from ..comfyui.files import FolderFiles
from ..comfyui.graph import Graph, WorkflowError
from ..comfyui.models_folder import ModelsFolder, WorkflowFiles
from ..comfyui.plan import explain as explained
from ..comfyui.plan import plan
from ..comfyui.registry import NODES
from ..comfyui.run import Events, Files, Run, only_one
from ..comfyui.save import save_images
from ..comfyui.workflow_file import read_workflow
from ..engine import Engine
from ..errors import RequestError
from ..request.types import StepInfo
from . import interrupt
from .common import backend_options, json_line, load_engine, printable, stderr, warn
from .options import BACKEND, AsJson, with_options


@with_options(BACKEND)
def workflow(
    ctx: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            help="A workflow of ComfyUI: JSON in API format or as its editor saves it, or a PNG that carries one."
        ),
    ],
    bundle: Annotated[
        list[str] | None,
        typer.Option(
            "-b",
            "--bundle",
            metavar="BUNDLE|FILE=BUNDLE",
            help="The bundle that the workflow's model files stand for, or that one file stands for; may be repeated.",
        ),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(
            help="ComfyUI's models folder, in place of -b: what the workflow names there is exported once, and kept."
        ),
    ] = None,
    bundles: Annotated[
        Path | None, typer.Option(help="Where exported bundles are kept. By default the folder zimage_rt in --models.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder of the images.")] = Path("out"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NODE.INPUT=VALUE", help="Another value for an input; may be repeated."),
    ] = None,
    loras: Annotated[Path | None, typer.Option(help="The folder of the LoRAs that it names. By default none.")] = None,
    input_: Annotated[
        Path | None, typer.Option("--input", help="The folder of its input images. By default the workflow's own.")
    ] = None,
    upscalers: Annotated[
        Path | None, typer.Option(help="The folder of the upscale models that it names. By default none.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print what it would do, and do nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a workflow of ComfyUI on bundles, and save its images with the workflow inside."""
    graph = with_values(read_workflow(file), set_ or [])
    if (bundle is None) == (models is None) or (bundles is not None and models is None):
        raise RequestError("expected either -b BUNDLE or --models FOLDER; --bundles FOLDER goes with the latter")
    named, default = _bundles(bundle or [])
    images = (input_ or file.parent,)
    files: Files
    if models is None:
        files, exported = FolderFiles(named, default, loras, images, upscalers), None
    else:
        folder = ModelsFolder(models, bundles, ctx.params["backend"])
        others = FolderFiles({}, None, loras or models / "loras", images, upscalers or models / "upscale_models")
        files = exported = folder.files(graph, others)
    engines: dict[str, Engine] = {}

    def engine(name: str) -> Engine:
        if name not in engines:
            if exported is not None:
                _export(exported, name)
            options = backend_options(ctx.params["backend_option"] or [])
            engines[name] = load_engine(Path(name), ctx.params["backend"], options)
        return engines[name]

    checked = plan(graph, files)
    for text in checked.warnings:
        warn(text)
    if explain:
        for line in explained(checked):
            print(printable(line))
        return
    start = time.perf_counter()
    run = Run(engine, files, _Interruptible(), only_one if exported is None else exported.together)
    execute(checked, run)
    for made, path in zip(run.made, save_images(run.made, checked.graph, output), strict=True):
        seconds = round(time.perf_counter() - start, 3)
        print(
            json_line({"file": str(path), "node": made.node, "seconds": seconds}) if as_json else printable(str(path))
        )


def _export(files: WorkflowFiles, bundle: str) -> None:
    """Export a bundle if need be; on a terminal the exporter's steps are shown."""
    with Progress(
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    ) as progress:
        task = progress.add_task(f"checking {Path(bundle).name}", total=None)
        files.ready(
            bundle,
            lambda text: stderr.print(printable(text), markup=False, highlight=False, soft_wrap=True),
            lambda text: progress.update(task, description=printable(text)),
        )


class _Interruptible(Events):
    """Ends the run after a step if the user asked for it."""

    def step(self, node: str, info: StepInfo) -> bool:
        """See `Events`."""
        interrupt.check()
        return True

    def progress(self, node: str, done: int, count: int) -> bool:
        """See `Events`."""
        interrupt.check()
        return True


def with_values(graph: Graph, texts: list[str]) -> Graph:
    """A graph with values of `NODE.INPUT=VALUE`; values are JSON, or text if they are no JSON. Raises WorkflowError."""
    found = dict(graph)
    for text in texts:
        place, equals, value = text.partition("=")
        name, dot, key = place.rpartition(".")
        if not equals or not dot:
            raise RequestError(f"--set: expected NODE.INPUT=VALUE, got {text!r}")
        if name not in found:
            raise WorkflowError(f"--set: there is no node #{name}; there are: {', '.join(list(found)[:60])}")
        node = found[name]
        if key not in node.inputs:
            known = ", ".join(node.inputs) or "none"
            raise WorkflowError(f"--set: {node.label} has no input {key!r}; it has: {known}")
        known_kind = NODES.get(node.kind)
        is_text = (
            known_kind is not None
            and key in known_kind.inputs
            and known_kind.inputs[key].spec.type in ("STRING", "COMBO")
        )
        found[name] = dataclasses.replace(node, inputs={**node.inputs, key: value if is_text else _value(value)})
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _bundles(texts: list[str]) -> tuple[dict[str, str], str | None]:
    """The folders of bundles by the files that stand for them, and that of all other files."""
    named: dict[str, str] = {}
    default = None
    for text in texts:
        name, equals, folder = text.partition("=")
        if equals:
            named[name] = folder
        elif default is None:
            default = name
        else:
            raise RequestError(f"-b: expected one bundle for all files, got {default} and {name}; say FILE=BUNDLE")
    return named, default
