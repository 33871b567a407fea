"""Attention that TensorRT does not fuse, split into pieces: the same results, and plans that fit at 2048 x 2048."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import onnx  # noqa: E402
from export_checkpoints import recipe  # noqa: E402
from zimage_rt.export.builders import tensorrt_rtx  # noqa: E402
from zimage_rt.export.checkpoint import open_checkpoint  # noqa: E402
from zimage_rt.export.errors import BuildError  # noqa: E402
from zimage_rt.export.graph.attention import count_pieces, cut_queries, find_attentions  # noqa: E402
from zimage_rt.export.parity.measure import session  # noqa: E402
from zimage_rt.export.plan import plan_modules  # noqa: E402
from zimage_rt.export.precision import FP32  # noqa: E402
from zimage_rt.export.tensorrt_options import TensorRTOptions  # noqa: E402

from zimage_rt.bundle.manifest import EngineSpec, ShapeRange, read_manifest  # noqa: E402

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install 'zimage-rt[tensorrt-rtx]'"
)
SIDE_2048 = ShapeRange(64, 256, 2048, 16)


def graph_of(bundle: Path, module: str) -> onnx.ModelProto:
    return onnx.load(bundle / f"{module}.onnx", load_external_data=False)


@pytest.mark.parametrize(
    ("module", "count"), [("text_encoder", 0), ("context_refiner", 1), ("transformer", 3), ("full_vae_encoder", 1)]
)
def test_every_attention_without_a_mask_is_found(small_bundle: Path, module: str, count: int):
    """One per layer of the small checkpoint; those of the text encoder have causal masks."""
    assert len(find_attentions(graph_of(small_bundle, module).graph)) == count


@pytest.mark.parametrize("pieces", [1, 2, 3, 16])
def test_pieces_compute_what_the_whole_computes(small_bundle: Path, tmp_path: Path, pieces: int):
    """Also if they do not divide the queries, and if there are more pieces than rows of latents."""
    whole = graph_of(small_bundle, "full_vae_decoder")
    (attention,) = find_attentions(whole.graph)
    # External data must be in the graph's folder, and other tests share the bundle.
    shutil.copy(small_bundle / "full_vae_decoder.safetensors", tmp_path)
    onnx.save(cut_queries(whole, {attention.queries: pieces}), tmp_path / "cut.onnx")
    cut, expected = session(tmp_path / "cut.onnx"), session(small_bundle / "full_vae_decoder.onnx")
    nodes = sum(node.op_type == "Softmax" for node in cut_queries(whole, {attention.queries: pieces}).graph.node)
    assert nodes == pieces
    rng = np.random.default_rng(pieces)
    for shape in ((1, 16, 8, 8), (2, 16, 10, 14), (1, 16, 2, 6)):
        latents = rng.standard_normal(shape, dtype=np.float32)
        (wanted,), (got,) = (run.run(None, {"latents": latents}) for run in (expected, cut))
        # fp32 sums in another order, as ONNX Runtime fuses other nodes; images are in [-1, 1].
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_attention_of_small_images_is_not_split():
    assert count_pieces(8, 32 * 32, 32 * 32) == 1
    assert count_pieces(2, 128 * 128, 128 * 128) == 1  # 1024 x 1024
    assert count_pieces(8, 128 * 128, 128 * 128) == 8
    assert count_pieces(1, 256 * 256, 256 * 256) == 64


def build(bundle: Path, checkpoint: Path, name: str, folder: Path, **shapes: Any) -> EngineSpec:
    """Builds a plan of one of the small bundle's VAEs in fp32, like the full VAE of an fp16 bundle."""
    plans = plan_modules(open_checkpoint(checkpoint), FP32, ("full",))
    plan = next(plan for plan in plans if plan.name == name)
    options = TensorRTOptions(sm=(89,), optimization_level=0)
    given = recipe(checkpoint, folder / "out", tensorrt=options)
    given = dataclasses.replace(given, shapes=dataclasses.replace(given.shapes, **shapes))
    pipeline = read_manifest(bundle).pipeline
    (engine,) = tensorrt_rtx.build(plan, bundle / f"{name}.onnx", folder, given, pipeline, lambda *_: None)
    return engine


@needs_rtx
@pytest.mark.parametrize("name", ["full_vae_decoder", "full_vae_encoder"])
def test_the_full_vae_builds_at_2048(small_bundle: Path, small_checkpoint: Path, tmp_path: Path, name: str):
    """Unsplit, the scores of an image take 17 GB in fp32, twice."""
    shapes = {"height": SIDE_2048, "width": SIDE_2048, "batch": ShapeRange(1, 1, 1)}
    engine = build(small_bundle, small_checkpoint, name, tmp_path, **shapes)
    assert (tmp_path / engine.file).stat().st_size > 100_000
    assert 0 < engine.activation_bytes < 8e9


@needs_rtx
def test_a_batch_too_large_for_a_tensor_is_split(small_bundle: Path, small_checkpoint: Path, tmp_path: Path):
    """The bundle serves 16 images of 2048 x 2048, of which the VAE's plan runs 15 at a time."""
    shapes = {"height": SIDE_2048, "width": SIDE_2048, "batch": ShapeRange(1, 1, 16)}
    engine = build(small_bundle, small_checkpoint, "full_vae_decoder", tmp_path, **shapes)
    (profile,) = engine.profiles
    # 32 channels of 2048 x 2048 are 2^27 elements, and a tensor may have 2^31 - 1.
    assert profile["latents"].max == (15, 16, 256, 256)
    assert profile["latents"].min == (1, 16, 8, 8)


@needs_rtx
def test_one_image_too_large_for_a_tensor_is_refused_by_name(
    small_bundle: Path, small_checkpoint: Path, tmp_path: Path
):
    side = ShapeRange(64, 256, 8192, 16)
    with pytest.raises(BuildError, match=r"full_vae_decoder: at batch 8, latent_height 1024, .* elements") as info:
        build(small_bundle, small_checkpoint, "full_vae_decoder", tmp_path, height=side, width=side)
    assert "`max` under [shapes] or [[tensorrt.profiles]]" in str(info.value)
    assert "split" not in str(info.value)
