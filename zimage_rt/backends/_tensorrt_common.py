"""What `tensorrt` and `tensorrt_rtx` share: loading plans, binding our own memory, choosing profiles, running.

The two libraries have the same runtime API (tests/backends/test_tensorrt_api.py holds them to that), so one code path
serves both, and each backend's file has only what the other library lacks.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
import weakref
from collections import OrderedDict, deque
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
from ._tensorrt_plans import (
    DTYPES,
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

# Input shapes of one module whose preparation is kept; every length of a prompt is one.
MAX_PROGRAMS = 16

# A graph is captured for shapes that come again and again: not for a prompt's length seen once or twice.
RUNS_BEFORE_CAPTURE = 2

# Bytes; cudaMalloc's alignment, which the libraries ask for.
MIN_ACTIVATIONS = 256


class Log:
    """The errors a library wrote since `clear`; `logger` is what its constructors take."""

    def __init__(self, library: Any) -> None:
        self._lines: deque[str] = deque(maxlen=8)
        lines, severe = self._lines, (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR)

        class Logger(library.ILogger):
            def __init__(self) -> None:
                library.ILogger.__init__(self)  # pybind11 wants this one, not super()

            def log(self, severity: Any, msg: str) -> None:
                if severity in severe:
                    lines.append(msg)

        self.logger: trt.ILogger = Logger()

    def clear(self) -> None:
        """Forget what was written."""
        self._lines.clear()

    @property
    def text(self) -> str:
        """What was written, or that nothing was."""
        return "; ".join(self._lines) or "it gave no reason"

    @property
    def out_of_memory(self) -> bool:
        """Whether an error was for want of device memory."""
        return any("out of memory" in line.lower() or "outofmemory" in line.lower() for line in self._lines)


def deserialize(runtime: trt.Runtime, log: Log, label: str, library: str, plan: mmap.mmap) -> trt.ICudaEngine:
    """A plan to an engine. Raises BundleMismatch with the library's own words where it refuses."""
    log.clear()
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        if log.out_of_memory:
            raise OutOfMemory(log.text)
        raise BundleMismatch(
            f"{label}: {library} refuses the plan: {log.text}; export the bundle again on this machine"
        )
    return engine


def engine_tensors(engine: trt.ICudaEngine, is_input: Any) -> list[tuple[TensorSpec, bool]]:
    """An engine's tensors as `check_border` takes them; `is_input` is the library's `TensorIOMode.INPUT`."""
    border = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = engine.get_tensor_dtype(name).name
        spec = TensorSpec(name, DTYPES.get(dtype, dtype), tuple(engine.get_tensor_shape(name)))
        border.append((spec, engine.get_tensor_mode(name) == is_input))
    return border


class Part:
    """One loaded plan of a module.

    Attributes:
        label: names it in messages.
        sha256: the plan's, which names what the library compiled from it.
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
    """One library on one GPU; see `TensorRTBackend` and `TensorRTRTXBackend`, which say what differs.

    Device memory for activations is one buffer, shared by all modules: they run one after another.
    """

    name = ""
    # Whether we capture CUDA graphs; a library that does so itself says False.
    captures_graphs = False
    # Compute capabilities that the library runs on at no time.
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
        """Why a GPU cannot run this backend; None where it can."""
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
        """See `Probe`."""
        devices = nvidia_driver.query().devices
        # Device 0 is asked for even where there is none: the answer says why.
        unfit = [cls.problem(device) for device in range(max(len(devices), 1))]
        problems = [] if None in unfit else [problem for problem in unfit if problem is not None]
        versions = {library.__name__: library.__version__, "cuda-bindings": cuda_bindings_version}
        return [Probe(cls.name, "; ".join(problems) or None, versions, devices)]

    def open(self, bundle: Path, manifest: Manifest, check: CheckModule) -> ModulePipeline:
        """A pipeline over a bundle; modules are loaded on first use."""
        # Plans are checked by `load_module`, always; the files that `check` knows are read for stripped plans alone.
        return ModulePipeline(lambda name: self.load_module(bundle, manifest, name, check), lambda name: None)

    def load_module(self, bundle: Path, manifest: Manifest, module: str, check: CheckModule) -> TensorRTModule:
        """Load a module's plans, cheap checks first. Raises BundleMismatch or OutOfMemory."""
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
        """A new context of a part under a profile, with no device memory of its own for activations."""
        self.log.clear()
        context = self.create_context(part)
        if context is None or not context.set_optimization_profile_async(profile, self.gpu.stream):
            raise self.failed(f"preparing {part.label}", part.engine.device_memory_size_v2)
        self.gpu.synchronize(f"preparing {part.label}")
        return Context(part, profile, context)

    def failed(self, doing: str, needed: int) -> ZImageError:
        """The error for a call of the library that failed, from what it wrote."""
        if self.log.out_of_memory:
            return self.gpu.out_of_memory(doing, needed)
        return ZImageError(f"{doing}: {self.name} says: {self.log.text}")

    # What the two libraries do differently.

    def check_plan(self, label: str, plan: mmap.mmap) -> None:
        """Raise BundleMismatch for a plan that the library says it cannot run here."""

    def create_context(self, part: Part) -> Any:
        """The library's IExecutionContext, which leaves device memory for activations to us; None where it failed."""
        raise NotImplementedError

    def refit(self, part: Part, bundle: Path, spec: ModuleSpec) -> None:
        """Fill a stripped plan's weights from the bundle."""
        raise BundleMismatch(f"{part.label}: {self.name} cannot refit stripped plans; export the bundle again")

    def after_run(self, parts: Sequence[Part], runs: int) -> None:
        """Called after each run of a module, with how often these shapes were run."""


class Program:
    """How a module runs on inputs of given shapes: its contexts, the shape and size of every tensor."""

    def __init__(self, contexts: list[Context], shapes: Shapes, sizes: Mapping[str, int], activations: int) -> None:
        self.contexts, self.shapes, self.sizes, self.activations = contexts, shapes, sizes, activations
        self.runs = 0
        self.graph: Graph | None = None
        self.graph_addresses: tuple[int, ...] = ()


class TensorRTModule:
    """A module's plans, loaded; calls from several threads take turns."""

    def __init__(self, backend: TensorRTBackendBase, name: str, spec: ModuleSpec, parts: list[Part]) -> None:
        self._backend, self._name, self._spec, self._parts = backend, name, spec, parts
        # One buffer a name: what one part gives, the next takes from the same place.
        self._buffers: dict[str, Buffer] = {}
        self._programs: OrderedDict[tuple[Shape, ...], Program] = OrderedDict()
        # At the end contexts go first: they use what the backend and the parts hold.
        weakref.finalize(self, _release, self._programs, parts, backend)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the module; the outputs are new arrays.

        Raises RequestError for shapes outside every profile, OutOfMemory where they do not fit; both leave it usable.
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
        """Choose profiles part by part; each part's outputs have the shapes that the engine infers."""
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
        """Set a context to input shapes; returns the bytes it then needs for activations."""
        backend, label = self._backend, context.part.label
        backend.log.clear()
        context.shapes = {}  # unknown, should a call below fail
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
        # Never empty: a context that needs memory for other shapes wants some for these as well.
        self._backend.activations.reserve(max(program.activations, MIN_ACTIVATIONS))

    def _launch(self, program: Program) -> None:
        """Put one run on the stream: replayed where it was captured and nothing has moved since."""
        if not self._backend.captures_graphs or program.runs < RUNS_BEFORE_CAPTURE:
            self._enqueue(program)
            return
        addresses = (self._backend.activations.address, *(self._buffers[name].address for name in program.sizes))
        if program.graph is None or program.graph_addresses != addresses:
            program.graph, program.graph_addresses = self._capture(program), addresses
        program.graph.launch(f"running {self._name}")

    def _capture(self, program: Program) -> Graph:
        """A graph of the whole chain of parts.

        A context serves no other shape once it was captured, so the program gets its own; and after its shapes were
        set, it must have run once before (both from NVIDIA's Developer Guide, "CUDA Graphs").
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
    """Destroy a module's contexts while all that they use is still there, `backend` included."""
    programs.clear()
    for part in parts:
        part.contexts.clear()
