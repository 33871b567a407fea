"""The engine reads nothing that the manifest does not name, and nothing outside of the bundle's folder."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from shared import copy_bundle

import zimage_rt
from zimage_rt.bundle.manifest import read_manifest, write_manifest
from zimage_rt.bundle.onnx_files import external_files
from zimage_rt.bundle.verify import hash_file
from zimage_rt.errors import BundleMismatch

MODULE = "tiny_vae_decoder"


def bundle_with_graph(bundle: Path, folder: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    """A copy of a bundle whose tiny decoder's graph is another one, with its hash in the manifest."""
    copy_bundle(bundle, folder, MODULE)
    path = folder / f"{MODULE}.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    manifest = read_manifest(folder)
    files = {**manifest.files, path.name: hash_file(path)}
    write_manifest(dataclasses.replace(manifest, files=files), folder)
    return folder


def relocate(location: str) -> Callable[[onnx.ModelProto], object]:
    def change(model: onnx.ModelProto) -> None:
        entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
        locations = [entry for entry in entries if entry.key == "location"]
        assert locations
        locations[-1].value = location

    return change


@pytest.mark.parametrize("location", ["../outside.safetensors", "transformer.safetensors", "/etc/hostname"])
def test_a_graph_reads_its_own_weights_alone(bundle: Path, tmp_path: Path, location: str) -> None:
    shutil.copy(bundle / f"{MODULE}.safetensors", tmp_path / "outside.safetensors")
    engine = zimage_rt.Engine.load(bundle_with_graph(bundle, tmp_path / "copy", relocate(location)))
    with pytest.raises(BundleMismatch, match=f"got a graph that reads '{location}', which the manifest does not name"):
        engine.generate("a cat", height=64, width=64, num_inference_steps=1)


def test_a_graph_that_is_as_it_was_exported_is_read(bundle: Path, tmp_path: Path) -> None:
    copy = bundle_with_graph(bundle, tmp_path / "copy", lambda model: None)
    fields = {"seed": 1, "height": 64, "width": 64, "num_inference_steps": 1}
    ours, theirs = (zimage_rt.Engine.load(path).generate("a cat", **fields).images for path in (copy, bundle))
    assert ours.tobytes() == theirs.tobytes()


def test_a_graph_that_is_none_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = bundle_with_graph(bundle, tmp_path / "copy", lambda model: None)
    manifest = read_manifest(copy)
    path = copy / f"{MODULE}.onnx"
    path.write_bytes(path.read_bytes()[:-7])
    write_manifest(dataclasses.replace(manifest, files={**manifest.files, path.name: hash_file(path)}), copy)
    with pytest.raises(BundleMismatch, match="no ONNX graph"):
        zimage_rt.Engine.load(copy).generate("a cat", height=64, width=64, num_inference_steps=1)


def external(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="offset", value="0")
    return tensor


def test_external_data_is_found_wherever_a_graph_can_hold_it() -> None:
    """Initialisers, constants of nodes, graphs inside of nodes, sparse tensors, functions."""
    inner = helper.make_graph([], "inner", [], [], [external("a", "in-a-branch")])
    nodes = [
        helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=helper.make_graph([], "e", [], [])),
        helper.make_node("Constant", [], ["c"], value=external("b", "in-a-constant")),
    ]
    graph = helper.make_graph(nodes, "outer", [], [], [external("d", "in-the-graph")])
    sparse = graph.sparse_initializer.add()
    sparse.values.CopyFrom(external("e", "in-a-sparse-tensor"))
    function = helper.make_function(
        "f", "F", [], ["o"], [helper.make_node("Constant", [], ["o"], value=external("g", "in-a-function"))], []
    )
    model = helper.make_model(graph, functions=[function])
    assert external_files(model.SerializeToString()) == {
        "in-a-branch",
        "in-a-constant",
        "in-the-graph",
        "in-a-sparse-tensor",
        "in-a-function",
    }


def test_a_compiled_program_inside_a_graph_is_refused() -> None:
    node = helper.make_node("EPContext", [], ["y"], domain="com.microsoft", embed_mode=0, ep_cache_context="program")
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    with pytest.raises(ValueError, match="compiled program"):
        external_files(model.SerializeToString())
