"""The cache of traced graphs: hits, damaged files, and folders that cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

ir = pytest.importorskip("onnx_ir")
torch = pytest.importorskip("torch")

from zimage_rt.export.graph import cache as graph_cache  # noqa: E402
from zimage_rt.export.graph.trace import trace  # noqa: E402

from zimage_rt.bundle.manifest import TensorSpec  # noqa: E402


class Tracer:
    """Traces a small layer and counts the traces."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> ir.Model:
        self.count += 1
        with torch.device("meta"):
            module = torch.nn.Linear(4, 3)
        border = (TensorSpec("prompt_embeds", "float32", ("batch", 4)), TensorSpec("context", "float32", ("batch", 3)))
        return trace(module, border[:1], border[1:], {})


def described(model: ir.Model) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    graph = model.graph
    weights = [(str(name), str(value.shape)) for name, value in graph.initializers.items()]
    return [node.op_type for node in graph], weights, [str(value.shape) for value in graph.inputs]


def test_a_graph_is_traced_once(tmp_path: Path) -> None:
    tracer = Tracer()
    first, second = (graph_cache.cached("key", tracer, tmp_path) for _ in range(2))
    assert tracer.count == 1
    assert described(first) == described(second) == described(tracer())
    assert [path.suffix for path in tmp_path.iterdir()] == [".onnx"]
    graph_cache.cached("another", tracer, tmp_path)
    assert tracer.count == 3


def test_a_damaged_file_is_traced_again(tmp_path: Path) -> None:
    tracer = Tracer()
    graph_cache.cached("key", tracer, tmp_path)
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    assert described(graph_cache.cached("key", tracer, tmp_path)) == described(tracer())
    assert kept.read_bytes() == whole


def test_without_a_writable_folder_it_is_traced_each_time(tmp_path: Path) -> None:
    tracer, file = Tracer(), tmp_path / "file"
    file.touch()
    for folder in (None, file):
        graph_cache.cached("key", tracer, folder)
    assert tracer.count == 2


def test_the_oldest_files_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_cache, "KEPT", 2)
    tracer = Tracer()
    for key in "abc":
        graph_cache.cached(key, tracer, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    graph_cache.cached("c", tracer, tmp_path)
    assert tracer.count == 3
