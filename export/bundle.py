"""Makes a bundle: plans the modules, writes weights and graphs, measures parity, puts the folder in place at once."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import onnx_ir as ir

from zimage_rt.bundle.manifest import (
    EngineSpec,
    FileEntry,
    Manifest,
    ModuleSpec,
    Parity,
    PipelineSpec,
    ShapeRanges,
    write_manifest,
)
from zimage_rt.bundle.verify import hash_file

from . import graph_cache, weights
from .builders import builder_for
from .checkpoint import Checkpoint, open_checkpoint
from .errors import RecipeError
from .modeling.transformer import SEQUENCE_MULTIPLE, TransformerConfig
from .modules import ModulePlan, plan_modules
from .parity import ReferenceCache, measure
from .recipe import ExportRecipe
from .replace_folder import replacing
from .tokenizer import chat_template, tokenizer_file
from .trace import trace

# Above this many weights a component's reference in fp32 and a module of it do not fit in a 24 GB machine together.
WHOLE_PARITY_ELEMENTS = 1_000_000_000

# (what is being done, module, bytes done so far, bytes in all)
Progress = Callable[[str, str, int, int], None]

# A builder's last touch to a traced graph.
Simplify = Callable[[ir.Model, ModulePlan], None]


def export(
    recipe: ExportRecipe,
    progress: Progress = lambda *_: None,
    checkpoint: Checkpoint | None = None,
) -> Manifest:
    """Export a bundle to `recipe.out`.

    Killed at any point, it leaves what was there before: everything is written to a folder beside it, which takes
    the bundle's name in the end.

    Args:
        recipe: what to export.
        progress: called with every step.
        checkpoint: an open one instead of what the recipe names; its tensors may come from anywhere.

    Raises:
        ExportError: with what was wrong; the folder that was there is untouched.
    """
    builder = builder_for(recipe.backend)
    builder.check(recipe)
    if checkpoint is None:
        checkpoint = open_checkpoint(recipe.checkpoint, recipe.parts, recipe.config)
    vaes = recipe.vae
    if vaes is None:
        found = {"tiny": checkpoint.tiny_vae, "full": checkpoint.vae}
        vaes = tuple(kind for kind, component in found.items() if component is not None and kind in builder.vaes)
    plans = plan_modules(checkpoint, builder.precisions[recipe.precision], vaes)
    tokenizer = tokenizer_file(checkpoint.tokenizer)
    pipeline = _pipeline(checkpoint, recipe)
    _check_shapes(recipe.shapes, TransformerConfig.from_dict(checkpoint.transformer.config), pipeline.size_multiple)
    with replacing(recipe.out) as folder:
        job = _Job(recipe, checkpoint, vaes, builder, folder, pipeline, ReferenceCache(), progress)
        modules = {plan.name: _module(plan, job) for plan in plans}
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        names = sorted(path.name for path in folder.iterdir())
        files: dict[str, FileEntry] = {}
        for i, name in enumerate(names):
            progress("hash", name, i, len(names))
            files[name] = hash_file(folder / name)
        manifest = Manifest(
            name=recipe.name,
            precision=recipe.precision,
            producer={
                package: importlib.metadata.version(package)
                for package in ("zimage-rt", "torch", "onnx", "onnxscript", "onnxruntime")
            },
            source=_source(checkpoint),
            pipeline=pipeline,
            shapes=recipe.shapes,
            tokenizer="tokenizer.json",
            modules=modules,
            files=files,
        )
        write_manifest(manifest, folder)
    return manifest


def _check_shapes(shapes: ShapeRanges, config: TransformerConfig, patch: int) -> None:
    """Raise RecipeError for sizes that the transformer's rotary tables do not reach.

    A prompt's padded tokens have the positions 1, 2, …, and the image the one after them; rows and columns of patches
    count from 0; `patch` is one's side in pixels.
    """
    rows = config.axes_lens[0]
    most = (rows - 2) // SEQUENCE_MULTIPLE * SEQUENCE_MULTIPLE
    if shapes.prompt_tokens.max > most:
        raise RecipeError(
            f"shapes.prompt_tokens.max: expected at most {most}, which the transformer's rotary table of {rows} rows "
            f"serves, got {shapes.prompt_tokens.max}; lower it, or correct axes_lens under [config.transformer]"
        )
    for name, length in (("height", config.axes_lens[1]), ("width", config.axes_lens[2])):
        size = getattr(shapes, name)
        if size.max > length * patch:
            raise RecipeError(
                f"shapes.{name}.max: expected at most {length * patch}, which the transformer's rotary table of "
                f"{length} rows serves, got {size.max}"
            )


def _pipeline(checkpoint: Checkpoint, recipe: ExportRecipe) -> PipelineSpec:
    config = TransformerConfig.from_dict(checkpoint.transformer.config)
    vae = checkpoint.vae or checkpoint.tiny_vae
    factor = 8 if vae is None else 2 ** (len(vae.config["block_out_channels"]) - 1)
    prefix, suffix = chat_template(checkpoint.tokenizer)
    return PipelineSpec(
        latent_channels=config.in_channels,
        vae_scale_factor=factor,
        sequence_multiple=SEQUENCE_MULTIPLE,
        size_multiple=factor * config.patch_size,
        shift=float(checkpoint.scheduler.get("shift", 3.0)),
        prompt_prefix=prefix,
        prompt_suffix=suffix,
        num_inference_steps=recipe.num_inference_steps,
        guidance_scale=recipe.guidance_scale,
    )


def _source(checkpoint: Checkpoint) -> dict[str, object]:
    """What the weights were made of; paths inside the checkpoint only, so that no machine's folders are told."""
    components = (
        checkpoint.transformer,
        checkpoint.text_encoder,
        checkpoint.vae,
        checkpoint.tiny_vae,
        checkpoint.controlnet,
    )
    files = sorted({file for component in components if component for file in component.files})
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent

    def name(file: Path) -> str:
        return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name

    return {
        "format": checkpoint.format,
        "files": {name(file): dataclasses.asdict(hash_file(file)) for file in files},
    }


@dataclasses.dataclass(frozen=True)
class _Job:
    """What all modules of an export have in common."""

    recipe: ExportRecipe
    checkpoint: Checkpoint
    vaes: tuple[str, ...]
    builder: ModuleType
    folder: Path
    pipeline: PipelineSpec
    references: ReferenceCache
    progress: Progress


def _module(plan: ModulePlan, job: _Job) -> ModuleSpec:
    folder, progress = job.folder, job.progress
    graph, weight_file = None, f"{plan.name}.safetensors"
    module, shared = plan.meta_module(), plan.shared()
    total = sum(tensor.nbytes for name, tensor in module.state_dict().items() if name not in shared)
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        progress("write", plan.name, done, total)

    weights.write(module, plan.component, folder / weight_file, advance, shared)
    parity = None
    engines: tuple[EngineSpec, ...] = ()
    if job.builder.simplify is not None:
        progress("trace", plan.name, total, total)
        graph = _write_graph(plan, folder, job.builder.simplify)
        if job.recipe.parity:
            progress("parity", plan.name, total, total)
            parity = _parity(plan, graph, job)
        if job.builder.build is not None:
            if plan.elements > WHOLE_PARITY_ELEMENTS:
                job.references.clear()  # a builder wants the memory
            engines = job.builder.build(plan, graph, folder, job.recipe, job.pipeline, progress)
    return ModuleSpec(
        inputs=plan.inputs,
        outputs=plan.outputs,
        precision=plan.precision.name,
        graph=None if graph is None else graph.name,
        weights=weight_file,
        config=dict(plan.config),
        linears=weights.linear_places(module, shared),
        parity=parity,
        engines=engines,
        base=None if plan.base is None else plan.base.name,
    )


def _write_graph(plan: ModulePlan, folder: Path, simplify: Simplify, suffix: str = ".onnx") -> Path:
    """Trace a module whose weights are written already, its base's too, and write its graph beside them."""
    model = graph_cache.cached(
        plan.graph_key(), lambda: trace(plan.meta_module(), plan.inputs, plan.outputs, plan.multiples)
    )
    for part in (plan,) if plan.base is None else (plan, plan.base):
        _, stored = weights.layout(part.meta_module(), part.shared())
        weights.attach(model, f"{part.name}.safetensors", folder, stored)
    simplify(model, plan)
    path = folder / f"{plan.name}{suffix}"
    try:
        ir.save(model, path)
    except OSError as error:
        raise weights.disk_error(error, path) from error
    return path


def _parity(plan: ModulePlan, graph: Path, job: _Job) -> Parity:
    """Measure a module, or its twin on the same weights where ONNX Runtime cannot run the module's own graph."""
    twin = plan.precision.twin
    if twin is None:
        return _measure(plan, graph, job)
    plan = next(other for other in plan_modules(job.checkpoint, twin, job.vaes) if other.name == plan.name)
    graph = _write_graph(plan, job.folder, job.builder.simplify, ".twin.onnx")
    try:
        parity = _measure(plan, graph, job)
    finally:
        graph.unlink()
    return dataclasses.replace(parity, runtime=f"{parity.runtime}, computed in {twin.compute}".replace("torch.", ""))


def _measure(plan: ModulePlan, graph: Path, job: _Job) -> Parity:
    """Measure a module; where its component is too large for memory, only the component's first layers are used.

    A module that lost layers by that is exported again, the same way; one that has none of them (the context refiner)
    is measured as it is, against what is left of the reference.
    """
    if plan.elements <= WHOLE_PARITY_ELEMENTS:
        return measure(plan, graph, *job.references.get(plan))
    references = job.references
    shorter = references.shorter(job.checkpoint)
    plans = plan_modules(shorter, plan.precision, ())
    short = next(other for other in plans if other.name == plan.name)
    if short.meta_module().state_dict().keys() == plan.meta_module().state_dict().keys():
        return measure(plan, graph, *references.get(short))
    with tempfile.TemporaryDirectory(prefix="parity-", dir=graph.parent) as temporary:
        folder = Path(temporary)
        for part in (short,) if short.base is None else (short, short.base):
            path = folder / f"{part.name}.safetensors"
            weights.write(part.meta_module(), part.component, path, shared=part.shared())
        path = _write_graph(short, folder, job.builder.simplify)
        reference, name = references.get(short)
        return measure(short, path, reference, f"{name}, first layers only")
