"""Cache of traced graphs in the user's cache folder: tracing takes most of an export, and graphs hold no weights.

Fine-tunes of a model share their graphs, so the second export of an architecture skips the tracer. The key covers
everything a graph depends on: the module's architecture, inputs and outputs, the code of `export/`, and the versions of
the tracers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from zimage_rt.atomic_write import atomic_write

FOLDER = Path("~/.cache/zimage_rt/graphs")
KEPT = 64  # files; the graph of zimage-nano's transformer (seven blocks) takes 1.3 MB
TRACERS = ("torch", "onnx", "onnxscript", "onnx-ir")


@functools.cache
def _code() -> str:
    """Hash of the sources of `export/` and of the tracers' versions."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    for package in TRACERS:
        digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    return digest.hexdigest()


def cached(key: str, trace: Callable[[], ir.Model], folder: Path | None = FOLDER) -> ir.Model:
    """Returns a cached graph, or traces and stores it. A broken or read-only cache only costs time.

    Args:
        key: everything the graph depends on, except for code.
        trace: makes the graph, with weights that have no values.
        folder: the cache; None for no cache.
    """
    if folder is None:
        return trace()
    path = folder.expanduser() / f"{hashlib.sha256((_code() + key).encode()).hexdigest()[:32]}.onnx"
    with contextlib.suppress(Exception):  # missing or damaged: traced again
        model = ir.load(path)
        path.touch()
        return model
    model = trace()
    try:
        _keep(model, path)
    except OSError:
        return model
    return ir.load(path)  # so that the first export writes the same bytes as later ones


def _keep(model: ir.Model, path: Path) -> None:
    """Writes a graph and deletes the oldest files beyond `KEPT`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, _serialised(model))
    by_age = sorted(path.parent.glob("*.onnx"), key=lambda file: file.stat().st_mtime)
    for file in by_age[:-KEPT]:
        file.unlink(missing_ok=True)


def _serialised(model: ir.Model) -> bytes:
    """Serialises a graph; each weight without a value becomes external data of a file that does not exist."""
    tensors = {value.name: value.const_value for value in model.graph.initializers.values()}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and getattr(tensor.raw, "is_meta", False):
            value.const_value = ir.ExternalTensor(
                "none", 0, 0, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=str(value.name)
            )
    try:
        content: bytes = ir.to_proto(model).SerializeToString()
    finally:
        for value in model.graph.initializers.values():
            value.const_value = tensors[value.name]
    return content
