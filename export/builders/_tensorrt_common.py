"""Builds TensorRT plans from a bundle's graphs with either package, `tensorrt` or `tensorrt_rtx`.

Their Python APIs differ in a few calls, which `Package` holds. Networks are strongly typed: every dtype is the graph's
own, so a plan computes what parity measured in ONNX Runtime.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import onnx

from zimage_rt.bundle.manifest import EngineSpec, PipelineSpec, ProfileRange, ShapeRanges

from ..errors import BuildError, RecipeError
from ..graph.attention import count_pieces, cut_queries, find_attentions
from ..graph.optimize import simplify
from ..graph.split import split
from ..plan import ModulePlan
from ..precision import BF16_NATIVE, FP16_WIDE
from ..recipe import ExportRecipe
from ._tensorrt_package import STEPS, Package
from ._tensorrt_plan_builder import SMALLER_SHAPES, InferredTensor, PlanBuilder, size_of, tensor_spec

__all__ = ["PRECISIONS", "TABLES", "VAES", "Package", "build", "check", "simplify"]

VAES = ("tiny", "full")
TABLES = ("tensorrt",)
PRECISIONS = {precision.name: precision for precision in (FP16_WIDE, BF16_NATIVE)}

# (step, module, units done, units in all)
Progress = Callable[[str, str, int, int], None]

# TensorRT fuses attention in fp16 and bf16 up to this head size, and never in fp32.
FUSED_HEAD_SIZE = 256
# TensorRT-RTX 1.7.1 builds plans with larger tensors without an error, but leaves these out of the activation memory
# that it reports.
MOST_ELEMENTS = 2**31 - 1

# Sizes by symbol at a profile's min, opt and max.
Limits = tuple[Mapping[str, int], ...]


def check(package: Package, recipe: ExportRecipe) -> ModuleType:
    """Checks a recipe before any work is done; returns the package's module.

    Raises:
        RecipeError: no plan can be built for it.
        BuilderUnavailable: the package is not installed.
    """
    if recipe.precision not in PRECISIONS:
        raise RecipeError(
            f"precision: the {package.name} backend runs {' and '.join(PRECISIONS)}, got {recipe.precision!r}; "
            "it fuses no attention in fp32"
        )
    for module in recipe.tensorrt.split:
        if module not in ("transformer", "text_encoder"):
            raise RecipeError(f"tensorrt.split: expected transformer or text_encoder, got {module!r}")
    if "controlnet" in recipe.parts:
        raise RecipeError(
            f"controlnet: the {package.name} backend builds no plan of it; leave it out, or export for onnxruntime"
        )
    return package.load()


def build(
    package: Package,
    plan: ModulePlan,
    graph_path: Path,
    folder: Path,
    recipe: ExportRecipe,
    pipeline: PipelineSpec,
    progress: Progress,
) -> tuple[EngineSpec, ...]:
    """Build a module's plans into `folder`.

    Args:
        package: which TensorRT.
        plan: the module.
        graph_path: its graph; the weight file in the same folder is mapped, never read as a whole.
        folder: gets the plans.
        recipe: gives the shapes and the `[tensorrt]` options.
        pipeline: relates the free sizes to each other.
        progress: called during the build.

    Raises:
        ExportError: the build failed; the message quotes TensorRT.
        KeyboardInterrupt: Ctrl-C was pressed; raised after TensorRT has stopped.
    """
    trt = package.load()
    model = onnx.load(graph_path, load_external_data=False)
    models, tokens = [model], f"{plan.name}_tokens"
    count = recipe.tensorrt.split.get(plan.name, 1)
    if count > 1:
        if plan.blocks is None or count > plan.blocks.count:
            most = 1 if plan.blocks is None else plan.blocks.count
            raise RecipeError(f"tensorrt.split: {plan.name} can be split into {most} plans at most, got {count}")
        firsts = [round(i * plan.blocks.count / count) for i in range(1, count)]
        models = split(model, firsts, tokens, plan.blocks.width)
    ranges = [_sizes(plan, profile, pipeline, tokens) for profile in recipe.tensorrt.profiles or (recipe.shapes,)]
    names = [plan.name if count == 1 else f"{plan.name}.{part}" for part in range(count)]
    steps = ["build" if count == 1 else f"build {part + 1}/{count}" for part in range(count)]
    builders = [
        PlanBuilder(package, trt, name, functools.partial(_advance, progress, step, plan.name), recipe, plan.blocks)
        for name, step in zip(names, steps, strict=True)
    ]
    for part, builder in enumerate(builders):
        models[part] = _cut(models[part], [builder.infer(models[part], graph_path, limits[-1]) for limits in ranges])
        # All parts run the same batch, so each may lower the limit for all.
        ranges = [
            _narrowed(builder.name, limits, _written(models[part], builder.infer(models[part], graph_path, limits[-1])))
            for limits in ranges
        ]
    engines = []
    for part, (piece, builder) in enumerate(zip(models, builders, strict=True)):
        inputs = tuple(tensor_spec(value) for value in piece.graph.input)
        spec = EngineSpec(
            file=f"{builder.name}.engine",
            backend=package.name,
            version=trt.__version__,
            compute_capabilities=(),
            part=part,
            inputs=inputs,
            outputs=tuple(tensor_spec(value) for value in piece.graph.output),
            profiles=tuple(
                {
                    spec.name: ProfileRange(*(tuple(size_of(sizes, dim) for dim in spec.dims) for sizes in limits))
                    for spec in inputs
                }
                for limits in ranges
            ),
            stripped=package.stripped,
        )
        engines.append(builder.build(piece, graph_path, folder, spec))
    return tuple(engines)


def _is_fused(queries: InferredTensor) -> bool:
    return not queries.wide and queries.shape[-1] <= FUSED_HEAD_SIZE


def _cut(model: onnx.ModelProto, inferred: list[dict[str, InferredTensor]]) -> onnx.ModelProto:
    """Cuts the attentions that no kernel fuses into pieces, by the largest of their inferred shapes."""
    counts: dict[str, int] = {}
    for attention in find_attentions(model.graph):
        queries = [sizes[attention.queries] for sizes in inferred]
        scores = [sizes[attention.scores.output[0]] for sizes in inferred]
        if not _is_fused(queries[0]) and len(queries[0].shape) == 3:
            counts[attention.queries] = max(count_pieces(*tensor.shape) for tensor in scores)
    return cut_queries(model, counts)


def _written(model: onnx.ModelProto, inferred: Mapping[str, InferredTensor]) -> dict[str, InferredTensor]:
    """Tensors that an execution writes to memory: all except the scores `[…, query, key]` of fused attentions."""
    fused = {
        inferred[attention.scores.output[0]].shape[-2:]
        for attention in find_attentions(model.graph)
        if _is_fused(inferred[attention.queries])
    }
    return {name: tensor for name, tensor in inferred.items() if tensor.shape[-2:] not in fused}


def _narrowed(name: str, limits: Limits, inferred: Mapping[str, InferredTensor]) -> Limits:
    """Lowers a profile's batch until every tensor is within `MOST_ELEMENTS`; the engine splits larger batches.

    Raises BuildError: if a single sample is too large.
    """
    tensor, largest = max(inferred.items(), key=lambda item: item[1].elements)
    if largest.elements <= MOST_ELEMENTS:
        return limits
    least, opt, most = limits
    batch = MOST_ELEMENTS * most["batch"] // largest.elements
    if batch < least["batch"]:
        sizes = ", ".join(f"{symbol} {size}" for symbol, size in most.items())
        raise BuildError(
            f"{name}: at {sizes} one sample's {tensor} has {largest.elements // most['batch']:,} elements, "
            f"and TensorRT takes {MOST_ELEMENTS:,}; {SMALLER_SHAPES}"
        )
    return least, {**opt, "batch": min(opt["batch"], batch)}, {**most, "batch": batch}


def _advance(progress: Progress, step: str, module: str, done: int) -> None:
    progress(step, module, done, STEPS)


def _sizes(plan: ModulePlan, ranges: ShapeRanges, pipeline: PipelineSpec, tokens: str) -> Limits:
    """Free sizes of a module's inputs, and its number of tokens, at min, opt and max of a profile."""
    symbols = {dim for spec in plan.inputs for dim in spec.dims if isinstance(dim, str)}
    found = {symbol: ranges.of(symbol, pipeline) for symbol in sorted(symbols)}
    limits = []
    for limit in ("min", "opt", "max"):
        sizes = {symbol: getattr(found[symbol], limit) for symbol in found}
        if plan.blocks is not None:
            sizes[tokens] = plan.blocks.tokens(sizes)
        limits.append(sizes)
    return tuple(limits)
