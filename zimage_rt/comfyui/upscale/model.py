"""A loaded upscale model: a session of ONNX Runtime on the CPU."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from ...checks import shown_text
from ...errors import BackendUnavailable, OutOfMemory
from ..inputs import InputError
from .architectures import Network, build
from .weights import open_weights

# Sessions that are kept; each has the weights, 70 MB in the usual models.
MAX_KEPT = 2


class UpscaleModel:
    """UPSCALE_MODEL. Thread-safe.

    Attributes:
        scale: the output's size relative to the input's.
    """

    def __init__(self, network: Network) -> None:
        self.scale = network.scale
        self._multiple, self._least = network.multiple, network.least
        self._session = _session(network.model)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Enlarge an image, float32 `[1, 3, height, width]`; the result is from 0 to 1. Raises OutOfMemory."""
        height, width = image.shape[2:]
        rows, columns = (self._padding(size) for size in (height, width))
        for sides, mode in (
            ((min(rows, height - 1), min(columns, width - 1)), "reflect"),
            # The rest, if a side has too few pixels to reflect.
            ((max(0, rows - height + 1), max(0, columns - width + 1)), "edge"),
        ):
            if any(sides):
                image = np.pad(image, [(0, 0), (0, 0), (0, sides[0]), (0, sides[1])], mode=mode)  # type: ignore[call-overload]
        try:
            (found,) = self._session.run(None, {"image": np.ascontiguousarray(image, np.float32)})
        except Exception as error:  # onnxruntime's own exceptions have no common base
            text = str(error)
            if isinstance(error, MemoryError) or any(sign in text for sign in ("bad_alloc", "Failed to allocate")):
                raise OutOfMemory(f"upscaling {width} by {height} pixels: {text}; free memory") from error
            raise
        found = found[:, :, : height * self.scale, : width * self.scale]
        return np.clip(found, 0, 1, out=found)

    def _padding(self, size: int) -> int:
        least = max(size, self._least)
        return -(-least // self._multiple) * self._multiple - size


_lock = threading.Lock()
_kept: OrderedDict[tuple[str, int, int], UpscaleModel] = OrderedDict()


def load_upscaler(path: Path, name: str) -> UpscaleModel:
    """The model of a file, from memory if it was loaded before and has not changed since.

    Raises:
        InputError: the file is damaged, or no ESRGAN-type model.
        BackendUnavailable: onnxruntime is not installed.
    """
    try:
        state = path.stat()
        key = (str(path.resolve()), state.st_mtime_ns, state.st_size)
        with _lock:
            if key not in _kept:
                _kept[key] = UpscaleModel(build(open_weights(path)))
            _kept.move_to_end(key)
            while len(_kept) > MAX_KEPT:
                _kept.popitem(last=False)
            return _kept[key]
    except OSError as error:
        raise InputError("value_not_in_list", f"{name!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError("value_not_in_list", f"{name}: {shown_text(str(error), 1000)}") from error


def _session(model: bytes) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(
            f"upscale models run on ONNX Runtime: {error}; install it with: pip install 'zimage-rt[onnxruntime]'"
        ) from error
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    # By default ONNX Runtime pins a thread to each of the machine's cores, even to those that a container excludes.
    if hasattr(os, "sched_getaffinity"):
        settings.intra_op_num_threads = len(os.sched_getaffinity(0))
    # A tile of 512 pixels takes some GB, which the arena would keep.
    settings.enable_cpu_mem_arena = False
    return onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
