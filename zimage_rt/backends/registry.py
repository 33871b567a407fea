"""Backends by name, imported only when asked for: each needs a library of its own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ..errors import BackendUnavailable, RequestError
from .base import Backend

# Name → (module, class, the pip extra that brings its library).
BACKENDS: dict[str, tuple[str, str, str]] = {
    "onnxruntime": ("zimage_rt.backends.onnxruntime", "OnnxRuntimeBackend", "onnxruntime"),
    "cuda": ("zimage_rt.backends.cuda", "CudaBackend", "cuda"),
}


def load_backend(name: str, options: Mapping[str, Any]) -> Backend:
    """Build the named backend. Raises BackendUnavailable, naming the extra to install."""
    if name not in BACKENDS:
        raise BackendUnavailable(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    module, attribute, extra = BACKENDS[name]
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise BackendUnavailable(
            f"backend {name!r}: {error}; install it with: pip install 'zimage-rt[{extra}]'"
        ) from error
    try:
        return cls(**options)
    except TypeError as error:
        raise RequestError(f"backend {name!r}: {error}") from error
