"""ComfyUI's clients for Node against the service: @saintno/comfyui-sdk and @stable-canvas/comfyui-client."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shared import ROOT

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from comfyui_service import DATA, graph, is_comfyui_image, misplaced, pixels, psnr, run_here, small, start_service
from services import Server

import zimage_rt

# Tests need no network: whoever wants these installs the clients there first.
FOLDER = ROOT / "build" / "comfyui-node"
VERSIONS = {"@saintno/comfyui-sdk": "0.3.1", "@stable-canvas/comfyui-client": "1.5.9"}
INSTALL = f"npm install --prefix {FOLDER} " + " ".join(f"{name}@{version}" for name, version in VERSIONS.items())
STEPS = [[step, 8] for step in range(1, 9)]
Call = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def script() -> Path:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    for name, version in VERSIONS.items():
        package = FOLDER / "node_modules" / name / "package.json"
        if not package.is_file() or json.loads(package.read_text())["version"] != version:
            pytest.skip(f"{name} {version} is not installed; install it with: {INSTALL}")
    path = FOLDER / "comfyui_node.mjs"  # beside its node_modules, where node looks
    shutil.copy(ROOT / "tests" / "data" / "comfyui_node.mjs", path)
    return path


@pytest.fixture(scope="module")
def server(script: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_service(tmp_path_factory.mktemp("comfyui-node"), bundle)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def call(server: Server, script: Path) -> Call:
    def run(name: str, **given: Any) -> dict[str, Any]:
        command = ["node", str(script), server.url, name]
        environment = {**os.environ, "NO_COLOR": "1"}
        done = subprocess.run(
            command, input=json.dumps(given), capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return json.loads(done.stdout.splitlines()[-1])

    return run


def only(said: dict[str, Any]) -> bytes:
    (image,) = said["images"]
    return base64.b64decode(image)


# --- @saintno/comfyui-sdk -------------------------------------------------------------------------------------------


def test_saintno_draws(call: Call) -> None:
    said = call("saintno_draw", graph=graph(n8_seed=1), seed=42)
    assert is_comfyui_image(only(said)) and said["finished"] and said["failed"] is None
    assert said["progress"] == STEPS
    again = call("saintno_draw", graph=graph(n8_seed=1), seed=42)  # nothing is left to draw
    assert only(again) == only(said) and again["finished"] and again["progress"] == []


def test_saintno_uploads(call: Call, engine: zimage_rt.Engine) -> None:
    image = base64.b64encode((DATA / "input_scene.png").read_bytes()).decode()
    said = call("saintno_edit", graph=graph("05_img2img_denoise_05", n8_steps=2), image=image)
    assert (said["info"]["filename"], said["info"]["type"]) == ("from node.png", "input")
    (expected,) = run_here(graph("05_img2img_denoise_05", n8_steps=2), engine)
    assert psnr(pixels(only(said)), expected) > 60


def test_saintno_hears_of_failures(call: Call) -> None:
    invalid, failing = call("saintno_fails", graphs=[small(n8_sampler_name="no_such_sampler"), misplaced(small())])[
        "failed"
    ]
    assert invalid["message"] == "Failed to queue prompt"
    assert failing["cause"]["node_id"] == "10" and "filename_prefix" in failing["cause"]["exception_message"]


def test_saintno_asks(call: Call) -> None:
    said = call("saintno_asks")
    assert "z_image_turbo.safetensors" in said["checkpoints"] and "res_multistep" in said["samplers"]
    assert (said["version"], said["embeddings"], said["histories"]) == ("0.33.0", [], 1)


# --- @stable-canvas/comfyui-client ----------------------------------------------------------------------------------


def test_stable_canvas_draws(call: Call) -> None:
    first = call("stable_draw", graph=small(5))  # the template's is not cached after it
    assert pixels(only(first)).shape == (64, 64, 3)
    said = call("stable_draw", graph=graph())
    assert is_comfyui_image(only(said)) and said["progress"] == STEPS


def test_stable_canvas_polls_and_builds(call: Call, engine: zimage_rt.Engine) -> None:
    (expected,) = run_here(small(6), engine)
    assert psnr(pixels(only(call("stable_polls", graph=small(6)))), expected) > 60
    assert is_comfyui_image(only(call("stable_builds", seed=42)))


def test_stable_canvas_asks(call: Call) -> None:
    said = call("stable_asks")
    assert {"euler", "res_multistep"} <= set(said["samplers"]) and "simple" in said["schedulers"]
    assert "ae_nano.safetensors" in said["vaes"] and said["loras"] == []
    assert said["queue"] == {"Running": [], "Pending": []}
