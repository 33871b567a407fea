"""Workflows for a service that speaks ComfyUI's protocol, and a plain client of it."""

from __future__ import annotations

import copy
import io
import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from services import Server
from shared import ROOT

import zimage_rt
from zimage_rt.comfyui.execute import execute
from zimage_rt.comfyui.files import FolderFiles
from zimage_rt.comfyui.plan import plan
from zimage_rt.comfyui.run import Run
from zimage_rt.comfyui.workflow_file import parse_workflow

DATA = ROOT / "tests" / "data" / "comfyui"
GRAPHS: Mapping[str, dict[str, Any]] = json.loads((DATA / "graphs.json").read_text(encoding="utf-8"))
TEMPLATE = "01_template_turbo"
# The model files that the graphs and the articles name.
FILES = (
    "zimage_nano_bf16.safetensors",
    "qwen3_nano.safetensors",
    "ae_nano.safetensors",
    "z_image_turbo.safetensors",
    "z_image_edit.safetensors",
)
# The least share of levels that are ComfyUI's or one more: ComfyUI cuts off to 8 bits what the engine rounds. All of
# them are; of another seed 0.95, of Euler's sampler 0.997.
SAME_LEVELS = 0.999


def start_service(folder: Path, bundle: Path, *, sections: str = "") -> Server:
    """A service with one slot whose files are those of the graphs; `sections` are more of its TOML."""
    folder.mkdir(parents=True, exist_ok=True)
    files = ", ".join(f'"{name}" = "nano"' for name in FILES)
    config = folder / "service.toml"
    config.write_text(
        f'slots = 1\npreview_share = 1\n[models.nano]\nbundle = "{bundle.absolute()}"\n'
        'backend_options = {provider = "cpu"}\n'
        f"[comfyui]\nfiles = {{{files}}}\n{sections}\n",
        encoding="utf-8",
    )
    server = Server(folder, "--config", str(config))
    server.wait_until_ready()
    return server


def graph(name: str = TEMPLATE, **values: Any) -> dict[str, Any]:
    """A graph of `graphs.json` with a title per node, and other values: `n8_seed` is `seed` of node 8."""
    found = copy.deepcopy(GRAPHS[name])
    for node in found.values():
        node["_meta"] = {"title": node["class_type"]}
    for place, value in values.items():
        node_id, _, key = place[1:].partition("_")
        assert key in found[node_id]["inputs"], place
        found[node_id]["inputs"][key] = value
    return found


def small(seed: int = 1, **values: Any) -> dict[str, Any]:
    """The template's graph at 64 x 64 pixels and two steps."""
    return graph(**{"n7_width": 64, "n7_height": 64, "n8_steps": 2, "n8_seed": seed, **values})


def misplaced(sent: dict[str, Any]) -> dict[str, Any]:
    """A graph that fails in its last node: the file's prefix comes from a node, and leads out of the folder."""
    sent["prefix"] = {"class_type": "PrimitiveString", "inputs": {"value": "../out"}}
    sent["10"]["inputs"]["filename_prefix"] = ["prefix", 0]
    return sent


def slow(seed: int = 1) -> dict[str, Any]:
    """A graph that takes some seconds, and stops between two steps."""
    return graph(n8_steps=90, n8_seed=seed)


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    difference = ((one.astype(float) - other.astype(float)) ** 2).mean()
    return float("inf") if difference == 0 else float(10 * np.log10(255**2 / difference))


def comfyui_image(name: str = "input_scene.png") -> np.ndarray:
    """An image that ComfyUI made; the default is that of the template's graph."""
    return pixels((DATA / name).read_bytes())


def is_comfyui_image(content: bytes, name: str = "input_scene.png") -> bool:
    """Whether an image is the one that ComfyUI makes of the graph."""
    difference = pixels(content).astype(int) - comfyui_image(name)
    return bool(((difference == 0) | (difference == 1)).mean() >= SAME_LEVELS)


def run_here(sent: dict[str, Any], engine: zimage_rt.Engine, images: Path = DATA) -> list[np.ndarray]:
    """The images that `zimage workflow` makes of a graph, in this process."""
    files = FolderFiles({}, "nano", None, (images,))
    run = Run(lambda bundle: engine, files)
    execute(plan(parse_workflow(sent), files), run)
    return [made.pixels for made in run.made]


class Comfy:
    """A client as ComfyUI's own examples write it: POST /prompt, then the history, then /view."""

    def __init__(self, server: Server, headers: Mapping[str, str] | None = None, prefix: str = "") -> None:
        self.server, self.headers, self.prefix = server, dict(headers or {}), prefix
        self.http = httpx.Client(base_url=server.url + prefix, headers=self.headers, timeout=60)

    def queue(self, sent: Mapping[str, Any], **body: Any) -> str:
        """The id of a workflow that waits."""
        answer = self.http.post("/prompt", json={"prompt": sent, **body})
        assert answer.status_code == 200, answer.text
        said = answer.json()
        assert said["node_errors"] == {} and isinstance(said["number"], (int, float))
        return said["prompt_id"]

    def refused(self, sent: Any, status: int = 400, **body: Any) -> dict[str, Any]:
        """What the service says of a workflow that it does not take."""
        answer = self.http.post("/prompt", json={"prompt": sent, **body})
        assert answer.status_code == status, answer.text
        said = answer.json()
        assert set(said) == {"error", "node_errors"}
        assert set(said["error"]) == {"type", "message", "details", "extra_info"}
        return said

    def wait(self, prompt_id: str, seconds: float = 60) -> dict[str, Any]:
        """A workflow's entry in the history, when it has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.http.get(f"/history/{prompt_id}").json()
            if found:
                assert list(found) == [prompt_id]
                return found[prompt_id]
            time.sleep(0.02)
        raise AssertionError(f"{prompt_id} did not end: {self.server.log[-2000:]}")

    def run(self, sent: Mapping[str, Any], **body: Any) -> dict[str, Any]:
        """A workflow's entry in the history."""
        return self.wait(self.queue(sent, **body))

    def view(self, reference: Mapping[str, str], **more: str) -> bytes:
        """A file by its reference."""
        answer = self.http.get("/view", params={**reference, **more})
        assert answer.status_code == 200, answer.text
        return answer.content

    def draw(self, sent: Mapping[str, Any], **body: Any) -> list[bytes]:
        """The files of a workflow's images."""
        entry = self.run(sent, **body)
        assert entry["status"]["status_str"] == "success", entry["status"]
        return [self.view(each) for output in entry["outputs"].values() for each in output.get("images", ())]

    def upload(self, content: bytes, name: str, **fields: str) -> dict[str, str]:
        """The name under which an image is kept."""
        answer = self.http.post("/upload/image", files={"image": (name, content)}, data=fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait_for_state(self, prompt_id: str, state: str, seconds: float = 30) -> None:
        """Return when a job has a state of `/api/jobs`."""
        end = time.monotonic() + seconds
        url = f"{self.server.url}/api/jobs/{prompt_id}"
        while httpx.get(url, headers=self.headers).json().get("status") != state:
            assert time.monotonic() < end, f"{prompt_id} did not become {state}"
            time.sleep(0.02)

    def is_empty(self) -> bool:
        """Whether nothing waits or runs."""
        return self.http.get("/prompt").json() == {"exec_info": {"queue_remaining": 0}}


class Messages:
    """A websocket's messages.

    Attributes:
        sid: the client's id, as the service says it.
        first: the message that the service sends at once.
        headers: of the answer that opens it.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.headers = connection.response.headers
        self.first = self.read()
        assert isinstance(self.first, dict) and self.first["type"] == "status"
        self.sid = self.first["data"]["sid"]

    def send(self, message: Mapping[str, Any]) -> None:
        self._connection.send(json.dumps(message))

    def read(self, seconds: float = 30) -> dict[str, Any] | bytes:
        """The next message; binary ones as they are."""
        found = self._connection.recv(timeout=seconds)
        return found if isinstance(found, bytes) else json.loads(found)

    def until(self, kind: str, **data: Any) -> list[dict[str, Any] | bytes]:
        """All messages up to one of a kind whose data has these values."""
        found: list[dict[str, Any] | bytes] = []
        while True:
            message = self.read()
            found.append(message)
            if not isinstance(message, dict) or message["type"] != kind:
                continue
            if all(message["data"].get(name) == value for name, value in data.items()):
                return found

    def run(self, prompt_id: str) -> list[dict[str, Any] | bytes]:
        """All messages up to the end of a workflow, as ComfyUI's example waits for it."""
        return self.until("executing", node=None, prompt_id=prompt_id)

    def is_quiet(self, seconds: float = 0.3) -> bool:
        """Whether no message comes."""
        try:
            self._connection.recv(timeout=seconds)
        except TimeoutError:
            return True
        return False


@contextmanager
def websocket(comfy: Comfy, client: str | None = None) -> Iterator[Messages]:
    """A websocket of a client; None sends no id."""
    from websockets.sync.client import connect

    query = "" if client is None else f"?clientId={client}"
    url = comfy.server.url.replace("http://", "ws://") + f"{comfy.prefix}/ws{query}"
    with connect(url, additional_headers=comfy.headers) as connection:
        yield Messages(connection)


def new_id() -> str:
    return str(uuid.uuid4())


def texts(messages: list[dict[str, Any] | bytes]) -> list[dict[str, Any]]:
    """The messages that are JSON."""
    return [each for each in messages if isinstance(each, dict)]


def kinds(messages: list[dict[str, Any] | bytes]) -> list[str]:
    """The kinds of the messages, `bytes` for binary ones; a kind that repeats is named once."""
    found: list[str] = []
    for each in messages:
        kind = each["type"] if isinstance(each, dict) else "bytes"
        if not found or found[-1] != kind:
            found.append(kind)
    return found
