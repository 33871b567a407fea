"""Requests are checked before any work is done."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from manifests import small_manifest

from zimage_rt.errors import RequestError
from zimage_rt.request.resolve import resolve
from zimage_rt.request.types import GenerateRequest
from zimage_rt.sampling.schedules import flow_match_sigmas, schedule_sigmas


def manifest():
    base = small_manifest()
    module = base.modules["t"]
    return dataclasses.replace(base, modules={"t": module, "tiny_vae_decoder": module})


BEGIN = {"image_latents": np.zeros((1, 16, 32, 32), np.float32)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "prompt: expected some text"),
        ({"prompt": []}, "prompt: expected at least one"),
        ({"prompt": 7}, "prompt: expected a string"),
        ({"prompt": ["a", " "]}, "prompt: expected some text"),
        ({"prompt": "a \ud83d cat"}, r"prompt: expected text, got half of a character \(U\+D83D\) at position 2"),
        ({"negative_prompt": "\udc00"}, r"negative_prompt: expected text, got half of a character \(U\+DC00\)"),
        ({"height": 250}, "height: expected 64 to 512 in steps of 16, got 250; the nearest are 240 and 256: choose"),
        ({"width": 513}, "width: .* got 513; the nearest is 512: choose it, or let fit_size='nearest' take 512"),
        ({"width": 529, "fit_size": "nearest"}, "width: expected 64 to 512 in steps of 16, got 529; choose a size in"),
        ({"fit_size": "any"}, "fit_size: expected one of exact, nearest"),
        ({"shift": 0}, "shift: expected more than 0"),
        ({"shift": float("inf")}, "shift: expected a finite number"),
        ({"shift": "3"}, "shift: expected a number"),
        ({"denoise": 0.5}, "denoise: expected an image to begin with"),
        ({"denoise": 0, **BEGIN}, "denoise: expected more than 0"),
        ({"denoise": 1.5, **BEGIN}, "denoise: expected at most 1"),
        ({"denoise": 0.001, **BEGIN}, "denoise: expected at least 0.008 with 8 steps"),
        ({"denoise": 0.5, "sigmas": (1.0, 0.5), **BEGIN}, "denoise: expected none beside `sigmas`"),
        ({"batch_noise": "mine"}, "batch_noise: expected one of separate, comfyui"),
        ({"batch_noise": "comfyui", "num_images": 2, "seed": [1, 2]}, "seed: expected one for all images"),
        ({"truncate_prompt": 1}, "truncate_prompt: expected True or False"),
        ({"sampler": "magic"}, "sampler: expected one of euler, heun, .*, got 'magic'"),
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
        ({"latents": np.full((1, 16, 32, 32), np.inf, np.float32)}, "latents: .*got values that are not fin"),
        ({"latents": np.full((1, 16, 32, 32), np.nan, np.float32)}, "latents: .*got values that are not fin"),
        ({"latents": np.zeros((1, 16, 32, 32))}, "latents: expected finite float32 values, got float64"),
        (
            {"image": np.zeros((10, 256, 3), np.uint8)},
            "height: expected 64 to 512 in steps of 16, got 10 from the image; give height and width to scale it",
        ),
        ({"image": np.zeros((256, 1000, 3), np.uint8)}, "width: .* got 1000 from the image; give height and width to"),
        (
            {"image": np.zeros((256, 1000, 3), np.uint8), "width": 1000},
            "width: .* got 1000; the nearest|got 1000; choo",
        ),
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


@pytest.mark.parametrize(
    "fields", [{"guidance_scale": 1.0}, BEGIN, {"image": np.zeros((256, 256, 3), np.uint8)}, {"prompt": ["a", "b"]}]
)
def test_an_empty_prompt_goes_with_guidance_or_an_image(fields: dict) -> None:
    base = manifest()
    full = dataclasses.replace(base, modules={**base.modules, "tiny_vae_encoder": base.modules["t"]})
    resolved = resolve(GenerateRequest(**{"prompt": "", **fields}), full)
    assert resolved.prompts[0] == fields.get("prompt", [""])[0]


@pytest.mark.parametrize(
    ("decoders", "graph", "drawn"),
    [
        (["tiny", "full"], "t.onnx", "tiny"),
        (["tiny", "full"], None, "full"),  # exported for the cuda backend
        (["tiny"], None, "tiny"),
        (["full"], "t.onnx", "full"),
    ],
)
def test_the_vae_of_a_request_that_names_none(decoders: list[str], graph: str | None, drawn: str) -> None:
    base = manifest()
    module = dataclasses.replace(base.modules["t"], graph=graph)
    bundle = dataclasses.replace(base, modules={f"{vae}_vae_decoder": module for vae in decoders})
    assert resolve(GenerateRequest("a"), bundle).vae == drawn
    assert resolve(GenerateRequest("a", vae=decoders[0]), bundle).vae == decoders[0]


@pytest.mark.parametrize(
    ("size", "taken"), [(250, 256), (247, 240), (248, 240), (256, 256), (66, 64), (60, 64), (513, 512)]
)
def test_the_nearest_size_is_taken_on_request(size: int, taken: int) -> None:
    resolved = resolve(GenerateRequest("a", height=size, width=256, fit_size="nearest"), manifest())
    assert (resolved.height, resolved.width) == (taken, 256)


def test_shift_and_denoise_make_the_sigmas() -> None:
    own = manifest().pipeline.shift
    assert resolve(GenerateRequest("a"), manifest()).shift == own
    shifted = resolve(GenerateRequest("a", shift=own * 2), manifest())
    assert shifted.shift == own * 2
    np.testing.assert_array_equal(shifted.sigmas, flow_match_sigmas(8, own * 2))
    again = resolve(GenerateRequest("a", num_inference_steps=9, denoise=0.7, schedule="simple", **BEGIN), manifest())
    np.testing.assert_array_equal(again.sigmas, schedule_sigmas("simple", 12, own)[-10:])
    whole = resolve(GenerateRequest("a", denoise=1.0), manifest())
    np.testing.assert_array_equal(whole.sigmas, flow_match_sigmas(8, own))


def test_samplers_that_would_waste_a_step_get_another_schedule() -> None:
    own = manifest().pipeline.shift
    resolved = resolve(GenerateRequest("a", sampler="dpm_2", schedule="simple"), manifest())
    nine = schedule_sigmas("simple", 9, own)
    np.testing.assert_array_equal(resolved.sigmas, [*nine[:8], 0])
