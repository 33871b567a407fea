"""Values that a graph may have and a run cannot serve, or that are easily misread."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shared import ROOT

import zimage_rt
from zimage_rt.cli.workflow import with_values
from zimage_rt.comfyui.execute import execute
from zimage_rt.comfyui.files import FolderFiles
from zimage_rt.comfyui.graph import WorkflowError
from zimage_rt.comfyui.nodes import images, latents
from zimage_rt.comfyui.plan import plan
from zimage_rt.comfyui.run import Made, Run
from zimage_rt.comfyui.save import save_images
from zimage_rt.comfyui.values import Latent
from zimage_rt.comfyui.workflow_file import parse_workflow

GRAPHS = json.loads((ROOT / "tests" / "data" / "comfyui" / "graphs.json").read_text(encoding="utf-8"))


def graph() -> dict[str, Any]:
    return copy.deepcopy(GRAPHS["02_euler_simple"])


def files(folder: Path) -> FolderFiles:
    return FolderFiles({}, "nano", None, (folder,))


def run(data: dict[str, Any], engine: zimage_rt.Engine, folder: Path) -> Run:
    found = Run(lambda bundle: engine, files(folder))
    execute(plan(parse_workflow(data), files(folder)), found)
    return found


@pytest.mark.parametrize(
    ("node", "inputs", "message"),
    [
        ("7", {"width": 264}, r"KSampler \(#8\): latent_image: expected a width of 64 to .* in steps of 16, got 264"),
        ("7", {"height": 16384}, "expected a height of 64 to .*, got 16384"),
        ("8", {"denoise": 1e-9}, "denoise: expected at most 10000 steps"),
        ("4", {"shift": 1e-30}, "shift: expected 0.01 or more"),
    ],
)
def test_a_value_that_cannot_be_served_is_named(
    node: str, inputs: dict[str, Any], message: str, engine: zimage_rt.Engine, tmp_path: Path
) -> None:
    data = graph()
    data[node]["inputs"] |= inputs
    with pytest.raises(WorkflowError, match=message):
        run(data, engine, tmp_path)


@pytest.mark.parametrize("sigmas", ["", "hello", "1", "1, 1", "0, 1", "2, 1"])
def test_sigmas_that_do_not_fall_are_refused(sigmas: str, engine: zimage_rt.Engine, tmp_path: Path) -> None:
    data = copy.deepcopy(GRAPHS["15_custom_advanced"])
    data["32"] = {"class_type": "ManualSigmas", "inputs": {"sigmas": sigmas}}
    with pytest.raises(WorkflowError, match=r"ManualSigmas \(#32\): sigmas: expected two or more numbers that fall"):
        run(data, engine, tmp_path)


def test_a_linked_name_of_no_file_is_refused(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    data = graph()
    data["name"] = {"class_type": "PrimitiveString", "inputs": {"value": "none.safetensors"}}
    data["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["1", 0], "lora_name": ["name", 0]}}
    data["4"]["inputs"]["model"] = ["lora", 0]
    with pytest.raises(WorkflowError, match=r"LoraLoaderModelOnly \(#lora\): there is no LoRA 'none.safetensors'"):
        run(data, engine, tmp_path)


def test_a_node_that_fails_is_named(engine: zimage_rt.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "CHANNELS", -1)  # numpy refuses it
    with pytest.raises(WorkflowError, match=r"EmptySD3LatentImage \(#7\): failed: ValueError: .*negative"):
        run(graph(), engine, tmp_path)


# --- the editor's files ---------------------------------------------------------------------------------------------


def reroute(number: int, link: int) -> dict[str, Any]:
    return {"id": number, "type": "Reroute", "inputs": [{"name": "", "link": link}], "outputs": [{"type": "*"}]}


@pytest.mark.parametrize("count", [2, 3000])
def test_reroutes_without_an_end_are_refused(count: int) -> None:
    nodes = [reroute(number, number) for number in range(1, count + 1)]
    links = [[number, number % count + 1, 0, number, 0, "*"] for number in range(1, count + 1)]
    save = {"id": 9999, "type": "SaveImage", "inputs": [{"name": "images", "link": 1}], "widgets_values": ["x"]}
    with pytest.raises(WorkflowError, match="more or a circle"):
        parse_workflow({"nodes": [*nodes, save], "links": links})


def test_subgraphs_that_double_are_refused_at_once() -> None:
    definitions = [
        {"id": f"s{level}", "nodes": [{"id": each, "type": f"s{level + 1}"} for each in (1, 2)]} for level in range(27)
    ]
    begun = time.monotonic()
    with pytest.raises(WorkflowError, match=r"levels of subgraphs|nodes in all subgraphs"):
        parse_workflow({"nodes": [{"id": 1, "type": "s0"}], "definitions": {"subgraphs": definitions}})
    assert time.monotonic() - begun < 5


# --- images and latents ---------------------------------------------------------------------------------------------


def test_sixteen_bits_of_grey_keep_their_range(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    pixels, _ = images.load_image(Run(lambda bundle: engine, files(tmp_path)), "grey.png")
    assert np.abs(pixels[0, ..., 0] - ramp / 65535).max() < 1 / 255


def test_a_mask_of_an_opaque_image_has_its_size(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    Image.new("RGB", (96, 80)).save(tmp_path / "plain.png")
    found = Run(lambda bundle: engine, files(tmp_path))
    assert images.load_mask(found, "plain.png", "alpha")[0].shape == (1, 80, 96)
    assert images.load_image(found, "plain.png")[1].shape == (1, 64, 64)


def test_latents_are_at_least_64_pixels(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    found = Run(lambda bundle: engine, files(tmp_path))
    for crop in ("disabled", "center"):
        latent = Latent(np.zeros((1, 16, 16, 24), np.float32))
        (larger,) = latents.upscale(found, latent, "bilinear", 4, 4, crop)
        assert larger.samples.shape == (1, 16, 8, 8)


# --- names and options ----------------------------------------------------------------------------------------------


def test_names_are_expanded_and_checked_before_anything_is_written(tmp_path: Path) -> None:
    pixels = np.zeros((64, 96, 3), np.uint8)
    parsed = parse_workflow(graph())
    (path,) = save_images([Made("10", pixels, "a/%width%x%height%_%none%", False)], parsed, tmp_path)
    assert path == tmp_path / "a" / "96x64_%none%_00001_.png"
    for bad in ("../x", "/x", "x\0y", "\ud800", "x" * 300):
        with pytest.raises(WorkflowError, match="filename_prefix of #11"):
            save_images([Made("10", pixels, "good", False), Made("11", pixels, bad, False)], parsed, tmp_path)
    assert not list(tmp_path.glob("good*"))


def test_set_takes_texts_as_they_are() -> None:
    parsed = parse_workflow(graph())
    changed = with_values(parsed, ["5.text=1e3", "10.filename_prefix=1.10", "8.seed=7", "8.sampler_name=heun"])
    assert changed["5"].inputs["text"] == "1e3" and changed["10"].inputs["filename_prefix"] == "1.10"
    assert changed["8"].inputs["seed"] == 7 and changed["8"].inputs["sampler_name"] == "heun"
    assert with_values(parsed, ["8.seed=" + "[" * 100_000])["8"].inputs["seed"].startswith("[")
    for text, message in (("8.sead=7", "has no input 'sead'"), ("88.seed=7", "no node #88"), ("seed", "NODE.INPUT")):
        with pytest.raises(zimage_rt.errors.ZImageError, match=message):
            with_values(parsed, [text])
