"""The backends by name, imported lazily: each needs a library of its own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ..checks import shown
from ..errors import BackendUnavailable, RequestError
from .base import Backend, Probe

# Name → (module, class, pip extra of its library).
BACKENDS: dict[str, tuple[str, str, str]] = {
    "onnxruntime": ("zimage_rt.backends.onnxruntime", "OnnxRuntimeBackend", "onnxruntime"),
    "cuda": ("zimage_rt.backends.cuda", "CudaBackend", "cuda"),
    "tensorrt": ("zimage_rt.backends.tensorrt", "TensorRTBackend", "tensorrt"),
    "tensorrt_rtx": ("zimage_rt.backends.tensorrt_rtx", "TensorRTRTXBackend", "tensorrt-rtx"),
}


def load_backend(name: str, options: Mapping[str, Any]) -> Backend:
    """Construct the named backend with its options.

    Raises:
        BackendUnavailable: its library is missing; the message names the extra to install.
        RequestError: an option is unknown, or its value is invalid.
    """
    if not isinstance(name, str) or name not in BACKENDS:
        raise BackendUnavailable(f"backend: expected one of {', '.join(BACKENDS)}, got {shown(name)}")
    module, attribute, extra = BACKENDS[name]
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise BackendUnavailable(
            f"backend {name!r}: {error}; install it with: pip install 'zimage-rt[{extra}]'"
        ) from error
    known = inspect.signature(cls).parameters
    for option in options:
        if option not in known:
            raise RequestError(f"backend {name!r}: expected one of {', '.join(known)}, got {shown(option)}")
    try:
        return cls(**options)
    except TypeError as error:
        raise RequestError(f"backend {name!r}: {error}") from error


def probe_backends() -> list[Probe]:
    """Probe every backend on this machine; backends that cannot be imported are reported, not raised."""
    return [probe for name in BACKENDS for probe in _probe(name)]


def _probe(name: str) -> Sequence[Probe]:
    module, _, extra = BACKENDS[name]
    try:
        imported = importlib.import_module(module)
        if not hasattr(imported, "probe"):
            return [Probe(name, "its library loads; the backend does not say whether it can run here")]
        return imported.probe()
    except ImportError as error:
        return [Probe(name, f"{error}; install it with: pip install 'zimage-rt[{extra}]'")]
    except BackendUnavailable as error:
        return [Probe(name, str(error).removeprefix(f"backend {name!r}: "))]
    except Exception as error:  # a broken library must not hide the other backends
        return [Probe(name, f"{type(error).__name__}: {error}")]
