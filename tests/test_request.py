"""Requests are checked before any work is done."""

from __future__ import annotations

import numpy as np
import pytest
from test_manifest import small_manifest

from zimage_rt.errors import RequestError
from zimage_rt.request import GenerateRequest, resolve


def manifest():
    import dataclasses

    base = small_manifest()
    module = base.modules["transformer"]
    return dataclasses.replace(base, modules={"transformer": module, "tiny_vae_decoder": module})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "prompt: expected some text"),
        ({"prompt": []}, "prompt: expected at least one"),
        ({"prompt": 7}, "prompt: expected a string"),
        ({"height": 250}, "height: expected 64 to 512 in steps of 16, got 250"),
        ({"width": 4096}, "width: expected 64 to 512"),
        ({"width": 256.0}, "width: expected a whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected 1 to 1000, got 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a finite number"),
        ({"guidance_scale": -1}, "guidance_scale: expected a finite number"),
        ({"num_images": 5}, "num_images: expected 1 to 4"),
        ({"prompt": ["a", "b", "c"], "num_images": 2}, "batch: expected at most 4"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, "negative_prompt: expected 1 or 3"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"seed": [1, 2]}, "seed: expected one number or 1 of them"),
        ({"vae": "huge"}, "vae: expected tiny or full"),
        ({"vae": "full"}, "this bundle has no full VAE"),
        ({"latents": np.zeros((1, 16, 8, 8), np.float32)}, r"latents: expected \[1, 16, 32, 32\]"),
        ({"latents": np.full((1, 16, 32, 32), np.inf, np.float32)}, "latents: expected finite"),
    ],
)
def test_impossible_requests_are_named(fields: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        resolve(GenerateRequest(**{"prompt": "a cat", **fields}), manifest())


def test_defaults_and_batches() -> None:
    one = resolve(GenerateRequest("a cat", seed=5), manifest())
    assert (one.height, one.width, len(one.sigmas), one.guidance_scale) == (256, 256, 9, 0.0)
    assert one.seeds == (5,)
    four = resolve(GenerateRequest(["a", "b"], seed=5, num_images=2), manifest())
    assert four.prompts == ("a", "a", "b", "b")
    assert four.seeds == (5, 6, 7, 8)
    assert resolve(GenerateRequest("a"), manifest()).seeds != resolve(GenerateRequest("a"), manifest()).seeds
