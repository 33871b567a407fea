"""The ONNX Runtime backend, which runs on any machine."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from .. import _core, checks
from ..bundle.manifest import Manifest, ModuleSpec, shape_text
from ..bundle.onnx_files import external_files
from ..errors import BundleMismatch, OutOfMemory, RequestError, ZImageError
from .base import MAX_DEVICE, Change, CheckModule, Probe
from .merge import merged
from .modules import ModulePipeline
from .onnxruntime_binding import BoundSession
from .onnxruntime_providers import (
    check_assignment,
    check_options,
    create_session,
    find_provider,
    probe_providers,
    require,
)

log = logging.getLogger(__name__)

BFLOAT16 = 16  # TensorProto.BFLOAT16 in onnx.proto3
# ONNX Runtime has no limit of its own.
MAX_THREADS = 1024
# How long a thread of an operator waits for the next one before it sleeps. By ONNX Runtime's default it waits so long
# that it takes the processor from other requests and programs: beside those an image takes two thirds of the time with
# this, and on an idle machine no more than before (benchmarks/README.md).
SPIN_MICROSECONDS = "20"
# Entries of `allow_cpu`.
MAX_NAMES = 1024


class OnnxRuntimeBackend:
    """Runs modules with ONNX Runtime, on the CPU or through another of its execution providers.

    Args:
        num_threads: threads per operator; None means one per core that this process may use.
        provider: `cpu`, `cuda`, `tensorrt` or `nv_tensorrt_rtx`, or ONNX Runtime's own name of another provider.
        provider_options: the provider's options, e.g. `{"enable_cuda_graph": True}`; see ONNX Runtime's documentation.
        device: index of the GPU.
        allow_cpu: operators, by ONNX type (`"Shape"`), or whole modules, by name, that may run on the CPU if the
            provider does not support them. Other operators on the CPU are an error.
        io_binding: whether inputs and outputs have persistent buffers on the device; None means on GPUs only.

    Raises:
        BackendUnavailable: the provider or the device is missing; the message says what to install.
        RequestError: an option is invalid.
    """

    name = "onnxruntime"

    def __init__(
        self,
        num_threads: int | None = None,
        provider: str = "cpu",
        provider_options: Mapping[str, Any] | None = None,
        device: int = 0,
        allow_cpu: Sequence[str] = (),
        io_binding: bool | None = None,
    ) -> None:
        if num_threads is not None:
            num_threads = checks.integer(num_threads, "num_threads", 1, MAX_THREADS)
        allow_cpu = checks.items(allow_cpu, "allow_cpu", "a list of names", MAX_NAMES)
        if not all(isinstance(name, str) for name in allow_cpu):
            raise RequestError(f"allow_cpu: expected a list of names, got {checks.shown(allow_cpu)}")
        device = checks.integer(device, "device", 0, MAX_DEVICE)
        if io_binding is not None:
            io_binding = checks.flag(io_binding, "io_binding")
        self._num_threads = num_threads or _cores_allowed()
        self._provider = find_provider(provider)
        self._provider_options = check_options(self._provider, {} if provider_options is None else provider_options)
        self._device, self._allow_cpu = device, frozenset(allow_cpu)
        require(self._provider, device)
        self._io_binding = self._provider.on_gpu if io_binding is None else io_binding

    def open(self, bundle: Path, manifest: Manifest, check: CheckModule) -> ModulePipeline:
        """Open a bundle: its pipeline, whose modules are loaded on first use."""
        return ModulePipeline(
            lambda name: self.load_module(bundle, manifest, name),
            check,
            lambda name, changes: self.load_module(bundle, manifest, name, changes),
            {name: module.base for name, module in manifest.modules.items() if module.base is not None},
        )

    def load_module(
        self, bundle: Path, manifest: Manifest, module: str, changes: Sequence[Change] = ()
    ) -> OnnxRuntimeModule:
        """Load a module, with LoRAs' changes of its own or its base's weights.

        Raises BundleMismatch if it cannot be loaded, OutOfMemory, or LoraError if a change does not fit.
        """
        start = time.perf_counter()
        spec = manifest.module(module)
        if spec.graph is None:
            raise BundleMismatch(
                f"{module}: this bundle has weights and no ONNX graph; load it with backend='cuda', "
                "or export it for onnxruntime"
            )
        path = bundle / spec.graph
        _check_external_files(path, set(manifest.module_files(module)) - {spec.graph})
        settings = self._settings()
        try:
            # Set before the graph is optimised, so that constant folding does not use the bundle's own weights.
            changed = spec if spec.base is None else manifest.module(spec.base)
            weights = _values(merged(bundle / changed.weights, changes))
            settings.add_external_initializers(list(weights), list(weights.values()))
            session = create_session(path, settings, self._provider, self._provider_options, self._device)
        except ZImageError:
            raise
        except Exception as error:  # onnxruntime's own exceptions have no common base
            _raise_if_out_of_memory(error, f"loading {module}")
            raise BundleMismatch(
                f"{path}: ONNX Runtime {ort.__version__} cannot load it: {error}; "
                "export the bundle again, or upgrade onnxruntime"
            ) from error
        check_assignment(session, module, self._provider, self._allow_cpu)
        bound = None
        if self._io_binding:
            place = "cuda" if self._provider.on_gpu else "cpu"
            bound = BoundSession(session, [output.name for output in spec.outputs], place, self._device)
        seconds = time.perf_counter() - start
        log.debug(
            "%s loaded on %s with %d changed tensors in %.3f s", module, self._provider.name, len(weights), seconds
        )
        return OnnxRuntimeModule(module, spec, session, bound, weights)

    def _settings(self) -> ort.SessionOptions:
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_MICROSECONDS)
        for key, value in exact_products().items():
            settings.add_session_config_entry(key, value)
        if self._num_threads is not None:
            settings.intra_op_num_threads = self._num_threads
        return settings


def exact_products() -> dict[str, str]:
    """Entries of a session's configuration with which products of uint8 and int8 are exact on this processor.

    Without VNNI they saturate in 16 bits, and give other images with no error; ONNX Runtime then multiplies unsigned
    bytes. With VNNI they are exact, and unsigned weights would take two to four times as long (findings/).
    """
    return {} if _core.multiplies_bytes_exactly() else {"session.x64quantprecision": "1"}


def probe() -> list[Probe]:
    """The availability of every execution provider; see `Probe`."""
    return probe_providers()


class OnnxRuntimeModule:
    """A loaded session. Thread-safe, as ONNX Runtime's `run` and `BoundSession.run` are."""

    def __init__(
        self,
        name: str,
        spec: ModuleSpec,
        session: ort.InferenceSession,
        bound: BoundSession | None = None,
        weights: Mapping[str, ort.OrtValue] | None = None,
    ) -> None:
        self._name, self._spec, self._session, self._bound = name, spec, session, bound
        self._weights = weights  # the session uses their memory, which must stay alive
        self._outputs = [output.name for output in spec.outputs]

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the module; the outputs are new arrays."""
        for tensor in self._spec.inputs:
            got = inputs[tensor.name]
            fits = got.dtype == tensor.dtype and len(got.shape) == len(tensor.dims)
            if not fits or any(
                isinstance(dim, int) and dim != size for dim, size in zip(tensor.dims, got.shape, strict=True)
            ):
                raise RequestError(
                    f"{self._name}.{tensor.name}: expected {tensor.dtype} "
                    f"{shape_text(tensor.dims)}, got {got.dtype} {shape_text(got.shape)}"
                )
        try:
            given = {tensor.name: inputs[tensor.name] for tensor in self._spec.inputs}
            values = self._bound.run(given) if self._bound is not None else self._session.run(self._outputs, given)
        except Exception as error:
            _raise_if_out_of_memory(error, f"running {self._name}")
            raise
        return dict(zip(self._outputs, values, strict=True))


def _check_external_files(graph: Path, named: Set[str]) -> None:
    """Raise BundleMismatch if a graph reads files that the manifest does not name for it."""
    try:
        strange = external_files(graph.read_bytes()) - named
    except (OSError, ValueError) as error:
        raise BundleMismatch(f"{graph}: {error}; export the bundle again") from error
    if strange:
        raise BundleMismatch(
            f"{graph}: expected weights in {' and '.join(sorted(named))}, got a graph that reads {min(strange)!r}, "
            "which the manifest does not name for it; export the bundle again"
        )


def _cores_allowed() -> int | None:
    """The number of cores that this process may use, if that is not all of them; None means ONNX Runtime's default.

    By default it pins a thread to each of the machine's cores, even to those that a container or `taskset` excludes.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = len(os.sched_getaffinity(0))
    return allowed if allowed < (os.cpu_count() or allowed) else None


def _values(weights: Mapping[str, np.ndarray]) -> dict[str, ort.OrtValue]:
    """Arrays as OrtValues without copies; uint16 arrays are bf16, which numpy does not have."""
    return {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
        if array.dtype == np.uint16
        else ort.OrtValue.ortvalue_from_numpy(array)
        for name, array in weights.items()
    }


def _raise_if_out_of_memory(error: Exception, doing: str) -> None:
    text = str(error)
    signs = ("bad_alloc", "Failed to allocate", "out of memory")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        raise OutOfMemory(f"{doing}: {text}; ask for a smaller image or batch, or free memory") from error
