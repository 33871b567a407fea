"""Deserialization of TensorRT engines, and the errors that the library logs."""

from __future__ import annotations

import mmap
from collections import deque
from typing import TYPE_CHECKING, Any

from ..bundle.manifest import TensorSpec
from ..errors import BundleMismatch, OutOfMemory
from ._tensorrt_plans import DTYPES

if TYPE_CHECKING:
    import tensorrt as trt


class Log:
    """The errors that a library has logged since `clear`; `logger` is the argument of its constructors."""

    def __init__(self, library: Any) -> None:
        self._lines: deque[str] = deque(maxlen=8)
        lines, severe = self._lines, (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR)

        class Logger(library.ILogger):
            def __init__(self) -> None:
                library.ILogger.__init__(self)  # pybind11 requires this call instead of super()

            def log(self, severity: Any, msg: str) -> None:
                if severity in severe:
                    lines.append(msg)

        self.logger: trt.ILogger = Logger()

    def clear(self) -> None:
        """Drop the errors so far."""
        self._lines.clear()

    @property
    def text(self) -> str:
        """The errors in one line, or a text that says there are none."""
        return "; ".join(self._lines) or "it gave no reason"

    @property
    def out_of_memory(self) -> bool:
        """Whether an error is about device memory."""
        return any("out of memory" in line.lower() or "outofmemory" in line.lower() for line in self._lines)


def deserialize(runtime: trt.Runtime, log: Log, label: str, library: str, plan: mmap.mmap) -> trt.ICudaEngine:
    """Deserialize a plan to an engine. Raises OutOfMemory, or BundleMismatch with the library's message."""
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
    """An engine's tensors for `check_border`; `is_input` is the library's `TensorIOMode.INPUT`."""
    border = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = engine.get_tensor_dtype(name).name
        spec = TensorSpec(name, DTYPES.get(dtype, dtype), tuple(engine.get_tensor_shape(name)))
        border.append((spec, engine.get_tensor_mode(name) == is_input))
    return border
