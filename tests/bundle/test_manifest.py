"""The manifest: round trips, and errors that name the fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from manifests import small_manifest

from zimage_rt.bundle.json_codec import to_json
from zimage_rt.bundle.manifest import ShapeRange, read_manifest, write_manifest
from zimage_rt.bundle.verify import check_file, hash_file
from zimage_rt.errors import BundleMismatch, ManifestError


def module(data: dict[str, Any]) -> dict[str, Any]:
    return data["modules"]["t"]


def test_round_trip(tmp_path: Path) -> None:
    manifest = small_manifest()
    write_manifest(manifest, tmp_path)
    again = read_manifest(tmp_path)
    assert to_json(again) == to_json(manifest)
    assert again.bundle_id == manifest.bundle_id


def test_a_file_is_no_bundle(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    with pytest.raises(ManifestError, match=r"model\.safetensors is a file; expected a bundle's folder"):
        read_manifest(file)


def test_named_dims() -> None:
    manifest = small_manifest()
    assert manifest.shapes.of("latent_height", manifest.pipeline) == ShapeRange(8, 32, 64, 2)
    assert manifest.shapes.of("context_tokens", manifest.pipeline) == ShapeRange(32, 64, 512, 32)
    with pytest.raises(ManifestError, match="unknown dim 'depth'"):
        manifest.shapes.of("depth", manifest.pipeline)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema_version=99), "expected schema 1, got 99; upgrade"),
        (lambda data: data.update(flavour="mint"), "unknown key 'flavour'"),
        (lambda data: data.pop("shapes"), "missing key 'shapes'"),
        (lambda data: data["pipeline"].update(shift="3"), "pipeline.shift: expected a number, got text '3'"),
        (lambda data: data["shapes"]["height"].update(min=70), "expected multiples of 16"),
        (lambda data: data.pop("schema_version"), "no schema_version"),
        (lambda data: data.update(schema_version=True), "no schema_version"),
        (lambda data: data.update(name=[]), "name: expected a text, got a list"),
        (lambda data: data.update(modules=[]), "modules: expected an object, got a list"),
        (lambda data: data["pipeline"].update(shift=True), "shift: expected a number, got bool True"),
        (lambda data: data["pipeline"].update(shift=10**390), "shift: expected a number, got one that is too large"),
        (lambda data: data["pipeline"].update(shift=0), "shift: expected more than 0"),
        (lambda data: data["pipeline"].update(num_inference_steps=0), "num_inference_steps: expected 1 to"),
        (lambda data: data["pipeline"].update(size_multiple=12), "size_multiple: expected a multiple of 8"),
        (lambda data: data.update(precision="int4"), "precision: expected one of fp32, fp16, bf16"),
        (lambda data: data.update(tokenizer="other.json"), "tokenizer: expected one of the files, got 'other.json'"),
        (lambda data: module(data).update(graph="u.onnx"), "modules.t.graph: expected one of the files"),
        (lambda data: module(data).update(base="t2"), "base: expected a module with weights of its own, got 't2'"),
        (lambda data: module(data).update(precision="int4"), "modules.t.precision: expected one of"),
        (lambda data: module(data)["inputs"][0]["dims"].append(0), "expected sizes of 1 or more, got 0"),
        (lambda data: module(data)["inputs"][0]["dims"].append(True), "expected a whole number or a text, got bool"),
        (lambda data: module(data)["inputs"][0]["dims"].append("depth"), "unknown dim 'depth'"),
        (lambda data: data["modules"].update(transformer=module(data)), "inputs: expected latents, timestep, context"),
        (lambda data: data["files"]["t.onnx"].update(sha256="ab"), "expected a size and a SHA-256"),
        (lambda data: data["files"]["t.onnx"].update(size=-1), "expected a size and a SHA-256"),
        *(
            (lambda data, name=name: data["files"].update({name: data["files"]["t.onnx"]}), "files inside the bundle")
            for name in (
                "../t.onnx",
                "/etc/passwd",
                "a/../../b",
                "a//b",
                "c:t",
                "a\\b",
                "",
                ".",
                "a/.",
                "a\0b",
                "manifest.json",
            )
        ),
    ],
)
def test_wrong_manifests_are_named(tmp_path: Path, change, message: str) -> None:
    data = to_json(small_manifest())
    change(data)
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested deeper than 32"),
        ('{"schema_version": 1, "a": ' + "[" * 40 + "]" * 40 + "}", "nested deeper than 32"),
        ('{"schema_version": 1, "schema_version": 1}', "key 'schema_version' is there twice"),
        ('{"schema_version": 1, "name": NaN}', "NaN is no number"),
        ('{"schema_version": 1, "name": 1e999}', "a number is too large"),
        ('{"schema_version": 1, "name": "\\ud83d"}', "half a surrogate pair"),
        ('{"schema_version": ' + "1" * 5000 + "}", "cannot be read"),
    ],
)
def test_what_json_can_do_is_bounded(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path)


def test_no_bundle_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match=r"no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 1,')
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path)


def test_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"0123456789")
    entry = hash_file(path)
    check_file(tmp_path, "weights", entry)
    path.write_bytes(b"0123456780")
    check_file(tmp_path, "weights", entry, content=False)
    with pytest.raises(BundleMismatch, match="was changed"):
        check_file(tmp_path, "weights", entry)
    path.write_bytes(b"012345678")
    with pytest.raises(BundleMismatch, match="expected 10 bytes, got 9"):
        check_file(tmp_path, "weights", entry)
    path.unlink()
    with pytest.raises(BundleMismatch, match="missing"):
        check_file(tmp_path, "weights", entry)
