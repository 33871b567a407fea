"""ComfyUI's protocol: files, what two keys see of each other, limits, and workflows that are refused."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from comfyui_service import (
    Comfy,
    graph,
    pixels,
    slow,
    small,
    start_service,
    texts,
    websocket,
)
from services import Server

import zimage_rt
from zimage_rt.cli.main import app

WORD = "forbiddenword"
# What clients of ComfyUI get of a failed check, and of a node in `node_errors`.
ENTRY = {"type", "message", "details", "extra_info"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def run_cli(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with the keys of alice, of bob, and of one with narrow limits."""
    folder = tmp_path_factory.mktemp("comfyui-access")
    limits = {"narrow": ("--max-pixels", "4096", "--max-steps", "3", "--max-jobs", "1")}
    names = ("alice", "bob", "narrow")
    data = str(folder / "data")
    return folder, {name: run_cli("keys", "add", name, "--data", data, *limits.get(name, ())).strip() for name in names}


@pytest.fixture(scope="module")
def server(bundle: Path, keys: tuple[Path, dict[str, str]]) -> Iterator[Server]:
    folder = keys[0]
    (folder / "words.txt").write_text(f"{WORD}\n", encoding="utf-8")
    sections = '[limits]\nmax_images = 3\n[safety]\nprompt = "block"\nwords = "words.txt"\n'
    server = start_service(folder, bundle, sections=sections)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def clients(server: Server, keys: tuple[Path, dict[str, str]]) -> dict[str, Comfy]:
    return {name: Comfy(server, bearer(key)) for name, key in keys[1].items()}


@pytest.fixture
def comfy(clients: dict[str, Comfy]) -> Comfy:
    return clients["alice"]


# --- files ----------------------------------------------------------------------------------------------------------


def png(value: int, mode: str = "RGB") -> bytes:
    encoded = io.BytesIO()
    Image.new(mode, (32, 16), (value,) * len(mode)).save(encoded, "PNG")
    return encoded.getvalue()


def test_uploads_have_names_of_their_own(comfy: Comfy) -> None:
    assert comfy.upload(png(1), "twice.png")["name"] == "twice.png"
    assert comfy.upload(png(1), "twice.png")["name"] == "twice.png"  # the same bytes
    assert comfy.upload(png(2), "twice.png")["name"] == "twice (1).png"
    assert comfy.upload(png(3), "twice.png")["name"] == "twice (2).png"
    assert comfy.upload(png(2), "twice.png")["name"] == "twice (1).png"
    assert comfy.upload(png(4), "twice.png", overwrite="true")["name"] == "twice.png"
    found = comfy.view({"filename": "twice.png", "type": "input"})
    assert found == png(4)
    kept = comfy.upload(png(5), "sub.png", subfolder="a/b", type="temp")
    assert kept == {"name": "sub.png", "subfolder": "a/b", "type": "temp"}
    assert comfy.view({"filename": "sub.png", "subfolder": "a/b", "type": "temp"}) == png(5)
    listed = comfy.http.get("/object_info/LoadImage").json()["LoadImage"]["input"]["required"]["image"][0]
    assert {"twice.png", "twice (1).png", "twice (2).png"} <= set(listed)
    for files, data in (
        ({}, {}),
        ({"image": ("a.png", b"no image")}, {}),
        ({"image": ("a.png", png(1))}, {"subfolder": "../.."}),
        ({"image": ("a.png", png(1))}, {"type": "models"}),
    ):
        assert comfy.http.post("/upload/image", files=files, data=data).status_code == 400


def test_uploads_at_once_do_not_take_each_others_name(comfy: Comfy) -> None:
    contents = [png(value) for value in range(12)]
    with ThreadPoolExecutor(len(contents)) as pool:
        kept = list(pool.map(lambda content: comfy.upload(content, "at once.png"), contents))
    assert len({each["name"] for each in kept}) == len(contents)
    for each, content in zip(kept, contents, strict=True):
        assert comfy.view({"filename": each["name"], "type": "input"}) == content


def test_a_view_has_formats_and_channels(comfy: Comfy) -> None:
    comfy.upload(png(7, "RGBA"), "alpha.png")
    place = {"filename": "alpha.png", "type": "input"}
    for wanted, kind in (("webp;90", "WEBP"), ("jpeg", "JPEG"), ("tiff;1", "WEBP")):
        assert Image.open(io.BytesIO(comfy.view(place, preview=wanted))).format == kind
    rgb = Image.open(io.BytesIO(comfy.view(place, channel="rgb")))
    assert rgb.mode == "RGB" and rgb.getpixel((0, 0)) == (7, 7, 7)
    assert Image.open(io.BytesIO(comfy.view(place, channel="a"))).getpixel((0, 0)) == (0, 0, 0, 7)
    answer = comfy.http.get("/view", params={**place, "filename": "alpha.png [input]", "type": "output"})
    assert answer.content == png(7, "RGBA") and answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"] == 'filename="alpha.png"'


def test_a_masks_image_keeps_its_workflow(comfy: Comfy) -> None:
    (content,) = comfy.draw(small(70, n10_filename_prefix="masked"))
    answer = comfy.http.post(
        "/upload/mask",
        files={"image": ("mask of it.png", png(9, "RGBA"))},
        data={"original_ref": json.dumps({"filename": "masked_00001_.png", "type": "output", "subfolder": ""})},
    )
    assert answer.status_code == 200, answer.text
    found = Image.open(io.BytesIO(comfy.view({"filename": answer.json()["name"], "type": "input"})))
    assert json.loads(found.info["prompt"]) == small(70, n10_filename_prefix="masked")
    assert found.mode == "RGBA" and found.getpixel((0, 0))[3] == 9
    assert (np.asarray(found.convert("RGB")) == pixels(content)).all()
    for reference in ("{}", "no JSON", '{"filename": "no such.png"}', '{"filename": "../service.sqlite"}'):
        answer = comfy.http.post(
            "/upload/mask", files={"image": ("m.png", png(9, "RGBA"))}, data={"original_ref": reference}
        )
        assert answer.status_code in (400, 404), reference


def test_a_saved_image_runs_again(comfy: Comfy, bundle: Path, tmp_path: Path) -> None:
    workflow = {"id": "w", "nodes": [{"id": 10, "type": "SaveImage"}], "version": 0.4}
    (content,) = comfy.draw(small(71), extra_data={"extra_pnginfo": {"workflow": workflow, "Author": "me"}})
    file = tmp_path / "saved.png"
    file.write_bytes(content)
    found = Image.open(file).info
    assert json.loads(found["prompt"]) == small(71) and json.loads(found["workflow"]) == workflow
    assert json.loads(found["Author"]) == "me"
    record = json.loads(found["zimage_rt_workflow"])
    assert record["version"] == zimage_rt.__version__ and set(record["models"]) == {"nano"}
    out = tmp_path / "out"
    run_cli("workflow", str(file), "-b", str(bundle), "-o", str(out))
    (again,) = out.glob("*.png")
    assert (pixels(again.read_bytes()) == pixels(content)).all()


# --- keys -----------------------------------------------------------------------------------------------------------


def test_two_keys_see_nothing_of_each_other(clients: dict[str, Comfy]) -> None:
    alice, bob = clients["alice"], clients["bob"]
    # The same client id: still two clients.
    with websocket(alice, "shared") as hers, websocket(bob, "shared") as his:
        running = alice.queue(slow(80), client_id="shared")
        hers.until("progress")
        waiting = alice.queue(small(81, n10_filename_prefix="hers"), client_id="shared")
        assert bob.http.get("/queue").json() == {"queue_running": [], "queue_pending": []} and bob.is_empty()
        assert bob.http.get(f"/api/jobs/{running}").status_code == 404
        assert bob.http.post(f"/jobs/{running}/cancel").json() == {"cancelled": False}
        bob.http.post("/interrupt", json={"prompt_id": running})
        bob.http.post("/interrupt", json={})
        bob.http.post("/queue", json={"clear": True, "delete": [waiting]})
        assert len(alice.http.get("/queue").json()["queue_pending"]) == 1
        alice.http.post("/interrupt", json={"prompt_id": running})
        hers.run(waiting)
        (image,) = alice.wait(waiting)["outputs"]["10"]["images"]
        assert his.is_quiet()
    alice.upload(png(11), "secret.png")
    assert bob.http.get(f"/history/{waiting}").json() == {} and waiting not in bob.http.get("/history").json()
    bob.http.post("/history", json={"clear": True, "delete": [waiting]})
    assert waiting in alice.http.get("/history").json()
    assert bob.http.get("/view", params=image).status_code == 404
    assert bob.http.get("/view", params={"filename": "secret.png", "type": "input"}).status_code == 404
    # A workflow of his cannot read them, and has numbers of its own.
    sent = graph("05_img2img_denoise_05", n20_image="secret.png", n8_steps=2)
    assert "20" in bob.refused(sent)["node_errors"]
    (his_image,) = bob.run(small(81, n10_filename_prefix="hers"))["outputs"]["10"]["images"]
    assert his_image == image


def test_a_key_comes_by_bearer_or_basic(server: Server, keys: tuple[Path, dict[str, str]]) -> None:
    from comfy_api_simplified import ComfyApiWrapper, ComfyWorkflowWrapper
    from websockets.exceptions import InvalidStatus

    assert httpx.get(f"{server.url}/queue").status_code == 401
    assert httpx.get(f"{server.url}/queue", auth=("anyone", "wrong")).status_code == 401
    with pytest.raises(InvalidStatus, match="401"), websocket(Comfy(server)):
        pass
    assert httpx.get(f"{server.url}/queue", auth=("anyone", keys[1]["bob"])).status_code == 200
    # As a client sends it, in the address of the websocket, too.
    api = ComfyApiWrapper(server.url, user="anyone", password=keys[1]["bob"])
    (content,) = api.queue_and_wait_images(ComfyWorkflowWrapper(small(90)), "SaveImage").values()
    assert pixels(content).shape == (64, 64, 3)


# --- limits and refusals --------------------------------------------------------------------------------------------


def test_limits_hold(clients: dict[str, Comfy]) -> None:
    alice, narrow = clients["alice"], clients["narrow"]

    def fails(comfy: Comfy, sent: dict[str, Any]) -> str:
        entry = comfy.run(sent)
        kind, data = entry["status"]["messages"][-1]
        assert (kind, data["node_id"], data["node_type"]) == ("execution_error", "8", "KSampler")
        assert entry["status"]["status_str"] == "error" and entry["outputs"] == {}
        return data["exception_message"]

    assert "at most 3 images of a batch here, got 4" in fails(alice, small(1, n7_batch_size=4))
    assert "at most 100 steps here, got 101" in fails(alice, small(1, n8_steps=101))
    assert "at most 4096 pixels here, got 6144" in fails(narrow, small(1, n7_width=96))
    assert "at most 3 steps here, got 4" in fails(narrow, small(1, n8_steps=4))
    assert len(narrow.draw(small(1, n8_steps=3))) == 1 and len(alice.draw(small(1, n7_batch_size=3))) == 3
    # A job at once.
    running = alice.queue(slow(2))
    alice.wait_for_state(running, "in_progress")
    waiting = narrow.queue(small(2))
    assert narrow.refused(small(3), 429)["error"]["type"] == "rate_limited"
    alice.http.post("/interrupt", json={"prompt_id": running})
    assert narrow.wait(waiting)["status"]["completed"]


def test_forbidden_words_draw_nothing(comfy: Comfy) -> None:
    with websocket(comfy, "words") as socket:
        prompt_id = comfy.queue(small(1, n5_text=f"a {WORD} here"), client_id="words")
        ended = next(each for each in texts(socket.run(prompt_id)) if each["type"] == "execution_error")
    assert ended["data"]["exception_type"] == "blocked" and ended["data"]["traceback"]
    entry = comfy.wait(prompt_id)
    assert entry["outputs"] == {} and not entry["status"]["completed"]
    listed = comfy.http.get(f"/jobs/{prompt_id}").json()
    assert listed["status"] == "failed" and listed["execution_error"]["exception_type"] == "blocked"


@pytest.mark.parametrize(
    ("node", "key", "value", "fault"),
    [
        ("8", "sampler_name", "none", "value_not_in_list"),
        ("8", "steps", 0, "value_smaller_than_min"),
        ("8", "steps", "many", "invalid_input_type"),
        ("8", "model", None, "required_input_missing"),
        ("8", "model", ["3", 0], "return_type_mismatch"),
        ("1", "unet_name", "x", "value_not_in_list"),
        ("8", "class_type", "NoSuchNode", "missing_node_type"),
    ],
)
def test_a_broken_workflow_is_refused_in_comfyuis_shape(
    node: str, key: str, value: Any, fault: str, comfy: Comfy
) -> None:
    sent = small(1)
    place = sent[node] if key == "class_type" else sent[node]["inputs"]
    place[key] = value
    if value is None:
        del place[key]
    said = comfy.refused(sent)
    is_unknown = fault == "missing_node_type"
    assert said["error"]["type"] == ("missing_node_type" if is_unknown else "prompt_outputs_failed_validation")
    found = said["node_errors"][node]
    assert found["class_type"] == sent[node]["class_type"] and found["dependent_outputs"] == ["10"]
    first = found["errors"][0]
    assert set(first) == ENTRY and first["type"] == fault
    assert is_unknown or first["extra_info"]["input_name"] == key


def test_what_is_no_workflow_is_refused(comfy: Comfy) -> None:
    sent = small(1)
    del sent["10"]
    assert comfy.refused(sent)["error"]["type"] == "prompt_no_outputs"
    del sent["9"]["class_type"]
    assert comfy.refused(sent)["error"]["type"] == "invalid_prompt"
    for body in ({}, {"prompt": {}}, {"prompt": []}, {"prompt": "text"}, {"prompt": None}):
        answer = comfy.http.post("/prompt", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "no_prompt", body
    answer = comfy.http.post("/prompt", content=b"{")
    assert answer.status_code == 400 and set(answer.json()["error"]) == ENTRY
    assert comfy.is_empty()


def test_the_editors_format_is_told_apart(comfy: Comfy) -> None:
    editor = {"nodes": [{"id": 1, "type": "SaveImage"}], "links": [], "version": 0.4}
    assert "Export (API)" in comfy.refused(editor)["error"]["message"]
    answer = comfy.http.post("/prompt", json=editor)  # not even under `prompt`
    assert answer.status_code == 400 and "Export (API)" in answer.json()["error"]["message"]


def test_the_body_is_read_whatever_its_type(comfy: Comfy) -> None:
    for kind in ("text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "application/octet-stream", None):
        headers = {} if kind is None else {"Content-Type": kind}
        body = json.dumps({"prompt": small(1)}).encode()
        answer = comfy.http.post("/prompt", content=body, headers=headers)
        assert answer.status_code == 200, kind
        comfy.wait(answer.json()["prompt_id"])
