"""`/v1/sessions`: turns that begin with the last one's image, undo and redo, restarts."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from services import Server

from zimage_rt.server.database import connect

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}


def take(server: Server, session: str, task: str, **fields: Any) -> np.ndarray:
    answer = server.client.post(f"/v1/sessions/{session}/turns/{task}", json=fields)
    assert answer.status_code == 202, answer.text
    job, turn = answer.json()["id"], answer.json()["turn"]
    assert server.finish(job)["state"] == "done"
    return picture(server, session, turn)


def picture(server: Server, session: str, turn: int) -> np.ndarray:
    answer = server.client.get(f"/v1/sessions/{session}/turns/{turn}/image")
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def data_url(pixels: np.ndarray) -> str:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()


def check_images(server: Server) -> None:
    """`generate` alone begins with an image that is given."""
    session = server.client.post("/v1/sessions").json()["id"]
    image = np.full((64, 64, 3), (176, 64, 32), np.uint8)
    fields = {"prompt": "a panda", "image": data_url(image), "strength": 0.1, "num_inference_steps": 20}
    drawn = take(server, session, "generate", **fields)
    assert abs(drawn.mean((0, 1)) - image[0, 0]).max() < 32
    for task in ("edit", "refine"):
        fields = {"prompt": "a cat", "image": data_url(image)}
        refused = server.client.post(f"/v1/sessions/{session}/turns/{task}", json=fields)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "image", refused.text
        assert "take a turn `generate` with it" in refused.json()["error"]["message"]
    server.client.delete(f"/v1/sessions/{session}")
    (route,) = [
        route for path, route in server.client.get("/openapi.json").json()["paths"].items() if "turns/{t" in path
    ]
    body = route["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "Of `generate` alone" in body["properties"]["image"]["description"]


def test_a_session_takes_one_turn_at_a_time(bundle: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, bundle=bundle)
    try:
        server.wait_until_ready()
        turns = f"/v1/sessions/{server.client.post('/v1/sessions').json()['id']}/turns/generate"
        long = {"prompt": "a panda", "height": 256, "width": 256, "num_inference_steps": 100}
        refused = server.client.post(turns, json={**long, "prompt": ["a panda", "a cat"]})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"
        with ThreadPoolExecutor(4) as pool:  # at once: none of them sees another's job
            answers = list(pool.map(lambda _: httpx.post(server.url + turns, json=long, timeout=60), range(4)))
        assert sorted(answer.status_code for answer in answers) == [202, 400, 400, 400]
        messages = [answer.json()["error"]["message"] for answer in answers if answer.status_code == 400]
        assert all("a turn of it is being drawn" in message for message in messages)
        (job,) = [answer.json()["id"] for answer in answers if answer.status_code == 202]
        for move in ("undo", "redo"):
            refused = server.client.post(turns.replace("turns/generate", move))
            assert refused.status_code == 400 and "a turn of it is being drawn" in refused.json()["error"]["message"]
        server.client.delete(f"/v1/jobs/{job}")
        assert server.finish(job)["state"] == "cancelled"
        check_images(server)
    finally:
        assert server.stop() == 0


def restarted(server: Server, bundle: Path) -> Server:
    """Kill a service, and start another in its folder."""
    server.process.kill()
    server.process.wait()
    server.client.close()
    again = Server(server.folder, bundle=bundle)
    again.wait_until_ready()
    return again


def begin(server: Server, session: str, task: str, **fields: Any) -> str:
    """Take a turn, without waiting for it; its job."""
    answer = server.client.post(f"/v1/sessions/{session}/turns/{task}", json=fields)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


LONG: dict[str, Any] = {"prompt": "a panda", "height": 192, "width": 192, "num_inference_steps": 60}


def test_a_turn_stands_after_the_service_was_killed(bundle: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, bundle=bundle)
    try:
        server.wait_until_ready()
        session = server.client.post("/v1/sessions").json()["id"]
        job = begin(server, session, "generate", **LONG)
        time.sleep(0.8)
        server = restarted(server, bundle)
        refused = server.client.post(f"/v1/sessions/{session}/turns/generate", json=LONG)
        assert refused.status_code == 400 and "being drawn" in refused.json()["error"]["message"]
        server = restarted(server, bundle)
        assert server.finish(job)["state"] == "done"
        found = server.client.get(f"/v1/sessions/{session}").json()
        (turn,) = found["turns"]
        assert found["standing"] == 1 and (turn["job"], turn["prompt"], turn["size"]) == (job, "a panda", [192, 192])
        assert picture(server, session, 0).shape == (192, 192, 3)
    finally:
        assert server.stop() == 0


def test_the_service_ends_although_turns_are_drawn(bundle: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, "--drain-seconds", "0", bundle=bundle)
    server.wait_until_ready()
    for _ in range(2):
        begin(
            server, server.client.post("/v1/sessions").json()["id"], "generate", **{**LONG, "num_inference_steps": 100}
        )
    assert server.stop(15) == 0


def test_a_turn_stands_whose_job_was_done_when_the_service_was_killed(bundle: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, bundle=bundle)
    try:
        server.wait_until_ready()
        sessions = [server.client.post("/v1/sessions").json()["id"] for _ in range(3)]
        done, cancelled = (begin(server, session, "generate", **{**LONG, **SMALL}) for session in sessions[:2])
        server.finish(done), server.finish(cancelled)
        before = server.client.get(f"/v1/sessions/{sessions[0]}").json()
        server.process.kill()
        server.process.wait()
        # As if it had been killed before the turns stood, before a job was cancelled, and before one was promised.
        with contextlib.closing(connect(tmp_path / "data")) as database:
            database.execute("UPDATE sessions SET turns = '[]', standing = 0")
            database.execute("UPDATE jobs SET state = 'cancelled' WHERE id = ?", (cancelled,))
            said = json.dumps({"task": "generate", "prompt": "a panda", "negative_prompt": ""})
            for session, job in zip(sessions, (done, cancelled, "none"), strict=True):
                database.execute("INSERT INTO promised_turns VALUES (?, ?, 0, ?)", (session, job, said))
            database.commit()
        server = restarted(server, bundle)
        shown = [server.client.get(f"/v1/sessions/{session}").json() for session in sessions]
        assert shown[0] == before and picture(server, sessions[0], 0).shape == (64, 64, 3)
        assert [each["standing"] for each in shown] == [1, 0, 0]
        with contextlib.closing(connect(tmp_path / "data")) as database:
            assert not database.execute("SELECT * FROM promised_turns").fetchall()
        take(server, sessions[2], "generate", prompt="a cat", **SMALL)
    finally:
        assert server.stop() == 0


def test_an_edit_is_drawn_after_the_service_was_killed(bundle: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, bundle=bundle)
    try:
        server.wait_until_ready()
        session = server.client.post("/v1/sessions").json()["id"]
        take(server, session, "generate", prompt="a panda", **SMALL)
        job = begin(server, session, "edit", prompt="a cat", strength=0.5, num_inference_steps=60)
        server = restarted(server, bundle)
        status = server.finish(job)
        assert status["state"] == "done", status
    finally:
        assert server.stop() == 0


def test_a_session_outlives_the_service(bundle: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, bundle=bundle)
    try:
        server.wait_until_ready()
        session = server.client.post("/v1/sessions").json()["id"]
        refused = server.client.post(f"/v1/sessions/{session}/turns/edit", json={"prompt": "a cat", **SMALL})
        assert refused.status_code == 400 and "no image yet; take a turn `gen" in refused.json()["error"]["message"]
        first = take(server, session, "generate", prompt="a panda", seed=7, **SMALL)
        mask = np.zeros((64, 64), np.uint8)
        mask[:32] = 255
        url = data_url(mask)
        edited = take(server, session, "edit", prompt="a cat", mask=url, num_inference_steps=2)
        assert (edited[32:] == first[32:]).all() and (edited[:32] != first[:32]).any()
        refined = take(server, session, "refine", num_inference_steps=4)
        assert refined.shape == first.shape and (refined != edited).any()
        turns = server.client.get(f"/v1/sessions/{session}").json()["turns"]
        assert [turn["task"] for turn in turns] == ["generate", "edit", "refine"]
        assert [turn["prompt"] for turn in turns] == ["a panda", "a cat", "a cat"]
        assert {turn["seed"] for turn in turns} == {7} and "file" not in turns[0]
    finally:
        assert server.stop() == 0
    server = Server(tmp_path, bundle=bundle)
    try:
        server.wait_until_ready()
        assert (picture(server, session, 1) == edited).all()
        assert server.client.post(f"/v1/sessions/{session}/undo").json()["standing"] == 2
        assert server.client.post(f"/v1/sessions/{session}/undo").json()["standing"] == 1
        assert server.client.post(f"/v1/sessions/{session}/undo").json()["standing"] == 0
        refused = server.client.post(f"/v1/sessions/{session}/turns/edit", json={"prompt": "a cat", **SMALL})
        assert refused.status_code == 400 and "with `redo`, or take a turn" in refused.json()["error"]["message"]
        for standing in (1, 2):
            assert server.client.post(f"/v1/sessions/{session}/redo").json()["standing"] == standing
        again = take(server, session, "refine", num_inference_steps=4)
        assert (again == refined).all()  # from the same image with the same seed
        assert server.client.post(f"/v1/sessions/{session}/redo").status_code == 400
        assert [each["id"] for each in server.client.get("/v1/sessions").json()["sessions"]] == [session]
        assert server.client.delete(f"/v1/sessions/{session}").json()["deleted"] is True
        assert server.client.get(f"/v1/sessions/{session}").status_code == 404
        assert not list((tmp_path / "data" / "sessions").iterdir())
    finally:
        assert server.stop() == 0
