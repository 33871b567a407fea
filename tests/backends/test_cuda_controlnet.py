"""ControlNets on the `cuda` backend: single evaluations beside torch in fp32, images beside ONNX Runtime in fp32."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_reference import relative_error, require_gpu
from lora_files import random_lora_of
from PIL import Image
from shared import CUDA_PRECISIONS, ROOT
from zimage_rt.benchmarks.fidelity import psnr

import zimage_rt
from zimage_rt.backends.base import Module
from zimage_rt.backends.registry import load_backend
from zimage_rt.bundle.manifest import read_manifest
from zimage_rt.errors import BundleMismatch, Cancelled, OutOfMemory

pytestmark = pytest.mark.gpu
require_gpu()

# By the version of the Fun-Union ControlNets: `add_control_noise_refiner`, and after which of nano's five layers the
# control layers stand.
KINDS: dict[str, tuple[str | None, list[int]]] = {
    "1": (None, [0]),
    "2.0": ("control_layers", [0, 1]),
    "2.1": ("control_noise_refiner", [0, 2]),
}
PROMPT = "a panda on a blue background"
LONGER = "a cat on the left and a house on the right, purple background, drawn as children draw them, with a pencil"
SIZES = {"dim": 384, "n_heads": 3, "n_kv_heads": 3}  # of the single evaluations, as small as the kernels compute
TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3}  # of a whole evaluation against fp32
DECIBELS = {"bf16": 30, "fp16": 38}

Load = Callable[[str, str], zimage_rt.Engine]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """zimage-nano with a random ControlNet of a kind: fp32 for ONNX Runtime, the other precisions for `cuda`."""
    from controlnet_files import make_controlnet  # torch loads here
    from zimage_rt.export.bundle import export
    from zimage_rt.export.recipe import read_recipe

    folder, made = tmp_path_factory.mktemp("controlled"), dict[Path, Path]()

    def bundle(kind: str, precision: str) -> Path:
        net, out = folder / f"net-{kind}", folder / f"{kind}-{precision}"
        if net not in made:
            refiner, places = KINDS[kind]
            made[net] = make_controlnet(net, refiner, control_layers_places=places)
        if out not in made:
            recipe = read_recipe(ROOT / "engines" / ("nano.toml" if precision == "fp32" else f"nano-{precision}.toml"))
            backend = recipe.backend if precision == "fp32" else "cuda"
            parts = {**recipe.parts, "controlnet": net}
            export(dataclasses.replace(recipe, out=out, vae=("tiny",), parts=parts, backend=backend, parity=False))
            made[out] = out
        return out

    return bundle


@pytest.fixture(scope="module")
def load(bundles: Callable[[str, str], Path]) -> Load:
    engines: dict[tuple[str, str], zimage_rt.Engine] = {}

    def engine(kind: str, precision: str) -> zimage_rt.Engine:
        if (kind, precision) not in engines:
            backend = "onnxruntime" if precision == "fp32" else "cuda"
            engines[kind, precision] = zimage_rt.Engine.load(bundles(kind, precision), backend=backend)
        return engines[kind, precision]

    return engine


@pytest.fixture(scope="module")
def following(load: Load) -> zimage_rt.Engine:
    return load("2.1", "bf16")


@pytest.fixture(scope="module")
def reference(load: Load) -> zimage_rt.Engine:
    return load("2.1", "fp32")


@pytest.fixture(scope="module")
def card() -> Image.Image:
    from controlnet_files import control_card

    return control_card()


def draw(engine: zimage_rt.Engine, card: Image.Image | None, prompts: Any = PROMPT, **settings: Any) -> np.ndarray:
    settings = {"seed": 5, "num_inference_steps": 4, "vae": "tiny", "height": 256, "width": 192, **settings}
    return engine.generate(prompts, control_image=card, **settings).images


# --- one evaluation ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint with a transformer of five layers and three that refine: more than nano has."""
    import diffusers
    import torch
    from export_checkpoints import copy_with

    torch.manual_seed(1)
    transformer = diffusers.ZImageTransformer2DModel(**SIZES, n_layers=5, n_refiner_layers=3, cap_feat_dim=64)
    for name, parameter in transformer.named_parameters():
        if "pad_token" in name or name.endswith(("norm1.weight", "norm2.weight", "bias")):
            parameter.data.normal_(0.2, 0.3)
    folder = tmp_path_factory.mktemp("deep")
    transformer.save_pretrained(folder / "transformer")
    return copy_with(small_checkpoint, folder / "checkpoint", transformer=folder / "transformer")


def in_torch(checkpoint: Path, net: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    import torch
    from zimage_rt.export import weights
    from zimage_rt.export.checkpoint import open_checkpoint
    from zimage_rt.export.plan import plan_modules
    from zimage_rt.export.precision import FP32

    plans = plan_modules(open_checkpoint(checkpoint, {"controlnet": net}), FP32, ())
    plan = next(plan for plan in plans if plan.name == "controlnet")
    assert plan.base is not None
    tensors = {**plan.base.component.tensors, **plan.component.tensors}
    module = weights.load(plan.build(), dataclasses.replace(plan.component, tensors=tensors))
    with torch.no_grad():
        return module(*(torch.from_numpy(inputs[spec.name]) for spec in plan.inputs)).numpy()


def on_cuda(checkpoint: Path, net: Path, out: Path, precision: str) -> Any:
    from export_checkpoints import recipe
    from zimage_rt.export.bundle import export

    parts = {"controlnet": net}
    export(recipe(checkpoint, out, precision=precision, backend="cuda", vae=(), parity=False, parts=parts))
    return load_backend("cuda", {}).open(out, read_manifest(out), lambda name: None)


def evaluation(channels: int, dim: int, batch: int, height: int, width: int, rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng()
    control = np.zeros((batch, channels, height, width))
    control[:, :16] = rng.standard_normal((batch, 16, height, width))
    inputs = {
        "latents": rng.standard_normal((batch, 16, height, width)),
        "timestep": np.linspace(0.1, 0.9, batch),
        "context": rng.standard_normal((batch, rows, dim)),
        "control_latents": control,
        "control_scale": np.linspace(0.75, 1.5, batch),
    }
    return {name: value.astype(np.float32) for name, value in inputs.items()}


@pytest.mark.parametrize("precision", CUDA_PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_is_that_of_torch(kind, precision, deep, tmp_path):
    """Several layers and hints in the noise refiner; the ControlNet is loaded beside a transformer that was used."""
    from controlnet_files import make_controlnet

    refiner = KINDS[kind][0]
    places = None if refiner is None else [0, 2]
    net = make_controlnet(
        tmp_path / "net",
        refiner,
        **SIZES,
        n_refiner_layers=3,
        control_layers_places=[0, 1, 3],
        control_refiner_layers_places=places,
    )
    pipeline = on_cuda(deep, net, tmp_path / "bundle", precision)
    for batch, height, width, rows in ((1, 10, 14, 32), (3, 26, 34, 64), (1, 64, 72, 96)):
        inputs = evaluation(16 if refiner is None else 33, SIZES["dim"], batch, height, width, rows)
        plain = pipeline.module("transformer")({name: inputs[name] for name in ("latents", "timestep", "context")})
        wanted = in_torch(deep, net, inputs)
        ours = pipeline.module("controlnet")(inputs)["noise_pred"]
        assert relative_error(ours, wanted) < TOLERANCE[precision]
        assert relative_error(plain["noise_pred"], wanted) > 5 * TOLERANCE[precision]  # the hints are no rounding error
        silent = pipeline.module("controlnet")({**inputs, "control_scale": np.zeros(batch, np.float32)})
        assert relative_error(silent["noise_pred"], plain["noise_pred"]) < TOLERANCE[precision] / 4


def test_a_transformer_that_no_kernel_computes_is_refused_when_it_is_loaded(small_checkpoint, tmp_path):
    from controlnet_files import make_controlnet

    sizes = {"dim": 256, "n_heads": 2, "n_kv_heads": 2}  # int(256 / 3 * 8) = 682 wide between w1 and w2
    net = make_controlnet(tmp_path / "net", None, **sizes, control_layers_places=[0])
    pipeline = on_cuda(small_checkpoint, net, tmp_path / "bundle", "bf16")
    with pytest.raises(BundleMismatch, match=r"loading transformer: .* multiple of 8, got 682"):
        pipeline.load(["transformer"])


def test_a_control_stream_beyond_fp16_draws_what_fp32_does(deep, tmp_path):
    """The projections take it as it is, no norm before them: here its values are about 1e5."""
    from controlnet_files import WEIGHTS, make_controlnet, tensors_of
    from safetensors.torch import save_file

    net = make_controlnet(
        tmp_path / "net",
        "control_noise_refiner",
        **SIZES,
        n_refiner_layers=2,
        control_layers_places=[0, 2],
    )

    def loud(name: str) -> float:
        begins = name.endswith(("2-1.bias", "before_proj.bias"))
        return 2.0**19 if begins else 2.0**-8 if "_proj.weight" in name else 1.0

    save_file({name: tensor * loud(name) for name, tensor in tensors_of(net).items()}, net / WEIGHTS)
    inputs = evaluation(33, SIZES["dim"], 1, 26, 34, 64)
    ours = on_cuda(deep, net, tmp_path / "bundle", "fp16").module("controlnet")(inputs)["noise_pred"]
    assert relative_error(ours, in_torch(deep, net, inputs)) < 2e-2


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", CUDA_PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_images_are_those_of_onnxruntime(load, card, kind, precision):
    ours, theirs = load(kind, precision), load(kind, "fp32")
    free = draw(ours, None)
    for scale in (0.75, 1.5):
        image = draw(ours, card, control_scale=scale)
        assert psnr(image[0], draw(theirs, card, control_scale=scale)[0]) >= DECIBELS[precision]
        assert psnr(image[0], free[0]) < 30
    # Plain images are to the byte what they were before any control image.
    assert draw(ours, card, control_scale=0.0).tobytes() == draw(ours, None).tobytes() == free.tobytes()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 2.0, "negative_prompt": "text"},
        {"guidance_scale": 3.0, "cfg_truncation": 0.5, "cfg_normalization": 1.0},
        {"sampler": "heun"},
        {"prompts": [PROMPT, LONGER], "guidance_scale": 2.0},
        {"height": 512, "width": 512, "num_inference_steps": 2},
    ],
)
def test_the_same_bytes_again_by_graph_and_by_step(following, card, settings):
    first, again, third = (draw(following, card, **settings) for _ in range(3))
    stepped = draw(following, card, callback=lambda info: None, **settings)
    assert first.tobytes() == again.tobytes() == third.tobytes() == stepped.tobytes()


def test_one_graph_serves_every_control_image_and_scale(following, card):
    before = draw(following, card)
    graphs = following.pipeline.native.graph_count
    other = card.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    for control, scale in ((other, 0.75), (card, 0.5), (other, 2.0)):
        drawn = draw(following, control, control_scale=scale)
        assert drawn.tobytes() != before.tobytes()
        stepped = draw(following, control, control_scale=scale, callback=lambda info: info.preview() is not None)
        assert drawn.tobytes() == stepped.tobytes()
    assert following.pipeline.native.graph_count == graphs
    assert draw(following, card).tobytes() == before.tobytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 2.0, "negative_prompt": "text"},
        {"guidance_scale": 3.0, "cfg_truncation": 0.5, "cfg_normalization": 1.0},
    ],
)
def test_batches_of_two_lengths_and_guidance_are_those_of_onnxruntime(following, reference, card, settings):
    prompts = [PROMPT, LONGER]
    ours, theirs = (draw(engine, card, prompts, **settings) for engine in (following, reference))
    assert min(psnr(*pair) for pair in zip(ours, theirs, strict=True)) >= DECIBELS["bf16"]
    for i, prompt in enumerate(prompts):
        assert psnr(ours[i], draw(following, card, prompt, **{**settings, "seed": 5 + i})[0]) > 35


@pytest.mark.parametrize(
    "settings", [{"strength": 0.6}, {"strength": 1.0, "mask": "lower"}, {"second_pass": zimage_rt.SecondPass(1.5, 0.5)}]
)
def test_it_goes_with_other_features(following, reference, card, settings):
    settings = dict(settings)
    if "strength" in settings:
        settings["image"] = draw(reference, None)[0]
    if "mask" in settings:
        settings["mask"] = np.repeat(np.uint8([0, 255]), 128)[:, None] * np.ones((1, 192), np.uint8)
    ours, theirs = (draw(engine, card, **settings) for engine in (following, reference))
    assert psnr(ours[0], theirs[0]) >= DECIBELS["bf16"]


def test_loras_change_what_follows(following, reference, card, tmp_path):
    before = draw(following, card)
    path = random_lora_of(following.manifest, tmp_path / "style.safetensors", seed=1, modules=("transformer",))
    for engine in (following, reference):
        engine.load_lora(path, weight=0.5)
    try:
        styled = draw(following, card)
        assert psnr(styled[0], draw(reference, card)[0]) >= DECIBELS["bf16"]
        assert psnr(styled[0], before[0]) < 35
        assert draw(following, card, callback=lambda info: None).tobytes() == styled.tobytes()
    finally:
        for engine in (following, reference):
            engine.unload_lora("style")
    assert draw(following, card).tobytes() == before.tobytes()


def test_a_callback_cancels_and_the_next_request_is_whole(following, card):
    whole = draw(following, card)
    with pytest.raises(Cancelled):
        draw(following, card, callback=lambda info: info.step < 1)
    assert draw(following, card).tobytes() == whole.tobytes()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_its_weights_come_with_the_first_request_that_wants_them(bundles, card):
    engine = zimage_rt.Engine.load(bundles("2.1", "bf16"), backend="cuda")
    engine.pipeline.load(["tiny_vae_encoder", "tiny_vae_decoder"])
    before = engine.pipeline.memory()["weights"]
    draw(engine, None)
    assert engine.pipeline.memory()["weights"] == before
    draw(engine, card)
    added = engine.pipeline.memory()["weights"] - before
    size = (bundles("2.1", "bf16") / "controlnet.safetensors").stat().st_size
    assert 0.95 * size < added < 1.05 * size + 65536


def test_too_little_memory_for_it_leaves_plain_images(bundles, card):
    bundle = bundles("2.1", "bf16")
    roomy = zimage_rt.Engine.load(bundle, backend="cuda")
    roomy.pipeline.load(["tiny_vae_encoder"])
    draw(roomy, None)
    use = roomy.pipeline.memory()
    size = (bundle / "controlnet.safetensors").stat().st_size
    options = {"memory_limit": use["weights"] + use["workspace"] + use["graphs"] + size // 2}
    tight = zimage_rt.Engine.load(bundle, backend="cuda", backend_options=options)
    tight.pipeline.load(["tiny_vae_encoder"])
    plain = draw(tight, None)
    for _ in range(2):
        with pytest.raises(OutOfMemory, match="ControlNet"):
            tight.pipeline.load(["controlnet"])
        with pytest.raises(OutOfMemory):
            draw(tight, card)
    assert draw(tight, None).tobytes() == plain.tobytes()


def test_each_of_its_tensors_is_checked_when_it_is_loaded(bundles):
    """A refused ControlNet leaves nothing on the device; the right weights load behind it."""
    from zimage_rt import _cuda
    from zimage_rt.backends.cuda import _tensors

    bundle = bundles("2.1", "bf16")
    manifest = read_manifest(bundle)
    pipeline = load_backend("cuda", {}).open(bundle, manifest, lambda name: None)
    pipeline.load(["transformer"])
    before = pipeline.memory()
    spec, path = manifest.module("controlnet"), bundle / "controlnet.safetensors"
    tensors = _tensors(path)
    for lost, *_ in tensors:
        changed = [(f"{name}.gone" if name == lost else name, *rest) for name, *rest in tensors]
        with pytest.raises(_cuda.WeightError, match=rf"{re.escape(lost)} .*is missing"):
            pipeline.native.load("controlnet", str(path), changed, dict(spec.config))
    after = pipeline.memory()
    assert after["weights"] == before["weights"]
    assert before["free"] - after["free"] < 4 * path.stat().st_size  # of as many uploads as it has tensors
    pipeline.load(["controlnet"])
    inputs = evaluation(33, 384, 1, 8, 8, 32)
    whole = load_backend("cuda", {}).open(bundle, manifest, lambda name: None)
    drawn = [one.module("controlnet")(inputs)["noise_pred"].tobytes() for one in (pipeline, whole)]
    assert drawn[0] == drawn[1]


def test_control_latents_of_another_shape_are_refused(following, card):
    module: Module = following.pipeline.module("controlnet")
    inputs = evaluation(33, 384, 1, 8, 8, 32)
    for name, value in (
        ("control_latents", inputs["control_latents"][:, :16]),
        ("control_latents", inputs["control_latents"][:, :, :4]),
        ("control_scale", np.ones(2, np.float32)),
    ):
        with pytest.raises(zimage_rt.errors.RequestError, match=name):
            module({**inputs, name: value})
