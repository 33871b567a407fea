"""Exports a bundle: plans modules, writes weights and graphs, measures parity, replaces the folder atomically."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from zimage_rt.bundle.manifest import (
    MANIFEST_NAME,
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

from . import weights
from .builders import Builder, builder_for
from .calibration import draw_latents
from .checkpoint import Checkpoint, open_checkpoint
from .errors import RecipeError, disk_error
from .graph import cache
from .graph.trace import trace
from .modeling.transformer import SEQUENCE_MULTIPLE, TransformerConfig
from .parity.measure import measure
from .parity.reference import ReferenceCache
from .plan import ModulePlan, plan_modules
from .recipe import ExportRecipe
from .replace_folder import replacing
from .tokenizer import chat_template, tokenizer_file

# With more weights than this, a module and its fp32 reference do not fit into 24 GB together.
WHOLE_PARITY_ELEMENTS = 1_000_000_000
TOKENIZER = "tokenizer.json"

# (step, module, bytes done, bytes in all)
Progress = Callable[[str, str, int, int], None]

# Rewrites a traced graph in place, given the module's name.
Simplify = Callable[[ir.Model, str], None]


def export(
    recipe: ExportRecipe,
    progress: Progress = lambda *_: None,
    checkpoint: Checkpoint | None = None,
) -> Manifest:
    """Exports a bundle to `recipe.out`.

    An export that is killed leaves an older bundle untouched: it writes to a temporary folder in the same parent, which
    takes the bundle's name at the end.

    Args:
        recipe: what to export.
        progress: called at every step.
        checkpoint: replaces the checkpoint that the recipe names, e.g. by one that was made in memory.

    Raises:
        ExportError: the export failed; an older bundle is untouched.
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
    pipeline = pipeline_spec(checkpoint, recipe)
    _check_shapes(recipe.shapes, TransformerConfig.from_dict(checkpoint.transformer.config), pipeline.size_multiple)
    with replacing(recipe.out) as folder:
        source = _source(checkpoint)
        job = _Job(recipe, checkpoint, source, vaes, builder, folder, pipeline, ReferenceCache(), progress)
        shutil.copyfile(tokenizer, folder / TOKENIZER)
        for plan in plans:
            job.modules[plan.name] = _module(plan, job)
        manifest = _manifest(job)
        write_manifest(manifest, folder)
    return manifest


def _manifest(job: _Job) -> Manifest:
    """The manifest of the modules so far; hashes each file once."""
    names = sorted(path.name for path in job.folder.iterdir() if path.is_file())
    for i, name in enumerate(names):
        if name not in job.files:
            job.progress("hash", name, i, len(names))
            job.files[name] = hash_file(job.folder / name)
    return Manifest(
        name=job.recipe.name,
        precision=job.recipe.precision,
        producer={
            package: importlib.metadata.version(package)
            for package in ("zimage-rt", "torch", "onnx", "onnxscript", "onnxruntime")
        },
        source=job.source,
        pipeline=job.pipeline,
        shapes=job.recipe.shapes,
        tokenizer=TOKENIZER,
        modules=dict(job.modules),
        files=dict(job.files),
    )


def _check_shapes(shapes: ShapeRanges, config: TransformerConfig, patch: int) -> None:
    """Raises RecipeError: a size is beyond the transformer's rotary tables.

    A prompt's padded tokens have the positions 1, 2, …, and the image has the next one. Rows and columns of patches
    count from 0; `patch` is a patch's side in pixels.
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


def pipeline_spec(checkpoint: Checkpoint, recipe: ExportRecipe) -> PipelineSpec:
    """Numbers of the sampler loop and the prompt's template, for the manifest."""
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
    """The checkpoint's format and files for the manifest; relative paths reveal no folder outside of it."""
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
    """Inputs and outputs that all modules of an export share."""

    recipe: ExportRecipe
    checkpoint: Checkpoint
    source: Mapping[str, object]  # of the manifest
    vaes: tuple[str, ...]
    builder: Builder
    folder: Path
    pipeline: PipelineSpec
    references: ReferenceCache
    progress: Progress
    modules: dict[str, ModuleSpec] = dataclasses.field(default_factory=dict)  # so far, like their files
    files: dict[str, FileEntry] = dataclasses.field(default_factory=dict)


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
    simplify = job.builder.simplify
    if simplify is not None:
        progress("trace", plan.name, total, total)
        graph = _write_graph(plan, folder, simplify)
        if plan.calibrated and job.builder.quantize is not None and job.recipe.calibration:
            progress("calibrate", plan.name, total, total)
            job.builder.quantize(graph, folder / weight_file, _calibration_latents(job, plan))
        if job.recipe.parity:
            progress("parity", plan.name, total, total)
            parity = _parity(plan, graph, job, simplify)
        if job.builder.build is not None:
            if plan.elements > WHOLE_PARITY_ELEMENTS:
                job.references.clear()  # the builder needs the memory
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


def _calibration_latents(job: _Job, plan: ModulePlan) -> np.ndarray:
    """Latents of the recipe's prompts, drawn by the modules before `plan`."""
    manifest = _manifest(job)
    for name in (f"{plan.name}.onnx", f"{plan.name}.safetensors"):
        job.files.pop(name)  # about to change
    path = job.folder / MANIFEST_NAME
    write_manifest(manifest, job.folder)
    try:
        return draw_latents(job.folder, manifest, job.recipe.calibration)
    finally:
        path.unlink()


def _write_graph(plan: ModulePlan, folder: Path, simplify: Simplify, suffix: str = ".onnx") -> Path:
    """Traces a module, attaches its and its base's weight files, and writes the graph next to them."""
    model = cache.cached(plan.graph_key(), lambda: trace(plan.meta_module(), plan.inputs, plan.outputs, plan.multiples))
    for part in (plan,) if plan.base is None else (plan, plan.base):
        _, stored = weights.layout(part.meta_module(), part.shared())
        weights.attach(model, f"{part.name}.safetensors", folder, stored)
    simplify(model, plan.name)
    path = folder / f"{plan.name}{suffix}"
    try:
        ir.save(model, path)
    except OSError as error:
        raise disk_error(error, path) from error
    return path


def _parity(plan: ModulePlan, graph: Path, job: _Job, simplify: Simplify) -> Parity:
    """Measures a module, or its precision's `twin` on the same weights if ONNX Runtime cannot run its own graph."""
    twin = plan.precision.twin
    if twin is None:
        return _measure(plan, graph, job, simplify)
    plan = next(other for other in plan_modules(job.checkpoint, twin, job.vaes) if other.name == plan.name)
    graph = _write_graph(plan, job.folder, simplify, ".twin.onnx")
    try:
        parity = _measure(plan, graph, job, simplify)
    finally:
        graph.unlink()
    return dataclasses.replace(parity, runtime=f"{parity.runtime}, computed in {twin.compute}".replace("torch.", ""))


def _measure(plan: ModulePlan, graph: Path, job: _Job, simplify: Simplify) -> Parity:
    """Measures a module; of a component that is too large for memory, only the first layers.

    A module with fewer layers is exported again for that. A module without these layers (the context refiner) is
    measured as it is, against the shortened reference.
    """
    if plan.elements <= WHOLE_PARITY_ELEMENTS:
        return measure(plan, graph, *job.references.get(plan))
    references = job.references
    shortened = references.shortened(job.checkpoint)
    plans = plan_modules(shortened, plan.precision, ())
    short = next(other for other in plans if other.name == plan.name)
    if short.meta_module().state_dict().keys() == plan.meta_module().state_dict().keys():
        return measure(plan, graph, *references.get(short))
    with tempfile.TemporaryDirectory(prefix="parity-", dir=graph.parent) as temporary:
        folder = Path(temporary)
        for part in (short,) if short.base is None else (short, short.base):
            path = folder / f"{part.name}.safetensors"
            weights.write(part.meta_module(), part.component, path, shared=part.shared())
        path = _write_graph(short, folder, simplify)
        reference, name = references.get(short)
        return measure(short, path, reference, f"{name}, first layers only")
