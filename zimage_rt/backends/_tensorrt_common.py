"""Shared code of `tensorrt` and `tensorrt_rtx`: loading plans, device memory, choosing profiles, running.

The two libraries have the same runtime API, which tests/backends/test_tensorrt_api.py checks. Each backend's file has
only the parts that differ.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cuda.bindings import __version__ as cuda_bindings_version

from ..bundle.manifest import EngineSpec, Manifest, ModuleSpec, TensorSpec
from ..checks import shown
from ..errors import BackendUnavailable, BundleMismatch, OutOfMemory, RequestError, ZImageError
from . import nvidia_driver
from ._cuda_runtime import Buffer, Gpu, Graph, runtime_problem
from ._tensorrt_engine import Log, deserialize, engine_tensors
from ._tensorrt_plans import (
    ITEM_SIZES,
    Shape,
    Shapes,
    check_border,
    check_inputs,
    check_output,
    checked_plans,
    choose_profile,
    rows_per_run,
)
from .base import MAX_DEVICE, CheckModule, Probe
from .modules import ModulePipeline

if TYPE_CHECKING:
    import tensorrt as trt

log = logging.getLogger(__name__)

# Programs kept per module, one per set of input shapes; every length of a prompt is another.
MAX_PROGRAMS = 16

# Runs of a program before its graph is captured, so that rare lengths of prompts have none.
RUNS_BEFORE_CAPTURE = 2

# Bytes; the alignment of cudaMalloc, which the libraries require.
MIN_ACTIVATIONS = 256


class Part:
    """A loaded plan of a module.

    Attributes:
        label: its name in messages.
        sha256: the plan's hash, which identifies the kernels compiled from it.
        contexts: by profile; a context is large, and one serves every shape of its profile.
    """

    def __init__(self, label: str, spec: EngineSpec, sha256: str, engine: trt.ICudaEngine) -> None:
        self.label, self.spec, self.sha256, self.engine = label, spec, sha256, engine
        self.contexts: dict[int, Context] = {}


class Context:
    """An execution context, and the shapes it was last set to."""

    def __init__(self, part: Part, profile: int, context: trt.IExecutionContext) -> None:
        self.part, self.profile, self.context = part, profile, context
        self.shapes: dict[str, Shape] = {}


class TensorRTBackendBase:
    """One of the two libraries on one GPU; see `TensorRTBackend` and `TensorRTRTXBackend` for the differences.

    All modules share one buffer of device memory for activations, because they run one after another.
    """

    name = ""
    # Whether this code captures CUDA graphs; False for a library that does so itself.
    captures_graphs = False
    # Compute capabilities that the library does not support.
    refused: tuple[tuple[int, int], ...] = ()

    def __init__(self, library: Any, device: int) -> None:
        if isinstance(device, bool) or not isinstance(device, int) or not 0 <= device <= MAX_DEVICE:
            raise RequestError(f"device: expected the number of a GPU, from 0, got {shown(device)}")
        problem = self.problem(device)
        if problem is not None:
            raise BackendUnavailable(f"backend {self.name!r}: {problem}")
        self.library = library
        self.gpu = Gpu(device)
        self.log = Log(library)
        self.runtime: trt.Runtime = library.Runtime(self.log.logger)
        self.activations = self.gpu.buffer("activations")
        self.lock = threading.Lock()

    @classmethod
    def problem(cls, device: int) -> str | None:
        """Why a GPU cannot run this backend; None if it can."""
        problem = runtime_problem(device)
        if problem is not None:
            return f"{problem}. Or load the bundle with backend='onnxruntime'"
        found = nvidia_driver.query().devices[device]
        if found.compute_capability in cls.refused:
            return (
                f"{cls.name} does not run on {found.name} (compute capability "
                f"{'{}.{}'.format(*found.compute_capability)}); use backend='cuda' or 'onnxruntime' there"
            )
        return None

    @classmethod
    def probe(cls, library: Any) -> list[Probe]:
        """The backend's availability; see `Probe`."""
        devices = nvidia_driver.query().devices
        # Device 0 is probed even if there is none, because the problem says why.
        unfit = [cls.problem(device) for device in range(max(len(devices), 1))]
        problems = [] if None in unfit else [problem for problem in unfit if problem is not None]
        versions = {library.__name__: library.__version__, "cuda-bindings": cuda_bindings_version}
        return [Probe(cls.name, "; ".join(problems) or None, versions, devices)]

    def open(self, bundle: Path, manifest: Manifest, check: CheckModule) -> ModulePipeline:
        """Open a bundle: its pipeline, whose modules are loaded on first use."""
        # `load_module` always checks plans; the files that `check` checks are read only for stripped plans.
        return ModulePipeline(lambda name: self.load_module(bundle, manifest, name, check), lambda name: None)

    def load_module(self, bundle: Path, manifest: Manifest, module: str, check: CheckModule) -> TensorRTModule:
        """Check and load a module's plans. Raises BundleMismatch or OutOfMemory."""
        start = time.perf_counter()
        spec = manifest.module(module)
        version, capability = self.library.__version__, self.gpu.compute_capability
        plans = checked_plans(bundle, manifest, module, check, self.name, version, capability)
        parts = []
        with self.lock:
            self.gpu.make_current()
            for engine_spec, plan in plans:
                label = module if len(plans) == 1 else f"{module} part {engine_spec.part}"
                sha256 = manifest.files[engine_spec.file].sha256
                parts.append(self._load_part(label, engine_spec, sha256, plan))
                if engine_spec.stripped:
                    self.refit(parts[-1], bundle, spec)
        log.debug("%s loaded from %d plans in %.3f s", module, len(parts), time.perf_counter() - start)
        return TensorRTModule(self, module, spec, parts)

    def _load_part(self, label: str, spec: EngineSpec, sha256: str, plan: mmap.mmap) -> Part:
        self.check_plan(label, plan)
        try:
            engine = deserialize(self.runtime, self.log, label, self.name, plan)
        except OutOfMemory as error:
            raise self.gpu.out_of_memory(f"loading {label}", len(plan)) from error
        border = engine_tensors(engine, self.library.TensorIOMode.INPUT)
        check_border(label, spec, border, engine.num_optimization_profiles)
        return Part(label, spec, sha256, engine)

    def context(self, part: Part, profile: int) -> Context:
        """A new context of a part for a profile, without device memory of its own for activations."""
        self.log.clear()
        context = self.create_context(part)
        if context is None or not context.set_optimization_profile_async(profile, self.gpu.stream):
            raise self.failed(f"preparing {part.label}", part.engine.device_memory_size_v2)
        self.gpu.synchronize(f"preparing {part.label}")
        return Context(part, profile, context)

    def failed(self, doing: str, needed: int) -> ZImageError:
        """The error for a failed call of the library, from its log."""
        if self.log.out_of_memory:
            return self.gpu.out_of_memory(doing, needed)
        return ZImageError(f"{doing}: {self.name} says: {self.log.text}")

    # Methods that differ between the two libraries.

    def check_plan(self, label: str, plan: mmap.mmap) -> None:
        """Raise BundleMismatch if the library cannot run a plan here; by default there is no such check."""

    def create_context(self, part: Part) -> Any:
        """An IExecutionContext without device memory for activations, which the caller sets; None on failure."""
        raise NotImplementedError

    def refit(self, part: Part, bundle: Path, spec: ModuleSpec) -> None:
        """Fill a stripped plan's weights from the bundle."""
        raise BundleMismatch(f"{part.label}: {self.name} cannot refit stripped plans; export the bundle again")

    def after_run(self, parts: Sequence[Part], runs: int) -> None:
        """Called after each run of a module, with the number of runs of these shapes; does nothing by default."""


class Program:
    """The execution of a module for given input shapes: its contexts, and shapes and sizes of all tensors."""

    def __init__(self, contexts: list[Context], shapes: Shapes, sizes: Mapping[str, int], activations: int) -> None:
        self.contexts, self.shapes, self.sizes, self.activations = contexts, shapes, sizes, activations
        self.runs = 0
        self.graph: Graph | None = None
        self.graph_addresses: tuple[int, ...] = ()


class TensorRTModule:
    """A module's loaded plans; concurrent calls run one after another."""

    def __init__(self, backend: TensorRTBackendBase, name: str, spec: ModuleSpec, parts: list[Part]) -> None:
        self._backend, self._name, self._spec, self._parts = backend, name, spec, parts
        # One buffer per tensor name: outputs of a part are inputs of later parts.
        self._buffers: dict[str, Buffer] = {}
        self._programs: OrderedDict[tuple[Shape, ...], Program] = OrderedDict()
        # Contexts are destroyed first, because they use objects of the backend and the parts.
        weakref.finalize(self, _release, self._programs, parts, backend)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the module; the outputs are new arrays.

        Raises RequestError for shapes outside every profile, OutOfMemory if they do not fit; it stays usable.
        """
        checked = check_inputs(self._name, self._spec.inputs, inputs)
        shapes = {name: array.shape for name, array in checked.items()}
        batch = shapes[self._spec.inputs[0].name][0]
        rows = rows_per_run(self._parts[0].spec.profiles, self._spec.inputs, shapes)
        if rows == batch:
            return self._run(checked)
        runs = [
            self._run({name: array[start : start + rows] for name, array in checked.items()})
            for start in range(0, batch, rows)
        ]
        return {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}

    def _run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        backend, gpu = self._backend, self._backend.gpu
        with backend.lock:
            gpu.make_current()
            program = self._program({name: array.shape for name, array in inputs.items()})
            self._reserve(program)
            for name, array in inputs.items():
                gpu.upload(self._buffers[name], array)
            self._launch(program)
            outputs = {
                tensor.name: np.empty(program.shapes[tensor.name], tensor.dtype) for tensor in self._spec.outputs
            }
            for name, array in outputs.items():
                gpu.download(self._buffers[name], array)
            gpu.synchronize(f"running {self._name}")
            program.runs += 1
            backend.after_run(self._parts, program.runs)
        return outputs

    def _program(self, shapes: Shapes) -> Program:
        key = tuple(shapes[tensor.name] for tensor in self._spec.inputs)
        if key not in self._programs:
            self._programs[key] = self._prepare(shapes)
            while len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return self._programs[key]

    def _prepare(self, inputs: Shapes) -> Program:
        """Choose a profile per part, and infer the shapes of all tensors."""
        shapes = dict(inputs)
        sizes = {tensor.name: _size(tensor, shapes[tensor.name]) for tensor in self._spec.inputs}
        contexts, activations = [], 0
        for part in self._parts:
            known = {tensor.name: shapes[tensor.name] for tensor in part.spec.inputs}
            profile = choose_profile(part.label, part.spec.profiles, known)
            if profile not in part.contexts:
                part.contexts[profile] = self._backend.context(part, profile)
            context = part.contexts[profile]
            activations = max(activations, self._set_shapes(context, known))
            for tensor in part.spec.outputs:
                shapes[tensor.name] = tuple(context.context.get_tensor_shape(tensor.name))
                sizes[tensor.name] = check_output(part.label, tensor, shapes[tensor.name])
            contexts.append(context)
        return Program(contexts, shapes, sizes, activations)

    def _set_shapes(self, context: Context, shapes: Shapes) -> int:
        """Set a context's input shapes; returns the bytes that it needs for activations."""
        backend, label = self._backend, context.part.label
        backend.log.clear()
        context.shapes = {}  # unknown if a call below fails
        for name, shape in shapes.items():
            if not context.context.set_input_shape(name, shape):
                raise backend.failed(f"{label}: setting {name} to {shape}", 0)
        needed = context.context.update_device_memory_size_for_shapes()
        context.shapes = dict(shapes)
        return needed

    def _reserve(self, program: Program) -> None:
        for name, size in program.sizes.items():
            if name not in self._buffers:
                self._buffers[name] = self._backend.gpu.buffer(f"{self._name}.{name}")
            self._buffers[name].reserve(size)
        # Never empty: a context that needs memory for other shapes requires some for these too.
        self._backend.activations.reserve(max(program.activations, MIN_ACTIVATIONS))

    def _launch(self, program: Program) -> None:
        """Enqueue one run: as a graph if it was captured and no buffer has moved since."""
        if not self._backend.captures_graphs or program.runs < RUNS_BEFORE_CAPTURE:
            self._enqueue(program)
            return
        addresses = (self._backend.activations.address, *(self._buffers[name].address for name in program.sizes))
        if program.graph is None or program.graph_addresses != addresses:
            program.graph, program.graph_addresses = self._capture(program), addresses
        program.graph.launch(f"running {self._name}")

    def _capture(self, program: Program) -> Graph:
        """Capture a graph of all parts.

        A captured context serves no other shapes, so the program gets contexts of its own. A context must run once
        after its shapes were set. Both are from NVIDIA's Developer Guide, "CUDA Graphs".
        """
        program.graph = None
        program.contexts = [self._backend.context(old.part, old.profile) for old in program.contexts]
        self._enqueue(program)
        self._backend.gpu.synchronize(f"running {self._name}")
        return self._backend.gpu.capture(f"capturing {self._name}", lambda: self._enqueue(program))

    def _enqueue(self, program: Program) -> None:
        backend = self._backend
        for context in program.contexts:
            part, execution = context.part, context.context
            shapes = {tensor.name: program.shapes[tensor.name] for tensor in part.spec.inputs}
            if context.shapes != shapes:
                self._set_shapes(context, shapes)
            backend.log.clear()
            for tensor in (*part.spec.inputs, *part.spec.outputs):
                if not execution.set_tensor_address(tensor.name, self._buffers[tensor.name].address):
                    raise backend.failed(f"{part.label}: binding {tensor.name}", program.sizes[tensor.name])
            execution.set_device_memory(backend.activations.address, backend.activations.size)
            if not execution.execute_async_v3(backend.gpu.stream):
                raise backend.failed(f"running {part.label}", program.activations)


def _size(tensor: TensorSpec, shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64)) * ITEM_SIZES[tensor.dtype]


def _release(
    programs: OrderedDict[tuple[Shape, ...], Program], parts: list[Part], backend: TensorRTBackendBase
) -> None:
    """Destroy a module's contexts while the objects that they use, including `backend`, still exist."""
    programs.clear()
    for part in parts:
        part.contexts.clear()
