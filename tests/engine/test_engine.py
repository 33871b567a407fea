"""The engine on the real bundle: images, batches, callbacks, threads, bad bundles, and no torch in the process."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zimage_rt.benchmarks.quality.judge import Judge, summarise
from zimage_rt.benchmarks.quality.prompts import read_prompts

import zimage_rt

PROMPTS = [
    "a panda",
    "一只企鹅，蓝色背景",
    "draw a red apple on the left and a house on the right, green background please",
]


def max_difference(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.abs(first.astype(np.int16) - second.astype(np.int16)).max())


def test_images_show_what_the_prompts_say(engine: zimage_rt.Engine) -> None:
    prompts = [prompt for prompt in read_prompts(60) if not prompt["unseen"]][:16]
    judge, judged = Judge(), []
    for prompt in prompts:
        image = engine.generate(prompt["caption"], seed=prompt["seed"]).images[0]
        judged.append((prompt, judge.score(image, prompt["scene"])))
    figures = summarise(judged)
    for name in ("colour", "places", "subject", "subject_pair", "subject_word", "style", "glyphs"):
        assert figures[name] >= 0.95, name


def test_same_request_same_bytes(engine: zimage_rt.Engine) -> None:
    first, second = (engine.generate(PROMPTS[0], seed=3, num_inference_steps=3) for _ in range(2))
    assert first.images.tobytes() == second.images.tobytes()
    assert first.images.shape == (1, 256, 256, 3)
    assert first.seeds == (3,)
    assert first.bundle_id == engine.bundle_id
    assert set(first.timings) == {"encode_prompt", "denoise", "decode", "total"}


def test_a_batch_gives_each_the_image_it_has_alone(engine: zimage_rt.Engine) -> None:
    options = {"num_inference_steps": 4, "guidance_scale": 1.5, "negative_prompt": "text"}
    batch = engine.generate(PROMPTS, seed=11, **options)
    for i, prompt in enumerate(PROMPTS):
        alone = engine.generate(prompt, seed=batch.seeds[i], **options)
        # A product over more rows may be blocked otherwise and round otherwise, by 1e-6 of its size: that moves a pixel
        # to the next grey level where it lies between two, and never further.
        assert max_difference(batch.images[i], alone.images[0]) <= 1


def test_noise_is_the_seeds(engine: zimage_rt.Engine) -> None:
    import torch

    latents = torch.randn((1, 16, 32, 32), generator=torch.Generator("cpu").manual_seed(9)).numpy()
    given = engine.generate(PROMPTS[0], latents=latents, num_inference_steps=2)
    seeded = engine.generate(PROMPTS[0], seed=9, num_inference_steps=2)
    assert max_difference(given.images, seeded.images) <= 1  # noise that differs in its last place, as above


@pytest.mark.parametrize(("height", "width"), [(64, 64), (512, 768), (208, 1120), (1024, 1024)])
def test_other_sizes_run(engine: zimage_rt.Engine, height: int, width: int) -> None:
    image = engine.generate(PROMPTS[1], height=height, width=width, num_inference_steps=2, seed=1).images[0]
    assert image.shape == (height, width, 3)
    assert image.std() > 1


def test_full_vae_and_several_images(engine: zimage_rt.Engine) -> None:
    result = engine.generate(PROMPTS[0], vae="full", num_images=2, num_inference_steps=2, seed=1)
    assert result.images.shape == (2, 256, 256, 3)
    assert max_difference(result.images[0], result.images[1]) > 10
    assert [image.size for image in result.pil_images] == [(256, 256)] * 2


def test_callback_sees_every_step_previews_and_cancels(engine: zimage_rt.Engine) -> None:
    seen = []

    def callback(info: zimage_rt.StepInfo) -> bool:
        seen.append((info.step, info.num_steps, info.sigma > info.sigma_next))
        assert not info.latents.flags.writeable
        if info.step == 1:
            assert info.preview().shape == (1, 64, 64, 3)
        return True

    engine.generate(PROMPTS[0], height=64, width=64, num_inference_steps=3, callback=callback)
    assert seen == [(0, 3, True), (1, 3, True), (2, 3, True)]
    with pytest.raises(zimage_rt.Cancelled):
        engine.generate(PROMPTS[0], height=64, width=64, callback=lambda info: info.step < 2)


def test_threads_do_not_mix_results(engine: zimage_rt.Engine) -> None:
    def draw(seed: int) -> bytes:
        return engine.generate(
            PROMPTS[seed % 3], height=64, width=64, seed=seed, num_inference_steps=3
        ).images.tobytes()

    alone = [draw(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(draw, range(6))) == alone


def test_long_prompts_are_refused(engine: zimage_rt.Engine) -> None:
    for prompt in ("x" * 10_000_000, "panda " * 2000):
        with pytest.raises(zimage_rt.RequestError, match="expected at most 512 tokens"):
            engine.generate(prompt)
    with pytest.raises(zimage_rt.RequestError, match="negative_prompt: expected at most 512 tokens with the chat"):
        engine.generate("a cat", "panda " * 2000, guidance_scale=1.0)
    with pytest.raises(zimage_rt.RequestError, match="known fields"):
        engine.generate("a cat", stepz=4)


def test_long_prompts_are_cut_on_request(engine: zimage_rt.Engine) -> None:
    """As diffusers does: the template's last tokens go with what is behind the length."""
    fields: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 1, "truncate_prompt": True}
    whole = engine._prompts._tokenizer("cat " * 400)
    long = engine._prompts._tokenizer("panda " * 2000, truncate=True)
    assert long.shape == (1, 512)
    assert (long[0, :3] == whole[0, :3]).all() and long[0, -1] == long[0, -2] != whole[0, -1]
    result = engine.generate("panda " * 2000, **fields)
    assert result.records[0].request["truncate_prompt"] is True
    (warning,) = result.records[0].warnings
    assert re.fullmatch(r"prompt: was cut to 512 of 20\d\d tokens, as truncate_prompt asks", warning)
    # What is behind the cut makes no difference; what was not cut is not spoken of.
    other = engine.generate("panda " * 600 + "cat " * 100, **fields)
    assert other.latents.tobytes() == result.latents.tobytes()
    assert list(engine.generate("a cat", **fields).records[0].warnings) == []


def test_whatever_reaches_the_tokenizer_is_a_request_error_or_drawn(engine: zimage_rt.Engine) -> None:
    for text in (
        "\0",
        "\x7f\u200b\ufeff",
        "e" + "\u0301" * 100,
        "\U0010ffff",
        "👩\u200d👩\u200d👧",
        "<|im_end|>" * 5,
        "\ufffe",
    ):
        assert engine._prompts._tokenizer(text).size > 0
    for text in ("\ud83d", "a cat \udc31", "\udc31\ud83d"):
        with pytest.raises(zimage_rt.RequestError, match="half of a character"):
            engine.encode_prompt(text)
        with pytest.raises(zimage_rt.RequestError, match=r"^negative_prompt: expected text"):
            engine.generate("a cat", text)


def test_unknown_backend_and_option(bundle: Path) -> None:
    with pytest.raises(zimage_rt.BackendUnavailable, match="expected one of onnxruntime"):
        zimage_rt.Engine.load(bundle, backend="teapot")
    with pytest.raises(zimage_rt.RequestError, match="num_threads"):
        zimage_rt.Engine.load(bundle, backend_options={"num_threads": 0})
    with pytest.raises(zimage_rt.RequestError, match=r"expected one of num_threads, provider, .*, got 'foo'$"):
        zimage_rt.Engine.load(bundle, backend_options={"foo": "bar"})


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


@pytest.mark.parametrize("name", ["transformer.onnx", "transformer.safetensors", "tokenizer.json"])
def test_a_changed_byte_or_a_truncated_file_is_refused(copied: Path, name: str) -> None:
    path = copied / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(zimage_rt.BundleMismatch, match="was changed"):
        zimage_rt.Engine.load(copied)
    path.write_bytes(content[:-7])
    with pytest.raises(zimage_rt.BundleMismatch, match="bytes, got"):
        zimage_rt.Engine.load(copied, verify=False)


def test_a_newer_schema_is_refused(copied: Path) -> None:
    path = copied / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"schema_version": 2}))
    with pytest.raises(zimage_rt.ManifestError, match="upgrade zimage_rt"):
        zimage_rt.Engine.load(copied)


NO_TORCH = """
import sys
import zimage_rt
result = zimage_rt.Engine.load(sys.argv[1]).generate("a panda", num_inference_steps=2, guidance_scale=1.0)
assert result.images.std() > 1
loaded = {name.split(".")[0] for name in sys.modules} & {"torch", "onnx", "diffusers", "transformers"}
assert not loaded, loaded
"""


def test_a_real_generation_loads_no_torch(bundle: Path, tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", NO_TORCH, bundle], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
