"""Nodes of images, masks, latents, sigmas, texts, numbers and logic, against torch's, kornia's and Python's numbers.

`more_nodes.npz` has inputs (`in_…`) and what ComfyUI's rules make of them, computed with torch 2.13.0, Pillow and, for
edges, kornia 0.9.0 with a square root that is rounded correctly: torch's on a CPU is off by the last bit for a fifth of
all numbers, which moves 128 of the edges of `shapes`, and none of the photos. Latents in it are in the VAE's space.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shared import ROOT

from zimage_rt.comfyui import expression, regex
from zimage_rt.comfyui.canny import canny
from zimage_rt.comfyui.execute import execute
from zimage_rt.comfyui.expression import evaluate
from zimage_rt.comfyui.files import FolderFiles
from zimage_rt.comfyui.graph import WorkflowError
from zimage_rt.comfyui.nodes import compose, conditioning, filters, latent_math, logic, masks, omni, sigmas
from zimage_rt.comfyui.plan import plan
from zimage_rt.comfyui.registry import NODES
from zimage_rt.comfyui.resize import MAX_NUMBERS, check_numbers, resize
from zimage_rt.comfyui.run import Events, Run, Said
from zimage_rt.comfyui.values import Clip, Latent
from zimage_rt.comfyui.workflow_file import parse_workflow

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


def shown_texts(graph: dict[str, Any], events: Events | None = None) -> list[str]:
    run = Run(no_engine, FolderFiles({}, None, None, ()), events)
    execute(plan(parse_workflow(graph), run.files), run)
    return [each.text for each in run.shown if isinstance(each, Said)]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": {key.replace("__", "."): value for key, value in inputs.items()}}


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


# --- logic ------------------------------------------------------------------------------------------------------------


class Begun(Events):
    def __init__(self) -> None:
        self.kinds: list[str] = []

    def begins(self, node: str) -> None:
        self.kinds.append(node)


@pytest.mark.parametrize(("value", "text"), [(False, "no"), (True, "yes")])
def test_only_the_branch_that_is_taken_runs(value: bool, text: str) -> None:
    graph = {
        "flag": node("PrimitiveBoolean", value=value),
        "no": node("PrimitiveString", value="no"),
        "yes": node("PrimitiveString", value="yes"),
        "switch": node("ComfySwitchNode", switch=["flag", 0], on_false=["no", 0], on_true=["yes", 0]),
        "text": node("StringConcatenate", string_a=["switch", 0], string_b="!", delimiter=""),
        "out": node("PreviewAny", source=["text", 0]),
    }
    begun = Begun()
    assert shown_texts(graph, begun) == [f"{text}!"]
    assert text in begun.kinds and ("yes" if text == "no" else "no") not in begun.kinds


def test_values_are_true_as_in_python() -> None:
    assert call("ComfyNotNode", value="") and not call("ComfyNotNode", value=0.1)
    assert call("ComfyAndNode", values__value0=1, values__value1="x") is True
    assert call("ComfyAndNode", values__value0=1, values__value1=0) is False
    assert call("ComfyOrNode", values__value0=0, values__value1="") is False
    assert call("ComfyOrNode", values__value0=0, values__value9=2) is True
    assert logic.pass_or_none(RUN, None, 5) == (5, False) and logic.pass_or_none(RUN) == (None, True)
    assert logic.combo(RUN, "9:16", 1) == ("9:16", 1)
    with pytest.raises(WorkflowError, match="expected a number, a text or yes or no, got 4 numbers"):
        call("ComfyNotNode", value=np.zeros((1, 2, 2)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", "a\nb"),
        (None, "None"),
        (True, "True"),
        (1.5, "1.5"),
        (10**20, "1" + "0" * 20),
        ({"a": [1, "ü"]}, '{\n    "a": [\n        1,\n        "\\u00fc"\n    ]\n}'),
        (Latent(np.zeros((1, 16, 2, 2), np.float32)), "<Latent>"),
    ],
)
def test_values_are_shown_as_texts(value: Any, text: str) -> None:
    assert logic.as_text(value) == text


def test_arrays_are_shown_shortly() -> None:
    text = logic.as_text(np.zeros((1, 512, 512, 3), np.float32))
    assert text.startswith("1x512x512x3 numbers:\n[[[[0. 0. 0.]") and len(text) < 2000


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # From ComfyUI's templates.
        ("a > 2048", False),
        ("a & ~1", 46),
        ("a & -8", 40),
        ("floor(a/32)*32", 32),
        ("max(((a + 15) // 16) * 16, 256)", 256),
        ("ceil(1.5 * log2(max(a, b))) + 2", 11),
        ("a % b if b > 0 else 0", 47 % 1.5),
        ("(a % 4 == 3) and ((b - 1) % 4 == 0.5)", True),
        ("max(5, round(a * 24)) + (5 - (max(5, round(a * 24)) % 17)) % 17", 1144),
        ("max(4, (int(a) // 16) * 16)", 32),
        # The rest of the syntax.
        (" -a + +b ", -45.5),
        ("2 ** 0.5 * 2 ** -1", math.sqrt(2) / 2),
        ("not a or b", 1.5),
        ("a and 0", 0),
        ("1 < b < 2 != a", True),
        ("sum(values) + sum(1, 2) + values[0] + values[-1]", 48.5 + 3 + 48.5),
        ("a in values and 3 not in values", True),
        ("min(values) + pow(2, 10) + abs(-3) + sqrt(16)", 1.5 + 1024 + 3 + 4),
        ("round(b * 1.23456, 2) + log(8, 2) + log10(1000)", 1.85 + 3 + 3),
        ("1 << 4 | 1 ^ 3", 18),
        ("sin(0) + cos(0) + tan(0) + float(2)", 3.0),
        ("10 ** 400 // 10 ** 399", 10),
    ],
)
def test_expressions_have_pythons_values(text: str, value: float) -> None:
    found = evaluate(text, {"a": 47, "b": 1.5})
    assert type(found) is type(value) and found == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected 1 to 4096 characters"),
        ("1" * 5000, "expected 1 to 4096 characters"),
        ("1; 2", "cannot be read"),
        ("a +", "cannot be read"),
        ("-" * 4000 + "1", "cannot be read|expected"),
        ("(" * 4000, "cannot be read"),
        ("c", "expected one of a, b, values, got 'c'"),
        ("__import__('os')", "expected numbers, names"),
        ("a.real", "expected numbers, names"),
        ("[1][0]", "expected numbers, names"),
        ("'a' * 3", "expected numbers, names"),
        ("(lambda: 1)()", "expected numbers, names"),
        ("open(a)", "expected numbers, names"),
        ("values", "expected a finite number"),
        ("values * 1000", "expected a number, got the list"),
        ("values[9]", "has no value"),
        ("1 / 0", "has no value: division by zero"),
        ("1e400", "expected a finite number"),
        ("10 ** 400", "has no value|finite"),
        ("10.0 ** 400", "has no value"),
        ("9 ** 9 ** 9", "expected powers of at most"),
        ("pow(9, 9 ** 9)", "expected powers of at most"),
        ("1 << 10 ** 9", "expected shifts of at most"),
        ("(-8) ** 0.5", "expected numbers, got"),
        ("*".join(["(2 ** 8000)"] * 9), "expected whole numbers of at most"),
        ("round(5, -10 ** 9) + 1 / 0", "has no value: division by zero"),
        ("float(1) if a else b if", "cannot be read"),
    ],
)
def test_what_is_no_expression_is_refused_at_once(text: str, message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(WorkflowError, match=message):
        evaluate(text, {"a": 47, "b": 1.5})
    assert time.monotonic() - begun < 1


def test_an_expression_gives_each_type_of_number() -> None:
    function = NODES["ComfyMathExpression"].function
    assert function(RUN, "a / 2", **{"values.a": 7}) == (3.5, 3, True)
    assert function(RUN, "a and b", **{"values.a": True, "values.b": False}) == (0.0, 0, False)
    with pytest.raises(WorkflowError, match=r"values\.a: expected a number, got 'x'"):
        function(RUN, "a", **{"values.a": "x"})
    graph = {
        "size": node("PrimitiveInt", value=1000),
        "math": node("ComfyMathExpression", expression="a // 16 * 16 + b", values__a=["size", 0], values__b=8),
        "out": node("PreviewAny", source=["math", 1]),
    }
    assert shown_texts(graph) == ["1000"]
    graph["math"]["inputs"]["values.b"] = "8"
    with pytest.raises(WorkflowError, match=r"values\.b: expected a number, got a str"):
        shown_texts(graph)


@pytest.mark.parametrize(
    ("value", "numbers"),
    [
        (True, (1.0, 1)),
        (2.9, (2.9, 2)),
        (-2.9, (-2.9, -2)),
        (" 12 ", (12.0, 12)),
        ("1e3", (1000.0, 1000)),
        ("9007199254740993", (9007199254740992.0, 9007199254740993)),
    ],
)
def test_numbers_are_converted(value: Any, numbers: tuple[float, int]) -> None:
    found = NODES["ComfyNumberConvert"].function(RUN, value)
    assert found == numbers and [type(each) for each in found] == [float, int]


@pytest.mark.parametrize("value", ["", "x", "nan", "inf", "1" * 5000, None, [1], 10**400])
def test_what_is_no_number_is_not_converted(value: Any) -> None:
    with pytest.raises(WorkflowError, match="value: expected a finite number"):
        call("ComfyNumberConvert", value=value)


# --- texts ------------------------------------------------------------------------------------------------------------


def abc(*values: Any) -> dict[str, Any]:
    return {f"values__{name}": value for name, value in zip("abc", values, strict=False)}


@pytest.mark.parametrize(
    ("kind", "inputs", "wanted"),
    [
        ("StringConcatenate", {"string_a": "a", "string_b": "b", "delimiter": ", "}, "a, b"),
        ("StringSubstring", {"string": "a red fox", "start": 2, "end": -4}, "red"),
        ("StringLength", {"string": "füchse"}, 6),
        ("CaseConverter", {"string": "a RED fox", "mode": "Title Case"}, "A Red Fox"),
        ("CaseConverter", {"string": "a RED fox", "mode": "Capitalize"}, "A red fox"),
        ("CaseConverter", {"string": "straße", "mode": "UPPERCASE"}, "STRASSE"),
        ("CaseConverter", {"string": "A", "mode": "lowercase"}, "a"),
        ("StringTrim", {"string": " \n a ", "mode": "Both"}, "a"),
        ("StringTrim", {"string": " a ", "mode": "Left"}, "a "),
        ("StringTrim", {"string": " a ", "mode": "Right"}, " a"),
        ("StringReplace", {"string": "aXbX", "find": "X", "replace": "--"}, "a--b--"),
        ("StringReplace", {"string": "ab", "find": "", "replace": "-"}, "-a-b-"),
        ("StringContains", {"string": "A Fox", "substring": "fox"}, False),
        ("StringContains", {"string": "A Fox", "substring": "fox", "case_sensitive": False}, True),
        ("StringCompare", {"string_a": "A Fox", "string_b": "A", "mode": "Starts With"}, True),
        ("StringCompare", {"string_a": "A Fox", "string_b": "x", "mode": "Ends With"}, True),
        ("StringCompare", {"string_a": "A", "string_b": "a", "mode": "Equal"}, False),
        ("StringCompare", {"string_a": "A", "string_b": "a", "mode": "Equal", "case_sensitive": False}, True),
        ("RegexMatch", {"string": "a FOX", "regex_pattern": "f.x"}, True),
        ("RegexMatch", {"string": "a FOX", "regex_pattern": "f.x", "case_insensitive": False}, False),
        ("RegexMatch", {"string": "a", "regex_pattern": "("}, False),
        ("RegexMatch", {"string": "a\nb", "regex_pattern": "^b$", "multiline": True}, True),
        ("RegexMatch", {"string": "a\nb", "regex_pattern": "a.b", "dotall": True}, True),
        ("RegexExtract", {"string": "x=1 y=22", "regex_pattern": r"\w=(\d+)", "mode": "First Match"}, "x=1"),
        ("RegexExtract", {"string": "x=1 y=22", "regex_pattern": r"\w=(\d+)", "mode": "First Group"}, "1"),
        ("RegexExtract", {"string": "x=1 y=22", "regex_pattern": r"\w=(\d+)", "mode": "All Matches"}, "1\n22"),
        ("RegexExtract", {"string": "x=1 y=22", "regex_pattern": r"\w=\d+", "mode": "All Matches"}, "x=1\ny=22"),
        ("RegexExtract", {"string": "a1b", "regex_pattern": r"(a)|(b)", "mode": "All Matches"}, "a\n"),
        ("RegexExtract", {"string": "a1b", "regex_pattern": r"(a)|(b)", "mode": "All Groups", "group_index": 2}, "b"),
        ("RegexExtract", {"string": "ab", "regex_pattern": "a", "mode": "All Groups", "group_index": 0}, ""),
        ("RegexExtract", {"string": "ab", "regex_pattern": "(a)", "mode": "First Group", "group_index": 3}, ""),
        ("RegexExtract", {"string": "ab", "regex_pattern": "(", "mode": "First Match"}, ""),
        ("RegexExtract", {"string": "ab", "regex_pattern": "c", "mode": "First Match"}, ""),
        ("RegexReplace", {"string": "```json\n{}", "regex_pattern": r"^```(?:json)?\s*\n?", "replace": ""}, "{}"),
        ("RegexReplace", {"string": "", "regex_pattern": "^$", "replace": "[]"}, "[]"),
        ("RegexReplace", {"string": "aXaX", "regex_pattern": "x", "replace": "", "count": 1}, "aaX"),
        ("RegexReplace", {"string": "ab", "regex_pattern": "(a)(b)", "replace": r"\2\g<1>ü"}, "baü"),
        ("JsonExtractString", {"json_string": 'x {"no} {"k": [1]} {"k": 2}', "key": "k"}, "[1]"),
        ("JsonExtractString", {"json_string": '{"k": null}', "key": "k"}, ""),
        ("JsonExtractString", {"json_string": "none", "key": "k"}, ""),
        ("StringFormat", {"f_string": "{a}{{}}{b:.2f}{c!r:>5}", **abc("x", 1, "y")}, "x{}1.00  'y'"),
        ("StringFormat", {"f_string": "{a:>{b}}", "values__a": "x", "values__b": 3}, "  x"),
        ("StringFormat", {"f_string": "{a}", "values__a": np.float32}, "<type>"),
    ],
)  # fmt: skip
def test_texts_are_comfyuis(kind: str, inputs: dict[str, Any], wanted: Any) -> None:
    found = call(kind, **inputs)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    ("kind", "inputs", "message"),
    [
        ("RegexReplace", {"string": "a", "regex_pattern": "(", "replace": ""}, "Python's re, got .*: missing"),
        ("RegexReplace", {"string": "b", "regex_pattern": "a", "replace": r"\1"}, "invalid group reference 1"),
        ("RegexReplace", {"string": "b" * 2000, "regex_pattern": "", "replace": "c" * 2000}, "text of at most"),
        ("RegexExtract", {"string": "b" * 5000, "regex_pattern": "(?=(.*))", "mode": "All Matches"}, "shorter text"),
        ("RegexMatch", {"string": "a", "regex_pattern": "a" * 10_001}, "regex_pattern: expected at most 10000"),
        ("RegexMatch", {"string": "a" * (1 << 21), "regex_pattern": "a"}, "string: expected at most 1048576"),
        ("StringReplace", {"string": "b" * 2000, "find": "", "replace": "c" * 2000}, "expected a text of at most"),
        ("StringConcatenate", {"string_a": "a" * (1 << 20), "string_b": "b"}, "expected a text of at most"),
        ("StringFormat", {"f_string": "{a:>100000000}", "values__a": "x"}, "expected a width of at most 1000"),
        ("StringFormat", {"f_string": "{a:.100000000f}", "values__a": 1.0}, "expected a width of at most 1000"),
        ("StringFormat", {"f_string": "{a}" * 2000, "values__a": "x" * 2000}, "expected a text of at most"),
        ("StringFormat", {"f_string": "{a.__class__}", "values__a": "x"}, "f_string: expected"),
        ("StringFormat", {"f_string": "{a[0]}", "values__a": "x"}, "f_string: expected"),
        ("StringFormat", {"f_string": "{}", "values__a": "x"}, "f_string: expected"),
        ("StringFormat", {"f_string": "{b}", "values__a": "x"}, "f_string: expected"),
        ("JsonExtractString", {"json_string": '{"a":' * 9000, "key": "a"}, "too many braces"),
    ],
)  # fmt: skip
def test_texts_that_cannot_be_made_are_refused_at_once(kind: str, inputs: dict[str, Any], message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(WorkflowError, match=message):
        call(kind, **inputs)
    assert time.monotonic() - begun < 2


def test_a_search_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regex, "SECONDS", 0.5)
    begun = time.monotonic()
    with pytest.raises(WorkflowError, match=r"regex_pattern: expected a search of at most 0.5 seconds, got more"):
        call("RegexMatch", string="a" * 40 + "!", regex_pattern="(a+)+$")
    assert time.monotonic() - begun < 5


# --- the Omni models' prompt ------------------------------------------------------------------------------------------


def test_the_omni_prompt_is_a_prompt_and_takes_no_images() -> None:
    clip = Clip("nano")
    wanted = conditioning.encode_text(RUN, "a red fox", clip)
    assert omni.encode(RUN, clip, "a red fox") == wanted == omni.encode(RUN, clip, "a red fox", False, None, None)
    with pytest.raises(WorkflowError, match="image2: expected none, got an image; models that edit images"):
        omni.encode(RUN, clip, "a red fox", image2=SMALL)


def test_limits_are_what_the_documents_say() -> None:
    assert (MAX_NUMBERS, expression.MAX_LENGTH, regex.MAX_TEXT) == (268_435_456, 4096, 1_048_576)
