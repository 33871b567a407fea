"""ComfyUI's protocol: strange ids, texts, numbers and names, which lose nothing of anybody's."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from comfyui_service import Comfy, small, start_service
from services import Server

from zimage_rt.cli.main import app

HALF = "\\ud83d"  # of a character, as JSON writes it


@pytest.fixture(scope="module")
def clients(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Comfy]]:
    folder = tmp_path_factory.mktemp("comfyui-strange")
    keys = {}
    for name in ("carol", "dan"):
        result = CliRunner().invoke(app, ["keys", "add", name, "--data", str(folder / "data")], catch_exceptions=False)
        keys[name] = result.stdout.strip()
    server: Server = start_service(folder, bundle)
    yield {name: Comfy(server, {"Authorization": f"Bearer {key}"}) for name, key in keys.items()}
    server.stop()


@pytest.fixture
def comfy(clients: dict[str, Comfy]) -> Comfy:
    return clients["carol"]


def post(comfy: Comfy, text: str) -> httpx.Response:
    """A body as it is, not as a JSON library would write it."""
    return comfy.http.post("/prompt", content=text.encode())


def shows(text: str) -> dict[str, Any]:
    return {"1": {"class_type": "PreviewAny", "inputs": {"source": text}}}


def test_nobody_takes_the_id_of_anothers_workflow(clients: dict[str, Comfy]) -> None:
    carol, dan = clients["carol"], clients["dan"]
    wanted = str(uuid.uuid4())
    body = {"prompt": shows("mine"), "prompt_id": wanted}
    assert carol.http.post("/prompt", json=body).status_code == 200
    carol.wait(wanted)
    for other in (dan, carol):
        answer = other.http.post("/prompt", json={"prompt": shows("theirs"), "prompt_id": wanted})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_prompt_id"
    assert carol.http.get(f"/history/{wanted}").json()[wanted]["outputs"]["1"]["text"] == ["mine"]


def test_of_one_id_sent_at_once_one_is_drawn(comfy: Comfy) -> None:
    body = {"prompt": shows("at once"), "prompt_id": str(uuid.uuid4())}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: comfy.http.post("/prompt", json=body).status_code, range(8)))
    assert sorted(answers) == [200, *[400] * 7]


@pytest.mark.parametrize(
    "place",
    [
        {"prompt": shows("HALF")},
        {"prompt": shows("x"), "extra_data": {"extra_pnginfo": {"workflow": "HALF"}}},
        {"prompt": small(n10_filename_prefix="HALF")},
    ],
)
def test_a_half_of_a_character_is_refused(comfy: Comfy, place: dict[str, Any]) -> None:
    answer = post(comfy, json.dumps(place).replace("HALF", f"a{HALF}b"))
    assert answer.status_code == 400 and "\\ud83d" in answer.json()["error"]["message"]
    # A whole character in two halves is none.
    assert post(comfy, json.dumps({"prompt": shows("HALF")}).replace("HALF", f"{HALF}\\ude00")).status_code == 200
    assert comfy.http.get("/queue").status_code == comfy.http.get("/history").status_code == 200


def test_a_half_that_a_node_makes_can_be_read(comfy: Comfy) -> None:
    nodes = {
        "1": {"class_type": "JsonExtractString", "inputs": {"json_string": f'{{"a": "{HALF}"}}', "key": "a"}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    job = comfy.http.post("/prompt", json={"prompt": nodes}).json()["prompt_id"]
    comfy.wait(job)
    assert comfy.http.get(f"/history/{job}").json()[job]["outputs"]["2"]["text"] == ["?"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400", "1" + "0" * 400, "true"])
def test_a_strange_number_is_refused(comfy: Comfy, number: str) -> None:
    answer = post(comfy, f'{{"prompt": {json.dumps(shows("x"))}, "number": {number}}}')
    assert answer.status_code == 400 and set(answer.json()) == {"error", "node_errors"}


@pytest.mark.parametrize(
    "prefix", ["../x", "/etc/x", "a/../../x", "..", "\0a", "b" * 300 + "/x", "q/" * 500 + "x", "e" * 300, "a\nb"]
)
def test_a_prefix_that_leads_elsewhere_is_refused_before_anything_is_drawn(comfy: Comfy, prefix: str) -> None:
    answer = comfy.http.post("/prompt", json={"prompt": small(n10_filename_prefix=prefix)})
    assert answer.status_code == 400 and set(answer.json()["node_errors"]) == {"10"}


def test_an_empty_prefix_is_a_name(comfy: Comfy) -> None:
    image = {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 2, "color": 255}}
    saved = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "deep/"}}
    job = comfy.http.post("/prompt", json={"prompt": {"1": image, "2": saved}}).json()["prompt_id"]
    comfy.wait(job)
    files = comfy.http.get(f"/history/{job}").json()[job]["outputs"]["2"]["images"]
    assert [each["filename"] for each in files] == ["_00001_.png", "_00002_.png"]
    for each in files:
        assert Image.open(io.BytesIO(comfy.view(each))).size == (16, 16)


@pytest.mark.parametrize(
    "address", ["/jobs?offset=-1", f"/jobs?limit={'9' * 26}", f"/history?max_items={'9' * 23}", "/history?offset=-9"]
)
def test_strange_pages_are_pages(comfy: Comfy, address: str) -> None:
    assert comfy.http.get(address).status_code == 200


def test_an_upload_says_no_address_of_memory(comfy: Comfy) -> None:
    answer = comfy.http.post("/upload/image", files={"image": ("a.png", b"none")})
    assert answer.status_code == 400 and "0x" not in answer.text
    long = {"subfolder": "a" * 300}
    assert comfy.http.post("/upload/image", files={"image": ("a.png", b"none")}, data=long).status_code == 400
