"""ComfyUI's clients in Python against the service: plain requests, comfy-api-simplified, ComfyScript, comfy-cli."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from shared import ROOT

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from comfyui_service import (
    DATA,
    Comfy,
    graph,
    is_comfyui_image,
    misplaced,
    new_id,
    pixels,
    psnr,
    run_here,
    slow,
    start_service,
)
from services import Server

import zimage_rt
from zimage_rt.comfyui.files import FolderFiles
from zimage_rt.comfyui.plan import plan
from zimage_rt.comfyui.workflow_file import parse_workflow

# comfy-cli needs 60 other packages: whoever wants it installs it there first.
COMFY_CLI = ROOT / "build" / "comfy-cli"
CLI_VERSION = "1.23.0"
INSTALL = f"python -m venv {COMFY_CLI} && {COMFY_CLI}/bin/pip install comfy-cli=={CLI_VERSION}"
# Images that our own code makes twice, here and in the service.
SAME = 60


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_service(tmp_path_factory.mktemp("comfyui-python"), bundle)
    yield server
    server.stop()


@pytest.fixture
def comfy(server: Server) -> Iterator[Comfy]:
    client = Comfy(server)
    with client.http:
        yield client


# --- plain requests, as ComfyUI's own examples write them -----------------------------------------------------------


def post_prompt(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    # urllib says that this is a form.
    request = urllib.request.Request(f"{server.url}/prompt", data=json.dumps(body).encode("utf-8"))
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


def get(server: Server, path: str, **query: str) -> bytes:
    url = f"{server.url}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
    with urllib.request.urlopen(url) as answer:
        return answer.read()


def test_a_prompt_without_a_client_is_polled(server: Server) -> None:
    said = post_prompt(server, {"prompt": graph()})
    prompt_id, end = said["prompt_id"], time.monotonic() + 60
    history: dict[str, Any] = {}
    while not history and time.monotonic() < end:
        history = json.loads(get(server, f"/history/{prompt_id}"))
        time.sleep(0.05)
    (image,) = history[prompt_id]["outputs"]["10"]["images"]
    assert image["type"] == "output" and history[prompt_id]["status"]["completed"]
    assert is_comfyui_image(get(server, "/view", **image))


def test_a_websocket_tells_the_end(server: Server, engine: zimage_rt.Engine) -> None:
    from websockets.sync.client import connect

    client = new_id()
    with connect(f"{server.url.replace('http', 'ws')}/ws?clientId={client}") as socket:
        prompt_id = post_prompt(server, {"prompt": graph(n8_seed=1234), "client_id": client})["prompt_id"]
        while True:
            message = json.loads(socket.recv(timeout=60))  # no binary ones, which nobody asked for
            if message["type"] == "executing" and message["data"] == {"node": None, "prompt_id": prompt_id}:
                break
    outputs = json.loads(get(server, f"/history/{prompt_id}"))[prompt_id]["outputs"]
    images = [get(server, "/view", **each) for output in outputs.values() for each in output["images"]]
    (content,) = images
    (expected,) = run_here(graph(n8_seed=1234), engine)
    assert psnr(pixels(content), expected) > SAME
    assert not is_comfyui_image(content)  # so that the template's comparison says something


def test_an_uploaded_image_is_drawn_over(comfy: Comfy, engine: zimage_rt.Engine) -> None:
    scene = (DATA / "input_scene.png").read_bytes()
    name = comfy.upload(scene, "scene of mine.png", subfolder="uploads")
    assert name == {"name": "scene of mine.png", "subfolder": "uploads", "type": "input"}
    sent = graph("05_img2img_denoise_05", n20_image="uploads/scene of mine.png", n8_steps=2)
    (content,) = comfy.draw(sent)
    (expected,) = run_here(graph("05_img2img_denoise_05", n8_steps=2), engine)
    assert psnr(pixels(content), expected) > SAME


def test_an_uploaded_mask_is_painted_in(comfy: Comfy) -> None:
    comfy.upload((DATA / "input_scene.png").read_bytes(), "input_scene.png", overwrite="true")
    comfy.upload((DATA / "input_mask.png").read_bytes(), "input_mask.png", overwrite="true")
    (content,) = comfy.draw(graph("06_inpaint_noise_mask"))
    assert is_comfyui_image(content, "06_inpaint_noise_mask.png")


def test_a_mask_drawn_over_an_image_is_its_alpha(comfy: Comfy, engine: zimage_rt.Engine, tmp_path: Path) -> None:
    """The editor's way: the image, then a picture with its mask as alpha, whose colours do not count."""
    scene, mask = (DATA / "input_scene.png").read_bytes(), Image.open(DATA / "input_mask.png").convert("L")
    original = comfy.upload(scene, "clipspace.png")
    alpha = Image.new("RGBA", mask.size)
    alpha.putalpha(mask.point(lambda value: 255 - value))  # transparent is to be drawn
    encoded = io.BytesIO()
    alpha.save(encoded, "PNG")
    reference = {"filename": original["name"], "subfolder": original["subfolder"], "type": original["type"]}
    answer = comfy.http.post(
        "/upload/mask",
        files={"image": ("clipspace-mask.png", encoded.getvalue(), "image/png")},
        data={"original_ref": json.dumps(reference), "type": "input", "subfolder": "clipspace"},
    )
    masked = answer.json()
    assert masked == {"name": "clipspace-mask.png", "subfolder": "clipspace", "type": "input"}
    content = comfy.view({"filename": masked["name"], "subfolder": "clipspace", "type": "input"})
    assert (pixels(content) == pixels(scene)).all()

    sent = graph("06_inpaint_noise_mask")
    loader = next(name for name, node in sent.items() if node["class_type"] == "LoadImage")
    (mask_loader,) = (name for name, node in sent.items() if node["class_type"] == "LoadImageMask")
    sent[loader]["inputs"]["image"] = "clipspace/clipspace-mask.png [input]"
    del sent[mask_loader]
    (noise_mask,) = (node for node in sent.values() if node["class_type"] == "SetLatentNoiseMask")
    noise_mask["inputs"]["mask"] = [loader, 1]
    (drawn,) = comfy.draw(sent)
    assert is_comfyui_image(drawn, "06_inpaint_noise_mask.png")


# --- comfy-api-simplified -------------------------------------------------------------------------------------------


@pytest.fixture
def simplified(server: Server) -> Any:
    package = pytest.importorskip("comfy_api_simplified", reason="comfy-api-simplified is not installed")
    return package.ComfyApiWrapper(server.url)


def test_comfy_api_simplified_draws(simplified: Any) -> None:
    from comfy_api_simplified import ComfyWorkflowWrapper

    workflow = ComfyWorkflowWrapper(graph(n8_seed=7))
    workflow.set_node_param("KSampler", "seed", 42)
    images = simplified.queue_and_wait_images(workflow, "SaveImage")
    ((name, content),) = images.items()
    assert name.startswith("zimage_") and name.endswith("_.png")
    assert is_comfyui_image(content)
    # Nothing is left to draw: it ends just as well.
    again = simplified.queue_and_wait_images(workflow, "SaveImage")
    assert list(again) == [name] and again[name] == content


def test_comfy_api_simplified_uploads(simplified: Any, engine: zimage_rt.Engine) -> None:
    from comfy_api_simplified import ComfyWorkflowWrapper

    kept = simplified.upload_image(DATA / "input_scene.png")
    assert kept["subfolder"] == "default_upload_folder"
    workflow = ComfyWorkflowWrapper(graph("05_img2img_denoise_05", n8_steps=2))
    workflow.set_node_param("LoadImage", "image", f"{kept['subfolder']}/{kept['name']}")
    (content,) = simplified.queue_and_wait_images(workflow, "SaveImage").values()
    (expected,) = run_here(graph("05_img2img_denoise_05", n8_steps=2), engine)
    assert psnr(pixels(content), expected) > SAME


def test_comfy_api_simplified_hears_of_failures(simplified: Any) -> None:
    from comfy_api_simplified.exceptions import ComfyApiError

    with pytest.raises(ComfyApiError, match="400"):
        simplified.queue_prompt(graph(n8_sampler_name="no_such_sampler"))
    # What a node finds when it runs; a shorter run would end before this client opens its websocket.
    with pytest.raises(ComfyApiError, match="Execution error"):
        simplified.queue_and_wait_images(misplaced(graph(n8_seed=77)), "SaveImage")


def test_comfy_api_simplified_asks_and_stops(simplified: Any, comfy: Comfy) -> None:
    assert "KSampler" in simplified.get_object_info("KSampler") and simplified.get_embeddings() == []
    assert simplified.get_system_stats()["system"]["comfyui_version"] == "0.33.0"
    running, waiting = (simplified.queue_prompt(slow(seed))["prompt_id"] for seed in (1, 2))
    comfy.wait_for_state(running, "in_progress")
    assert [simplified.get_queue_size_before(each) for each in (running, waiting)] == [0, 1]
    comfy.http.post("/queue", json={"delete": [waiting]})
    simplified.interrupt()  # with no body at all
    assert comfy.wait(running)["status"]["messages"][-1][0] == "execution_interrupted"
    assert simplified.get_queue() == {"queue_running": [], "queue_pending": []}


# --- ComfyScript ----------------------------------------------------------------------------------------------------


def test_comfy_script_draws(server: Server) -> None:
    pytest.importorskip("comfy_script", reason="comfy-script is not installed")
    command = [sys.executable, str(ROOT / "tests" / "data" / "comfyui_script.py"), server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    (content,) = said["images"]
    assert is_comfyui_image(base64.b64decode(content))
    assert said["outputs"]["images"][0]["filename"].startswith("script_")
    assert "Failed to watch" not in done.stdout + done.stderr


# --- comfy-cli ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comfy_cli(tmp_path_factory: pytest.TempPathFactory) -> Any:
    command = COMFY_CLI / "bin" / "comfy"
    if not list(COMFY_CLI.glob(f"lib/python*/site-packages/comfy_cli-{CLI_VERSION}.dist-info")):
        pytest.skip(f"comfy-cli is not installed; install it with: {INSTALL}")
    # Its settings go to a home of its own, and it sends no statistics.
    home = tmp_path_factory.mktemp("comfy-cli")
    environment = {**os.environ, "HOME": str(home), "DO_NOT_TRACK": "1", "COMFY_NO_TELEMETRY": "1"}

    def run(server: Server, *arguments: str) -> list[dict[str, Any]]:
        host, port = server.url.removeprefix("http://").split(":")
        place = ["--host", host, "--port", port]
        done = subprocess.run(
            [str(command), "--skip-prompt", "run", *place, "--json", "--no-watch", *arguments],
            capture_output=True, text=True, env=environment, timeout=120,
        )  # fmt: skip
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_comfy_cli_runs_a_workflow(comfy_cli: Any, server: Server, tmp_path: Path) -> None:
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(graph(n10_filename_prefix="cli")), encoding="utf-8")
    events = comfy_cli(server, "--workflow", str(file), "--wait")
    end = events[-1]
    assert end["ok"] and end["data"]["status"] == "completed" and end["error"] is None
    (url,) = end["data"]["outputs"]
    with urllib.request.urlopen(url) as answer:
        assert is_comfyui_image(answer.read())
    progress = [(each["completed"], each["total"]) for each in events if each["type"] == "progress"]
    assert progress in ([], [(step, 8) for step in range(1, 9)])  # none if the sampler's result was kept


def test_comfy_cli_converts_the_editors_format(comfy_cli: Any, server: Server) -> None:
    """Its own conversion asks /object_info for the order of the widgets."""
    from importlib.resources import files

    source = files("comfyui_workflow_templates_json") / "templates" / "image_z_image_turbo.json"
    events = comfy_cli(server, "--workflow", str(source), "--print-prompt")
    (preview,) = (each for each in events if each["type"] == "prompt_preview")
    nodes = {node["class_type"]: node["inputs"] for node in preview["prompt"].values()}
    assert nodes["UNETLoader"]["unet_name"] == "z_image_turbo_bf16.safetensors"
    sampler = nodes["KSampler"]
    assert (sampler["steps"], sampler["sampler_name"], sampler["scheduler"]) == (8, "res_multistep", "simple")


def test_comfy_cli_tells_what_is_wrong(comfy_cli: Any, server: Server, tmp_path: Path) -> None:
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(graph(n8_sampler_name="no_such_sampler")), encoding="utf-8")
    end = comfy_cli(server, "--workflow", str(file), "--wait")[-1]
    assert not end["ok"] and "no_such_sampler" in json.dumps(end["error"])


# --- what articles print --------------------------------------------------------------------------------------------


def article(size: int = 128) -> dict[str, Any]:
    """Text to an image as articles print it: `model_name`, links to a wrong output, no `filename_prefix`."""
    sampler = {
        "model": ["4", 0], "positive": ["3", 0], "negative": ["6", 0], "latent_image": ["7", 0], "seed": 123456,
        "steps": 8, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
    }  # fmt: skip
    return {
        "3": {"inputs": {"text": "一只熊猫，绿色背景", "clip": ["4", 0]}, "class_type": "CLIPTextEncode"},
        "4": {"inputs": {"model_name": "z_image_turbo.safetensors"}, "class_type": "CheckpointLoaderSimple"},
        "5": {"inputs": sampler, "class_type": "KSampler"},
        "6": {"inputs": {"text": "模糊", "clip": ["4", 0]}, "class_type": "CLIPTextEncode"},
        "7": {"inputs": {"width": size, "height": size, "batch_size": 1}, "class_type": "EmptyLatentImage"},
        "8": {"inputs": {"samples": ["5", 0], "vae": ["4", 2]}, "class_type": "VAEDecode"},
        "9": {"inputs": {"images": ["8", 0]}, "class_type": "SaveImage"},
    }


def edit_article(*, masked: bool) -> dict[str, Any]:
    """An edit as articles print it: nodes that ComfyUI never had, two of them without inputs if there is no mask."""
    sampler = {
        "model": ["4", 0], "positive": ["3", 0], "negative": ["6", 0], "latent_image": ["7" if masked else "2", 0],
        "seed": 987654, "steps": 4, "cfg": 7.5, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 0.4,
    }  # fmt: skip
    mask = {"mask": ["8", 0], "latent": ["2", 0]}
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": "original.png"}},
        "2": {"class_type": "ImageToLatent", "inputs": {"pixels": ["1", 0], "vae": ["4", 2]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "一只狐狸", "clip": ["4", 0]}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"model_name": "z_image_edit.safetensors"}},
        "5": {"class_type": "KSampler", "inputs": sampler},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 0]}},
        "7": {"class_type": "MaskToLatent", "inputs": mask if masked else {}},
        "8": {"class_type": "LoadMask", "inputs": {"mask": "mask.png"} if masked else {}},
        "9": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["4", 2]}},
        "10": {"class_type": "SaveImage", "inputs": {"images": ["9", 0], "filename_prefix": "edited"}},
    }


def test_what_an_article_prints_draws(comfy: Comfy, engine: zimage_rt.Engine) -> None:
    # The graph that is meant, with the nodes and the links that ComfyUI has.
    meant = article()
    meant["4"]["inputs"] = {"ckpt_name": "z_image_turbo.safetensors"}
    for node in ("3", "6"):
        meant[node]["inputs"]["clip"] = ["4", 1]
    meant["9"]["inputs"]["filename_prefix"] = "ComfyUI"
    (expected,) = run_here(meant, engine)
    entry = comfy.run(article())
    (image,) = entry["outputs"]["9"]["images"]
    assert image["filename"] == "ComfyUI_00001_.png"
    # Articles say nothing but the name.
    assert psnr(pixels(comfy.view({"filename": image["filename"]})), expected) > SAME


@pytest.mark.parametrize("masked", [False, True])
def test_an_edit_that_an_article_prints_draws(
    masked: bool, comfy: Comfy, engine: zimage_rt.Engine, tmp_path: Path
) -> None:
    for name, source in (("original.png", "input_scene.png"), ("mask.png", "input_mask.png")):
        encoded = io.BytesIO()
        Image.open(DATA / source).resize((128, 128)).save(encoded, "PNG")
        comfy.upload(encoded.getvalue(), name, overwrite="true")
        (tmp_path / name).write_bytes(encoded.getvalue())
    (content,) = comfy.draw(edit_article(masked=masked))
    # The graph that is meant.
    meant = edit_article(masked=masked)
    meant["4"]["inputs"] = {"ckpt_name": "z_image_edit.safetensors"}
    for node in ("3", "6"):
        meant[node]["inputs"]["clip"] = ["4", 1]
    meant["2"]["class_type"] = "VAEEncode"
    if masked:
        meant["7"] = {"class_type": "SetLatentNoiseMask", "inputs": {"mask": ["8", 0], "samples": ["2", 0]}}
        meant["8"] = {"class_type": "LoadImageMask", "inputs": {"image": "mask.png", "channel": "red"}}
    else:
        del meant["7"], meant["8"]
    assert not plan(parse_workflow(meant), FolderFiles({}, "nano", None, (tmp_path,))).warnings
    (expected,) = run_here(meant, engine, tmp_path)
    assert psnr(pixels(content), expected) > SAME
