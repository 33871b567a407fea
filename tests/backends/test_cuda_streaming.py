"""`memory_limit` on the `cuda` backend: layers that do not fit are streamed, and nothing else of an image changes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_reference import require_gpu
from lora_files import random_lora_of
from shared import ROOT

import zimage_rt
from zimage_rt.bundle.manifest import read_manifest
from zimage_rt.bundle.safetensors_file import TensorFile
from zimage_rt.errors import Cancelled, LoraError, OutOfMemory

pytestmark = pytest.mark.gpu
require_gpu()

LAYERS = 24  # enough that they take more memory than everything that comes and goes
MATRICES = ("attention.qkv.weight", "attention.to_out.0.weight", "feed_forward.w13.weight", "feed_forward.w2.weight")
SIZES: dict[str, Any] = {"dim": 384, "n_heads": 3, "n_kv_heads": 3}
PROMPTS = ["a panda", "a red apple on the left and a house on the right, green background"]
LONGER = PROMPTS[1] + ", drawn as children draw it" * 12

RNG = np.random.default_rng(3)
IMAGE = RNG.integers(0, 256, (256, 256, 3), dtype=np.uint8)
MASK = np.pad(np.full((128, 256), 255, np.uint8), ((64, 64), (0, 0)))
GUIDED: dict[str, Any] = {"guidance_scale": 3.0, "negative_prompt": "a dog"}
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small": {"height": 64, "width": 208},
    "guidance": GUIDED,
    "truncated guidance": {**GUIDED, "cfg_truncation": 0.6},
    "heun": {"sampler": "heun"},
    "noisy steps": {"sampler": "euler_ancestral"},
    "image to image": {"image": IMAGE, "strength": 0.8},
    "inpainting": {"image": IMAGE, "mask": MASK, "strength": 1.0},
    "control": {"control_image": IMAGE},
    "guided control": {"control_image": IMAGE, **GUIDED},
    "two": {"prompt": PROMPTS},
}

Bundles = Callable[[str], Path]


def draw(engine: zimage_rt.Engine, **settings: Any) -> bytes:
    settings = {"prompt": PROMPTS[0], "seed": 5, "num_inference_steps": 4, "height": 256, "width": 256, **settings}
    return engine.generate(settings.pop("prompt"), vae="tiny", **settings).images.tobytes()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """zimage-nano with a random transformer of many layers, and a ControlNet that runs the noise refiner twice."""
    import diffusers
    import torch
    from controlnet_files import make_controlnet
    from export_checkpoints import copy_with
    from zimage_rt.export.bundle import export
    from zimage_rt.export.recipe import read_recipe

    folder, made = tmp_path_factory.mktemp("streamed"), dict[str, Path]()
    torch.manual_seed(1)
    transformer = diffusers.ZImageTransformer2DModel(**SIZES, n_layers=LAYERS, n_refiner_layers=2, cap_feat_dim=256)
    transformer.save_pretrained(folder / "transformer")
    nano = ROOT / "checkpoints" / "zimage-nano"
    checkpoint = copy_with(nano, folder / "checkpoint", transformer=folder / "transformer")
    net = make_controlnet(
        folder / "net",
        "control_noise_refiner",
        **SIZES,
        n_refiner_layers=2,
        control_layers_places=[0, 5, 17],
        control_refiner_layers_places=[0, 1],
    )

    def bundle(precision: str) -> Path:
        if precision not in made:
            recipe = read_recipe(ROOT / "engines" / "nano-bf16.toml")
            parts = {**recipe.parts, "controlnet": net}
            changes: dict[str, Any] = {"backend": "cuda", "parity": False, "vae": ("tiny",), "parts": parts}
            out = folder / precision
            export(dataclasses.replace(recipe, checkpoint=checkpoint, out=out, precision=precision, **changes))
            made[precision] = out
        return made[precision]

    return bundle


@pytest.fixture(scope="module", params=["bf16", "int8"])
def bundle(request: pytest.FixtureRequest, bundles: Bundles) -> Path:
    return bundles(request.param)


Work = Callable[[zimage_rt.Engine], object]


def draw_all(engine: zimage_rt.Engine) -> None:
    for settings in REQUESTS.values():
        draw(engine, **settings)
    draw(engine, callback=lambda info: info.preview() is not None)


def draw_larger(engine: zimage_rt.Engine) -> None:
    draw(engine)
    draw(engine, height=320, width=320, **GUIDED)


def draw_each(engine: zimage_rt.Engine) -> list[bytes]:
    return [draw(engine, seed=seed, height=128 + 16 * (seed % 3)) for seed in range(6)]


def evaluate_all(engine: zimage_rt.Engine) -> list[bytes]:
    """Single evaluations, plain and with a ControlNet."""
    rng, outputs = np.random.default_rng(1), []
    for batch, height, width, rows in ((1, 8, 8, 32), (3, 26, 34, 64), (2, 32, 32, 96)):
        inputs = {
            "latents": rng.standard_normal((batch, 16, height, width)),
            "timestep": np.linspace(0.1, 0.9, batch),
            "context": rng.standard_normal((batch, rows, SIZES["dim"])),
        }
        control = {"control_latents": rng.standard_normal((batch, 33, height, width)), "control_scale": np.ones(batch)}
        for module, given in (("transformer", inputs), ("controlnet", {**inputs, **control})):
            cast = {name: value.astype(np.float32) for name, value in given.items()}
            outputs.append(engine.pipeline.module(module)(cast)["noise_pred"].tobytes())
    return outputs


def warm(engine: zimage_rt.Engine) -> None:
    """Time the matrix products of all tests, so that engines that are loaded later choose the same algorithms."""
    draw_all(engine)
    draw_larger(engine)
    draw_each(engine)
    evaluate_all(engine)
    engine.pipeline.time_evaluation(256, 256, 64, 1, 1)
    engine.encode_prompt(LONGER)


@pytest.fixture(scope="module")
def resident(bundle: Path) -> Iterator[zimage_rt.Engine]:
    with zimage_rt.Engine.load(bundle, backend="cuda") as engine:
        warm(engine)
    with zimage_rt.Engine.load(bundle, backend="cuda") as engine:
        yield engine


def layer_bytes(bundle: Path) -> int:
    """Device memory of a layer's matrices."""
    file = TensorFile(bundle / read_manifest(bundle).module("transformer").weights)
    sizes = [file.tensors[f"layers.0.{name}"]["data_offsets"] for name in MATRICES]
    return sum(end - begin for begin, end in sizes)


def used(engine: zimage_rt.Engine) -> int:
    memory = engine.pipeline.memory()
    return sum(memory[name] for name in ("weights", "workspace", "graphs"))


def load_limited(bundle: Path, work: Work, layers: int, **options: Any) -> zimage_rt.Engine:
    """An engine with memory for some work but for so many layers."""
    with zimage_rt.Engine.load(bundle, backend="cuda", backend_options=options) as engine:
        work(engine)
        limit = used(engine) - layers * layer_bytes(bundle)
    options = {**options, "memory_limit": limit}
    return zimage_rt.Engine.load(bundle, backend="cuda", backend_options=options)


@pytest.fixture(scope="module")
def streamed(bundle: Path, resident: zimage_rt.Engine) -> Iterator[zimage_rt.Engine]:
    with load_limited(bundle, draw_all, 6) as engine:
        yield engine


def streamed_layers(engine: zimage_rt.Engine) -> int:
    return engine.pipeline.streaming()["layers"]


@pytest.mark.parametrize("request_of", REQUESTS)
def test_images_are_those_of_resident_layers(streamed, resident, request_of):
    for _ in range(3):  # computed and captured, replayed, and replayed after another request
        assert draw(streamed, **REQUESTS[request_of]) == draw(resident, **REQUESTS[request_of])
    draw(streamed)
    assert draw(streamed, **REQUESTS[request_of]) == draw(resident, **REQUESTS[request_of])


def test_memory_stays_within_the_limit_and_says_what_is_streamed(bundle, resident):
    with load_limited(bundle, draw_all, 6) as engine:
        counts = []
        for settings in REQUESTS.values():
            assert draw(engine, **settings) == draw(resident, **settings)
            counts.append(streamed_layers(engine))
        # Room is made as requests need it, and what needed it keeps it.
        assert counts == sorted(counts)
        assert 3 < counts[-1] < LAYERS
        memory = engine.pipeline.memory()
        assert engine.pipeline.streaming()["host_bytes"] == counts[-1] * layer_bytes(bundle)
        limit = engine.backend_options["memory_limit"]
        assert memory["weights"] + memory["workspace"] <= limit
        # All of it again: the same layers are streamed.
        for settings in REQUESTS.values():
            assert draw(engine, **settings) == draw(resident, **settings)
        assert streamed_layers(engine) <= counts[-1] + 2  # graphs take memory of the device


def test_each_number_of_streamed_layers_gives_the_same_bytes(bundle, resident):
    """An engine whose room shrinks: layers are streamed, and others come back in their place."""
    plain, large = draw(resident), draw(resident, height=320, width=320, **GUIDED)
    seen = set()
    for layers in (1, 3, 6, 10, 15, 20):
        with load_limited(bundle, draw_larger, layers) as engine:
            assert draw(engine) == plain
            seen.add(streamed_layers(engine))
            assert draw(engine, height=320, width=320, **GUIDED) == large
            assert draw(engine) == plain
            seen.add(streamed_layers(engine))
    assert len(seen) >= 5


def test_nothing_is_streamed_where_everything_fits(bundle, resident):
    assert resident.pipeline.streaming() == {"layers": 0, "host_bytes": 0}
    draw(resident)
    options = {"memory_limit": 2 * used(resident)}
    with zimage_rt.Engine.load(bundle, backend="cuda", backend_options=options) as engine:
        assert draw(engine) == draw(resident)
        assert engine.pipeline.streaming() == {"layers": 0, "host_bytes": 0}


def test_single_evaluations_are_the_same(streamed, resident):
    assert evaluate_all(streamed) == evaluate_all(resident)


def test_timing_replays_the_copies(streamed, resident):
    before = draw(streamed)
    assert len(streamed.pipeline.time_evaluation(256, 256, 64, 1, 3)) == 3
    assert draw(streamed) == before == draw(resident)


def test_callbacks_preview_and_cancel(streamed, resident):
    whole = draw(resident)
    assert draw(streamed, callback=lambda info: info.preview() is not None) == whole
    for step in range(4):
        with pytest.raises(Cancelled):
            draw(streamed, callback=lambda info, last=step: info.step < last)
        assert draw(streamed) == whole


def test_a_prompt_within_a_callback_may_take_layers_away(bundle, resident):
    """The text encoder needs memory between two steps: later steps are captured again, with other layers streamed."""
    with load_limited(bundle, draw, 4) as engine:
        draw(engine)
        before = streamed_layers(engine)

        def encode(info: zimage_rt.StepInfo) -> None:
            if info.step == 1:
                engine.encode_prompt(LONGER)
                engine.pipeline.decode(np.zeros((1, 16, 20, 20), np.float32), "tiny")

        assert draw(engine, callback=encode) == draw(resident)
        assert streamed_layers(engine) > before
        assert draw(engine) == draw(resident)


# --- LoRAs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def loras(streamed: zimage_rt.Engine, resident: zimage_rt.Engine, tmp_path: Path) -> Iterator[None]:
    """`one`, `other` and `whole`, whose changes are full matrices, on both engines and switched off."""
    from test_cuda_lora import whole_lora_of

    manifest = resident.manifest
    paths = {
        "one": random_lora_of(manifest, tmp_path / "one.safetensors", seed=1),
        "other": random_lora_of(manifest, tmp_path / "other.safetensors", seed=2, modules=("transformer",)),
        "whole": whole_lora_of(manifest, tmp_path / "whole.safetensors", ("transformer",)),
    }
    for engine in (streamed, resident):
        for name, path in paths.items():
            engine.load_lora(path, weight=0.0, name=name)
    yield
    for engine in (streamed, resident):
        for name in paths:
            engine.unload_lora(name)


@pytest.mark.usefixtures("loras")
def test_loras_on_off_and_swapped_are_those_of_resident_layers(streamed, resident):
    plain = draw(streamed)
    assert plain == draw(resident)
    drawn = []
    for weights in (
        {"one": 0.5},
        {"other": 0.7},
        {"one": 0.5, "other": -0.3},
        {"whole": 0.3},
        {"one": 0.2, "whole": 0.3},
        {},
        {"other": 0.7},
        {},
    ):
        for engine in (streamed, resident):
            engine.set_loras(weights)
        drawn.append(draw(streamed))
        assert drawn[-1] == draw(resident), weights
        assert draw(streamed, **GUIDED) == draw(resident, **GUIDED), weights
    assert drawn[5] == drawn[7] == plain
    assert drawn[1] == drawn[6]
    assert len(set(drawn)) == 6
    assert streamed_layers(streamed) > 3


def test_layers_that_move_keep_their_loras(bundle, resident, tmp_path):
    path = random_lora_of(resident.manifest, tmp_path / "mine.safetensors", seed=9, modules=("transformer",))
    with load_limited(bundle, draw_all, 6) as engine:
        for each in (engine, resident):
            each.load_lora(path, weight=0.8, name="mine")
        before = streamed_layers(engine)
        for settings in REQUESTS.values():
            assert draw(engine, **settings) == draw(resident, **settings)
        assert streamed_layers(engine) > before
        for each in (engine, resident):
            each.unload_lora("mine")
        assert draw(engine) == draw(resident)


def test_a_lora_that_does_not_fit_the_format_changes_nothing(bundles, tmp_path):
    bundle = bundles("fp16")
    with load_limited(bundle, draw, 3) as engine, zimage_rt.Engine.load(bundle, backend="cuda") as resident:
        path = random_lora_of(engine.manifest, tmp_path / "style.safetensors", seed=1)
        for each in (engine, resident):
            each.load_lora(path, weight=0.5)
        before = draw(engine)
        assert before == draw(resident)
        with pytest.raises(LoraError, match=r"does not fit into fp16"):
            engine.load_lora(path, weight=1e6, name="loud")
        assert engine.loras == {"style": 0.5}
        assert draw(engine) == before
        engine.unload_lora("style")
        resident.unload_lora("style")
        assert draw(engine) == draw(resident)


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_encoder", ["resident", "host"])
def test_a_limit_that_is_too_small_names_the_least_that_would_do(bundle, resident, text_encoder):
    """Each refusal names the least for what was refused; following them leads to an image."""
    with load_limited(bundle, draw, 10) as engine:
        roomy = engine.backend_options["memory_limit"]
    limit, tried = 1, list[int]()
    while True:
        tried.append(limit)
        assert len(tried) < 12
        options = {"memory_limit": limit, "text_encoder": text_encoder}
        try:
            with zimage_rt.Engine.load(bundle, backend="cuda", backend_options=options) as engine:
                assert draw(engine) == draw(resident)
                assert streamed_layers(engine) >= LAYERS - 4  # graphs take more or less of the device
            break
        except OutOfMemory as error:
            found = re.search(
                r"\(memory_limit\): needed \d+ MB .* are free; .* at least (\d+) bytes would do", str(error)
            )
            assert found is not None, error
            assert int(found[1]) > limit
            limit = int(found[1])
    assert limit < roomy


def test_a_request_that_does_not_fit_leaves_the_engine_as_it_was(bundle, resident):
    with load_limited(bundle, draw, 6) as engine:
        plain, count = draw(engine), streamed_layers(engine)
        with pytest.raises(
            OutOfMemory, match=r"needed \d+ MB .* \d+ MB are free; a memory_limit of at least \d+ bytes"
        ):
            draw(engine, height=2048, width=2048, num_inference_steps=1)
        assert streamed_layers(engine) == count
        assert draw(engine) == plain == draw(resident)


def test_two_engines_stream_beside_each_other(bundle, resident):
    wanted = draw_each(resident)
    with (
        load_limited(bundle, draw_each, 6) as one,
        load_limited(bundle, draw_each, 9, text_encoder="host") as other,
        ThreadPoolExecutor(4) as pool,
    ):
        for found in pool.map(draw_each, [one, other, one, other]):
            assert found == wanted
        assert min(streamed_layers(one), streamed_layers(other)) > 0
