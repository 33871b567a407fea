"""The manifest: what is written is read back, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zimage_rt.errors import BundleMismatch, ManifestError
from zimage_rt.manifest import (
    FileEntry,
    Manifest,
    ModuleSpec,
    Parity,
    ParityCase,
    PipelineSpec,
    ShapeRange,
    ShapeRanges,
    TensorSpec,
    check_file,
    hash_file,
    read_manifest,
    to_json,
    write_manifest,
)


def small_manifest() -> Manifest:
    latents = TensorSpec("latents", "float32", ("batch", 16, "latent_height", "latent_width"))
    parity = Parity("diffusers", "onnxruntime", 1e-4, (ParityCase({"batch": 1}, 1e-6, 1e-5),))
    module = ModuleSpec((latents,), (latents,), "fp32", "t.onnx", "t.safetensors", {"dim": 384}, parity)
    pipeline = PipelineSpec(16, 8, 32, 16, 3.0, "<", ">", 8, 0.0)
    pixels = ShapeRange(64, 256, 512, 16)
    shapes = ShapeRanges(ShapeRange(1, 1, 4), pixels, pixels, ShapeRange(1, 33, 512))
    files = {"t.onnx": FileEntry(3, "ab"), "t.safetensors": FileEntry(4, "cd")}
    return Manifest(
        "nano", "fp32", {"zimage_rt": "1"}, {}, pipeline, shapes, "tokenizer.json", {"transformer": module}, files
    )


def test_round_trip(tmp_path: Path) -> None:
    manifest = small_manifest()
    write_manifest(manifest, tmp_path)
    again = read_manifest(tmp_path)
    assert to_json(again) == to_json(manifest)
    assert again.bundle_id == manifest.bundle_id


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
        (lambda data: data["pipeline"].update(shift="3"), "pipeline.shift: expected float"),
        (lambda data: data["shapes"]["height"].update(min=70), "expected multiples of 16"),
        (lambda data: data.pop("schema_version"), "no schema_version"),
    ],
)
def test_wrong_manifests_are_named(tmp_path: Path, change, message: str) -> None:
    data = to_json(small_manifest())
    change(data)
    (tmp_path / "manifest.json").write_text(json.dumps(data))
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
