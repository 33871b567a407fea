"""A manifest with one module, for tests that load no bundle."""

from __future__ import annotations

from zimage_rt.bundle.manifest import (
    FileEntry,
    Manifest,
    ModuleSpec,
    Parity,
    ParityCase,
    PipelineSpec,
    ShapeRange,
    ShapeRanges,
    TensorSpec,
)


def small_manifest() -> Manifest:
    latents = TensorSpec("latents", "float32", ("batch", 16, "latent_height", "latent_width"))
    parity = Parity("diffusers", "onnxruntime", 1e-4, (ParityCase({"batch": 1}, 1e-6, 1e-5),))
    module = ModuleSpec((latents,), (latents,), "fp32", "t.onnx", "t.safetensors", {"dim": 384}, parity)
    pipeline = PipelineSpec(16, 8, 32, 16, 3.0, "<", ">", 8, 0.0)
    pixels = ShapeRange(64, 256, 512, 16)
    shapes = ShapeRanges(ShapeRange(1, 1, 4), pixels, pixels, ShapeRange(1, 33, 512))
    files = {name: FileEntry(3, "ab" * 32) for name in ("t.onnx", "t.safetensors", "tokenizer.json")}
    return Manifest("nano", "fp32", {"zimage_rt": "1"}, {}, pipeline, shapes, "tokenizer.json", {"t": module}, files)
