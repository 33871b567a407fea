"""Nodes of images, masks, latents and sigmas, against torch's and kornia's numbers.

`more_nodes.npz` has inputs (`in_…`) and what ComfyUI's rules make of them, computed with torch 2.13.0, Pillow and, for
edges, kornia 0.9.0 with a square root that is rounded correctly: torch's on a CPU is off by the last bit for a fifth of
all numbers, which moves 128 of the edges of `shapes`, and none of the photos. Latents in it are in the VAE's space.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shared import ROOT

from zimage_rt.comfyui.bislerp import bislerp
from zimage_rt.comfyui.canny import canny
from zimage_rt.comfyui.files import FolderFiles
from zimage_rt.comfyui.graph import WorkflowError
from zimage_rt.comfyui.nodes import compose, conditioning, filters, latent_math, masks, omni, sigmas
from zimage_rt.comfyui.registry import NODES
from zimage_rt.comfyui.resize import MAX_NUMBERS, check_numbers, resize
from zimage_rt.comfyui.run import Run
from zimage_rt.comfyui.values import Clip, Latent

DATA = ROOT / "tests" / "data" / "comfyui"
SCALE, SHIFT = 0.3611, 0.1159


def no_engine(bundle: str) -> Any:
    raise AssertionError(bundle)


RUN = Run(no_engine, FolderFiles({}, None, None, ()))


def call(name: str, **inputs: Any) -> Any:
    """The first output of a node; inputs with a dot are given with two underscores."""
    given = {key.replace("__", "."): value for key, value in inputs.items()}
    return NODES[name].function(RUN, **given)[0]


@pytest.fixture(scope="module")
def known() -> Mapping[str, np.ndarray]:
    with np.load(DATA / "more_nodes.npz") as file:
        return dict(file)


def latent(samples: np.ndarray, **more: Any) -> Latent:
    """A latent of samples in the VAE's space."""
    return Latent(((samples - SHIFT) * SCALE).astype(np.float32), **more)


# --- edges ------------------------------------------------------------------------------------------------------------


def shapes() -> np.ndarray:
    """Flat shapes with straight and slanted sides, along which every pixel is as strong as the next."""
    rows, columns = np.mgrid[:160, :192]
    image = np.zeros((1, 160, 192, 3), np.float32)
    image[:, 20:90, 30:100] = [1, 0.5, 0.2]
    image[:, 70:130, 90:150] = [0.1, 0.4, 0.9]
    image[:, columns > rows + 60] = [0.7, 0.7, 0.2]
    image[:, ((columns // 8 + rows // 8) % 2 == 1) & (rows > 130)] = 1
    return image


def photo(name: str) -> np.ndarray:
    return np.asarray(Image.open(DATA / name).convert("RGB"), np.float32)[None] / np.float32(255)


@pytest.mark.parametrize(("low", "high"), [(0.4, 0.8), (0.05, 0.2)])
@pytest.mark.parametrize("name", ["scene", "painted", "shapes"])
def test_edges_are_kornias(name: str, low: float, high: float, known: Mapping[str, np.ndarray]) -> None:
    files = {"scene": "input_scene.png", "painted": "06_inpaint_noise_mask.png"}
    image = photo(files[name]) if name in files else shapes()
    found = call("Canny", image=image, low_threshold=low, high_threshold=high)
    assert found.shape == image.shape and found.dtype == np.float32
    wanted = np.unpackbits(known[f"edges_{name}_{low:g}_{high:g}"])[: image[0, ..., 0].size]
    assert wanted.sum() >= 100 and np.array_equal(found[..., 2].ravel(), wanted)


def test_an_edge_goes_on_while_it_is_above_the_low_threshold() -> None:
    image = np.zeros((1, 40, 40, 3), np.float32)
    image[:, :, 20:] = np.linspace(0.02, 0.6, 40, dtype=np.float32)[:, None, None]  # a step that grows downwards
    rows = [int(canny(image, low, 0.8).any(axis=2).sum()) for low in (0.8, 0.4, 0.1)]
    assert rows[0] < rows[1] < rows[2] <= 40
    with pytest.raises(WorkflowError, match=r"low_threshold: expected at most 0\.3, got 0\.4"):
        filters.edges(RUN, image, 0.4, 0.3)


# --- images and masks -------------------------------------------------------------------------------------------------

IMAGES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "composite_plain": ("ImageCompositeMasked", {"destination": "A", "source": "B", "x": 3, "y": 2}),
    "composite_mask": ("ImageCompositeMasked", {"destination": "A", "source": "B", "x": 5, "y": 1, "mask": "M"}),
    "composite_resized": (
        "ImageCompositeMasked",
        {"destination": "A", "source": "B", "x": 2, "y": 3, "mask": "M", "resize_source": True},
    ),
    "outpaint_image": ("ImagePadForOutpaint", {"image": "A", "left": 2, "right": 3, "bottom": 1, "feathering": 2}),
    "stitch_right": ("ImageStitch", {"image1": "A", "image2": "B", "spacing_width": 3, "spacing_color": "red"}),
    "stitch_up": (
        "ImageStitch",
        {"image1": "A", "image2": "B", "direction": "up", "match_image_size": False, "spacing_width": 2},
    ),
    "stitch_left": (
        "ImageStitch",
        {"image1": "A", "image2": "B", "direction": "left", "match_image_size": False, "spacing_color": "green"},
    ),
    "resize_pad": (
        "ResizeAndPadImage",
        {"image": "A", "target_width": 13, "target_height": 7, "padding_color": "black", "interpolation": "bicubic"},
    ),
    "rotate": ("ImageRotate", {"image": "A", "rotation": "90 degrees"}),
    "flip": ("ImageFlip", {"image": "A", "flip_method": "x-axis: vertically"}),
    "batch_images": ("BatchImagesNode", {"images__image0": "A", "images__image1": "B"}),
    "resize_longer": (
        "ResizeImageMaskNode",
        {"input": "A", "resize_type": "scale longer dimension", "resize_type__longer_size": 11},
    ),
    "resize_shorter_mask": (
        "ResizeImageMaskNode",
        {
            "input": "M2",
            "resize_type": "scale shorter dimension",
            "resize_type__shorter_size": 5,
            "scale_method": "bilinear",
        },
    ),
    "resize_match": (
        "ResizeImageMaskNode",
        {
            "input": "A",
            "resize_type": "match size",
            "resize_type__match": "B",
            "resize_type__crop": "center",
            "scale_method": "bicubic",
        },
    ),
    "resize_multiple": (
        "ResizeImageMaskNode",
        {
            "input": "A",
            "resize_type": "scale to multiple",
            "resize_type__multiple": 5,
            "scale_method": "nearest-exact",
        },
    ),
    "blur": ("ImageBlur", {"image": "A", "blur_radius": 2, "sigma": 0.7}),
    "sharpen": ("ImageSharpen", {"image": "A", "alpha": 0.4}),
    **{
        f"blend_{mode}": ("ImageBlend", {"image1": "A", "image2": "B", "blend_factor": 0.3, "blend_mode": mode})
        for mode in filters.BLENDS
    },
    **{
        f"mask_{way}": ("MaskComposite", {"destination": "M2", "source": "M", "x": 6, "y": 1, "operation": way})
        for way in masks.OPERATIONS
    },
    "batch_masks": ("BatchMasksNode", {"masks__mask0": "M2", "masks__mask1": "M"}),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_comfyuis(name: str, known: Mapping[str, np.ndarray]) -> None:
    kind, inputs = IMAGES[name]
    arrays = {key: known[f"in_{value}"] for key, value in inputs.items() if f"in_{value}" in known}
    before = {key: array.copy() for key, array in arrays.items()}
    found = call(kind, **{**inputs, **arrays})
    assert found.shape == known[name].shape and found.dtype == np.float32
    assert np.abs(found - known[name]).max() < 2e-6
    # The inputs are those of other nodes, too.
    assert all(np.array_equal(arrays[key], before[key]) for key in arrays)


def test_the_mask_of_an_outpainted_image_fades_into_it(known: Mapping[str, np.ndarray]) -> None:
    found = compose.pad_for_outpaint(RUN, known["in_A"], 2, 0, 3, 1, 2)[1]
    assert np.array_equal(found, known["outpaint_mask"])
    hard = compose.pad_for_outpaint(RUN, known["in_A"], 2, 0, 3, 1, 3)[1]  # as wide as the image: no fade
    assert set(np.unique(hard)) == {0, 1}


def test_images_of_a_batch_and_their_parts(known: Mapping[str, np.ndarray]) -> None:
    image = known["in_A"]
    assert np.array_equal(call("ImageFromBatch", image=image, batch_index=-1, length=5), image[1:])
    assert np.array_equal(call("RepeatImageBatch", image=image, amount=3), np.concatenate([image] * 3))
    assert np.array_equal(call("ImageCrop", image=image, width=3, height=9, x=50, y=2), image[:, 2:, 7:])
    blue = call("EmptyImage", width=3, height=2, batch_size=2, color=0x3366FF)
    assert blue.shape == (2, 2, 3, 3) and np.allclose(blue[1, 1, 2], [0.2, 0.4, 1])
    assert call("ImageColorToMask", image=blue, color=0x3366FF).all()
    assert not call("ImageColorToMask", image=blue, color=0x3366FE).any()


def test_a_way_to_resize_needs_its_own_inputs(known: Mapping[str, np.ndarray]) -> None:
    with pytest.raises(WorkflowError, match=r"resize_type\.multiple: expected a value for 'scale to multiple', got"):
        call("ResizeImageMaskNode", input=known["in_A"], resize_type="scale to multiple", resize_type__width=8)
    with pytest.raises(WorkflowError, match="input: expected an image or a mask, got a Latent"):
        call("ResizeImageMaskNode", input=latent(known["in_L1"]), resize_type="scale width", resize_type__width=8)
    same = call("ResizeImageMaskNode", input=known["in_A"], resize_type="scale to multiple", resize_type__multiple=2)
    assert np.array_equal(same, known["in_A"])


def test_masks_of_one_value_and_their_parts(known: Mapping[str, np.ndarray]) -> None:
    mask = known["in_M2"]
    assert np.array_equal(call("SolidMask", value=0.25, width=3, height=2), np.full((1, 2, 3), 0.25, np.float32))
    assert np.array_equal(call("CropMask", mask=mask, x=2, y=1, width=3, height=50), mask[:, 1:, 2:5])
    assert np.array_equal(call("ThresholdMask", mask=mask, value=0.5), mask > 0.5)
    with pytest.raises(WorkflowError, match="x and y: expected a place in 8 by 6 pixels, got 8, 0"):
        call("CropMask", mask=mask, x=8)


# --- latents and sigmas -----------------------------------------------------------------------------------------------

LATENTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "latent_add": ("LatentAdd", {}),
    "latent_subtract": ("LatentSubtract", {}),
    "latent_multiply": ("LatentMultiply", {"multiplier": -1.7}),
    "latent_interpolate": ("LatentInterpolate", {"ratio": 0.3}),
    "latent_blend": ("LatentBlend", {"blend_factor": 0.3}),
    "latent_composite": ("LatentComposite", {"x": 16, "y": 8, "feather": 16}),
    "latent_composite_plain": ("LatentComposite", {"x": 40, "y": 24}),
    "latent_composite_wide": ("LatentComposite", {"x": 8, "y": 8, "feather": 72}),
    "latent_composite_empty": ("LatentComposite", {"x": 16, "y": 8, "feather": 16}),
    "latent_composite_masked": ("LatentCompositeMasked", {"x": 24, "y": 16}),
    "latent_batch": ("LatentBatch", {}),
    "latent_rotate": ("LatentRotate", {"rotation": "270 degrees"}),
}


@pytest.mark.parametrize("name", LATENTS)
def test_latents_are_comfyuis(name: str, known: Mapping[str, np.ndarray]) -> None:
    kind, inputs = LATENTS[name]
    is_empty = name == "latent_composite_empty"
    given: list[Any] = [Latent(np.zeros_like(known["in_L1"])) if is_empty else latent(known["in_L1"])]
    if kind not in ("LatentMultiply", "LatentRotate"):
        given.append(latent(known["in_L2"]))
    if name == "latent_composite_masked":
        inputs = {**inputs, "mask": known["in_M"]}
    found = NODES[kind].function(RUN, *given, **inputs)[0]
    assert found.samples.dtype == np.float32
    assert np.abs(found.samples / SCALE + SHIFT - known[name]).max() < 3e-6


def test_latents_keep_their_masks_and_places(known: Mapping[str, np.ndarray]) -> None:
    one = latent(known["in_L1"], mask=known["in_M"], batch_index=(4, 7))
    other = latent(known["in_L2"])
    assert latent_math.add(RUN, one, other)[0].mask is one.mask
    joined = call("BatchLatentsNode", latents__latent0=one, latents__latent1=other)
    assert joined.batch_index == (4, 7, 0) and joined.mask is one.mask and len(joined.samples) == 3
    assert call("LatentBatchSeedBehavior", samples=one, seed_behavior="fixed").batch_index == (4, 4)
    assert call("LatentBatchSeedBehavior", samples=one, seed_behavior="random").batch_index is None
    cut = call("LatentCrop", samples=one, width=64, height=64, x=800, y=0)
    assert np.array_equal(cut.samples, one.samples[:, :, :8, 2:])
    mirrored = call("LatentFlip", samples=one, flip_method="y-axis: horizontally")
    assert np.array_equal(mirrored.samples, one.samples[..., ::-1])


def test_the_sum_of_empty_latents_is_empty() -> None:
    empty = Latent(np.zeros((1, 16, 8, 8), np.float32))
    for kind in ("LatentAdd", "LatentSubtract", "LatentInterpolate", "LatentBatch"):
        assert not call(kind, samples1=empty, samples2=empty).samples.any()


def test_schedules_are_comfyuis(known: Mapping[str, np.ndarray]) -> None:
    found = {
        "karras": sigmas.karras(RUN, 9, 1.0, 0.003, 7.0),
        "karras_5": sigmas.karras(RUN, 30, rho=5.0),
        "exponential": sigmas.exponential(RUN, 9, 1.0, 0.003),
        "exponential_1": sigmas.exponential(RUN, 1, 1.0, 0.003),
        "polyexponential": sigmas.polyexponential(RUN, 9, 1.0, 0.003, 2.0),
    }
    for name, (values,) in found.items():
        assert np.allclose(values, known[f"sigmas_{name}"], rtol=2e-6, atol=0) and values.dtype == np.float32


def test_sigmas_are_cut_and_reversed() -> None:
    values = np.array([1, 0.8, 0.5, 0.2, 0], np.float32)
    high, low = sigmas.split(RUN, values, 2)
    assert high.tolist() == values[:3].tolist() and low.tolist() == values[2:].tolist()
    high, low = sigmas.split_denoise(RUN, values, 0.5)
    assert high.tolist() == values[:3].tolist() and low.tolist() == values[2:].tolist()
    assert [len(each) for each in sigmas.split_denoise(RUN, values, 0.0)] == [0, 1]
    assert np.allclose(sigmas.flip(RUN, values)[0], [0.0001, 0.2, 0.5, 0.8, 1])
    assert sigmas.set_first(RUN, values, 0.9)[0][0] == np.float32(0.9) and values[0] == 1
    assert call("SamplerEulerAncestral") == "euler_ancestral"
    for kind, inputs in (
        ("SetFirstSigma", {"sigmas": np.empty(0, np.float32)}),
        ("KarrasScheduler", {"rho": 0.0}),
        ("ExponentialScheduler", {"sigma_min": 0.0}),
        ("SamplerEulerAncestral", {"eta": 0.5}),
    ):
        with pytest.raises(WorkflowError, match="expected"):
            call(kind, **inputs)


# --- sizes ------------------------------------------------------------------------------------------------------------


SMALL = np.zeros((1, 8, 8, 3), np.float32)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("EmptyImage", {"width": 16384, "height": 16384}),
        ("SolidMask", {"width": 16384, "height": 16385}),
        ("RepeatImageBatch", {"image": np.zeros((1, 256, 256, 3), np.float32), "amount": 4096}),
        ("ImageScale", {"image": SMALL, "width": 16384, "height": 16384}),
        ("ImageScale", {"image": SMALL, "width": 16384, "height": 16384, "upscale_method": "lanczos"}),
        ("ImagePadForOutpaint", {"image": SMALL, "left": 16384, "top": 16384}),
        ("ResizeAndPadImage", {"image": SMALL, "target_width": 16384, "target_height": 16384}),
        ("ImageStitch", {"image1": np.zeros((1, 16384, 1, 3), np.float32), "image2": SMALL}),
        ("LatentUpscaleBy", {"samples": Latent(np.zeros((64, 16, 128, 128), np.float32)), "scale_by": 8.0}),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_made(kind: str, inputs: dict[str, Any]) -> None:
    begun = time.monotonic()
    with pytest.raises(WorkflowError, match=f"expected at most {MAX_NUMBERS} numbers, got"):
        call(kind, **inputs)
    assert time.monotonic() - begun < 1


def test_the_largest_size_is_allowed() -> None:
    check_numbers("size", 1 << 14, 1 << 14)
    with pytest.raises(WorkflowError, match="size: expected at most 268435456 numbers, got 16385 x 16384; take"):
        check_numbers("size", (1 << 14) + 1, 1 << 14)
    # Sides that are long on one axis alone need no square of weights.
    found = resize(np.full((1, 1, 16384), 0.5, np.float32), 2, 16383, "bilinear")
    assert found.shape == (1, 2, 16383) and np.abs(found - 0.5).max() < 1e-6


# --- the Omni models' prompt ------------------------------------------------------------------------------------------


def test_the_omni_prompt_is_a_prompt_and_takes_no_images() -> None:
    clip = Clip("nano")
    wanted = conditioning.encode_text(RUN, "a red fox", clip)
    assert omni.encode(RUN, clip, "a red fox") == wanted == omni.encode(RUN, clip, "a red fox", False, None, None)
    with pytest.raises(WorkflowError, match="image2: expected none, got an image; models that edit images"):
        omni.encode(RUN, clip, "a red fox", image2=SMALL)


def test_bislerp_is_torchs() -> None:
    """ComfyUI's rule in torch: neighbours by bilinear interpolation of their numbers, turned by slerp."""
    latents = torch.randn(2, 16, 7, 10, generator=torch.Generator().manual_seed(4))
    latents[:, :, 2, 3] = latents[:, :, 2, 4]  # the same direction, which has no angle

    def along(x: torch.Tensor, size: int) -> torch.Tensor:
        old = x.shape[-1]
        numbers = torch.arange(old, dtype=torch.float32)
        following = torch.cat([numbers[1:], numbers[-1:]])
        places, others = (
            torch.nn.functional.interpolate(each[None, None, None], (1, size), mode="bilinear")[0, 0, 0]
            for each in (numbers, following)
        )
        share, one, other = places - places.floor(), x[..., places.long()], x[..., others.long()]
        lengths = [each.norm(dim=1, keepdim=True) for each in (one, other)]
        cosine = ((one / lengths[0]) * (other / lengths[1])).sum(1, keepdim=True)
        angle = torch.acos(cosine.clamp(-1, 1))
        turned = torch.sin((1 - share) * angle) * one / lengths[0] + torch.sin(share * angle) * other / lengths[1]
        turned = turned / torch.sin(angle) * (lengths[0] * (1 - share) + lengths[1] * share)
        return torch.where(cosine > 1 - 1e-5, one, turned)

    wide = along(latents, 15)
    expected = along(wide.transpose(2, 3), 11).transpose(2, 3)
    assert np.abs(bislerp(latents.numpy(), 11, 15) - expected.numpy()).max() < 1e-4
