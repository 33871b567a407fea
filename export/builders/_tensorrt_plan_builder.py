"""Builds one TensorRT plan from one graph."""

from __future__ import annotations

import dataclasses
import math
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from zimage_rt.bundle.manifest import EngineSpec, TensorSpec

from ..errors import BuildError, BuilderUnavailable, BuildMemoryError, ExportError, disk_error
from ..plan import Blocks
from ..recipe import ExportRecipe
from ._tensorrt_package import Package, make_logger, make_monitor, make_writer

SMALLER_SHAPES = "allow smaller ones: `max` under [shapes] or [[tensorrt.profiles]] of the recipe"

_DTYPES: Mapping[int, str] = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}


@dataclasses.dataclass(frozen=True)
class InferredTensor:
    """Shape and width of a tensor, as TensorRT infers them."""

    shape: tuple[int, ...]
    wide: bool  # fp32

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    dims = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
    return TensorSpec(value.name, _DTYPES[kind.elem_type], dims)


def size_of(sizes: Mapping[str, int], dim: int | str) -> int:
    return sizes[dim] if isinstance(dim, str) else dim


class PlanBuilder:
    """Builds one plan: parses a graph, configures the builder and runs it on a thread."""

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
        self.log, self.stop = make_logger(trt), threading.Event()
        self.monitor = make_monitor(trt, advance, self.stop)

    def build(self, model: onnx.ModelProto, graph_path: Path, folder: Path, spec: EngineSpec) -> EngineSpec:
        """Builds the plan into `folder`; weight files are in the folder of `graph_path`.

        Returns `spec` with the compute capabilities and the activation memory of the plan.
        """
        trt = self.trt
        builder, network, parser = self._start()
        weights = self._parse(parser, model, graph_path)
        config = builder.create_builder_config()
        capabilities = self.package.target(trt, config, self.options)
        self._configure(trt, builder, config, spec)
        with (folder / spec.file).open("wb") as file:
            writer = make_writer(trt, file)
            done = self._run(lambda: builder.build_serialized_network_to_stream(network, config, writer))
        del weights  # parser and network point into them up to here
        if writer.error is not None:
            known = disk_error(writer.error, folder / spec.file)
            raise known if isinstance(known, ExportError) else ExportError(f"{spec.file}: {known}") from writer.error
        if not done:
            raise self._failure()
        self._keep_timings(config)
        return dataclasses.replace(spec, compute_capabilities=capabilities, activation_bytes=self.log.activation_bytes)

    def infer(self, model: onnx.ModelProto, graph_path: Path, sizes: Mapping[str, int]) -> dict[str, InferredTensor]:
        """Infers every tensor of a graph at given free sizes; returns them by name."""
        trt = self.trt
        builder, network, parser = self._start()
        weights = self._parse(parser, model, graph_path)
        dims = {value.name: tensor_spec(value).dims for value in model.graph.input}
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            tensor.shape = tuple(size_of(sizes, dim) for dim in dims[tensor.name])
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        tensors = [layer.get_output(index) for layer in layers for index in range(layer.num_outputs)]
        found = {
            tensor.name: InferredTensor(tuple(tensor.shape), tensor.dtype == trt.DataType.FLOAT) for tensor in tensors
        }
        del tensors, layers, network, parser, builder, weights  # in this order, because each points into the later ones
        return found

    def _start(self) -> tuple[Any, Any, Any]:
        """Creates a builder, an empty network and its parser."""
        trt = self.trt
        builder = trt.Builder(self.log)
        if builder is None:
            raise BuilderUnavailable(f"{self.package.name} does not start: {self._words()}")
        # TensorRT 10 needs a flag for strongly typed networks; 11 has no other kind.
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        return builder, network, trt.OnnxParser(network, self.log)

    def _parse(self, parser: Any, model: onnx.ModelProto, graph_path: Path) -> dict[str, np.ndarray]:
        """Parses a graph with mapped weight files; returns the maps, which must outlive the network."""
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
            # TensorRT returns False for the cache of another GPU or version; then it starts from an empty one.
            if not config.set_timing_cache(config.create_timing_cache(kept), ignore_mismatch=False):
                config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        for ranges in spec.profiles:
            profile = builder.create_optimization_profile()
            for name, limits in ranges.items():
                profile.set_shape(name, limits.min, limits.opt, limits.max)
            if config.add_optimization_profile(profile) < 0:
                raise BuildError(f"{self.name}: {self.package.name} refuses the profile {ranges}: {self._words()}")

    def _run(self, call: Callable[[], Any]) -> bool:
        """Runs the build on a thread, so that Ctrl-C stops TensorRT at its next step.

        Waits until TensorRT has stopped, because it reads our memory until then.
        """
        results: list[Any] = []
        done = threading.Event()  # not Thread.join, which Ctrl-C can break (bpo-45274)

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
        # Without a driver every failure also reports cudaErrorInsufficientDriver (35), which explains nothing.
        relevant = [error for error in self.log.errors if "cudaError 35:" not in error]
        return "; ".join(relevant or self.log.errors) or "it gave no reason"

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
            f"{self.name}: not enough memory to build it: {words or 'allocation failed'}; {advice}, or build on a "
            "machine with more memory"
        )
