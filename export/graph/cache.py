"""Traced graphs, kept in the user's cache: most of an export is tracing, and what is traced has no weights.

Fine-tunes of a model share their graphs, so the second export of an architecture skips the tracer. A graph is found by
all that it depends on: the module's architecture and border, this package's own code, and the versions of what traces.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from zimage_rt.atomic_write import write_whole

FOLDER = Path("~/.cache/zimage_rt/graphs")
KEPT = 64  # files; that of zimage-nano's transformer, seven blocks, is 1.3 MB
TRACERS = ("torch", "onnx", "onnxscript", "onnx-ir")


@functools.cache
def _code() -> str:
    """A hash of this package's sources and of the versions of what traces."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    for package in TRACERS:
        digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    return digest.hexdigest()


def cached(key: str, trace: Callable[[], ir.Model], folder: Path | None = FOLDER) -> ir.Model:
    """A graph from an earlier export, or else a new one, which is kept; a cache that cannot be used costs only time.

    Args:
        key: says all that the graph depends on, the code apart.
        trace: makes it; weights without values are for whoever asks to fill in.
        folder: where graphs are kept; None for nowhere.
    """
    if folder is None:
        return trace()
    path = folder.expanduser() / f"{hashlib.sha256((_code() + key).encode()).hexdigest()[:32]}.onnx"
    with contextlib.suppress(Exception):  # not there, or not whole: it is made anew
        model = ir.load(path)
        path.touch()
        return model
    model = trace()
    try:
        _keep(model, path)
    except OSError:
        return model
    return ir.load(path)  # so that the first export and the next ones write the same bytes


def _keep(model: ir.Model, path: Path) -> None:
    """Write a graph; drop the oldest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _serialised(model))
    by_age = sorted(path.parent.glob("*.onnx"), key=lambda file: file.stat().st_mtime)
    for file in by_age[:-KEPT]:
        file.unlink(missing_ok=True)


def _serialised(model: ir.Model) -> bytes:
    """A graph whose weights have no values, which a file cannot hold: each gets a place in a file that is not."""
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
