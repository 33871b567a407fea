"""Every feature of a request on the `cuda` backend, beside the same request on ONNX Runtime in fp32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_reference import require_gpu
from zimage_rt.benchmarks.fidelity import psnr

from zimage_rt.request.types import SecondPass
from zimage_rt.session import Session

pytestmark = pytest.mark.gpu
require_gpu()

PROMPT, EDIT = "a red apple on the left and a house on the right, green background", "a panda on the left"
LEFT = np.zeros((256, 256), np.uint8)
LEFT[:, :128] = 255

# PSNR in dB of the worst precision, bf16: what samplers of a higher order do to its rounding included.
FEATURES: dict[str, dict[str, Any]] = {
    "image to image": {"image": True, "strength": 0.6},
    "a little retouching": {"image": True, "strength": 0.3, "num_inference_steps": 12},
    "inpainting": {"image": True, "strength": 1.0, "mask": LEFT},
    "inpainting with a soft edge": {"image": True, "strength": 0.8, "mask": LEFT, "mask_feather": 12.0},
    "truncated guidance": {"guidance_scale": 2.0, "negative_prompt": "a dog", "cfg_truncation": 0.7},
    "normalised guidance": {"guidance_scale": 2.0, "cfg_normalization": 1.0},
    "dynamic guidance": {"guidance_scale": 2.0, "dynamic_cfg": 1.0},
    "heun": {"sampler": "heun", "num_inference_steps": 5},
    "dpmpp_2m, karras": {"sampler": "dpmpp_2m", "schedule": "karras"},
    "dpmpp_2m, beta": {"sampler": "dpmpp_2m", "schedule": "beta"},
    "res_multistep, simple": {"sampler": "res_multistep", "schedule": "simple"},
    "euler_ancestral": {"sampler": "euler_ancestral"},
    "dpmpp_3m_sde, simple": {"sampler": "dpmpp_3m_sde", "schedule": "simple"},
    "uni_pc, another shift": {"sampler": "uni_pc", "schedule": "simple", "shift": 2.0},
    "own sigmas": {"sigmas": [1.0, 0.8, 0.5, 0.25]},
    "two passes over pixels": {"second_pass": SecondPass(1.5, 0.4, "pixel")},
    "two passes over latents": {"second_pass": SecondPass(1.5, 0.5, "latent")},
    "tiles": {"vae_tile": 128, "height": 256, "width": 320},
}


@pytest.fixture(scope="module")
def original(reference):
    return reference.generate(PROMPT, seed=3).images[0]


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_is_that_of_onnxruntime(cuda, reference, original, name):
    options = dict(FEATURES[name])
    if options.get("image"):
        options["image"] = original
    prompt = EDIT if "mask" in options else PROMPT
    ours = cuda.generate(prompt, seed=5, **options).images[0]
    theirs = reference.generate(prompt, seed=5, **options).images[0]
    assert psnr(ours, theirs) >= {"bf16": 30, "fp16": 38}[cuda.manifest.precision]
    if name == "inpainting":
        assert (ours[:, 128:] == original[:, 128:]).all()


@pytest.mark.parametrize(
    "name", ["inpainting", "truncated guidance", "heun", "dpmpp_2m, karras", "dpmpp_3m_sde, simple"]
)
def test_a_feature_gives_the_same_bytes_by_graph_and_by_step(bf16, original, name):
    options = dict(FEATURES[name])
    if options.get("image"):
        options["image"] = original
    first, again = (bf16.generate(PROMPT, seed=5, **options).images for _ in range(2))
    stepped = bf16.generate(PROMPT, seed=5, callback=lambda info: None, **options).images
    assert first.tobytes() == again.tobytes() == stepped.tobytes()


def test_previews_do_not_change_the_image(bf16):
    plain = bf16.generate(PROMPT, seed=5).images
    previews = []
    seen = bf16.generate(PROMPT, seed=5, callback=lambda info: previews.append(info.preview()) or True).images
    assert seen.tobytes() == plain.tobytes()
    assert psnr(previews[-1][0], plain[0]) > 40


def test_a_session_edits_and_undoes(bf16):
    session = Session(bf16)
    drawn = session.generate(PROMPT, seed=3).images[0]
    edited = session.edit(EDIT, mask=LEFT).images[0]
    assert (edited[:, 128:] == drawn[:, 128:]).all()
    assert (edited[:, :128] != drawn[:, :128]).any()
    undone = session.undo()
    assert undone is not None
    assert undone.images[0].tobytes() == drawn.tobytes()
