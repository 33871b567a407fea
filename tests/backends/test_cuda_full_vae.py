"""The full VAE on the GPU: whole halves against diffusers with random weights, and zimage-nano's in the engine."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_reference import relative_error, require_gpu
from shared import ROOT

import zimage_rt
from zimage_rt.errors import NotFinite, OutOfMemory
from zimage_rt.image.convert import to_uint8

pytestmark = pytest.mark.gpu
require_gpu()

# Whole halves against diffusers, with random weights of the real architecture at a tenth of its work.
WIDTHS = (64, 128, 256, 256)


@pytest.fixture(scope="module")
def random_vae() -> Any:
    pytest.importorskip("diffusers")
    from zimage_rt.benchmarks.full_vae import make_vae

    return make_vae(WIDTHS, seed=0).cuda()


def native(vae: Any, folder: Path, dtype: str) -> Any:
    """A pipeline with both halves of `vae`, stored in `dtype`."""
    from zimage_rt.benchmarks.full_vae import native_pipeline

    return native_pipeline(vae, folder, dtype)


def both_ways(pipeline: Any, vae: Any, height: int, width: int) -> tuple[float, float]:
    """PSNR of our decoder and encoder against diffusers in fp32."""
    from zimage_rt.benchmarks.full_vae import DECODER, ENCODER, reference_decode, reference_encode, signal_to_noise

    rng = np.random.default_rng(8)
    latents = rng.standard_normal((2, 16, height // 8, width // 8)).astype(np.float32)
    image = np.tanh(rng.standard_normal((2, 3, height, width))).astype(np.float32)
    decoded, encoded = pipeline.decode(latents, DECODER), pipeline.encode_image(image, ENCODER)
    return (
        signal_to_noise(decoded, reference_decode(vae, latents)),
        signal_to_noise(encoded, reference_encode(vae, image)),
    )


# Decibels against fp32; a computation with the same roundings on a CPU has 51 to 56 and 69 to 74.
LEAST = {"bfloat16": 45, "float16": 60, "float32": 60}


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (8, 24), (200, 328)])
def test_a_random_vae_is_that_of_diffusers(random_vae, tmp_path, height, width, stored):
    decoded, encoded = both_ways(native(random_vae, tmp_path, stored), random_vae, height, width)
    assert decoded > LEAST[stored] and encoded > LEAST[stored]


def test_loud_activations_do_not_overflow_fp16(random_vae, tmp_path):
    """The residual stream reaches several times fp16's largest number, as on the real weights."""
    import torch

    loud = copy.deepcopy(random_vae)
    for name, parameter in loud.named_parameters():
        if ".conv2." in name or ".conv1." in name or "conv_in." in name or "to_out" in name:
            parameter.data *= 1e5
    halved = copy.deepcopy(loud).half()
    latents = torch.randn(1, 16, 16, 16, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    with torch.no_grad():
        assert not torch.isfinite(halved.decode(latents.half()).sample).all(), "not loud enough to test anything"
    decoded, encoded = both_ways(native(loud, tmp_path, "float32"), loud, 128, 192)
    assert decoded > LEAST["float16"] and encoded > LEAST["float16"]


# Of a whole half against fp32; a computation with the same roundings on a CPU has half of it.
ENGINE_TOLERANCE = {"bf16": 1e-2, "fp16": 1.2e-3}


# zimage-nano's own full VAE in the engine, beside ONNX Runtime.
@pytest.fixture(scope="module", params=["bf16", "fp16"])
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> zimage_rt.Engine:
    from zimage_rt.export.bundle import export
    from zimage_rt.export.recipe import read_recipe

    out = tmp_path_factory.mktemp("full") / "bundle"
    recipe = read_recipe(ROOT / "engines" / f"nano-{request.param}.toml")
    export(replace(recipe, out=out, vae=("tiny", "full"), backend="cuda"))
    return zimage_rt.Engine.load(out, backend="cuda")


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (26, 140)])
def test_the_full_vae_is_that_of_onnxruntime(full, reference, height, width):
    latents = np.random.default_rng(9).standard_normal((2, 16, height, width)).astype(np.float32)
    image = reference.pipeline.module("full_vae_decoder")({"latents": latents})["image"]
    tolerance = ENGINE_TOLERANCE[full.manifest.precision]
    assert relative_error(full.pipeline.module("full_vae_decoder")({"latents": latents})["image"], image) < tolerance
    assert np.abs(full.decode(latents, "full").astype(float) - to_uint8(image)).mean() < 0.5
    encoded = reference.pipeline.module("full_vae_encoder")({"image": image})["latents"]
    assert relative_error(full.pipeline.module("full_vae_encoder")({"image": image})["latents"], encoded) < tolerance
    pixels = to_uint8(image)
    assert relative_error(full.encode_image(pixels, "full"), reference.encode_image(pixels, "full")) < tolerance
    tiled = [engine.decode(latents, "full", tile=128) for engine in (full, reference)]
    assert np.abs(tiled[0].astype(float) - tiled[1]).mean() < 0.5


def test_it_is_the_default_and_both_vaes_share_an_engine(full):
    options = {"seed": 1, "num_inference_steps": 2}
    default = full.generate("a panda", **options).images.tobytes()
    tiny = full.generate("a panda", vae="tiny", **options).images.tobytes()
    assert tiny != default
    for _ in range(2):  # replayed graphs, each of its own decoder
        assert full.generate("a panda", vae="full", **options).images.tobytes() == default
        assert full.generate("a panda", vae="tiny", **options).images.tobytes() == tiny
    previews = []
    full.generate("a panda", **options, callback=lambda info: previews.append(info.preview()))
    assert len(previews) == 2 and full.generate("a panda", **options).images.tobytes() == default


def test_a_picture_is_drawn_from_another(full):
    image = full.generate("a panda", seed=1, num_inference_steps=2).images[0]
    options = {"image": image, "strength": 0.5, "seed": 2, "num_inference_steps": 2}
    first = full.generate("a panda", **options).images
    assert first.shape == image[None].shape and full.generate("a panda", **options).images.tobytes() == first.tobytes()


def test_latents_that_are_not_finite_are_found(full):
    latents = np.zeros((1, 16, 32, 32), np.float32)
    latents[0, 3, 4, 5] = np.inf
    with pytest.raises(NotFinite, match="full_vae_decoder"):
        full.decode(latents, "full")


def test_what_does_not_fit_is_decoded_in_tiles(full, monkeypatch, caplog):
    """The same tiles as with `vae_tile`, at the first limit that the loop and a tile fit into."""
    from zimage_rt.backends import cuda

    monkeypatch.setattr(cuda, "TILE", 256)
    options = {"seed": 1, "num_inference_steps": 1, "height": 1024, "width": 1024}
    expected = full.generate("a panda", vae_tile=256, **options).images
    weights = full.pipeline.memory()["weights"]
    for megabytes in range(40, 1000, 20):  # the whole decoder takes 280 with nano's widths
        limit = {"memory_limit": weights + (megabytes << 20)}
        caplog.clear()
        with zimage_rt.Engine.load(full.pipeline._bundle, backend="cuda", backend_options=limit) as engine:
            try:
                images = engine.generate("a panda", **options).images
            except OutOfMemory:
                continue
        break
    assert "tiles of 256 pixels" in caplog.text
    assert np.abs(images.astype(float) - expected).mean() < 0.5
