"""ComfyUI's protocol in its details: routes, queue, history, jobs, what is run again, messages, previews."""

from __future__ import annotations

import io
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from comfyui_service import DATA, Comfy, kinds, new_id, pixels, slow, small, start_service, texts, websocket
from services import Server

from zimage_rt.comfyui.registry import NODES


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_service(tmp_path_factory.mktemp("comfyui-protocol"), bundle)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def comfy(server: Server) -> Comfy:
    return Comfy(server)


# --- routes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_every_route_is_at_both_places(prefix: str, server: Server, comfy: Comfy) -> None:
    here = Comfy(server, comfy.headers, prefix)
    with here.http, websocket(here, "both") as socket:
        prompt_id = here.queue(small(1), client_id="both")
        socket.run(prompt_id)
        (image,) = here.wait(prompt_id)["outputs"]["10"]["images"]
        assert here.view(image).startswith(b"\x89PNG")
        assert here.upload((DATA / "input_mask.png").read_bytes(), f"at{len(prefix)}.png")["type"] == "input"
        for path in ("prompt", "queue", "history", "object_info", "object_info/KSampler", "embeddings", "models"):
            assert here.http.get(f"/{path}").status_code == 200, path
        for path in ("models/vae", "extensions", "features", "system_stats", "jobs", f"jobs/{prompt_id}"):
            assert here.http.get(f"/{path}").status_code == 200, path
        for path in ("interrupt", "free", "queue", "history"):
            answer = here.http.post(f"/{path}", json={})
            assert (answer.status_code, answer.content) == (200, b""), path
        assert here.http.post(f"/jobs/{prompt_id}/cancel").json() == {"cancelled": False}
        assert here.http.post("/jobs/cancel", json={"job_ids": [prompt_id]}).json() == {"cancelled": False}


def test_object_info_fits_every_node_that_runs(comfy: Comfy) -> None:
    """What the editor and ComfyScript need of each node."""

    said = comfy.http.get("/object_info").json()
    assert set(said) == set(NODES)
    for name, node in said.items():
        assert node["name"] == name and node["python_module"] and isinstance(node["output_node"], bool)
        assert len(node["output"]) == len(node["output_name"]) == len(node["output_is_list"])
        assert {"display_name", "description", "category"} <= set(node)
        order = [*node["input_order"].get("required", ()), *node["input_order"].get("optional", ())]
        assert set(order) == {*node["input"].get("required", {}), *node["input"].get("optional", {})}
    assert comfy.http.get("/object_info/NoSuchNode").json() == {}
    assert comfy.http.get("/object_info/KSampler").json() == {"KSampler": said["KSampler"]}


def test_what_is_unknown_is_harmless(comfy: Comfy) -> None:
    unknown = new_id()
    assert comfy.http.get(f"/history/{unknown}").json() == {}
    assert comfy.http.get(f"/api/jobs/{unknown}").status_code == 404
    assert "error" in comfy.http.get(f"/api/jobs/{unknown}").json()
    assert comfy.http.post(f"/api/jobs/{unknown}/cancel").json() == {"cancelled": False}
    for path, body in (("/queue", {"delete": [unknown]}), ("/history", {"delete": [unknown]})):
        assert comfy.http.post(path, json=body).status_code == 200
    assert comfy.http.post("/interrupt", json={"prompt_id": unknown}).status_code == 200
    assert comfy.http.post("/interrupt", content=b"no JSON").status_code == 200
    assert comfy.http.get("/view", params={"filename": "no such file.png"}).status_code == 404
    for filename in ("../service.sqlite", "/etc/passwd", "a/../../b.png"):
        assert comfy.http.get("/view", params={"filename": filename}).status_code == 400
    assert comfy.http.get("/view", params={"filename": "a.png", "subfolder": "../.."}).status_code in (400, 403)
    assert comfy.http.get("/view", params={"filename": "a.png", "type": "models"}).status_code == 400


# --- queueing -------------------------------------------------------------------------------------------------------


def test_a_prompts_id_may_be_chosen_once(comfy: Comfy) -> None:
    chosen = new_id()
    assert comfy.queue(small(2), prompt_id=chosen) == chosen
    for strange in (chosen, chosen.upper(), "42", 42, chosen.replace("-", "")):
        said = comfy.refused(small(2), prompt_id=strange)
        assert (said["error"]["type"], said["node_errors"]) == ("invalid_prompt_id", {})
    comfy.wait(chosen)
    assert comfy.refused(small(2), prompt_id=chosen)["error"]["type"] == "invalid_prompt_id"
    assert comfy.queue(small(2), prompt_id=None) != chosen


def test_the_queue_has_an_order_and_can_be_changed(comfy: Comfy) -> None:
    running = comfy.queue(slow(3), client_id="order", extra_data={"api_key_comfy_org": "secret", "mine": 1})
    comfy.wait_for_state(running, "in_progress")
    last = comfy.queue(small(4))
    first = comfy.queue(small(5), front=True)
    foremost = comfy.queue(small(6), front=True)
    late = comfy.queue(small(7), number=1e6)
    middle = comfy.queue(small(8), number=-0.5)
    said = comfy.http.get("/queue").json()
    (entry,) = said["queue_running"]
    number, prompt_id, sent, extra, outputs = entry
    assert (prompt_id, sent, outputs) == (running, slow(3), ["10"]) and number >= 0
    assert extra.pop("create_time") / 1000 == pytest.approx(time.time(), abs=60)
    assert extra == {"client_id": "order", "mine": 1}  # a key of Comfy's services is nobody's business
    waiting = [each[1] for each in said["queue_pending"]]
    assert waiting == [foremost, first, middle, last, late]
    assert [each[0] for each in said["queue_pending"]][2:] == sorted(each[0] for each in said["queue_pending"])[2:]
    assert comfy.http.get("/prompt").json() == {"exec_info": {"queue_remaining": 6}}
    listed = comfy.http.get("/api/jobs", params={"status": "pending,in_progress"}).json()
    assert {each["id"]: each["status"] for each in listed["jobs"]} == {
        running: "in_progress",
        **dict.fromkeys(waiting, "pending"),
    }

    comfy.http.post("/queue", json={"delete": [late]})
    assert comfy.http.post("/api/jobs/cancel", json={"job_ids": [last, new_id()]}).json() == {"cancelled": True}
    assert comfy.http.post(f"/jobs/{foremost}/cancel").json() == {"cancelled": True}
    comfy.http.post("/interrupt", json={"prompt_id": first})  # does not run
    assert [each[1] for each in comfy.http.get("/queue").json()["queue_pending"]] == [first, middle]
    comfy.http.post("/interrupt", json={"prompt_id": running})
    entries = [comfy.wait(each) for each in (running, first, middle)]
    assert [each["status"]["status_str"] for each in entries] == ["error", "success", "success"]
    ended = [dict(each["status"]["messages"]) for each in entries[1:]]
    assert ended[0]["execution_success"]["timestamp"] <= ended[1]["execution_start"]["timestamp"]
    for gone in (late, last, foremost):  # nothing is left of what never ran
        assert comfy.http.get(f"/history/{gone}").json() == {}
    (listed,) = (each for each in comfy.http.get("/jobs").json()["jobs"] if each["id"] == running)
    assert listed["status"] == "cancelled" and listed["execution_error"] is None


def test_the_queue_is_cleared(comfy: Comfy) -> None:
    with websocket(comfy, "clear") as socket:
        running = comfy.queue(slow(9), client_id="clear")
        socket.until("progress")
        waiting = [comfy.queue(small(seed), client_id="clear") for seed in (1, 2)]
        comfy.http.post("/queue", json={"clear": True})
        assert comfy.http.get("/queue").json()["queue_pending"] == []
        comfy.http.post("/interrupt")
        messages = texts(socket.run(running))
        assert not any(each["data"].get("prompt_id") in waiting for each in messages)  # as in ComfyUI
        ended = next(each["data"] for each in messages if each["type"] == "execution_interrupted")
        assert (ended["node_id"], ended["node_type"]) == ("8", "KSampler") and "5" in ended["executed"]
        assert comfy.wait(running)["outputs"] == {} and comfy.is_empty()


def test_some_outputs_alone_are_run(comfy: Comfy) -> None:
    sent = small(10)
    sent["11"] = {"class_type": "PreviewImage", "inputs": {"images": ["9", 0]}}
    entry = comfy.run(sent, partial_execution_targets=["11"])
    assert list(entry["outputs"]) == ["11"] and entry["prompt"][4] == ["11"]
    (preview,) = entry["outputs"]["11"]["images"]
    assert preview["type"] == "temp" and comfy.view(preview).startswith(b"\x89PNG")
    entry = comfy.run(sent)
    assert set(entry["outputs"]) == {"10", "11"} and entry["outputs"]["11"]["images"] == [preview]
    said = comfy.refused(sent, partial_execution_targets=["9"])  # shows nothing
    assert said["error"]["type"] == "prompt_no_outputs"


# --- history and jobs -----------------------------------------------------------------------------------------------


def test_the_history_has_pages_and_forgets(comfy: Comfy) -> None:
    comfy.http.post("/history", json={"clear": True})
    assert comfy.http.get("/history").json() == {}
    ids = [comfy.queue(small(seed)) for seed in (20, 21, 22, 23)]
    for each in ids:
        comfy.wait(each)

    def page(**query: int) -> list[str]:
        return list(comfy.http.get("/history", params=query).json())

    assert page() == ids and page(max_items=2) == ids[2:]  # the newest, the oldest of them first
    assert page(max_items=2, offset=1) == ids[1:3] and page(offset=3) == ids[3:]
    comfy.http.post("/history", json={"delete": ids[:1]})
    assert page() == ids[1:] and comfy.http.get(f"/history/{ids[0]}").json() == {}

    def jobs(**query: Any) -> tuple[list[str], dict[str, Any]]:
        said = comfy.http.get("/api/jobs", params=query).json()
        return [each["id"] for each in said["jobs"]], said["pagination"]

    newest = ids[:0:-1]
    assert jobs() == (newest, {"offset": 0, "limit": None, "total": 3, "has_more": False})
    assert jobs(limit=1, offset=1) == (newest[1:2], {"offset": 1, "limit": 1, "total": 3, "has_more": True})
    assert jobs(sort_order="asc", status="completed, failed")[0] == ids[1:]
    assert jobs(status="failed,cancelled")[0] == []
    for query in ({"status": "lost"}, {"sort_by": "name"}, {"sort_order": "up"}, {"limit": 0}, {"limit": "many"}):
        assert comfy.http.get("/api/jobs", params=query).status_code == 400, query
    for body in ({}, {"job_ids": "all"}, {"job_ids": [["a"]]}, {"job_ids": ["not an id"]}):
        assert comfy.http.post("/api/jobs/cancel", json=body).status_code == 400, body
    comfy.http.post("/history", json={"clear": True})
    assert jobs() == ([], {"offset": 0, "limit": None, "total": 0, "has_more": False})


def test_a_job_says_all_of_itself(comfy: Comfy) -> None:
    workflow = {"id": "11111111-2222-3333-4444-555555555555", "nodes": []}
    prompt_id = comfy.queue(small(30), extra_data={"extra_pnginfo": {"workflow": workflow}})
    (image,) = comfy.wait(prompt_id)["outputs"]["10"]["images"]
    said = comfy.http.get(f"/api/jobs/{prompt_id}").json()
    assert said["id"] == prompt_id and said["status"] == "completed" and said["execution_error"] is None
    assert said["create_time"] <= said["execution_start_time"] <= said["execution_end_time"]
    assert said["preview_output"] == {**image, "nodeId": "10", "mediaType": "images"} and said["outputs_count"] == 1
    assert said["outputs"] == {"10": {"images": [image]}} and said["workflow"]["prompt"] == small(30)
    assert said["workflow_id"] == workflow["id"]
    found = comfy.http.get("/jobs", params={"workflow_id": workflow["id"]}).json()["jobs"]
    assert [each["id"] for each in found] == [prompt_id]


# --- what is computed again -----------------------------------------------------------------------------------------


def test_only_what_changed_is_run_again(comfy: Comfy) -> None:
    with websocket(comfy, "cache") as socket:

        def run(sent: dict[str, Any]) -> tuple[set[str], list[str], dict[str, Any]]:
            prompt_id = comfy.queue(sent, client_id="cache")
            messages = texts(socket.run(prompt_id))
            (cached,) = (each["data"]["nodes"] for each in messages if each["type"] == "execution_cached")
            begun = [each["data"]["node"] for each in messages if each["type"] == "executing"]
            (shown,) = (each["data"]["output"] for each in messages if each["type"] == "executed")
            assert comfy.wait(prompt_id)["outputs"] == {"10": shown}
            return set(cached), begun[:-1], shown

        text = "a fox that nobody has drawn here before"
        _, begun, first = run(small(40, n5_text=text))
        assert {"5", "6", "8", "9", "10"} <= set(begun)
        # Another seed: the prompt is not encoded again.
        cached, begun, second = run(small(41, n5_text=text))
        assert begun == ["8", "9", "10"] and cached == {"1", "2", "3", "4", "5", "6", "7"}
        assert first != second
        # The same again: nothing is run, and the same files are shown.
        cached, begun, third = run(small(41, n5_text=text))
        assert begun == [] and cached == set(small()) and third == second
        names = {each["filename"] for output in (first, second, third) for each in output["images"]}
        assert len(names) == 2
        # Another name for the file: only it is new.
        _, begun, renamed = run(small(41, n5_text=text, n10_filename_prefix="renamed/%width%"))
        assert begun == ["10"]
        assert renamed["images"] == [{"filename": "64_00001_.png", "subfolder": "renamed", "type": "output"}]
        assert comfy.view(renamed["images"][0]) != b"" and pixels(comfy.view(renamed["images"][0])).shape == (64, 64, 3)


# --- messages -------------------------------------------------------------------------------------------------------


def test_messages_come_in_comfyuis_order(comfy: Comfy) -> None:
    with websocket(comfy) as socket:  # with no id, as the editor begins
        assert len(socket.sid) == 32 and socket.first["data"]["status"]["exec_info"] == {"queue_remaining": 0}
        prompt_id = comfy.queue(small(50, n5_text="a whale, for the order of messages"), client_id=socket.sid)
        # The end of the history comes before its message: clients read it when they hear of it.
        before = socket.until("execution_success", prompt_id=prompt_id)
        entry = comfy.http.get(f"/history/{prompt_id}").json()[prompt_id]
        messages = texts([*before, *socket.run(prompt_id)])
    assert messages[0]["type"] == "status"
    assert messages[0]["data"] == {"status": {"exec_info": {"queue_remaining": 1}}}  # with the one that runs
    assert not any(isinstance(each, bytes) for each in before)
    rest = [each for each in messages[1:] if each["type"] != "status"]
    assert [each["type"] for each in rest[:2]] == ["execution_start", "execution_cached"]
    assert [each["type"] for each in rest[-4:]] == ["executed", "progress_state", "execution_success", "executing"]
    last_status = [each for each in messages if each["type"] == "status"][-1]
    assert last_status["data"] == {"status": {"exec_info": {"queue_remaining": 0}}}
    assert all(each["data"]["prompt_id"] == prompt_id for each in rest)
    for name in ("execution_start", "execution_cached", "execution_success"):
        (data,) = (each["data"] for each in rest if each["type"] == name)
        assert data["timestamp"] / 1000 == pytest.approx(time.time(), abs=60)
        assert [name, data] in entry["status"]["messages"]
    (progress,) = ([each["data"] for each in rest if each["type"] == "progress"],)
    assert progress == [{"node": "8", "value": step, "max": 2, "prompt_id": prompt_id} for step in (1, 2)]
    states = [each["data"]["nodes"] for each in rest if each["type"] == "progress_state"]
    assert {node["state"] for node in states[-1].values()} == {"finished"} and set(states[-1]) == set(small())
    running = next(each["8"] for each in states if each.get("8", {}).get("value") == 1)
    assert running == {
        "value": 1, "max": 2, "state": "running", "node_id": "8", "display_node_id": "8", "parent_node_id": None,
        "real_node_id": "8", "prompt_id": prompt_id,
    }  # fmt: skip
    (executed,) = (each["data"] for each in rest if each["type"] == "executed")
    assert executed == {"node": "10", "display_node": "10", "output": entry["outputs"]["10"], "prompt_id": prompt_id}
    assert entry["meta"]["10"]["real_node_id"] == "10"


def test_messages_are_not_compressed(comfy: Comfy) -> None:
    # Node inflates on a thread: on a busy machine HTTP answers overtake compressed messages (test_clients_node.py).
    with websocket(comfy) as socket:
        assert "Sec-WebSocket-Extensions" not in socket.headers


def test_only_its_client_hears_of_a_workflow(comfy: Comfy) -> None:
    with websocket(comfy, "mine") as mine, websocket(comfy, "other") as other:
        prompt_id = comfy.queue(small(51), client_id="mine")
        assert kinds(mine.run(prompt_id))[-1] == "executing"
        # All of a key's clients hear how many wait.
        assert other.read()["data"] == {"status": {"exec_info": {"queue_remaining": 1}}}
        assert other.read()["data"] == {"status": {"exec_info": {"queue_remaining": 0}}}
        assert other.is_quiet()
        # The id may be in the address, too.
        answer = comfy.http.post("/prompt?clientId=mine", json={"prompt": small(52)})
        mine.run(answer.json()["prompt_id"])


def test_a_client_comes_back_and_status_is_repeated(comfy: Comfy) -> None:
    with websocket(comfy, "back") as socket:
        prompt_id = comfy.queue(slow(53), client_id="back")
        socket.until("progress")
    with websocket(comfy, "back") as socket:
        assert socket.sid == "back" and socket.first["data"]["status"]["exec_info"] == {"queue_remaining": 1}
        assert socket.read() == {
            "type": "executing",
            "data": {"node": "8", "display_node": "8", "prompt_id": prompt_id},
        }
        (status,) = texts(socket.until("status"))[-1:]  # a client calls a silent service disconnected
        assert status["data"] == {"status": {"exec_info": {"queue_remaining": 1}}}
        with websocket(comfy, "back") as again:  # the same id twice: the last one counts
            comfy.http.post("/interrupt", json={})
            assert kinds(again.run(prompt_id))[-1] == "executing"


def previews_of(messages: list[dict[str, Any] | bytes]) -> list[bytes]:
    return [each for each in messages if isinstance(each, bytes)]


def test_previews_go_to_those_that_ask(comfy: Comfy) -> None:
    def run(features: dict[str, Any] | None, seed: int, **extra: Any) -> tuple[list[bytes], str]:
        with websocket(comfy, "previews") as socket:
            if features is not None:
                socket.send({"type": "feature_flags", "data": features})
                said = texts(socket.until("feature_flags"))[-1]
                assert said["data"]["supports_preview_metadata"] is True
            prompt_id = comfy.queue(small(seed, n8_steps=8), client_id="previews", extra_data=extra)
            return previews_of(socket.run(prompt_id)), prompt_id

    assert run(None, 60)[0] == []  # some clients take every binary message for a result
    assert run({"supports_preview_metadata": False}, 61)[0] == []
    plain, _ = run(None, 62, preview_method="auto")
    assert plain and all(struct.unpack(">II", each[:8]) == (1, 1) for each in plain)
    assert Image.open(io.BytesIO(plain[-1][8:])).format == "JPEG"
    rich, prompt_id = run({"supports_preview_metadata": True}, 63)
    assert rich
    kind, length = struct.unpack(">II", rich[-1][:8])
    assert kind == 4 and json.loads(rich[-1][8 : 8 + length]) == {
        "node_id": "8", "display_node_id": "8", "parent_node_id": None, "real_node_id": "8", "prompt_id": prompt_id,
        "image_type": "image/jpeg",
    }  # fmt: skip
    assert Image.open(io.BytesIO(rich[-1][8 + length :])).size == (64, 64)
    assert run({"supports_preview_metadata": True}, 64, preview_method="none")[0] == []
