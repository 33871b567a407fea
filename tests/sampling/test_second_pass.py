"""Two passes in one request, and decoding in tiles, on zimage-nano."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from zimage_rt.benchmarks.fidelity import psnr

import zimage_rt
from zimage_rt.errors import Cancelled, RequestError
from zimage_rt.image.tiled_decode import decode_tiled
from zimage_rt.request.types import SecondPass

PROMPT = "a red apple, green background"


@pytest.mark.parametrize("method", ["pixel", "latent"])
def test_a_draft_is_drawn_again_at_twice_its_size(engine: zimage_rt.Engine, method: str) -> None:
    options: dict[str, Any] = {"seed": 4, "height": 128, "width": 192}
    # Barely: with more strength nano, whose drawings have one size, draws them at that size.
    result = engine.generate(PROMPT, second_pass=SecondPass(2.0, 0.1, method), **options)
    assert result.images.shape == (1, 256, 384, 3)
    assert set(result.timings) == {"encode_prompt", "denoise", "upscale", "decode", "total"}
    smaller = result.images[0].reshape(128, 2, 192, 2, 3).mean(axis=(1, 3)).astype(np.uint8)
    same, other = (engine.generate(p, **options).images[0] for p in (PROMPT, "a house, green background"))
    # What is drawn, not how it rounds: the same drawing's edges are sharper, another drawing has other ones.
    assert psnr(smaller, same) > 15
    assert psnr(smaller, same) > psnr(smaller, other) + 3


def test_the_second_pass_is_image_to_image_over_the_first(engine: zimage_rt.Engine) -> None:
    """Refining is the second request that one would send by hand, with the same noise."""
    refined = engine.generate(PROMPT, seed=4, second_pass=SecondPass(1.0, 0.3, num_inference_steps=12)).images[0]
    first = engine.generate(PROMPT, seed=4).images[0]
    by_hand = engine.generate(PROMPT, seed=4, image=first, strength=0.3, num_inference_steps=12).images[0]
    assert refined.tobytes() == by_hand.tobytes()


def test_callbacks_know_the_pass_and_may_stop_either(engine: zimage_rt.Engine) -> None:
    seen: list[tuple[int, int, int]] = []
    options: dict[str, Any] = {"seed": 1, "height": 64, "width": 64, "second_pass": SecondPass(2.0, 0.5)}
    engine.generate(PROMPT, callback=lambda info: seen.append((info.stage, info.step, info.num_steps)), **options)
    assert seen == [(0, i, 8) for i in range(8)] + [(1, i, 4) for i in range(4)]
    with pytest.raises(Cancelled):
        engine.generate(PROMPT, callback=lambda info: info.stage == 0, **options)


@pytest.mark.parametrize(
    ("again", "message"),
    [
        (SecondPass(scale=40.0), "second_pass.scale: 40 times height 256 is 10240; this bundle serves 64 to 2048"),
        (SecondPass(scale=float("nan")), "second_pass.scale"),
        (SecondPass(strength=0.0), "strength: expected more than 0"),
        (SecondPass(method="magic"), "second_pass.method: expected one of pixel, latent, got 'magic'"),
        (SecondPass(num_inference_steps=0), "num_inference_steps: expected 1 to 1000, got 0"),
        (2.0, "second_pass: expected a SecondPass, got float"),
    ],
)
def test_nonsense_is_refused(engine: zimage_rt.Engine, again: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        engine.generate(PROMPT, second_pass=again)
    assert message in str(caught.value)


@pytest.mark.parametrize(("vae", "level"), [("tiny", 40), ("full", 25)])
def test_tiles_show_the_same_image(engine: zimage_rt.Engine, vae: str, level: float) -> None:
    options: dict[str, Any] = {"seed": 4, "height": 320, "width": 512, "vae": vae, "num_inference_steps": 4}
    whole = engine.generate(PROMPT, **options).images[0]
    tiled = engine.generate(PROMPT, vae_tile=256, **options).images[0]
    # How much a tile misses of what lies beyond it is the model's, and a hundred times what fp32 rounds: the full VAE
    # norms over all it sees and attends everywhere, so its tiles are not the whole's.
    assert psnr(whole, tiled) > level
    # No seams: no column steps more from its neighbour than in the whole image, with some room.
    steps = [np.abs(np.diff(image.astype(float), axis=1)).mean(axis=(0, 2)).max() for image in (whole, tiled)]
    assert steps[1] < 1.5 * steps[0] + 1


@pytest.mark.parametrize(("height", "width", "tile"), [(8, 8, 64), (9, 30, 64), (17, 17, 128), (40, 8, 64)])
def test_tiles_cover_every_pixel_with_weights_of_one(height: int, width: int, tile: int) -> None:
    latents = np.random.default_rng(0).integers(0, 255, (2, 3, height, width)).astype(np.float32)

    def nearest(part: np.ndarray) -> np.ndarray:
        assert part.shape[2] <= tile // 8
        assert part.shape[3] <= tile // 8
        return part.astype(np.uint8).repeat(8, 2).repeat(8, 3).transpose(0, 2, 3, 1)

    assert (decode_tiled(nearest, latents, tile, 8) == nearest_whole(latents)).all()


def nearest_whole(latents: np.ndarray) -> np.ndarray:
    return latents.astype(np.uint8).repeat(8, 2).repeat(8, 3).transpose(0, 2, 3, 1)


def test_tile_sizes_are_checked(engine: zimage_rt.Engine) -> None:
    with pytest.raises(RequestError, match="vae_tile: expected a multiple of 16, got 200"):
        engine.generate(PROMPT, vae_tile=200)
