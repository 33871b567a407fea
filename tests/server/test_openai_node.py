"""OpenAI's own client for Node against the service: generate, edit with a mask, stream, errors, retries."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shared import ROOT

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from services import Server

import zimage_rt

# Tests need no network: whoever wants these installs the client there first.
FOLDER = ROOT / "build" / "openai-node"
VERSION = "7.59.0"
INSTALL = f"npm install --prefix {FOLDER} openai@{VERSION}"
STEPS = {"num_inference_steps": 2, "seed": 3}
Call = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def script() -> Path:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    package = FOLDER / "node_modules" / "openai" / "package.json"
    if not package.is_file() or json.loads(package.read_text())["version"] != VERSION:
        pytest.skip(f"OpenAI's client for Node is not installed; install it with: {INSTALL}")
    path = FOLDER / "openai_node.mjs"  # beside its node_modules, where node looks
    shutil.copy(ROOT / "tests" / "data" / "openai_node.mjs", path)
    return path


@pytest.fixture(scope="module")
def server(script: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("openai-node")
    config = folder / "service.toml"
    config.write_text(
        f'slots = 1\npreview_share = 1\n[models.nano]\nbundle = "{bundle.absolute()}"\n[queue]\nmax_waiting = 1\n'
    )
    server = Server(folder, "--config", str(config))
    server.wait_until_ready()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def call(server: Server, script: Path) -> Call:
    def run(name: str, **given: Any) -> dict[str, Any]:
        command = ["node", str(script), server.url, name]
        environment = {**os.environ, "NO_COLOR": "1"}
        done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def png(array: np.ndarray) -> str:
    encoded = io.BytesIO()
    Image.fromarray(array).save(encoded, "PNG")
    return base64.b64encode(encoded.getvalue()).decode()


def test_generate(call: Call, engine: zimage_rt.Engine) -> None:
    found = call("generate", fields={"prompt": "一只熊猫", "size": "96x64", "n": 2, **STEPS})
    expected = engine.generate("一只熊猫", width=96, height=64, num_images=2, **STEPS).images
    assert [pixels(image).tobytes() for image in found["images"]] == [image.tobytes() for image in expected]
    assert found["size"] == "96x64" and found["usage"]["output_tokens"] == 2 * 6 * 4
    assert call("models")["names"] == ["nano"]


def test_an_edit_with_a_mask_keeps_the_rest(call: Call) -> None:
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)
    mask = np.full((64, 64, 4), 255, np.uint8)
    mask[:32, :, 3] = 0  # transparent: to be edited
    # A prompt of digits stays a text in a form; a list of sigmas and an object arrive as such.
    fields = {"prompt": "2024", "seed": 3, "sigmas": [1.0, 0.5]}
    found = call("edit", image=png(image), mask=png(mask), fields=fields)
    drawn = pixels(found["images"][0])
    assert (drawn[32:] == image[32:]).all() and (drawn[:32] != image[:32]).any()


def test_a_stream_has_partial_images_and_then_the_whole(call: Call, engine: zimage_rt.Engine) -> None:
    fields = {"prompt": "a panda", "seed": 3, "num_inference_steps": 6, "size": "64x64", "partial_images": 2}
    events = call("stream", fields=fields)["events"]
    kinds = ["partial_image", "partial_image", "completed"]
    assert [event["type"] for event in events] == [f"image_generation.{kind}" for kind in kinds]
    assert [event["index"] for event in events[:2]] == [0, 1]
    expected = engine.generate("a panda", width=64, height=64, seed=3, num_inference_steps=6).images[0]
    assert pixels(events[-1]["image"]).tobytes() == expected.tobytes()


def test_errors_are_those_of_the_client(call: Call) -> None:
    for fields, kind, param in (
        ({"size": "63x64"}, "BadRequestError", "width"),
        ({"n": 11}, "BadRequestError", "n"),
        ({"model": "gpt-image-2"}, "NotFoundError", "model"),
        ({"quality": "best"}, "BadRequestError", "quality"),
    ):
        error = call("generate", fields={"prompt": "a panda", **fields})["error"]
        assert (error["kind"], error["param"]) == (kind, param) and error["code"], error


def test_a_full_queue_is_asked_again(call: Call, server: Server) -> None:
    long = {"prompt": "a panda", "num_inference_steps": 60, "height": 128, "width": 128}
    for _ in range(2):
        assert server.client.post("/v1/jobs", json=long).status_code == 202
    fields = {"prompt": "a panda", "size": "64x64", **STEPS}
    error = call("generate", fields=fields)["error"]
    assert (error["kind"], error["status"], error["code"]) == ("RateLimitError", 429, "queue_full")
    assert len(call("generate", fields=fields, maxRetries=30)["images"]) == 1
