"""ComfyUI's workflows: eleven graphs against what ComfyUI 0.33.0 gave, articles' graphs, and broken ones.

`tests/data/comfyui` has the graphs, the latents of their samplers (ComfyUI's own, in the VAE's space) with their
sigmas, two input images, and the PNG of one graph. That of `01_template_turbo` is `input_scene.png`.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shared import ROOT

import zimage_rt
from zimage_rt.comfyui.execute import Cache, execute
from zimage_rt.comfyui.files import FolderFiles
from zimage_rt.comfyui.graph import WorkflowError
from zimage_rt.comfyui.nodes import samplers
from zimage_rt.comfyui.plan import explain, plan
from zimage_rt.comfyui.run import Run
from zimage_rt.comfyui.save import save_images, to_api
from zimage_rt.comfyui.values import Latent
from zimage_rt.comfyui.workflow_file import parse_workflow, read_workflow

DATA = ROOT / "tests" / "data" / "comfyui"
GRAPHS: Mapping[str, dict[str, Any]] = json.loads((DATA / "graphs.json").read_text(encoding="utf-8"))
LORAS = ROOT / "checkpoints" / "zimage-nano-cyanotype"
FILES = FolderFiles({}, "nano", LORAS, (DATA,))
# Of ComfyUI's latents: `samples / SCALE + SHIFT`.
SCALE, SHIFT = 0.3611, 0.1159

# Every sampler's sigmas and result, in the order of running.
Sampled = list[tuple[np.ndarray, Latent]]


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> Sampled:
    found: Sampled = []
    original = samplers._sampled

    def record(*arguments: Any) -> Latent:
        result = original(*arguments)
        found.append((arguments[4], result))
        return result

    monkeypatch.setattr(samplers, "_sampled", record)
    return found


def draw(graph: dict[str, Any], engine: zimage_rt.Engine, cache: Cache | None = None) -> tuple[Run, list[str]]:
    run = Run(lambda bundle: engine, FILES)
    return run, execute(plan(parse_workflow(graph), FILES), run, cache)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / ((one.astype(float) - other.astype(float)) ** 2).mean()))


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_gives_comfyuis_latents(name: str, engine: zimage_rt.Engine, sampled: Sampled) -> None:
    run, _ = draw(GRAPHS[name], engine)
    with np.load(DATA / "results.npz") as file:
        parts = sorted(key for key in file.files if key.startswith(f"{name}/") and key.endswith("latents"))
        # `latents` alone, or `pass1_` and `pass2_` before it.
        assert len(parts) == len(sampled) >= 1
        for part, (sigmas, latent) in zip(parts, sampled, strict=True):
            assert np.array_equal(sigmas, file[part.replace("latents", "sigmas")])
            found = latent.samples / SCALE + SHIFT
            assert np.abs(found - file[part]).max() < 1e-3  # measured: 4e-5 at most
    assert len(run.made) == (3 if name == "07_batch_3" else 1)


@pytest.mark.parametrize(
    ("name", "file"), [("01_template_turbo", "input_scene.png"), ("06_inpaint_noise_mask", "06_inpaint_noise_mask.png")]
)
def test_an_image_is_comfyuis(name: str, file: str, engine: zimage_rt.Engine) -> None:
    run, _ = draw(GRAPHS[name], engine)
    assert psnr(run.made[0].pixels, np.asarray(Image.open(DATA / file).convert("RGB"))) > 70  # measured: 76 and 78


def test_unchanged_inputs_are_not_computed_again(engine: zimage_rt.Engine) -> None:
    cache: Cache = {}
    graph = copy.deepcopy(GRAPHS["02_euler_simple"])
    first, reused = draw(graph, engine, cache)
    assert reused == []
    again, reused = draw(graph, engine, cache)
    assert {"8", "9"} <= set(reused) and again.made[0].pixels.tobytes() == first.made[0].pixels.tobytes()
    graph["8"]["inputs"]["seed"] = 5
    other, reused = draw(graph, engine, cache)
    assert "5" in reused and not {"8", "9"} & set(reused)
    assert (other.made[0].pixels != first.made[0].pixels).any()


def test_a_zeroed_negative_is_not_the_empty_prompt(engine: zimage_rt.Engine, sampled: Sampled) -> None:
    graph = copy.deepcopy(GRAPHS["01_template_turbo"])
    graph["8"]["inputs"]["cfg"] = 3.0
    draw(graph, engine)
    graph["6"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 0], "text": ""}}
    draw(graph, engine)
    zeroed, empty = (latent.samples for _, latent in sampled)
    assert np.abs(zeroed - empty).max() > 0.5


def test_a_batchs_parts_keep_their_noise(engine: zimage_rt.Engine, sampled: Sampled) -> None:
    graph = copy.deepcopy(GRAPHS["07_batch_3"])
    draw(graph, engine)
    (source,) = (name for name, node in graph.items() if node["class_type"] == "EmptySD3LatentImage")
    graph["part"] = {"class_type": "LatentFromBatch", "inputs": {"samples": [source, 0], "batch_index": 1, "length": 2}}
    graph["8"]["inputs"]["latent_image"] = ["part", 0]
    draw(graph, engine)
    whole, part = (latent.samples for _, latent in sampled)
    assert len(part) == 2 and np.abs(whole[1:] - part).max() < 1e-4


# --- articles -------------------------------------------------------------------------------------------------------


def article(masked: bool) -> dict[str, Any]:
    """A graph as articles print them: nodes and inputs that ComfyUI never had, and links to a wrong output."""
    text = {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox, white background", "clip": ["4", 0]}}
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": "input_scene.png"}},
        "2": {"class_type": "ImageToLatent", "inputs": {"pixels": ["1", 0], "vae": ["4", 2]}},
        "3": text,
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"model_name": "z_image_edit.safetensors"}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["4", 0], "positive": ["3", 0], "negative": ["3", 0], "seed": 9, "steps": 2, "cfg": 1.0,
                "sampler_name": "dpmpp_2m", "scheduler": "karras", "latent_image": ["7" if masked else "2", 0],
            },
        },
        "7": {"class_type": "MaskToLatent", "inputs": {"mask": ["8", 0], "latent": ["2", 0]} if masked else {}},
        "8": {"class_type": "LoadMask", "inputs": {"mask": "input_mask.png"} if masked else {}},
        "9": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["4", 2]}},
        "10": {"class_type": "SaveImage", "inputs": {"images": ["9", 0]}},
    }  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
def test_what_articles_print_runs_with_warnings(masked: bool, engine: zimage_rt.Engine, sampled: Sampled) -> None:
    checked = plan(parse_workflow(article(masked)), FILES)
    text = "\n".join(checked.warnings)
    for part in (
        "ImageToLatent (#2): there is no such node in ComfyUI; VAEEncode is meant",
        "model_name is no input of it; ckpt_name is meant",
        "clip leads to output 0; its CLIP is meant",
        "denoise is left out; 1.0 is taken",
        "filename_prefix is left out; 'ComfyUI' is taken",
    ):
        assert part in text
    assert ("nothing leads to it; it is left out" in text) != masked
    run = Run(lambda bundle: engine, FILES)
    execute(checked, run)
    assert run.made[0].pixels.shape == (256, 256, 3) and (sampled[0][1].mask is not None) == masked
    assert "VAEEncode (#2): VAEEncode(pixels=#1.0, vae=#4.2)" in explain(checked)


# --- broken ones ----------------------------------------------------------------------------------------------------


def without_a_node(graph: dict[str, Any], chance: random.Random) -> None:
    linked = {value[0] for node in graph.values() for value in node["inputs"].values() if isinstance(value, list)}
    del graph[chance.choice(sorted(linked))]


def to_nowhere(graph: dict[str, Any], chance: random.Random) -> None:
    inputs, name = chance.choice(links(graph))
    inputs[name] = chance.choice((["nowhere", 0], [inputs[name][0], 9], [inputs[name][0], -1]))


def in_a_circle(graph: dict[str, Any], chance: random.Random) -> None:
    sampler = next(name for name, node in graph.items() if "latent_image" in node["inputs"])
    graph[sampler]["inputs"]["latent_image"] = [sampler, 0]


def of_another_type(graph: dict[str, Any], chance: random.Random) -> None:
    loader = next(name for name, node in graph.items() if node["class_type"] == "CLIPLoader")
    inputs, name = chance.choice([each for each in links(graph) if each[1] != "clip"])
    inputs[name] = [loader, 0]


def without_an_input(graph: dict[str, Any], chance: random.Random) -> None:
    inputs, name = chance.choice(links(graph))
    del inputs[name]


def with_a_wrong_value(graph: dict[str, Any], chance: random.Random) -> None:
    sampler = next(node for node in graph.values() if "steps" in node["inputs"])
    sampler["inputs"]["steps"] = chance.choice((0, -3, 10**9, "many", None, [1, 2, 3], {}))


def with_an_unknown_kind(graph: dict[str, Any], chance: random.Random) -> None:
    graph[chance.choice(sorted(graph))]["class_type"] = chance.choice(("KSamplerX", "", "🐼", "x" * 5000))


def with_an_unknown_file(graph: dict[str, Any], chance: random.Random) -> None:
    name = chance.choice(("none.png", "/etc/passwd", "../graphs.json", "", 7))
    graph["extra"] = {"class_type": "LoadImage", "inputs": {"image": name}}
    graph["shown"] = {"class_type": "PreviewImage", "inputs": {"images": ["extra", 0]}}


def links(graph: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    return [
        (node["inputs"], name)
        for node in graph.values()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    ]


BREAKS: tuple[Callable[[dict[str, Any], random.Random], None], ...] = (
    without_a_node, to_nowhere, in_a_circle, of_another_type, without_an_input, with_a_wrong_value,
    with_an_unknown_kind, with_an_unknown_file,
)  # fmt: skip


def test_300_broken_workflows_are_refused_before_anything_is_drawn() -> None:
    count = 0
    for seed in range(4):
        for name, whole in GRAPHS.items():
            for breaks in BREAKS:
                graph = copy.deepcopy(whole)
                breaks(graph, random.Random(f"{seed} {name}"))
                with pytest.raises(WorkflowError) as caught:
                    plan(parse_workflow(graph), FILES)
                count += 1
                error = caught.value
                assert error.node_errors, (name, breaks.__name__, str(error))
                for node, found in error.node_errors.items():
                    assert found["class_type"] == graph[node]["class_type"]
                    for each in found["errors"]:
                        assert {"type", "message", "details", "extra_info"} == set(each) and each["message"]
    assert count >= 300


def test_all_faults_are_named_at_once() -> None:
    graph = copy.deepcopy(GRAPHS["01_template_turbo"])
    graph["8"]["inputs"] |= {"steps": 0, "sampler_name": "best", "model": ["3", 0]}
    graph["7"]["inputs"]["width"] = "wide"
    with pytest.raises(WorkflowError) as caught:
        plan(parse_workflow(graph), FILES)
    kinds = {error["type"] for found in caught.value.node_errors.values() for error in found["errors"]}
    assert kinds == {"value_smaller_than_min", "value_not_in_list", "return_type_mismatch", "invalid_input_type"}
    assert caught.value.node_errors["8"]["dependent_outputs"] == ["10"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected an object with a node by id"),
        ({}, "expected an object with a node by id"),
        ({"1": 3}, "expected an object with class_type"),
        ({"1": {"class_type": "KSampler", "inputs": []}}, "inputs: expected an object"),
        ({str(number): {"class_type": "SaveImage"} for number in range(10_001)}, "at most 10000 nodes"),
    ],
)
def test_what_is_no_workflow_is_refused(data: Any, message: str) -> None:
    with pytest.raises(WorkflowError, match=message):
        parse_workflow(data)


def test_10_000_nodes_in_a_row_are_planned() -> None:
    graph = copy.deepcopy(GRAPHS["02_euler_simple"])
    last = "9"
    for number in range(9_900):
        graph[f"n{number}"] = {"class_type": "ImageInvert", "inputs": {"image": [last, 0]}}
        last = f"n{number}"
    graph["10"]["inputs"]["images"] = [last, 0]
    assert len(plan(parse_workflow(graph), FILES).order) == len(graph)


# --- files ----------------------------------------------------------------------------------------------------------


def test_saved_images_are_numbered_and_carry_the_workflow(tmp_path: Path, engine: zimage_rt.Engine) -> None:
    run, _ = draw(GRAPHS["02_euler_simple"], engine)
    graph = parse_workflow(GRAPHS["02_euler_simple"])
    first = save_images(run.made, graph, tmp_path)
    second = save_images(run.made, graph, tmp_path)
    assert [path.name for path in (*first, *second)] == ["zimage_00001_.png", "zimage_00002_.png"]
    assert to_api(read_workflow(second[0])) == GRAPHS["02_euler_simple"]
    assert np.array_equal(np.asarray(Image.open(first[0])), run.made[0].pixels)
    (tmp_path / "plain.png").write_bytes((DATA / "input_mask.png").read_bytes())
    with pytest.raises(WorkflowError, match="expected a PNG that carries a workflow"):
        read_workflow(tmp_path / "plain.png")


# --- switches and outputs --------------------------------------------------------------------------------------------


def test_a_node_that_shows_and_is_needed_shows_again(engine: zimage_rt.Engine) -> None:
    def graph(end: str) -> dict[str, Any]:
        return {
            "1": {"class_type": "PrimitiveString", "inputs": {"value": "a"}},
            "z": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}},
            "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
            "3": {
                "class_type": "StringConcatenate",
                "inputs": {"string_a": ["2", 0], "string_b": end, "delimiter": ""},
            },
        }

    cache: Cache = {}
    first, _ = draw(graph("b"), engine, cache)
    again, reused = draw(graph("c"), engine, cache)
    assert [each.text for each in first.shown] == ["a", "ab"]
    assert [each.text for each in again.shown] == ["a", "ac"] and reused == ["1"]
