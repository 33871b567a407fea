"""What nodes change around an evaluation, against ComfyUI's rules written again over diffusers' transformer.

The references are euler loops in float64 around zimage-nano's transformer in float32. A rule is ComfyUI's 0.33.0.
Masked samplers are compared with what ComfyUI gave (`tests/data/comfyui_masked.npz`, its `source`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_cases import TOLERANCE, TOLERANCES, L, predict
from controlnet_files import control_card
from diffusers import ZImagePipeline
from export_checkpoints import graphs_of
from sample_jobs import sample_job
from shared import BUNDLE, CHECKPOINT, ROOT, made_once
from zimage_rt.export.bundle import export
from zimage_rt.export.recipe import read_recipe

import zimage_rt
from zimage_rt import _core
from zimage_rt.backends.base import SampleJob
from zimage_rt.comfyui import sampling
from zimage_rt.comfyui.execute import execute
from zimage_rt.comfyui.files import FolderFiles
from zimage_rt.comfyui.graph import WorkflowError
from zimage_rt.comfyui.inputs import InputError
from zimage_rt.comfyui.nodes import conditioning, latents, loaders, model_patches, samplers
from zimage_rt.comfyui.nodes.model_patches import control_of
from zimage_rt.comfyui.plan import plan
from zimage_rt.comfyui.run import Run
from zimage_rt.comfyui.values import Conditioning, Latent, Model, Noise
from zimage_rt.comfyui.workflow_file import parse_workflow
from zimage_rt.denoise import MaskedDenoiser
from zimage_rt.errors import RequestWarning
from zimage_rt.sampling.samplers import SAMPLERS, sampler_table, step_noise
from zimage_rt.sampling.schedules import denoise_sigmas, schedule_sigmas

FILES = FolderFiles({}, "nano", ROOT / "checkpoints" / "zimage-nano-cyanotype", ())
SEED, STEPS = 11, 4
SIZE = 64  # pixels
SHORT, LONGER = "a panda", "a fox on the left and a rocket on the right, yellow background, flat style, drawn with care"
BAD = "classic style"
# Of latents, which reach 3: float32 of the reference's transformer and of the bundle's differ by less.
SAME = 1e-4
# Of a ControlNet's input: a pixel in the middle between two bytes may be rounded to the other, which changes latents.
CONTROL_SAME = 0.02

# (latents, sigma) → the clean latents, all float64.
Clean = Callable[[np.ndarray, np.float32], np.ndarray]


@pytest.fixture(scope="module")
def diffusers_pipeline() -> Any:
    return ZImagePipeline.from_pretrained(str(CHECKPOINT), dtype=torch.float32)


class Transformer:
    """diffusers' transformer as a denoiser of prompts."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def clean(
        self, x: np.ndarray, sigma: np.float32, text: str, *, zeroed: bool = False, multiplier: float = 1
    ) -> np.ndarray:
        """The clean latents of `x` at a noise level."""
        with torch.no_grad():
            (embeds,), _ = self._pipeline.encode_prompt([text], do_classifier_free_guidance=False)
            embeds = embeds * (0 if zeroed else 1)
            timestep = np.float32(1) - np.float32(multiplier) * sigma
            parts = [torch.from_numpy(each.astype(np.float32))[:, None] for each in x]
            (predictions,) = self._pipeline.transformer(
                parts, torch.full((len(x),), float(timestep)), [embeds] * len(x), return_dict=False
            )
        prediction = -np.stack([each[:, 0].numpy() for each in predictions]).astype(np.float64)
        return x - float(sigma) * prediction


@pytest.fixture(scope="module")
def transformer(diffusers_pipeline: Any) -> Transformer:
    return Transformer(diffusers_pipeline)


def euler(clean: Clean, batch: int = 1) -> np.ndarray:
    """ComfyUI's euler over an empty latent, simple schedule."""
    sigmas = schedule_sigmas("simple", STEPS, 3.0)
    x = float(sigmas[0]) * _core.randn(SEED, [batch, 16, SIZE // 8, SIZE // 8]).astype(np.float64)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = x + (x - clean(x, sigma)) / float(sigma) * (float(sigma_next) - float(sigma))
    return x


class Nodes:
    """The nodes around a sampler, by their own functions."""

    def __init__(self, engine: zimage_rt.Engine) -> None:
        self.run = Run(lambda bundle: engine, FILES)
        (self.model,) = loaders.load_model(self.run, "nano.safetensors")
        (self.clip,) = loaders.load_clip(self.run, "nano.safetensors")
        (self.vae,) = loaders.load_vae(self.run, "nano.safetensors")

    def text(self, text: str) -> Conditioning:
        return conditioning.encode_text(self.run, text, self.clip)[0]

    def combined(self, *texts: str) -> Conditioning:
        first, *others = (self.text(text) for text in texts)
        for other in others:
            (first,) = conditioning.combine(self.run, first, other)
        return first

    def empty(self, batch: int = 1, size: int = SIZE) -> Latent:
        return latents.empty(self.run, size, size, batch)[0]

    def drawn(self, positive: Conditioning, negative: Conditioning, cfg: float = 1.0, **changes: Any) -> np.ndarray:
        given: dict[str, Any] = {
            "model": self.model,
            "seed": SEED,
            "steps": STEPS,
            "sampler_name": "euler",
            "scheduler": "simple",
            "latent_image": self.empty(),
        }
        given |= {"positive": positive, "negative": negative, "cfg": cfg, **changes}
        return samplers.ksampler(self.run, **given)[0].samples


@pytest.fixture(scope="module")
def nodes(engine: zimage_rt.Engine) -> Nodes:
    return Nodes(engine)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max())


# --- combined prompts ------------------------------------------------------------------------------------------------


def test_combined_prompts_count_by_their_mean(nodes: Nodes, transformer: Transformer) -> None:
    """Three positive ones, of which two have one length, and two negative ones."""
    positives, negatives = (SHORT, "a tiger", LONGER), (BAD, "a sign that says nothing at all, on an orange wall")

    def clean(x: np.ndarray, sigma: np.float32) -> np.ndarray:
        positive, negative = (
            np.mean([transformer.clean(x, sigma, text) for text in texts], axis=0) for texts in (positives, negatives)
        )
        return negative + 2.5 * (positive - negative)

    found = nodes.drawn(nodes.combined(*positives), nodes.combined(*negatives), 2.5, latent_image=nodes.empty(2))
    assert difference(found, euler(clean, batch=2)) < SAME
    alone = nodes.drawn(nodes.text(SHORT), nodes.combined(*negatives), 2.5, latent_image=nodes.empty(2))
    assert difference(found, alone) > 0.1


def test_of_combined_prompts_each_is_zeroed(nodes: Nodes, transformer: Transformer) -> None:
    (zeroed,) = conditioning.zero_out(nodes.run, nodes.combined(SHORT, LONGER))

    def clean(x: np.ndarray, sigma: np.float32) -> np.ndarray:
        positive = transformer.clean(x, sigma, SHORT)
        negative = np.mean([transformer.clean(x, sigma, text, zeroed=True) for text in (SHORT, LONGER)], axis=0)
        return negative + 2.0 * (positive - negative)

    assert difference(nodes.drawn(nodes.text(SHORT), zeroed, 2.0), euler(clean)) < SAME


def test_prompts_of_two_bundles_are_not_combined(nodes: Nodes) -> None:
    other = dataclasses.replace(nodes.text(SHORT), clip=dataclasses.replace(nodes.clip, bundle="other"))
    with pytest.raises(WorkflowError, match="conditioning_2: expected prompts of the bundle nano, got those of other"):
        conditioning.combine(nodes.run, nodes.text(SHORT), other)


def test_combining_without_end_is_refused(nodes: Nodes) -> None:
    found = nodes.text(SHORT)
    for _ in range(6):
        (found,) = conditioning.combine(nodes.run, found, found)
    with pytest.raises(WorkflowError, match="conditioning_2: expected at most 64 prompts in all, got 128"):
        conditioning.combine(nodes.run, found, found)


# --- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [0.0, 0.4, 3.0])
def test_any_cfg_leads_from_the_negative_prompt(nodes: Nodes, transformer: Transformer, cfg: float) -> None:
    def clean(x: np.ndarray, sigma: np.float32) -> np.ndarray:
        negative = transformer.clean(x, sigma, BAD)
        return negative + cfg * (transformer.clean(x, sigma, SHORT) - negative)

    expected = euler(clean)
    assert difference(nodes.drawn(nodes.text(SHORT), nodes.text(BAD), cfg), expected) < SAME
    sigmas = schedule_sigmas("simple", STEPS, 3.0)
    (guider,) = samplers.cfg_guider(nodes.run, nodes.model, nodes.text(SHORT), nodes.text(BAD), cfg)
    latent, _ = samplers.sampler_custom_advanced(nodes.run, Noise(SEED), guider, "euler", sigmas, nodes.empty())
    assert difference(latent.samples, expected) < SAME


def test_at_cfg_1_the_negative_prompt_is_not_evaluated(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = nodes.run.engine("nano").pipeline
    jobs: list[SampleJob] = []
    original = pipeline.sample
    monkeypatch.setattr(pipeline, "sample", lambda job: [jobs.append(job), original(job)][1])
    nodes.drawn(nodes.text(SHORT), nodes.text(BAD), 1.0)
    nodes.drawn(nodes.text(SHORT), nodes.text(BAD), 1.5)
    # Nothing special was asked for: both are the pipeline's own loop.
    assert [len(job.conditioning.negatives) for job in jobs] == [0, 1]


def scale_after(strength: float, positive: np.ndarray, clean: np.ndarray) -> np.ndarray:
    norms = [np.sqrt((each**2).sum(axis=1, keepdims=True)) for each in (positive, clean)]
    return clean * np.minimum(norms[0] / (norms[1] + 1e-8), 1) * strength


@pytest.mark.parametrize(("cfg", "strengths"), [(4.0, (1.0,)), (4.0, (0.9, 1.05)), (1.0, (0.9,)), (0.5, (1.0,))])
def test_cfg_norm_scales_clean_images(
    nodes: Nodes, transformer: Transformer, cfg: float, strengths: tuple[float, ...]
) -> None:
    """Also two after one another, and at cfg 1, where there is no negative prediction."""

    def clean(x: np.ndarray, sigma: np.float32) -> np.ndarray:
        positive = result = transformer.clean(x, sigma, SHORT)
        if cfg != 1:
            negative = transformer.clean(x, sigma, BAD)
            result = negative + cfg * (positive - negative)
        for strength in strengths:
            result = scale_after(strength, positive, result)
        return result

    model = nodes.model
    for strength in strengths:
        (model,) = model_patches.cfg_norm(nodes.run, model, strength)
    found = nodes.drawn(nodes.text(SHORT), nodes.text(BAD), cfg, model=model)
    assert difference(found, euler(clean)) < SAME
    assert difference(found, nodes.drawn(nodes.text(SHORT), nodes.text(BAD), cfg)) > 0.05


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_cfg_norm_before_guidance_scales_predictions(nodes: Nodes, transformer: Transformer, strength: float) -> None:
    def clean(x: np.ndarray, sigma: np.float32) -> np.ndarray:
        positive, negative = (x - transformer.clean(x, sigma, text) for text in (SHORT, BAD))
        both = negative + 4.0 * (positive - negative)
        norms = [np.sqrt((each**2).sum(axis=1, keepdims=True)) for each in (positive, both)]
        return x - (strength * both * norms[0] / norms[1] + (1 - strength) * both)

    (model,) = model_patches.cfg_norm(nodes.run, nodes.model, 0.1, pre_cfg=True)
    (model,) = model_patches.cfg_norm(nodes.run, model, strength, pre_cfg=True)  # the last one counts
    assert difference(nodes.drawn(nodes.text(SHORT), nodes.text(BAD), 4.0, model=model), euler(clean)) < SAME


def test_a_mask_keeps_an_image_with_norms_below_a_cfg_of_1(nodes: Nodes, transformer: Transformer) -> None:
    """The mask is outermost: what is evaluated, combined and scaled is the image with the mask's surroundings."""
    image = np.cos(np.arange(16 * 64).reshape(1, 16, 8, 8) * 0.1).astype(np.float32)
    mask = np.zeros((1, 8, 8), np.float32)
    mask[:, 2:6, 1:5], mask[:, 6] = 1, 0.5
    noise = _core.randn(SEED, [1, 16, 8, 8]).astype(np.float64)

    def clean(x: np.ndarray, sigma: np.float32) -> np.ndarray:
        level = float(sigma)
        seen = x * mask + (level * noise + (1 - level) * image) * (1 - mask)
        positive, negative = (transformer.clean(seen, sigma, text) for text in (SHORT, BAD))
        result = scale_after(0.95, positive, negative + 0.3 * (positive - negative))
        return result * mask + image * (1 - mask)

    (model,) = model_patches.cfg_norm(nodes.run, nodes.model, 0.95)
    found = nodes.drawn(nodes.text(SHORT), nodes.text(BAD), 0.3, model=model, latent_image=Latent(image, mask))
    assert difference(found, euler(clean)) < SAME
    assert difference(found[..., :2, :], image[..., :2, :]) < 1e-5


# --- timesteps -------------------------------------------------------------------------------------------------------


def test_sd3s_timesteps_ruin_an_image_as_in_comfyui(nodes: Nodes, transformer: Transformer) -> None:
    with pytest.warns(RequestWarning, match="ModelSamplingSD3 gives Z-Image timesteps that are 1000 times too large"):
        (model,) = model_patches.model_sampling_sd3(nodes.run, nodes.model, 3.0)
    found = nodes.drawn(nodes.text(SHORT), nodes.text(BAD), model=model)
    expected = euler(lambda x, sigma: transformer.clean(x, sigma, SHORT, multiplier=1000))
    assert difference(found, expected) < SAME
    plain = nodes.drawn(nodes.text(SHORT), nodes.text(BAD))
    assert difference(found, plain) > 0.5
    (restored,) = model_patches.model_sampling(nodes.run, model, 3.0)
    assert np.array_equal(nodes.drawn(nodes.text(SHORT), nodes.text(BAD), model=restored), plain)


# --- masks -----------------------------------------------------------------------------------------------------------


def masked_cases() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    with np.load(Path(__file__).parents[1] / "data" / "comfyui_masked.npz") as file:
        for case, expected in zip(file["cases"], file["latents"], strict=True):
            yield str(case), expected, file["mask"]


@pytest.mark.parametrize(("case", "expected", "mask"), [pytest.param(*each, id=each[0]) for each in masked_cases()])
def test_masked_samplers_are_comfyuis(case: str, expected: np.ndarray, mask: np.ndarray) -> None:
    name, schedule, steps, strength, seed = case.split("|")
    sigmas = denoise_sigmas(schedule, int(steps), 3.0, float(strength), spare_step=SAMPLERS[name].spare_step)
    latent = Latent(L[None], mask[:, 0])
    noise = sampling.noise_of(Noise(int(seed)), latent)
    job = sample_job(
        sampler_table(name, sigmas, 3.0),
        (sigmas[0] * noise + (1 - sigmas[0]) * L[None]).astype(np.float32),
        step_noise=step_noise(name, sigmas, 3.0, [int(seed)], (16, 8, 8), joint=True),
    )
    masked = sampling._latent_mask(latent, noise, name, int(seed))
    assert _core.sample(MaskedDenoiser(predict, masked), job)
    assert difference(job.latents[0], expected) < TOLERANCES.get(name, TOLERANCE)


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_latents_of_more_than_2_28_numbers_are_refused(nodes: Nodes) -> None:
    for make in (latents.empty, latents.empty_image):
        with pytest.raises(WorkflowError, match="batch_size: expected at most 268435456 numbers"):
            make(nodes.run, 16384, 16384, 5)
    with pytest.raises(WorkflowError, match="amount: expected at most 268435456 numbers"):
        latents.repeat(nodes.run, Latent(np.zeros((64, 16, 512, 512), np.float32)), 2)
    assert len(latents.repeat(nodes.run, nodes.empty(), 64)[0].samples) == 64


# --- ControlNets -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zimage_rt.Engine]:
    """zimage-nano with its ControlNet, whose input has the channels of an inpainting one."""

    def make(folder: Path) -> None:
        with graphs_of(BUNDLE, CHECKPOINT):
            export(dataclasses.replace(read_recipe(ROOT / "engines" / "nano-control.toml"), out=folder, parity=False))

    with zimage_rt.Engine.load(made_once(tmp_path_factory, "nano-control", make)) as engine:
        yield engine


@pytest.fixture(scope="module")
def guided(controlled: zimage_rt.Engine) -> Nodes:
    return Nodes(controlled)


def card(height: int, width: int) -> np.ndarray:
    """A control image, `[1, height, width, 3]`."""
    pixels = np.asarray(control_card().resize((width, height)), np.float32)
    return pixels[None] / np.float32(255)


def following(nodes: Nodes, image: np.ndarray | None, strength: float = 1.0, **more: Any) -> Model:
    (patch,) = model_patches.load_model_patch(nodes.run, "Z-Image-Turbo-Fun-Controlnet-Union.safetensors")
    return model_patches.fun_controlnet(nodes.run, nodes.model, patch, nodes.vae, strength, image, **more)[0]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_control_image_is_followed_as_by_the_engine(guided: Nodes, controlled: zimage_rt.Engine, cfg: float) -> None:
    """Of an image of the latents' size, to the byte; zimage-nano's ControlNet has zero weights for inpainting."""
    image = card(SIZE, 96)
    (patch,) = model_patches.load_model_patch(guided.run, "union.safetensors")
    (model,) = model_patches.follow(guided.run, guided.model, patch, guided.vae, image, 0.8)
    (empty,) = latents.empty(guided.run, 96, SIZE)
    fields: dict[str, Any] = {"model": model, "latent_image": empty, "sampler_name": "res_multistep"}
    found = guided.drawn(guided.text(SHORT), guided.text(BAD), cfg, **fields)
    expected = controlled.generate(
        SHORT, BAD if cfg > 1 else "", guidance_scale=cfg - 1, seed=SEED, num_inference_steps=STEPS,
        control_image=np.rint(image[0] * 255).astype(np.uint8), control_scale=0.8,
        sampler="res_multistep", schedule="simple", vae="full", height=SIZE, width=96,
    )  # fmt: skip
    assert np.array_equal(found, expected.latents)
    free = guided.drawn(guided.text(SHORT), guided.text(BAD), cfg, **fields | {"model": guided.model})
    assert difference(found, free) > 0.5
    off = guided.drawn(guided.text(SHORT), guided.text(BAD), cfg, **fields | {"model": following(guided, image, 0.0)})
    assert np.array_equal(off, free)


def test_a_batch_follows_with_masks_norms_loras_and_two_prompts(guided: Nodes, controlled: zimage_rt.Engine) -> None:
    """Against the modules of the bundle, evaluated by hand."""
    (model,) = loaders.load_lora_of_model(guided.run, guided.model, "cyanotype.safetensors", 0.7)
    (model,) = model_patches.cfg_norm(
        guided.run, dataclasses.replace(following(guided, card(SIZE, SIZE)), loras=model.loras), 0.9
    )
    image = np.cos(np.arange(2 * 16 * 64).reshape(2, 16, 8, 8) * 0.1).astype(np.float32)
    mask = np.zeros((1, 8, 8), np.float32)
    mask[:, 1:7, 3:] = 1
    latent = Latent(image, mask)
    found = guided.drawn(guided.combined(SHORT, LONGER), guided.text(BAD), 2.0, model=model, latent_image=latent)
    control = control_of(guided.run, model, latent)
    assert control is not None and control.latents.shape == (2, 33, 8, 8)
    noise = _core.randn(SEED, [2, 16, 8, 8])
    controlled.set_loras({"cyanotype.safetensors": 0.7})
    module = controlled.pipeline.module("controlnet")

    def clean(x: np.ndarray, sigma: np.float32) -> np.ndarray:
        level = float(sigma)
        seen = x * mask + (level * noise + (1 - level) * image) * (1 - mask)

        def of(text: str) -> np.ndarray:
            inputs: Mapping[str, np.ndarray] = {
                "latents": seen.astype(np.float32),
                "timestep": np.full(2, 1 - sigma, np.float32),
                "context": np.repeat(controlled.encode_prompt(text), 2, axis=0),
                "control_latents": control.latents,
                "control_scale": np.ones(2, np.float32),
            }
            return seen - level * module(inputs)["noise_pred"].astype(np.float64)

        positive, negative = (of(SHORT) + of(LONGER)) / 2, of(BAD)
        result = scale_after(0.9, positive, negative + 2.0 * (positive - negative))
        return result * mask + image * (1 - mask)

    try:
        assert difference(found, euler(clean, batch=2)) < SAME
    finally:
        controlled.set_loras({})


# What ComfyUI gives an inpainting ControlNet: 16 channels of the control image, the mask, 16 of the kept image.
def upscaled(array: torch.Tensor, height: int, width: int, mode: str) -> torch.Tensor:
    """`[batch, channels, rows, columns]` cut in the middle to the aspect ratio, and resized by torch."""
    rows, columns = array.shape[2:]
    if columns / rows > width / height:
        cut = round((columns - rows * width / height) / 2)
        array = array[..., cut : columns - cut]
    elif columns / rows < width / height:
        cut = round((rows - columns * height / width) / 2)
        array = array[:, :, cut : rows - cut]
    aligned = {"align_corners": False} if mode == "bilinear" else {}
    return torch.nn.functional.interpolate(array, (height, width), mode=mode, **aligned)


@pytest.mark.parametrize("has", ["image", "image mask", "inpaint_image mask", "image inpaint_image mask"])
def test_a_controlnets_input_is_comfyuis(guided: Nodes, diffusers_pipeline: Any, has: str) -> None:
    height, width = 64, 96
    chance = np.random.default_rng(5)
    smooth = torch.from_numpy(chance.random((2, 3, 7, 9), np.float32))
    image = upscaled(smooth[:1], 150, 130, "bilinear")
    kept = upscaled(smooth[1:], 100, 220, "bilinear")
    mask = upscaled(smooth[:1, :1], 45, 90, "bilinear")

    def encoded(pixels: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            mean = diffusers_pipeline.vae.encode(pixels * 2 - 1).latent_dist.mode()
        return ((mean - 0.1159) * 0.3611).numpy()

    grey = torch.full((1, 3, height, width), 0.5)
    seen = upscaled(kept, height, width, "area") if "inpaint_image" in has else grey
    known = torch.zeros(1, 1, height // 8, width // 8)
    if "mask" in has:
        seen = (seen - 0.5) * torch.round(upscaled(1 - mask, height, width, "bilinear")) + 0.5
        known = upscaled(1 - mask, height // 8, width // 8, "nearest")
    first = upscaled(image, height, width, "area") if has.startswith("image") else grey
    expected = np.concatenate([encoded(first), known.numpy(), encoded(seen)], axis=1)

    given = {
        "image": image.movedim(1, -1).numpy(),
        "inpaint_image": kept.movedim(1, -1).numpy(),
        "mask": mask[:, 0].numpy(),
    }
    model = following(guided, **{"image": None, **{name: given[name] for name in has.split()}})
    control = control_of(guided.run, model, latents.empty(guided.run, width, height, 3)[0])
    assert control is not None and control.scale == 1.0 and control.latents.shape == (3, 33, 8, 12)
    for each in control.latents:
        assert difference(each, expected[0]) < CONTROL_SAME  # measured: 3e-5
        assert difference(each[16], expected[0, 16]) < 1e-6


def test_a_plain_controlnet_gets_the_image_alone(guided: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of Fun-Union 1 has 16 channels, and no use for a mask."""
    model = following(guided, card(SIZE, SIZE), mask=np.ones((1, 8, 8), np.float32))
    whole = control_of(guided.run, model, guided.empty())
    monkeypatch.setattr(model_patches, "_channels", lambda run, model: model_patches.PLAIN)
    plain = control_of(guided.run, model, guided.empty())
    assert whole is not None and plain is not None
    assert plain.latents.shape == (1, 16, 8, 8) and np.array_equal(plain.latents, whole.latents[:, :16])
    with pytest.raises(WorkflowError, match="image: this ControlNet does not inpaint"):
        following(guided, None, inpaint_image=card(SIZE, SIZE))


def test_what_no_controlnet_can_follow_is_refused(guided: Nodes, nodes: Nodes) -> None:
    with pytest.raises(WorkflowError, match=r"name: the bundle nano, which union\.safetensors stands for, has no"):
        model_patches.load_model_patch(nodes.run, "union.safetensors")
    other = dataclasses.replace(guided.model, bundle="other")
    (patch,) = model_patches.load_model_patch(guided.run, "union.safetensors")
    with pytest.raises(InputError, match="model and controlnet: expected those of one bundle, got other and nano"):
        model_patches.follow(guided.run, other, patch, guided.vae, card(SIZE, SIZE))
    model = following(guided, card(SIZE, SIZE))
    with pytest.raises(WorkflowError, match="model: it follows a ControlNet already"):
        model_patches.follow(guided.run, model, patch, guided.vae, card(SIZE, SIZE))
    with pytest.raises(WorkflowError, match="image: expected a link to image or inpaint_image, got none"):
        following(guided, None)
    two = following(guided, np.concatenate([card(SIZE, SIZE)] * 2))
    with pytest.raises(WorkflowError, match="image: expected 1, or one for each of the 3 latents, got 2"):
        control_of(guided.run, two, guided.empty(3))
    with pytest.raises(WorkflowError, match="latent_image: expected a height of 64 to 2048 pixels"):
        guided.drawn(guided.text(SHORT), guided.text(BAD), model=model, latent_image=guided.empty(size=40))


def test_comfyuis_template_with_a_controlnet_runs(controlled: zimage_rt.Engine, tmp_path: Path) -> None:
    """The one that ComfyUI ships, with another node in place of its edge detector."""
    package = importlib.util.find_spec("comfyui_workflow_templates_json")
    assert package is not None and package.submodule_search_locations
    name = "image_z_image_turbo_fun_union_controlnet"
    path = Path(package.submodule_search_locations[0]) / "templates" / f"{name}.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    for each in data["nodes"]:
        if each["type"] == "Canny":
            each["type"], each["widgets_values"] = "ImageInvert", []
    control_card().resize((96, 64)).save(tmp_path / f"{name}_input_image.png")
    files = FolderFiles({}, "nano", None, (tmp_path,))
    images = []
    for _ in range(2):
        run = Run(lambda bundle: controlled, files)
        execute(plan(parse_workflow(data), files), run)
        saved = next(made for made in run.made if not made.is_preview)
        assert saved.pixels.shape == (64, 96, 3)
        images.append(saved.pixels)
        for subgraph in data["definitions"]["subgraphs"]:
            for each in subgraph["nodes"]:
                if each["type"] == "QwenImageDiffsynthControlnet":
                    each["widgets_values"] = [0.0]
    followed, free = images
    assert np.abs(followed.astype(int) - free).max() > 60
