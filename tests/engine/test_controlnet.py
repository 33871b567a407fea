"""ControlNets on zimage-nano: images against diffusers' pipeline, combinations with other features, refusals."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from controlnet_files import control_card, make_controlnet
from diffusers import ZImageControlNetModel, ZImageControlNetPipeline
from export_checkpoints import graphs_of, recipe
from lora_files import changed, peft, random_lora, write
from PIL import Image
from shared import CHECKPOINT, SAME_IMAGE
from zimage_rt.benchmarks.fidelity import psnr
from zimage_rt.export.bundle import export

import zimage_rt
from zimage_rt.bundle.manifest import read_manifest, write_manifest
from zimage_rt.errors import BundleMismatch, MetadataError, RequestError
from zimage_rt.request.resolve import resolve
from zimage_rt.request.types import SecondPass

# PSNR in dB below which images show different things; 13 to 37 are measured. Rounding is far above (`SAME_IMAGE`).
DIFFERENT = 40
PROMPT = "a panda on a blue background"
LONGER = "a cat on the left and a house on the right, purple background, drawn as children draw them, with a pencil"


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the architecture of zimage-nano-controlnet, whose graph the cookbook needs as well.

    It is that of Fun-Union 2.0: channels for inpainting, and control layers that also run over the image alone.
    """
    return make_controlnet(tmp_path_factory.mktemp("net"), "control_layers", control_layers_places=[0])


@pytest.fixture(scope="module")
def controlled(bundle: Path, net: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano bundle with that ControlNet; its VAEs are those of the exported bundle."""
    out = tmp_path_factory.mktemp("bundles") / "controlled"
    with graphs_of(bundle, CHECKPOINT):
        manifest = export(recipe(CHECKPOINT, out, vae=(), parity=False, parts={"controlnet": net}))
    nano = read_manifest(bundle)
    vaes = {name: module for name, module in nano.modules.items() if "_vae_" in name}
    files = {file: nano.files[file] for name in vaes for file in nano.module_files(name)}
    for file in files:
        shutil.copyfile(bundle / file, out / file)
    modules = {**manifest.modules, **vaes}
    write_manifest(
        dataclasses.replace(manifest, modules=modules, files={**manifest.files, **files}, shapes=nano.shapes), out
    )
    return out


@pytest.fixture(scope="module")
def following(controlled: Path) -> zimage_rt.Engine:
    """An engine with a ControlNet."""
    return zimage_rt.Engine.load(controlled)


@pytest.fixture(scope="module")
def card() -> Image.Image:
    return control_card()


@pytest.fixture(scope="module")
def reference(net: Path) -> Any:
    controlnet = ZImageControlNetModel.from_pretrained(net)
    pipeline = ZImageControlNetPipeline.from_pretrained(str(CHECKPOINT), controlnet=controlnet, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Any, card: Image.Image, prompts: list[str], **settings: Any) -> np.ndarray:
    settings = {"num_inference_steps": 4, "height": 256, "width": 192, "guidance_scale": 0.0, **settings}
    shape = (1, 16, settings["height"] // 8, settings["width"] // 8)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(5 + i)) for i in range(len(prompts))]
    images = pipeline(list(prompts), control_image=card, latents=torch.cat(noise), output_type="np", **settings).images
    return np.rint(images * 255).astype(np.uint8)


def ours(engine: zimage_rt.Engine, card: Any, prompts: Any = PROMPT, **settings: Any) -> np.ndarray:
    settings = {"seed": 5, "num_inference_steps": 4, "vae": "full", **settings}
    return engine.generate(prompts, control_image=card, **settings).images


@pytest.fixture(scope="module")
def plain(following: zimage_rt.Engine) -> np.ndarray:
    return ours(following, None, height=256, width=192)


@pytest.mark.parametrize("scale", [0.75, 0.25, 1.5])
def test_an_image_follows_as_in_diffusers(following, reference, card, plain, scale):
    expected = theirs(reference, card, [PROMPT], controlnet_conditioning_scale=scale)
    image = ours(following, card, control_scale=scale)
    assert psnr(image[0], expected[0]) >= SAME_IMAGE
    assert psnr(image[0], plain[0]) < DIFFERENT


def test_the_default_scale_is_that_of_diffusers(following, card):
    assert ours(following, card).tobytes() == ours(following, card, control_scale=0.75).tobytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 0.0},
        {"guidance_scale": 2.0},
        {"guidance_scale": 3.0, "cfg_truncation": 0.5, "cfg_normalization": 1.0},
    ],
)
def test_batches_and_guidance_follow_as_in_diffusers(following, reference, card, settings):
    """Prompts of two lengths and a negative prompt of a third, which run in separate batches."""
    prompts = [PROMPT, LONGER]
    expected = theirs(reference, card, prompts, negative_prompt=["text"] * 2, **settings)
    images = ours(following, card, prompts, negative_prompt="text", **settings)
    assert min(psnr(*pair) for pair in zip(images, expected, strict=True)) >= SAME_IMAGE


def test_at_scale_0_nothing_is_followed(following, card, plain):
    result = following.generate(
        PROMPT, seed=5, num_inference_steps=4, vae="full", control_image=card, control_scale=0.0
    )
    assert result.images.tobytes() == plain.tobytes()
    assert "encode_control" not in result.timings


def test_another_size_is_fitted_as_images_are(following, reference, card):
    """Unlike in diffusers, which stretches."""
    expected = theirs(reference, card, [PROMPT], height=128, width=160)
    assert psnr(ours(following, card, height=128, width=160, fit="stretch")[0], expected[0]) >= SAME_IMAGE
    pixels = np.asarray(card)
    cut = ours(following, card, height=192, width=192)
    assert cut.tobytes() == ours(following, Image.fromarray(pixels[32:224])).tobytes()


# --- with other features ----------------------------------------------------------------------------------------


def test_image_to_image_follows_a_control_image(following, card, plain):
    fields = {"image": plain[0], "strength": 0.6}
    free, bound = ours(following, None, **fields), ours(following, card, **fields)
    assert psnr(free[0], bound[0]) < DIFFERENT
    # At full strength the input image has no effect, only the control image.
    forgotten = ours(following, card, image=plain[0], strength=1.0)
    assert psnr(forgotten[0], ours(following, card)[0]) >= SAME_IMAGE


def test_what_a_mask_keeps_is_kept(following, card, plain):
    mask = np.zeros((256, 192), np.uint8)
    mask[128:] = 255
    fields = {"image": plain[0], "mask": mask, "strength": 1.0}
    bound = ours(following, card, **fields)
    assert (bound[0, :128] == plain[0, :128]).all()
    assert psnr(bound[0, 128:], ours(following, None, **fields)[0, 128:]) < DIFFERENT


def test_a_second_pass_follows_at_its_own_size(following, card):
    """Like a second request for the first one's result, with the control image at that size."""
    fields = {"num_inference_steps": 3, "seed": 5, "vae": "full"}
    again = SecondPass(scale=1.5, strength=0.5)
    small = {"height": 128, "width": 96, **fields}
    both = following.generate(PROMPT, control_image=card, second_pass=again, **small)
    first = following.generate(PROMPT, control_image=card, **small).pil_images[0]
    larger, control = (image.resize((144, 192), Image.Resampling.LANCZOS) for image in (first, card))
    second = ours(following, control, image=larger, strength=0.5, num_inference_steps=3)
    assert psnr(both.images[0], second[0]) >= SAME_IMAGE
    free = ours(following, None, image=larger, strength=0.5, num_inference_steps=3)
    assert psnr(both.images[0], free[0]) < DIFFERENT


def test_loras_change_what_follows(controlled, following, reference, card, tmp_path):
    """LoRAs loaded before and after the ControlNet; switched off, every byte is restored."""
    lora = random_lora(reference.transformer, seed=1)
    before = ours(following, card)
    path = write(tmp_path / "style.safetensors", peft(lora))
    following.load_lora(path)
    styled = ours(following, card)
    following.unload_lora("style")
    pipeline = copy.deepcopy(reference)
    changed(pipeline.transformer, lora)
    expected = theirs(
        ZImageControlNetPipeline(**{**pipeline.components}), card, [PROMPT], controlnet_conditioning_scale=0.75
    )
    assert psnr(styled[0], expected[0]) >= SAME_IMAGE
    assert psnr(styled[0], before[0]) < 35
    assert ours(following, card).tobytes() == before.tobytes()
    fresh = zimage_rt.Engine.load(controlled)
    fresh.load_lora(path)
    assert ours(fresh, card).tobytes() == styled.tobytes()


def test_an_image_records_its_control_image_and_is_repeated(following, controlled, card, tmp_path):
    path = tmp_path / "card.png"
    card.save(path)
    result = following.generate(
        PROMPT, seed=5, num_inference_steps=2, control_image=path, control_scale=1.25, height=64, width=64
    )
    (drawn,) = result.save(tmp_path / "drawn.png")
    record = zimage_rt.read_record(drawn)
    assert (record.request["control_image"]["path"], record.request["control_scale"]) == (str(path), 1.25)
    request = record.to_request()
    assert following.run(request).images.tobytes() == result.images.tobytes()
    by_array = following.generate(PROMPT, seed=5, num_inference_steps=1, control_image=card, height=64, width=64)
    with pytest.raises(MetadataError, match="control_image: came without a path"):
        by_array.records[0].to_request()

    command = [sys.executable, "-m", "zimage_rt.cli.main", "generate", str(controlled), "--like", str(drawn)]
    again = subprocess.run(
        [*command, "-o", str(tmp_path / "again.png"), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(again.stdout)["same"] is True
    options = ["--control-image", str(path), "--control-scale", "0", "-o", str(tmp_path / "other.png")]
    subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    free = following.generate(PROMPT, seed=5, num_inference_steps=2, height=64, width=64)
    assert np.asarray(Image.open(tmp_path / "other.png")).tobytes() == free.images.tobytes()


# --- sizes and refusals -----------------------------------------------------------------------------------------------


def test_a_control_image_sets_the_size_if_nothing_else_does(following, card):
    def size(**fields: Any) -> tuple[int, int]:
        resolved = resolve(zimage_rt.GenerateRequest(PROMPT, control_image=card, **fields), following.manifest)
        assert resolved.control_image is not None
        assert resolved.control_image.shape == (resolved.height, resolved.width, 3)
        return resolved.height, resolved.width

    assert size() == (256, 192)
    assert size(width=96) == (256, 96)
    assert size(image=Image.new("RGB", (64, 128))) == (128, 64)
    assert size(image_latents=np.zeros((1, 16, 10, 12), np.float32)) == (80, 96)


def test_a_bundle_without_one_says_how_to_get_it(engine: zimage_rt.Engine, card: Image.Image):
    with pytest.raises(RequestError, match=r"this bundle has no ControlNet; .*--controlnet PATH"):
        engine.generate(PROMPT, control_image=card)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"control_scale": -1.0}, "control_scale: expected a finite number, 0 or more, got -1.0"),
        ({"control_scale": float("nan")}, "control_scale: expected a finite number"),
        ({"control_scale": "much"}, "control_scale: expected a number, got 'much'"),
        ({"control_image": "no/such/image.png"}, "control_image: no/such/image.png cannot be read as an image"),
        ({"control_image": 5}, "control_image: expected a PIL image, an array or a path, got int"),
        ({"control_image": Image.new("RGB", (8, 8))}, "height: expected 64"),
    ],
)
def test_nonsense_is_refused(following, card, fields, message):
    with pytest.raises(RequestError) as caught:
        following.generate(PROMPT, **{"control_image": card, **fields})
    assert message in str(caught.value)


def test_both_weight_files_are_checked_before_they_are_read(following, controlled, card, tmp_path):
    assert following.manifest.modules["controlnet"].base == "transformer"
    files = following.manifest.module_files("controlnet")
    assert files == ("controlnet.onnx", "controlnet.safetensors", "transformer.safetensors")
    spoilt = shutil.copytree(controlled, tmp_path / "spoilt")
    with (spoilt / "controlnet.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    engine = zimage_rt.Engine.load(spoilt)
    small = {"num_inference_steps": 1, "height": 64, "width": 64}
    engine.generate(PROMPT, **small)  # nothing of the ControlNet is read for it
    with pytest.raises(BundleMismatch, match=r"controlnet\.safetensors.*the file was changed"):
        engine.generate(PROMPT, control_image=card, **small)
