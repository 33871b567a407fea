"""Requests that no client of ours makes: each is answered with a reason, and none with 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from services import Server, kill

JOBS, GENERATIONS, EDITS = "/v1/jobs", "/v1/images/generations", "/v1/images/edits"
SMALL: dict[str, Any] = {"prompt": "a panda", "height": 64, "width": 64, "num_inference_steps": 1, "seed": 3}


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("strange"), bundle=bundle)
    server.wait_until_ready()
    yield server
    assert "Traceback" not in server.log
    server.stop()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (JOBS, {"\ud800": 1}, "body"),
        (JOBS, {"prompt": "\ud800"}, "prompt"),
        (GENERATIONS, {"prompt": "x", "\ud800": 1}, None),
        (GENERATIONS, {"prompt": "x", "quality": []}, "quality"),
        (GENERATIONS, {"prompt": "x", "model": {}}, "model"),
        (GENERATIONS, {"prompt": "x", "output_format": "jpeg", "output_compression": "a"}, "output_compression"),
        (GENERATIONS, {"prompt": "x", "output_format": "jpeg", "output_compression": -5}, "output_compression"),
        (GENERATIONS, {"prompt": "x", "stream": "yes"}, "stream"),
        (GENERATIONS, {"prompt": "x", "response_format": 7}, "response_format"),
        (GENERATIONS, {"prompt": "x", "size": "٦٤x64"}, "size"),
        (GENERATIONS, {"prompt": "x", "n": True}, "n"),
        # A text for an image is a data URL, never a path of the server's.
        (GENERATIONS, {"prompt": "x", "image": "/etc/passwd"}, "image"),
        (GENERATIONS, {"prompt": "x", "mask": "/etc/passwd"}, "mask"),
        (EDITS, {"prompt": "x", "images": [{"image_url": "file:///etc/passwd"}]}, "images"),
    ],
)
def test_bodies_are_refused_by_their_fields(server: Server, path: str, body: dict[str, Any], param: str | None) -> None:
    answer = server.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert error["code"] == "invalid_request" and error["message"]


def test_an_own_image_of_a_generation_is_a_data_url(server: Server) -> None:
    examples = server.client.get("/openapi.json").json()["paths"][JOBS]["post"]["requestBody"]["content"]
    image = next(
        example["value"]["image"]
        for example in examples["application/json"]["examples"].values()
        if "image" in example["value"]
    )
    fields = {"prompt": "a panda", "image": image, "strength": 0.5, "num_inference_steps": 2}
    assert server.client.post(GENERATIONS, json=fields).status_code == 200


def test_a_wrong_method_names_those_of_the_path(server: Server) -> None:
    answer = server.client.request("OPTIONS", "/v1/jobs/none")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET")
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_events_after_a_strange_number_are_all(server: Server) -> None:
    job = server.draw(**SMALL)["id"]
    for last in ("9" * 5000, "²", "-1", "x"):
        headers = {"Last-Event-ID": last.encode()}
        answer = server.client.get(f"{JOBS}/{job}/events", headers=headers)
        assert answer.status_code == 200 and answer.text.startswith("id: 0\n")
    for number in ("-1", "9" * 30):
        assert server.client.get(f"{JOBS}/{job}/images/{number}").status_code == 404


def test_a_job_that_is_being_cancelled_is_not_drawn_again_after_its_worker_died(server: Server) -> None:
    """The largest image of two steps: the worker hears of the cancelling after the first of them."""
    long = {**SMALL, "height": 768, "width": 768, "num_inference_steps": 100}
    job = server.client.post(JOBS, json=long).json()["id"]
    for name, _ in server.events(job):
        if name in ("started", "step"):
            break
    (worker,) = server.workers()
    assert server.client.delete(f"{JOBS}/{job}").json()["state"] in ("running", "cancelled")
    kill(worker)
    status = server.finish(job)
    assert (status["state"], status["error"]["code"]) == ("cancelled", "cancelled")
    assert [name for name, _ in server.events(job)].count("started") == 1
