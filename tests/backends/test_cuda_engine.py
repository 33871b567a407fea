"""zimage-nano on the `cuda` backend, beside ONNX Runtime on the CPU: modules, images, graphs, threads, refusals."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cuda_reference import relative_error, require_gpu
from lora_files import random_lora_of
from shared import copy_bundle
from zimage_rt.benchmarks.fidelity import psnr
from zimage_rt.benchmarks.quality.prompts import read_prompts

import zimage_rt
from zimage_rt.errors import BundleMismatch, Cancelled, LoraError, NotFinite, OutOfMemory, RequestError

pytestmark = pytest.mark.gpu
require_gpu()

PROMPTS = [
    "a panda",
    "一只企鹅，蓝色背景",
    "draw a red apple on the left and a house on the right, green background please",
]


TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3}  # of a whole module against fp32, after all its layers


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 200, 512])
def test_prompts_become_the_contexts_of_onnxruntime(cuda, reference, tokens):
    ids = np.random.default_rng().integers(0, 4000, (1, tokens))
    precision = cuda.manifest.precision
    embeds = reference.pipeline.module("text_encoder")({"input_ids": ids})
    ours = cuda.pipeline.module("text_encoder")({"input_ids": ids})
    assert relative_error(ours["prompt_embeds"], embeds["prompt_embeds"]) < TOLERANCE[precision]
    context = reference.pipeline.module("context_refiner")(embeds)["context"]
    assert relative_error(cuda.pipeline.module("context_refiner")(embeds)["context"], context) < TOLERANCE[precision]
    assert relative_error(cuda.pipeline.context(ids), context) < TOLERANCE[precision]


@pytest.mark.parametrize(
    ("batch", "height", "width", "rows"), [(1, 32, 32, 32), (3, 26, 140, 64), (2, 8, 8, 32), (1, 128, 96, 512)]
)
def test_an_evaluation_is_that_of_onnxruntime(cuda, reference, batch, height, width, rows):
    rng = np.random.default_rng()
    inputs = {
        "latents": rng.standard_normal((batch, 16, height, width)).astype(np.float32),
        "timestep": np.linspace(0.1, 0.9, batch).astype(np.float32),
        "context": rng.standard_normal((batch, rows, 384)).astype(np.float32),
    }
    expected = reference.pipeline.module("transformer")(inputs)["noise_pred"]
    ours = cuda.pipeline.module("transformer")(inputs)["noise_pred"]
    assert relative_error(ours, expected) < TOLERANCE[cuda.manifest.precision]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (26, 140)])
def test_the_tiny_vae_is_that_of_onnxruntime(cuda, reference, height, width):
    latents = np.random.default_rng().standard_normal((2, 16, height, width)).astype(np.float32)
    image = reference.pipeline.module("tiny_vae_decoder")({"latents": latents})["image"]
    tolerance = TOLERANCE[cuda.manifest.precision]
    assert relative_error(cuda.pipeline.module("tiny_vae_decoder")({"latents": latents})["image"], image) < tolerance
    pixels = np.clip((image / 2 + 0.5) * 255, 0, 255).transpose(0, 2, 3, 1)
    assert np.abs(cuda.decode(latents, "tiny") - pixels).mean() < 0.75
    encoded = reference.pipeline.module("tiny_vae_encoder")({"image": image})["latents"]
    assert relative_error(cuda.pipeline.module("tiny_vae_encoder")({"image": image})["latents"], encoded) < tolerance


def test_images_are_those_of_onnxruntime(cuda, reference):
    prompts = read_prompts(20)
    scores = []
    for prompt in prompts:
        ours = cuda.generate(prompt["caption"], seed=prompt["seed"]).images[0]
        theirs = reference.generate(prompt["caption"], seed=prompt["seed"]).images[0]
        scores.append(psnr(ours, theirs))
    assert np.mean(scores) >= 38, scores


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0, "negative_prompt": "text"}])
def test_the_same_bytes_again_by_graph_and_by_step(bf16, options):
    options = {"seed": 5, "num_inference_steps": 4, **options}
    first, again, third = (bf16.generate(PROMPTS[0], **options).images for _ in range(3))
    steps = []
    stepped = bf16.generate(PROMPTS[0], callback=lambda info: steps.append(info.step), **options).images
    assert first.tobytes() == again.tobytes() == third.tobytes() == stepped.tobytes()
    assert steps == [0, 1, 2, 3]
    assert bf16.pipeline.native.graph_count >= 1


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 3.0, "negative_prompt": "blue background"},
        {"guidance_scale": 3.0, "cfg_normalization": 1.0},
        {"guidance_scale": 3.0, "cfg_truncation": 0.6},
    ],
)
def test_guidance_is_that_of_onnxruntime(bf16, reference, options):
    ours = bf16.generate(PROMPTS[2], seed=2, **options).images[0]
    assert psnr(ours, reference.generate(PROMPTS[2], seed=2, **options).images[0]) > 30


def test_a_batch_of_different_lengths_gives_each_its_own_image(bf16):
    options = {"num_inference_steps": 4, "guidance_scale": 1.5, "negative_prompt": "text"}
    prompts = [*PROMPTS, " ".join(PROMPTS * 4)]
    batch = bf16.generate(prompts, seed=11, **options)
    for i, prompt in enumerate(prompts):
        alone = bf16.generate(prompt, seed=batch.seeds[i], **options)
        assert psnr(batch.images[i], alone.images[0]) > 40


@pytest.mark.parametrize(("height", "width"), [(64, 64), (208, 1120), (512, 768), (1024, 1024)])
def test_other_sizes_run(bf16, reference, height, width):
    options = {"height": height, "width": width, "num_inference_steps": 2, "seed": 1}
    ours = bf16.generate(PROMPTS[1], **options).images[0]
    assert psnr(ours, reference.generate(PROMPTS[1], **options).images[0]) > 38


def test_a_callback_previews_and_cancels(bf16):
    previews = []

    def look(info):
        previews.append(info.preview())
        return len(previews) < 2

    with pytest.raises(Cancelled):
        bf16.generate(PROMPTS[0], seed=1, callback=look)
    assert len(previews) == 2
    assert previews[0].shape == (1, 256, 256, 3)
    whole = bf16.generate(PROMPTS[0], seed=1).images
    seen = bf16.generate(PROMPTS[0], seed=1, callback=lambda info: info.preview() is not None).images
    assert whole.tobytes() == seen.tobytes()  # a preview leaves the loop's memory alone


@pytest.mark.parametrize("step", range(5))
def test_an_error_in_a_callback_comes_out_as_it_is(bf16, step):
    options = {"seed": 1, "num_inference_steps": 5}
    whole = bf16.generate(PROMPTS[0], **options).images

    def fail(info):
        if info.step == step:
            raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        bf16.generate(PROMPTS[0], callback=fail, **options)
    assert bf16.generate(PROMPTS[0], **options).images.tobytes() == whole.tobytes()


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0, "negative_prompt": "text"}, {"sampler": "heun"}])
@pytest.mark.parametrize("step", range(4))
def test_a_request_can_be_cancelled_at_each_step(bf16, step, options, monkeypatch):
    """The step that runs ahead of the callback is dropped: nothing of it is in the latents, or the next request."""
    options = {"seed": 5, "num_inference_steps": 4, **options}
    whole = bf16.generate(PROMPTS[0], **options).images
    seen, jobs = [], []
    generate = bf16.pipeline.generate

    def stop(info):
        seen.append(info.latents)
        return info.step < step

    with monkeypatch.context() as patched:
        patched.setattr(bf16.pipeline, "generate", lambda job, vae: (jobs.append(job), generate(job, vae))[1])
        with pytest.raises(Cancelled):
            bf16.generate(PROMPTS[0], callback=stop, **options)
    assert len(seen) == step + 1
    assert jobs[0].latents.tobytes() == seen[-1].tobytes()
    assert bf16.generate(PROMPTS[0], **options).images.tobytes() == whole.tobytes()


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_latents_are_those_of_the_callbacks_step(bf16, sampler):
    """While the next step runs: the same as after the loop was stopped there, and at the end the result's."""
    options = {"seed": 3, "num_inference_steps": 4, "sampler": sampler}
    seen, first_read = [], []

    def look(info):
        first_read.append(info.latents)
        time.sleep(0.05)  # the next step is done in the meantime
        seen.append(info.latents.copy())
        assert not info.latents.flags.writeable

    result = bf16.generate(PROMPTS[0], callback=look, **options)
    assert len(seen) == 4
    assert [a.tobytes() for a in first_read] == [b.tobytes() for b in seen]
    assert len({a.tobytes() for a in seen}) == 4
    assert seen[-1].tobytes() == result.latents.tobytes()

    def read_elsewhere(info):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: info.latents).result().tobytes() == seen[info.step].tobytes()

    bf16.generate(PROMPTS[0], callback=read_elsewhere, **options)


def test_latents_are_not_read_after_their_callback(bf16):
    kept = []
    bf16.generate(PROMPTS[0], seed=1, num_inference_steps=2, callback=kept.append)
    for info in kept:
        with pytest.raises(RuntimeError, match="ask for them inside"):
            info.read_latents()


def test_a_request_within_a_callback_is_refused_and_the_outer_one_goes_on(bf16):
    options = {"num_inference_steps": 3}
    whole = bf16.generate(PROMPTS[0], seed=1, **options).images

    def nest(info):
        with pytest.raises(RequestError, match="when the callback has returned"):
            bf16.generate(PROMPTS[0], seed=2, **options)
        bf16.encode_prompt(f"a panda number {info.step}")

    assert bf16.generate(PROMPTS[0], seed=1, callback=nest, **options).images.tobytes() == whole.tobytes()


def test_a_first_request_with_a_callback_captures_what_later_ones_replay(cuda_bundles):
    """One graph for a step, whatever the number of steps, and one for the decoder; guided steps have their own."""
    engine = zimage_rt.Engine.load(cuda_bundles["bf16"], backend="cuda")
    native = engine.pipeline.native
    guided = {"guidance_scale": 2.0, "negative_prompt": "text", "num_inference_steps": 6, "seed": 5}
    truncated = engine.generate(PROMPTS[0], **guided, cfg_truncation=0.6).images  # the largest comes first
    assert native.graph_count == 3  # a guided step, one of the same request without guidance, the decoder
    first = engine.generate(PROMPTS[0], seed=5, num_inference_steps=6, callback=lambda info: None).images
    assert native.graph_count == 4  # a step of one sample
    assert engine.generate(PROMPTS[0], seed=5, num_inference_steps=6).images.tobytes() == first.tobytes()
    graphs = engine.pipeline.memory()["graphs"]
    # 200 steps need larger tables, which no graph knows.
    for steps in (1, 2, 5, 200):
        engine.generate(PROMPTS[0], seed=5, num_inference_steps=steps)
        engine.generate(PROMPTS[0], seed=5, num_inference_steps=steps, callback=lambda info: None)
    engine.generate(PROMPTS[0], seed=5, sampler="dpmpp_2m", schedule="karras")
    engine.generate(PROMPTS[0], **guided)
    assert native.graph_count == 4
    assert engine.pipeline.memory()["graphs"] == graphs
    assert engine.generate(PROMPTS[0], seed=5, num_inference_steps=6).images.tobytes() == first.tobytes()
    again = engine.generate(PROMPTS[0], callback=lambda info: None, **guided, cfg_truncation=0.6).images
    assert again.tobytes() == truncated.tobytes()


def test_the_number_of_graphs_is_bounded(cuda_bundles):
    engine = zimage_rt.Engine.load(cuda_bundles["bf16"], backend="cuda")
    engine.generate(PROMPTS[0], seed=1, height=512, width=1040, num_inference_steps=1)  # the largest comes first
    small = engine.generate(PROMPTS[0], seed=1, height=64, width=64, num_inference_steps=1).images
    counts = []
    for width in range(64, 1040, 16):
        engine.generate(PROMPTS[0], seed=1, height=64, width=width, num_inference_steps=1)
        counts.append(engine.pipeline.native.graph_count)
    assert max(counts) == counts[-1] <= 96
    assert counts[-1] > 90
    # The first ones are forgotten by now, and captured again.
    again = engine.generate(PROMPTS[0], seed=1, height=64, width=64, num_inference_steps=1).images
    assert again.tobytes() == small.tobytes()


def test_threads_take_turns_and_nothing_mixes(bf16):
    def draw(i):
        return bf16.generate(PROMPTS[i % 3], seed=i, num_inference_steps=3, height=64 + 16 * (i % 4)).images

    alone = [draw(i) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(draw, range(12)))
    assert [a.tobytes() for a in alone] == [b.tobytes() for b in together]


def test_text_encoder_on_the_host_gives_the_same_bytes(cuda_bundles, bf16):
    moving = zimage_rt.Engine.load(cuda_bundles["bf16"], backend="cuda", backend_options={"text_encoder": "host"})
    before = moving.pipeline.memory()["weights"]
    assert before < bf16.pipeline.memory()["weights"]
    ours = moving.generate(PROMPTS[1], seed=1).images
    assert ours.tobytes() == bf16.generate(PROMPTS[1], seed=1).images.tobytes()
    # The VAE came in the meantime; the text encoder did not stay.
    assert moving.pipeline.memory()["weights"] < bf16.pipeline.memory()["weights"]


@pytest.fixture
def unload():
    """Engines that the test put LoRAs on: it takes them off again."""
    engines: list[zimage_rt.Engine] = []
    yield engines
    for engine in engines:
        for name in engine.loras:
            engine.unload_lora(name)


def module_outputs(engine):
    rng = np.random.default_rng(3)
    latents, context = rng.standard_normal((1, 16, 32, 32)), rng.standard_normal((1, 64, 384))
    inputs = {"latents": latents, "timestep": np.full(1, 0.4), "context": context}
    inputs = {name: value.astype(np.float32) for name, value in inputs.items()}
    yield "context", engine.encode_prompt(PROMPTS[0])
    yield "transformer", engine.pipeline.module("transformer")(inputs)["noise_pred"]


def test_a_lora_is_that_of_onnxruntime_and_leaves_the_same_bytes(cuda, reference, unload, tmp_path):
    unload += [cuda, reference]
    path = random_lora_of(cuda.manifest, tmp_path / "style.safetensors", seed=1)
    other = random_lora_of(cuda.manifest, tmp_path / "other.safetensors", seed=2, modules=("transformer",))
    before = dict(module_outputs(cuda))
    for engine in (cuda, reference):
        engine.load_lora(path, weight=1.6)
        engine.load_lora(other, weight=-1.0)
    expected, ours = dict(module_outputs(reference)), dict(module_outputs(cuda))
    for name, value in ours.items():
        assert relative_error(value, before[name]) > 0.05, name
        assert relative_error(value, expected[name]) < 2 * TOLERANCE[cuda.manifest.precision], name
    cuda.unload_lora("other")
    cuda.set_loras({})
    for name, value in module_outputs(cuda):
        assert value.tobytes() == before[name].tobytes(), name


def test_a_swap_leaves_captured_graphs_as_they_are(bf16, unload, tmp_path):
    unload.append(bf16)
    options = {"seed": 5, "num_inference_steps": 3}
    plain = [bf16.generate(PROMPTS[0], **options).images.tobytes() for _ in range(3)]
    graphs = bf16.pipeline.native.graph_count
    bf16.load_lora(random_lora_of(bf16.manifest, tmp_path / "style.safetensors", seed=1))
    styled = bf16.generate(PROMPTS[0], **options).images.tobytes()
    assert bf16.pipeline.native.graph_count == graphs
    assert styled not in plain
    assert bf16.generate(PROMPTS[0], callback=lambda info: None, **options).images.tobytes() == styled
    bf16.set_loras({"style": 0.5})
    assert bf16.generate(PROMPTS[0], **options).images.tobytes() not in (styled, plain[0])
    bf16.set_loras({"style": 1.0})
    assert bf16.generate(PROMPTS[0], **options).images.tobytes() == styled
    bf16.unload_lora("style")
    assert bf16.generate(PROMPTS[0], **options).images.tobytes() == plain[0]


def test_a_text_encoder_on_the_host_takes_a_lora(cuda_bundles, bf16, unload, tmp_path):
    moving = zimage_rt.Engine.load(cuda_bundles["bf16"], backend="cuda", backend_options={"text_encoder": "host"})
    unload += [bf16, moving]
    plain = moving.encode_prompt(PROMPTS[1])
    path = random_lora_of(bf16.manifest, tmp_path / "text.safetensors", seed=4, modules=("text_encoder",))
    for engine in (bf16, moving):
        engine.load_lora(path)
    assert moving.pipeline.memory()["weights"] < bf16.pipeline.memory()["weights"]
    for prompt in PROMPTS:
        assert moving.encode_prompt(prompt).tobytes() == bf16.encode_prompt(prompt).tobytes()
    assert moving.encode_prompt(PROMPTS[1]).tobytes() != plain.tobytes()
    moving.unload_lora("text")
    assert moving.encode_prompt(PROMPTS[1]).tobytes() == plain.tobytes()


def test_a_lora_that_fp16_cannot_hold_is_refused_and_nothing_stays_of_it(cuda_bundles, tmp_path):
    engine = zimage_rt.Engine.load(cuda_bundles["fp16"], backend="cuda")
    path = random_lora_of(engine.manifest, tmp_path / "style.safetensors", seed=1)
    engine.load_lora(path, weight=0.5)
    before = dict(module_outputs(engine))
    with pytest.raises(LoraError, match=r"does not fit into fp16"):
        engine.load_lora(path, weight=1e6, name="loud")
    assert engine.loras == {"style": 0.5}
    for name, value in module_outputs(engine):
        assert value.tobytes() == before[name].tobytes(), name


def test_our_own_attention_gives_the_same_images(cuda_bundles, bf16):
    own = zimage_rt.Engine.load(cuda_bundles["bf16"], backend="cuda", backend_options={"cudnn": False})
    options = {"height": 640, "width": 640, "num_inference_steps": 2, "seed": 1}
    assert psnr(own.generate(PROMPTS[0], **options).images[0], bf16.generate(PROMPTS[0], **options).images[0]) > 40


def test_out_of_memory_names_the_need_and_the_engine_goes_on(cuda_bundles):
    limit = 200 << 20
    engine = zimage_rt.Engine.load(cuda_bundles["bf16"], backend="cuda", backend_options={"memory_limit": limit})
    small = engine.generate(PROMPTS[0], seed=1).images
    with pytest.raises(OutOfMemory, match=r"needed \d+ MB .* \d+ MB are free"):
        engine.generate(PROMPTS[0], seed=1, height=2048, width=2048, num_inference_steps=1)
    assert engine.generate(PROMPTS[0], seed=1).images.tobytes() == small.tobytes()


def test_what_cannot_be_served_is_refused(cuda_bundles, bf16):
    with pytest.raises(BundleMismatch, match="fp32"):
        zimage_rt.Engine.load(cuda_bundles["fp32"], backend="cuda")
    with pytest.raises(RequestError, match="no full VAE"):
        bf16.generate(PROMPTS[0], vae="full")
    with pytest.raises(RequestError, match="text_encoder"):
        zimage_rt.Engine.load(cuda_bundles["bf16"], backend="cuda", backend_options={"text_encoder": "moon"})
    with pytest.raises(zimage_rt.BackendUnavailable, match="device 99"):
        zimage_rt.Engine.load(cuda_bundles["bf16"], backend="cuda", backend_options={"device": 99})


def test_timings_say_what_the_device_took(bf16):
    result = bf16.generate(PROMPTS[0], seed=1)
    assert set(result.timings) == {"encode_prompt", "denoise", "decode", "total"}
    assert 0 < result.timings["denoise"] < result.timings["total"]


def test_a_decoder_that_is_not_finite_is_an_error(bf16, cuda_bundles, tmp_path):
    """Also where one pixel is: the device's rounding would make it black."""
    before = bf16.generate("a panda", seed=1, num_inference_steps=2).images
    latents = np.zeros((2, 16, 32, 32), np.float32)
    latents[1, 3, 5, 7] = np.nan
    with pytest.raises(NotFinite, match="tiny_vae_decoder"):
        bf16.pipeline.decode(latents, "tiny")  # the engine's own decode refuses such latents
    latents[1, 3, 5, 7] = 0.0
    assert bf16.decode(latents, "tiny").shape == (2, 256, 256, 3)
    path = copy_bundle(cuda_bundles["bf16"], tmp_path / "copy", "tiny_vae_decoder") / "tiny_vae_decoder.safetensors"
    data = bytearray(path.read_bytes())
    data[-2:] = np.array([0x7FC0], np.uint16).tobytes()  # NaN in bf16: the last layer's last number
    path.write_bytes(data)
    broken = zimage_rt.Engine.load(tmp_path / "copy", backend="cuda", verify=False)
    for callback in (None, lambda info: None):
        with pytest.raises(NotFinite, match="tiny_vae_decoder"):
            broken.generate("a panda", seed=1, num_inference_steps=2, callback=callback)
    assert bf16.generate("a panda", seed=1, num_inference_steps=2).images.tobytes() == before.tobytes()
