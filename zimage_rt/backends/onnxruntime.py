"""ONNX Runtime: the backend that runs anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..errors import BundleMismatch, OutOfMemory, RequestError
from ..manifest import Manifest, ModuleSpec, shape_text
from .base import CheckModule
from .modules import ModulePipeline


class OnnxRuntimeBackend:
    """Runs modules with ONNX Runtime on the CPU.

    Args:
        num_threads: threads inside one operator; None leaves it to ONNX Runtime (one a core).
    """

    name = "onnxruntime"

    def __init__(self, num_threads: int | None = None) -> None:
        self._options = ort.SessionOptions()
        self._options.log_severity_level = 3
        if num_threads is not None:
            if num_threads < 1:
                raise RequestError(f"num_threads: expected 1 or more, got {num_threads}")
            self._options.intra_op_num_threads = num_threads

    def open(self, bundle: Path, manifest: Manifest, check: CheckModule) -> ModulePipeline:
        """A pipeline over a bundle; modules are loaded on first use."""
        return ModulePipeline(lambda name: self.load_module(bundle, manifest, name), check)

    def load_module(self, bundle: Path, manifest: Manifest, module: str) -> OnnxRuntimeModule:
        """Load a module. Raises BundleMismatch where the graph and its weights do not fit."""
        spec = manifest.module(module)
        if spec.graph is None:
            raise BundleMismatch(
                f"{module}: this bundle has weights and no ONNX graph; load it with backend='cuda', "
                "or export it for onnxruntime"
            )
        path = bundle / spec.graph
        try:
            session = ort.InferenceSession(str(path), self._options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions have no common base
            _raise_if_out_of_memory(error, f"loading {module}")
            raise BundleMismatch(
                f"{path}: ONNX Runtime {ort.__version__} cannot load it: {error}; "
                "export the bundle again, or upgrade onnxruntime"
            ) from error
        return OnnxRuntimeModule(module, spec, session)


class OnnxRuntimeModule:
    """A loaded session; ONNX Runtime's `run` is thread-safe."""

    def __init__(self, name: str, spec: ModuleSpec, session: ort.InferenceSession) -> None:
        self._name, self._spec, self._session = name, spec, session
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
            values = self._session.run(self._outputs, dict(inputs))
        except Exception as error:
            _raise_if_out_of_memory(error, f"running {self._name}")
            raise
        return dict(zip(self._outputs, values, strict=True))


def _raise_if_out_of_memory(error: Exception, doing: str) -> None:
    text = str(error)
    if isinstance(error, MemoryError) or "bad_alloc" in text or "Failed to allocate" in text:
        raise OutOfMemory(f"{doing}: {text}; ask for a smaller picture or batch, or free memory") from error
