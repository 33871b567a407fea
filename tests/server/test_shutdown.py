"""The end of a service that has jobs: what its clients and the next service see."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from services import Server

LONG = {"prompt": "a panda", "size": "256x256", "num_inference_steps": 100}
SMALL = {"prompt": "a panda", "height": 64, "width": 64, "num_inference_steps": 1, "seed": 3}


def start(bundle: Path, folder: Path, drain_seconds: int) -> Server:
    config = folder / "service.toml"
    config.write_text(f'slots = 1\n[models.nano]\nbundle = "{bundle}"\n')
    server = Server(folder, "--config", str(config), "--drain-seconds", str(drain_seconds))
    server.wait_until_ready()
    return server


def wait(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_clients_that_wait_learn_that_the_service_ends(bundle: Path, tmp_path: Path) -> None:
    server = start(bundle, tmp_path, 1)

    def ask(fields: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/images/generations", json=fields, timeout=60)

    with ThreadPoolExecutor(3) as clients:
        answers = [clients.submit(ask, fields) for fields in (LONG, LONG, {**LONG, "stream": True})]
        wait(lambda: "zimage_queue_jobs 2.0" in server.client.get("/metrics").text)
        assert server.stop() == 0
        running, waiting, streamed = (answer.result() for answer in answers)
    for answer in (running, waiting):
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == "draining" and "the service ends" in answer.text
    lines = [line for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "draining"
    assert "Traceback" not in server.log and server.log.count("is dropped, because the service ends") == 3


def test_a_service_answers_while_it_drains(bundle: Path, tmp_path: Path) -> None:
    server = start(bundle, tmp_path, 30)
    done = server.draw(**SMALL)["id"]
    long = server.client.post("/v1/jobs", json={**SMALL, "num_inference_steps": 100, "height": 192, "width": 192})
    server.process.send_signal(signal.SIGTERM)
    wait(lambda: server.client.get("/readyz").status_code == 503)
    refused = server.client.post("/v1/jobs", json=SMALL)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert server.client.get(f"/v1/jobs/{done}/images/0").status_code == 200
    assert server.client.get("/healthz").status_code == 200
    assert httpx.get(f"{server.url}/readyz").status_code == 503  # over a new connection
    assert server.client.get(f"/v1/jobs/{long.json()['id']}").json()["state"] in ("queued", "running")
    assert server.process.wait(60) == 0


def test_a_promised_job_is_kept_and_the_log_says_so(bundle: Path, tmp_path: Path) -> None:
    server = start(bundle, tmp_path, 0)
    job = server.client.post("/v1/jobs", json={**SMALL, "num_inference_steps": 60, "height": 192, "width": 192})
    with ThreadPoolExecutor(1) as clients:
        events = clients.submit(lambda: [name for name, _ in server.events(job.json()["id"])])
        wait(lambda: server.client.get(f"/v1/jobs/{job.json()['id']}").json()["state"] == "running")
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0 and time.monotonic() - begun < 10
        assert "started" in events.result() and "done" not in events.result()
    assert f"job {job.json()['id']} is kept, and is drawn when the service runs again" in server.log
    assert "is dropped" not in server.log
    again = start(bundle, tmp_path, 30)
    assert again.finish(job.json()["id"])["state"] == "done"
    assert again.stop() == 0
