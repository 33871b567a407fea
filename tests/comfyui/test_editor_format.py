"""Workflows as ComfyUI's editor saves them."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared import ROOT

import zimage_rt
from zimage_rt.comfyui.execute import execute
from zimage_rt.comfyui.files import FolderFiles
from zimage_rt.comfyui.graph import Graph, Link, Node, WorkflowError
from zimage_rt.comfyui.plan import plan
from zimage_rt.comfyui.run import Run
from zimage_rt.comfyui.workflow_file import parse_workflow

LORAS = ROOT / "checkpoints" / "zimage-nano-cyanotype"
DATA = ROOT / "tests" / "data" / "comfyui"
FILES = FolderFiles({}, "nano", LORAS, (DATA,))
TEMPLATES = "comfyui_workflow_templates_json"


def node(number: int, kind: str, inputs: list[tuple[Any, ...]], outputs: str = "", **more: Any) -> dict[str, Any]:
    """A node; inputs are name, type, link, and whether they are widgets."""
    entries = [
        {"name": name, "type": type_, "link": link} | ({"widget": {"name": name}} if widget else {})
        for name, type_, link, *rest in inputs
        for widget in [bool(rest)]
    ]
    return {
        "id": number,
        "type": kind,
        "inputs": entries,
        "outputs": [{"type": each} for each in outputs.split()],
        **more,
    }


def link(number: int, origin: int, slot: int, target: int, place: int) -> dict[str, Any]:
    return {"id": number, "origin_id": origin, "origin_slot": slot, "target_id": target, "target_slot": place}


def workflow() -> dict[str, Any]:
    """A file with a subgraph in a subgraph, whose hosts have values of their own, a bypassed LoRA, and a reroute."""
    inner = {
        "id": "inner",
        "inputs": [
            {"name": "latent_image", "linkIds": [1]},
            {"name": "seed", "linkIds": [2]},
            {"name": "steps", "linkIds": [3]},
        ],
        "outputs": [{"name": "IMAGE", "linkIds": [16]}],
        "nodes": [
            node(1, "UNETLoader", [], "MODEL", widgets_values=["m.safetensors", "default"]),
            node(
                2, "LoraLoaderModelOnly", [("model", "MODEL", 10)], "MODEL",
                widgets_values=["cyanotype.safetensors", 1.0], mode=4,
            ),
            node(3, "CLIPLoader", [], "CLIP", widgets_values=["c.safetensors", "lumina2", "default"]),
            node(4, "CLIPTextEncode", [("clip", "CLIP", 11)], "CONDITIONING", widgets_values=["a fox"], title="Prompt"),
            node(5, "Reroute", [("", "*", 12)], "*"),
            node(6, "VAELoader", [], "VAE", widgets_values=["v.safetensors"]),
            node(
                7, "KSampler",
                [
                    ("model", "MODEL", 13), ("positive", "CONDITIONING", 14), ("negative", "CONDITIONING", 14),
                    ("latent_image", "LATENT", 1), ("seed", "INT", 2, True), ("steps", "INT", 3, True),
                ],
                "LATENT", widgets_values=[1, "randomize", 20, 1, "euler", "simple", 1],
            ),
            node(8, "VAEDecode", [("samples", "LATENT", 17), ("vae", "VAE", 15)], "IMAGE"),
            node(9, "MarkdownNote", [], widgets_values=["text"]),
        ],
        "links": [
            link(1, -10, 0, 7, 3), link(2, -10, 1, 7, 4), link(3, -10, 2, 7, 5), link(10, 1, 0, 2, 0),
            link(11, 3, 0, 4, 0), link(12, 4, 0, 5, 0), link(13, 2, 0, 7, 0), link(14, 5, 0, 7, 1),
            link(15, 6, 0, 8, 1), link(16, 8, 0, -20, 0), link(17, 7, 0, 8, 0),
        ],
    }  # fmt: skip
    outer = {
        "id": "outer",
        "inputs": [{"name": "seed", "linkIds": [1]}],
        "outputs": [{"name": "IMAGE", "linkIds": [3]}],
        "nodes": [
            node(
                20, "inner",
                [("latent_image", "LATENT", 2), ("seed", "INT", 1, True), ("steps", "INT", None, True)],
                "IMAGE", widgets_values_named={"steps": 2},
            ),
            node(21, "EmptySD3LatentImage", [], "LATENT", widgets_values=[64, 96, 1]),
        ],
        "links": [link(1, -10, 0, 20, 1), link(2, 21, 0, 20, 0), link(3, 20, 0, -20, 0)],
    }  # fmt: skip
    return {
        "nodes": [
            node(57, "outer", [("seed", "INT", None, True)], "IMAGE", widgets_values=[7]),
            node(9, "SaveImage", [("images", "IMAGE", 62)], widgets_values=["fox"]),
            node(10, "PreviewImage", [("images", "IMAGE", 63)], mode=2),
        ],
        "links": [[62, 57, 0, 9, 0, "IMAGE"], [63, 57, 0, 10, 0, "IMAGE"]],
        "definitions": {"subgraphs": [inner, outer]},
    }


def sampler(graph: Graph) -> Any:
    return graph["57:20:7"].inputs


def test_subgraphs_are_taken_apart_and_their_hosts_values_win() -> None:
    graph = parse_workflow(workflow())
    assert set(graph) == {"9", *(f"57:20:{number}" for number in (1, 3, 4, 6, 7, 8)), "57:21"}
    inputs = sampler(graph)
    assert (inputs["seed"], inputs["steps"], inputs["sampler_name"], inputs["denoise"]) == (7, 2, "euler", 1)
    assert inputs["model"] == Link("57:20:1", 0)  # past the bypassed LoRA
    assert inputs["positive"] == Link("57:20:4", 0)  # past the reroute
    assert inputs["latent_image"] == Link("57:21", 0)
    assert graph["9"].inputs == {"images": Link("57:20:8", 0), "filename_prefix": "fox"}
    assert graph["57:20:4"].label == "Prompt (#57:20:4)"
    assert graph["57:20:3"].inputs == {"clip_name": "c.safetensors", "type": "lumina2", "device": "default"}


def test_a_host_without_values_leaves_the_inner_ones() -> None:
    data = workflow()
    data["nodes"][0]["widgets_values"] = []
    assert sampler(parse_workflow(data))["seed"] == 1


def test_a_primitive_is_its_value() -> None:
    data = workflow()
    data["nodes"].append(node(11, "PrimitiveNode", [], "INT", widgets_values=[99, "fixed"]))
    data["nodes"][0]["inputs"][0]["link"] = 64
    data["links"].append([64, 11, 0, 57, 0, "INT"])
    graph = parse_workflow(data)
    assert sampler(graph)["seed"] == 99 and "11" not in graph


def test_a_file_of_the_editor_is_drawn(engine: zimage_rt.Engine) -> None:
    checked = plan(parse_workflow(workflow()), FILES)
    run = Run(lambda bundle: engine, FILES)
    execute(checked, run)
    expected = engine.generate(
        "a fox", seed=7, num_inference_steps=2, height=96, width=64, sampler="euler", schedule="simple", vae="full"
    )
    # ComfyUI cuts off to 8 bits where the engine rounds.
    difference = expected.images[0].astype(int) - run.made[0].pixels
    assert len(run.made) == 1 and set(np.unique(difference)) == {0, 1}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data["nodes"].append({"id": 3}),
        lambda data: data["nodes"].append(7),
        lambda data: data.update(links=[["a"]]),
        lambda data: data["definitions"].update(subgraphs=[{"id": "outer"}]),
    ],
)
def test_a_damaged_file_is_refused(damage: Any) -> None:
    data = copy.deepcopy(workflow())
    damage(data)
    with pytest.raises(WorkflowError):
        plan(parse_workflow(data), FILES)


def test_a_subgraph_in_itself_is_refused() -> None:
    data = workflow()
    data["definitions"]["subgraphs"][0]["nodes"].append(node(30, "outer", [], "IMAGE"))
    with pytest.raises(WorkflowError, match="levels of subgraphs"):
        parse_workflow(data)


def template(name: str, **values: Any) -> dict[str, Node]:
    """A template of ComfyUI's, with other values for its inputs of some names."""
    found = importlib.util.find_spec(TEMPLATES)
    if found is None or found.origin is None:
        pytest.skip("ComfyUI's templates are not installed: pip install comfyui-workflow-templates-json==0.1.123")
    path = Path(found.origin).parent / "templates" / f"{name}.json"
    graph = dict(parse_workflow(json.loads(path.read_text(encoding="utf-8"))))
    for key, each in graph.items():
        given = {field: value for field, value in values.items() if field in each.inputs}
        graph[key] = dataclasses.replace(each, inputs={**each.inputs, **given})
    return graph


@pytest.mark.parametrize(
    "name", ["image_z_image_turbo", "image_z_image_turbo_int8", "image_z_image", "image_z_image_int8"]
)
def test_a_template_of_comfyui_is_drawn(name: str, engine: zimage_rt.Engine) -> None:
    graph = template(name, width=128, height=128, text="a fox", steps=2)
    run = Run(lambda bundle: engine, FILES)
    execute(plan(graph, FILES), run)
    assert [made.pixels.shape for made in run.made] == [(128, 128, 3)]


def test_the_upscaler_template_is_drawn(engine: zimage_rt.Engine) -> None:
    graph = template("utility_z_image_turbo_2k_upscaler.app", megapixels=1 / 64, model_name="upscale_compact.pth")
    loader = next(each for each in graph.values() if each.kind == "LoadImage")
    graph[loader.id] = dataclasses.replace(loader, inputs={"image": "input_scene.png"})
    files = FolderFiles({}, "nano", None, (DATA,), DATA)
    run = Run(lambda bundle: engine, files)
    execute(plan(graph, files), run)
    # 128 pixels, enlarged by the model and halved, beside the input.
    before, after, saved = run.made
    assert before.pixels.shape == (256, 256, 3) and (before.group, after.group) == ("a_images", "b_images")
    assert after.pixels.tobytes() == saved.pixels.tobytes() and saved.pixels.std() > 5
