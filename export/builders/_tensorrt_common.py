"""Builds TensorRT plans from a bundle's graphs: what the packages `tensorrt` and `tensorrt_rtx` have in common.

Their Python APIs are the same but for a few calls, which `Package` holds. Networks are strongly typed: every number
format is the graph's own, so a plan computes what ONNX Runtime was seen to compute from the same graph.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from zimage_rt.bundle.manifest import EngineSpec, PipelineSpec, ProfileRange, ShapeRanges, TensorSpec

from ..errors import BuildError, BuilderUnavailable, BuildMemoryError, ExportError, RecipeError, disk_error
from ..graph.attention import count_pieces, cut_queries, find_attentions
from ..graph.optimize import simplify
from ..graph.split import split
from ..plan import Blocks, ModulePlan
from ..precision import BF16_NATIVE, FP16_WIDE
from ..recipe import ExportRecipe
from ..tensorrt_options import TensorRTOptions

__all__ = ["PRECISIONS", "TABLES", "VAES", "Package", "build", "check", "simplify"]

VAES = ("tiny", "full")
TABLES = ("tensorrt",)
PRECISIONS = {precision.name: precision for precision in (FP16_WIDE, BF16_NATIVE)}

# (what is being done, module, steps done so far, steps in all)
Progress = Callable[[str, str, int, int], None]

# Of a progress bar.
STEPS = 1000

# The largest head that TensorRT fuses an attention for, in fp16 and bf16; in fp32 it fuses none.
FUSED_HEAD_SIZE = 256
# TensorRT-RTX 1.7.1 builds a plan whose tensors may have more elements than this without a word, and leaves them out of
# the memory that it says an execution takes.
MOST_ELEMENTS = 2**31 - 1

SMALLER_SHAPES = "allow smaller ones: `max` under [shapes] or [[tensorrt.profiles]] of the recipe"

Shape = tuple[int, ...]
# Sizes by symbol: least, tuned for, most.
Limits = tuple[Mapping[str, int], ...]

_DTYPES: Mapping[int, str] = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}


@dataclasses.dataclass(frozen=True)
class Package:
    """One of the two packages.

    Attributes:
        name: to import, and what the manifest calls the backend.
        extra: of zimage-rt, installs it.
        stripped: whether plans leave the weights out, to be refitted at load.
        target: sets what to build for; returns the compute capabilities, as in `8.6`.
        timing_cache: whether it measures kernels while it builds, and can keep what it measured.
    """

    name: str
    extra: str
    stripped: bool
    target: Callable[[Any, Any, TensorRTOptions], tuple[str, ...]]
    timing_cache: bool = False

    def load(self) -> ModuleType:
        """Import it. Raises BuilderUnavailable, naming the extra."""
        try:
            return importlib.import_module(self.name)
        except ImportError as error:
            raise BuilderUnavailable(
                f"backend {self.name!r} needs the package {self.name}, which cannot be imported ({error}); "
                f"pip install 'zimage-rt[{self.extra}]'"
            ) from error


def check(package: Package, recipe: ExportRecipe) -> ModuleType:
    """Refuse what no plan can be built for, before any work is done; returns the package's module."""
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
        graph_path: its graph; the weight file that it names lies beside it and is mapped, never read as a whole.
        folder: where plans go.
        recipe: its shapes and `[tensorrt]` options.
        pipeline: how the free sizes depend on each other.
        progress: called as the builder goes on.

    Raises:
        ExportError: with TensorRT's own words.
        KeyboardInterrupt: after the builder has stopped.
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
        _Builder(package, trt, name, functools.partial(_advance, progress, step, plan.name), recipe, plan.blocks)
        for name, step in zip(names, steps, strict=True)
    ]
    for part, builder in enumerate(builders):
        models[part] = _cut(models[part], [builder.infer(models[part], graph_path, limits[-1]) for limits in ranges])
        # Parts run with the same batch: each narrows it for all.
        ranges = [
            _narrowed(builder.name, limits, _written(models[part], builder.infer(models[part], graph_path, limits[-1])))
            for limits in ranges
        ]
    engines = []
    for part, (piece, builder) in enumerate(zip(models, builders, strict=True)):
        inputs = tuple(_spec(value) for value in piece.graph.input)
        spec = EngineSpec(
            file=f"{builder.name}.engine",
            backend=package.name,
            version=trt.__version__,
            compute_capabilities=(),
            part=part,
            inputs=inputs,
            outputs=tuple(_spec(value) for value in piece.graph.output),
            profiles=tuple(
                {
                    spec.name: ProfileRange(*(tuple(_size(sizes, dim) for dim in spec.dims) for sizes in limits))
                    for spec in inputs
                }
                for limits in ranges
            ),
            stripped=package.stripped,
        )
        engines.append(builder.build(piece, graph_path, folder, spec))
    return tuple(engines)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """What TensorRT infers of one tensor."""

    shape: Shape
    wide: bool  # fp32

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def _is_fused(queries: _Tensor) -> bool:
    return not queries.wide and queries.shape[-1] <= FUSED_HEAD_SIZE


def _cut(model: onnx.ModelProto, inferred: list[dict[str, _Tensor]]) -> onnx.ModelProto:
    """Cut the attentions that no kernel fuses, by the largest of the shapes that they are inferred to have."""
    counts: dict[str, int] = {}
    for attention in find_attentions(model.graph):
        queries = [sizes[attention.queries] for sizes in inferred]
        scores = [sizes[attention.scores.output[0]] for sizes in inferred]
        if not _is_fused(queries[0]) and len(queries[0].shape) == 3:
            counts[attention.queries] = max(count_pieces(*tensor.shape) for tensor in scores)
    return cut_queries(model, counts)


def _written(model: onnx.ModelProto, inferred: Mapping[str, _Tensor]) -> dict[str, _Tensor]:
    """The tensors that an execution writes to memory: a fused attention's `[…, query, key]` are not among them."""
    fused = {
        inferred[attention.scores.output[0]].shape[-2:]
        for attention in find_attentions(model.graph)
        if _is_fused(inferred[attention.queries])
    }
    return {name: tensor for name, tensor in inferred.items() if tensor.shape[-2:] not in fused}


def _narrowed(name: str, limits: Limits, inferred: Mapping[str, _Tensor]) -> Limits:
    """A profile whose batch keeps every tensor within `MOST_ELEMENTS`; the engine runs a larger one in turns.

    Raises BuildError where one sample is too large.
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


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    dims = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
    return TensorSpec(value.name, _DTYPES[kind.elem_type], dims)


def _sizes(plan: ModulePlan, ranges: ShapeRanges, pipeline: PipelineSpec, tokens: str) -> Limits:
    """The free sizes of a module and of its borders: least, tuned for, most."""
    symbols = {dim for spec in plan.inputs for dim in spec.dims if isinstance(dim, str)}
    found = {symbol: ranges.of(symbol, pipeline) for symbol in sorted(symbols)}
    limits = []
    for limit in ("min", "opt", "max"):
        sizes = {symbol: getattr(found[symbol], limit) for symbol in found}
        if plan.blocks is not None:
            sizes[tokens] = plan.blocks.tokens(sizes)
        limits.append(sizes)
    return tuple(limits)


def _size(sizes: Mapping[str, int], dim: int | str) -> int:
    return sizes[dim] if isinstance(dim, str) else dim


class _Builder:
    """One plan in the making."""

    def __init__(
        self,
        package: Package,
        trt: ModuleType,
        name: str,
        advance: Callable[[int], None],
        recipe: ExportRecipe,
        blocks: Blocks | None,
    ) -> None:
        self.package, self.trt, self.name, self.blocks = package, trt, name, blocks
        self.options, self.cache = recipe.tensorrt, recipe.out.with_name(f"{recipe.out.name}.timing-cache")
        self.log, self.stop = _logger(trt), threading.Event()
        self.monitor = _monitor(trt, advance, self.stop)

    def build(self, model: onnx.ModelProto, graph_path: Path, folder: Path, spec: EngineSpec) -> EngineSpec:
        """Build a graph whose weights lie beside `graph_path`; returns `spec` with what only the build tells."""
        trt = self.trt
        builder, network, parser = self._start()
        weights = self._parse(parser, model, graph_path)
        config = builder.create_builder_config()
        capabilities = self.package.target(trt, config, self.options)
        self._configure(trt, builder, config, spec)
        with (folder / spec.file).open("wb") as file:
            writer = _writer(trt, file)
            done = self._run(lambda: builder.build_serialized_network_to_stream(network, config, writer))
        del weights  # the parser and the network point into them until here
        if writer.error is not None:
            known = disk_error(writer.error, folder / spec.file)
            raise known if isinstance(known, ExportError) else ExportError(f"{spec.file}: {known}") from writer.error
        if not done:
            raise self._failure()
        self._keep_timings(config)
        return dataclasses.replace(spec, compute_capabilities=capabilities, activation_bytes=self.log.activation_bytes)

    def infer(self, model: onnx.ModelProto, graph_path: Path, sizes: Mapping[str, int]) -> dict[str, _Tensor]:
        """What every tensor of a graph is like at given free sizes, by name, as TensorRT infers it."""
        trt = self.trt
        builder, network, parser = self._start()
        weights = self._parse(parser, model, graph_path)
        dims = {value.name: _spec(value).dims for value in model.graph.input}
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            tensor.shape = tuple(_size(sizes, dim) for dim in dims[tensor.name])
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        tensors = [layer.get_output(index) for layer in layers for index in range(layer.num_outputs)]
        found = {tensor.name: _Tensor(tuple(tensor.shape), tensor.dtype == trt.DataType.FLOAT) for tensor in tensors}
        del tensors, layers, network, parser, builder, weights  # in this order: each points into those behind it
        return found

    def _start(self) -> tuple[Any, Any, Any]:
        """A builder, an empty network and its parser."""
        trt = self.trt
        builder = trt.Builder(self.log)
        if builder is None:
            raise BuilderUnavailable(f"{self.package.name} does not start: {self._words()}")
        # TensorRT 10 has typed networks on request, 11 has no others.
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        return builder, network, trt.OnnxParser(network, self.log)

    def _parse(self, parser: Any, model: onnx.ModelProto, graph_path: Path) -> dict[str, np.ndarray]:
        """Show the parser the graph, and its weights where they lie; returns their maps, to be kept until the end."""
        files: dict[str, np.ndarray] = {}
        done = parser.load_model_proto(model.SerializeToString(), str(graph_path))
        for tensor in model.graph.initializer:
            if not done or tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            entry = {item.key: item.value for item in tensor.external_data}
            name = entry["location"]
            if name not in files:
                files[name] = np.memmap(graph_path.parent / name, np.uint8, "r")
            address = files[name].ctypes.data + int(entry["offset"])
            done = parser.load_initializer(tensor.name, address, int(entry["length"]))
        if done and parser.parse_model_proto():
            return files
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        words = "; ".join(f"{error.node_name() or error.node_operator()}: {error.desc()}" for error in errors)
        raise BuildError(f"{self.name}: {self.package.name} cannot read the graph: {words or self._words()}")

    def _configure(self, trt: ModuleType, builder: Any, config: Any, spec: EngineSpec) -> None:
        options = self.options
        config.progress_monitor = self.monitor
        if options.workspace_gb is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gb * 2**30))
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if self.package.stripped:
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
            config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
        if self.package.timing_cache:
            kept = self.cache.read_bytes() if self.cache.is_file() else b""
            # Another GPU's or version's is worth nothing: TensorRT says so by False, and starts an empty one.
            if not config.set_timing_cache(config.create_timing_cache(kept), ignore_mismatch=False):
                config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        for ranges in spec.profiles:
            profile = builder.create_optimization_profile()
            for name, limits in ranges.items():
                profile.set_shape(name, limits.min, limits.opt, limits.max)
            if config.add_optimization_profile(profile) < 0:
                raise BuildError(f"{self.name}: {self.package.name} refuses the profile {ranges}: {self._words()}")

    def _run(self, call: Callable[[], Any]) -> bool:
        """Run the build on a thread of its own, so that Ctrl-C is heard: TensorRT then stops at its next step.

        Waits until it has stopped, for it reads our memory until then.
        """
        results: list[Any] = []
        done = threading.Event()  # not Thread.join, which takes a thread for dead when Ctrl-C meets it (bpo-45274)

        def work() -> None:
            try:
                results.append(call())
            except BaseException as error:
                results.append(error)
            done.set()

        thread = threading.Thread(target=work, name=f"build {self.name}")
        thread.start()
        while not done.is_set():
            try:
                done.wait()
            except KeyboardInterrupt:
                self.stop.set()
        thread.join()
        if self.stop.is_set():
            raise KeyboardInterrupt
        (result,) = results
        if isinstance(result, MemoryError):
            raise self._no_memory(str(result)) from result
        if isinstance(result, BaseException):
            raise result
        return bool(result)

    def _keep_timings(self, config: Any) -> None:
        if self.package.timing_cache:
            data = config.get_timing_cache().serialize()
            fresh = self.cache.with_name(f"{self.cache.name}.new")
            fresh.write_bytes(data)
            fresh.replace(self.cache)

    def _words(self) -> str:
        # Where there is no driver, every failure ends with 35, cudaErrorInsufficientDriver, which says nothing of it.
        telling = [error for error in self.log.errors if "cudaError 35:" not in error]
        return "; ".join(telling or self.log.errors) or "it gave no reason"

    def _failure(self) -> BuildError:
        words = self._words()
        if re.search(r"bad_alloc|out ?of ?memory|cannot allocate", words, re.IGNORECASE):
            return self._no_memory(words)
        return BuildError(f"{self.name}: {self.package.name} cannot build the graph: {words}")

    def _no_memory(self, words: str) -> BuildMemoryError:
        if self.blocks is None:
            advice = f"it grows with the largest shapes: {SMALLER_SHAPES}"
        else:
            module = self.name.partition(".")[0]
            advice = (
                "building takes about twice the weights: split the module into more plans "
                f"(tensorrt.split, --split {module}=4)"
            )
        return BuildMemoryError(
            f"{self.name}: not enough memory to build it: {words or 'allocation failed'}; {advice}, or build where "
            "there is more memory"
        )


# The three classes below derive from the package's own, so they are made once it is imported. pybind11 wants its
# constructors called by name.


def _logger(trt: Any) -> Any:
    severe = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    class Logger(trt.ILogger):
        """Keeps the errors, and how much memory the builder says that an execution takes."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.activation_bytes = 0

        def log(self, severity: Any, msg: str) -> None:
            if severity in severe:
                self.errors.append(msg)
            elif match := re.match(r"Total Activation Memory: (\d+) bytes", msg):
                self.activation_bytes = max(self.activation_bytes, int(match[1]))

    return Logger()


def _monitor(trt: Any, advance: Callable[[int], None], stop: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Turns TensorRT's nested phases into one number; called from its threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, tuple[int, int]] = {}  # name -> steps done, steps in all; outermost first
            self._last = -1

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = (0, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            total = self._phases.get(phase_name, (0, 1))[1]
            self._phases[phase_name] = (step + 1, total)
            done, share = 0.0, 1.0
            for steps, whole in list(self._phases.values()):
                share /= max(whole, 1)
                done += steps * share
            if (now := int(min(done, 1.0) * STEPS)) > self._last:
                self._last = now
                advance(now)
            return not stop.is_set()

    return Monitor()


def _writer(trt: Any, file: Any) -> Any:
    class Writer(trt.IStreamWriter):
        """Writes a plan as it comes, and keeps what went wrong: TensorRT hears of no exception."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                file.write(data)
                file.flush()
            except OSError as error:
                self.error = error
                return 0
            return len(data)

    return Writer()
