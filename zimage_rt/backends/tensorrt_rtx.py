"""TensorRT-RTX (package `tensorrt-rtx-cu13`): GeForce and RTX cards, Turing to Blackwell."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import tensorrt_rtx as trt

from ..bundle.manifest import Manifest
from ..checks import choice, flag, path
from ..errors import BundleMismatch
from ._tensorrt_cache import cache_file, cache_folder, read_cache, write_cache
from ._tensorrt_common import Part, TensorRTBackendBase
from .base import CheckModule, Probe
from .modules import ModulePipeline

log = logging.getLogger(__name__)

SHAPE_KERNELS = ("lazy", "eager", "none")

# Numbers of runs after which the cache is saved: kernels that are compiled in the background (`lazy`) are in it by the
# end of a request of eight evaluations.
SAVE_AFTER_RUNS = (1, 8)


class TensorRTRTXBackend(TensorRTBackendBase):
    """Runs a bundle's plans with TensorRT-RTX on one GeForce or RTX card.

    The library compiles a plan's kernels for the card when a context is created, and again for new shapes. Compiled
    kernels are stored in a cache file, so that only the first start waits.

    Args:
        device: index of the GPU.
        cuda_graph: whether the library captures and replays CUDA graphs.
        shape_kernels: kernels specialised for the shapes of the inputs: `lazy` compiles them in the background, while a
            general kernel runs; `eager` waits for them; `none` uses general kernels only.
        cache_dir: the folder of compiled kernels: `beside` for `NAME.cache` beside the bundle (`~/.cache/zimage_rt` if
            that cannot be written), a folder, or None for no cache.

    Raises:
        BackendUnavailable: there is no such GPU, no driver, or the library does not run on it.
    """

    name = "tensorrt_rtx"
    # Hopper: on an H200 with 1.7.1 engines do not load, and the builder has no such target.
    refused = ((9, 0),)

    def __init__(
        self,
        device: int = 0,
        cuda_graph: bool = True,
        shape_kernels: str = "lazy",
        cache_dir: str | Path | None = "beside",
    ) -> None:
        cuda_graph = flag(cuda_graph, "cuda_graph")
        shape_kernels = choice(shape_kernels, "shape_kernels", SHAPE_KERNELS)
        if cache_dir is not None and cache_dir != "beside":
            cache_dir = path(cache_dir, "cache_dir")
        self._graphs = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if cuda_graph else trt.CudaGraphStrategy.DISABLED
        self._kernels = getattr(trt.DynamicShapesKernelSpecializationStrategy, shape_kernels.upper())
        self._cache_dir = cache_dir
        self._cache_folder: Path | None = None
        # By the plan's hash: the cache, and its size in bytes when it was last saved.
        self._caches: dict[str, tuple[trt.IRuntimeCache, int]] = {}
        super().__init__(trt, device)

    def open(self, bundle: Path, manifest: Manifest, check: CheckModule) -> ModulePipeline:
        """Open a bundle: its pipeline, whose modules are loaded on first use."""
        self._cache_folder = cache_folder(bundle, self._cache_dir)
        return super().open(bundle, manifest, check)

    def check_plan(self, label: str, plan: mmap.mmap) -> None:
        """Raise BundleMismatch if the library's check of the plan's header fails."""
        self.log.clear()
        # The shared code has it as a `tensorrt` object; TensorRT-RTX's has further methods.
        validity, diagnostics = cast(trt.Runtime, self.runtime).get_engine_validity(plan)
        if validity == trt.EngineValidity.INVALID:
            raise BundleMismatch(
                f"{label}: TensorRT-RTX {trt.__version__} refuses the plan: {diagnosis(diagnostics)}; "
                f"export the bundle again with --backend {self.name}"
            )

    def create_context(self, part: Part) -> Any:
        """Create an execution context, with kernels from the cache or compiled now; see the base class."""
        engine = cast(trt.ICudaEngine, part.engine)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.cuda_graph_strategy = self._graphs
        config.dynamic_shapes_kernel_specialization_strategy = self._kernels
        path = self._cache_file(part)
        if path is not None:
            if part.sha256 not in self._caches:
                cache = config.create_runtime_cache()
                data = read_cache(path)
                # Caches of another version or driver are refused; the kernels are compiled again.
                if data and not cache.deserialize(data):
                    log.warning("%s: TensorRT-RTX refused the kernel cache; its kernels are compiled again", path)
                    cache.reset()
                self._caches[part.sha256] = (cache, len(data))
            config.set_runtime_cache(self._caches[part.sha256][0])
        return engine.create_execution_context(config)

    def after_run(self, parts: Sequence[Part], runs: int) -> None:
        """Save kernels that were compiled for new shapes."""
        if runs not in SAVE_AFTER_RUNS:
            return
        for part in parts:
            path = self._cache_file(part)
            if path is None:
                return
            cache, saved = self._caches[part.sha256]
            data = bytes(cache.serialize())
            if len(data) != saved:
                write_cache(path, data)
                self._caches[part.sha256] = (cache, len(data))

    def _cache_file(self, part: Part) -> Path | None:
        if self._cache_folder is None:
            return None
        return cache_file(self._cache_folder, part.sha256, trt.__version__, self.gpu.name, self.gpu.driver)


def probe() -> list[Probe]:
    """The availability of TensorRT-RTX; see `Probe`."""
    return TensorRTRTXBackend.probe(trt)


def diagnosis(diagnostics: int) -> str:
    """The names of the set bits of the library's diagnostics, for messages."""
    members = trt.EngineInvalidityDiagnostics.__members__
    names = [name.lower().replace("_", " ") for name, bit in members.items() if diagnostics & int(bit)]
    return ", ".join(names) or "it gave no reason"
