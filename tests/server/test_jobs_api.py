"""`/v1/jobs` over HTTP, with real workers: bytes as the engine gives them, progress, cancelling, deaths, restarts."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from services import Server, kill
from shared import ROOT

import zimage_rt
from zimage_rt.metadata.image_file import read_record

SMALL: dict[str, Any] = {"prompt": "a panda", "height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), bundle=bundle)
    server.wait_until_ready()
    yield server
    assert server.stop() == 0


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def data_url(image: np.ndarray) -> str:
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG")
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()


def test_a_job_is_drawn_as_the_engine_draws_it(server: Server, engine: zimage_rt.Engine, tmp_path: Path) -> None:
    status = server.draw(**SMALL, num_images=2)
    assert (status["state"], status["images"], status["error"]) == ("done", 2, None)
    assert (status["seeds"], status["warnings"]) == ([3, 4], [])
    drawn = engine.generate(**SMALL, num_images=2).images
    for number in range(2):
        answer = server.client.get(f"/v1/jobs/{status['id']}/images/{number}")
        assert answer.headers["content-type"] == "image/png"
        assert pixels(answer.content).tobytes() == drawn[number].tobytes()
    path = tmp_path / "a.png"
    path.write_bytes(answer.content)
    record = read_record(path)
    assert record.request["seed"] == 4 and record.to_request(seed=4).prompt == "a panda"
    assert "/" not in json.dumps(record.loras) and record.backend_options == {}
    assert server.client.get(f"/v1/jobs/{status['id']}/images/2").status_code == 404


def test_events_tell_every_step(server: Server) -> None:
    job = server.client.post("/v1/jobs", json={**SMALL, "num_inference_steps": 3, "previews": 1}).json()["id"]
    events = list(server.events(job))
    assert [name for name, _ in events] == ["queued", "started", "step", "step", "step", "done"]
    steps = [data for name, data in events if name == "step"]
    assert [data["step"] for data in steps] == [1, 2, 3] and steps[-1]["sigma"] == 0.0
    previews = [data["preview"] for data in steps if "preview" in data]
    if previews:  # they are dropped when the images are there
        assert Image.open(io.BytesIO(base64.b64decode(previews[0]))).format == "JPEG"
    assert events[-1][1]["images"] == [f"/v1/jobs/{job}/images/0"] and events[-1][1]["seeds"] == [3]
    for last in (4, 5, 6, 10**6):  # to its end, or that again
        assert [name for name, _ in server.events(job, since=last)] == ["done"]


def test_images_come_as_data_urls_and_as_parts_of_a_form(server: Server, engine: zimage_rt.Engine) -> None:
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    expected = engine.generate(**{**SMALL, "num_inference_steps": 4}, image=image, strength=0.5).images[0].tobytes()
    fields = {**SMALL, "num_inference_steps": 4, "strength": 0.5}
    status = server.draw(**fields, image=data_url(image))
    found = server.client.get(f"/v1/jobs/{status['id']}/images/0").content
    assert pixels(found).tobytes() == expected
    content = base64.b64decode(data_url(image).partition(",")[2])
    form = {name: str(value) for name, value in fields.items()}
    answer = server.client.post("/v1/jobs", data=form, files={"image": ("a.bin", content)})
    assert answer.status_code == 202, answer.text
    found = server.client.get(f"/v1/jobs/{server.finish(answer.json()['id'])['id']}/images/0").content
    assert pixels(found).tobytes() == expected


@pytest.mark.parametrize(
    ("body", "status", "field", "message"),
    [
        ({**SMALL, "height": 63}, 400, "height", "expected 64 to"),
        ({**SMALL, "heigth": 64}, 400, "heigth", "Extra inputs"),
        ({**SMALL, "seed": "3"}, 400, "seed", "valid integer"),
        ({"seed": 3}, 400, "prompt", "prompt: expected a text, got nothing"),
        ({**SMALL, "second_pass": {"scal": 2.0}}, 400, "second_pass.scal", "second_pass.scal: Extra inputs"),
        ({**SMALL, "model": "flux"}, 404, "model", "there is no model 'flux'"),
        ({**SMALL, "image": "http://example.com/a.png"}, 400, "image", "the service fetches nothing"),
        ({**SMALL, "image": "/etc/passwd"}, 400, "image", "expected a data URL"),
        ({**SMALL, "image": "data:image/png;base64,AAAA"}, 400, "image", "cannot be read as"),
        ({**SMALL, "loras": {"../style": 1.0}}, 400, "loras", "no LoRA named"),
        ({**SMALL, "num_inference_steps": 101}, 400, "num_inference_steps", "at most 100 here"),
        ({**SMALL, "num_images": 2, "num_images_per_prompt": 1}, 400, "num_images", "expected it once"),
        ({**SMALL, "output_quality": 90}, 400, "output_quality", "a PNG keeps every pixel"),
        ({**SMALL, "second_pass": {"scale": 99.0}}, 400, "second_pass.scale", "expected"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(
    server: Server, body: dict[str, Any], status: int, field: str, message: str
) -> None:
    answer = server.client.post("/v1/jobs", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, field), error
    assert message in error["message"] and str(server.folder) not in error["message"]


def test_a_job_is_cancelled_while_it_runs_and_while_it_waits(server: Server) -> None:
    long = {**SMALL, "num_inference_steps": 100, "height": 256, "width": 256}
    jobs = [server.client.post("/v1/jobs", json=long).json()["id"] for _ in range(4)]
    for job in reversed(jobs):
        answer = server.client.delete(f"/v1/jobs/{job}")
        assert answer.status_code == 200
    for job in jobs:
        status = server.finish(job)
        assert (status["state"], status["error"]["code"]) == ("cancelled", "cancelled")
    assert server.client.delete("/v1/jobs/none").status_code == 404


def test_a_worker_that_is_killed_is_replaced_and_its_job_drawn_once(server: Server, engine: zimage_rt.Engine) -> None:
    job = server.client.post("/v1/jobs", json={**SMALL, "num_inference_steps": 40}).json()["id"]
    for name, _ in server.events(job):
        if name == "step":
            break
    (worker,) = server.workers()
    kill(worker)
    status = server.finish(job)
    assert status["state"] == "done", status
    names = [name for name, _ in server.events(job)]
    assert names.count("started") == 2 and names.count("done") == 1
    found = server.client.get(f"/v1/jobs/{job}/images/0").content
    assert pixels(found).tobytes() == engine.generate(**{**SMALL, "num_inference_steps": 40}).images[0].tobytes()
    assert server.workers() != [worker]


def test_strangers_hosts_and_pages_are_refused(server: Server) -> None:
    assert server.client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert server.client.get("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403
    own = server.url.removeprefix("http://")
    answer = server.client.get("/v1/models", headers={"Host": own, "Origin": f"http://{own}"})
    assert [model["id"] for model in answer.json()["data"]] == ["nano"]


def test_promised_jobs_outlive_the_service(bundle: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, "--drain-seconds", "0", bundle=bundle)
    try:
        server.wait_until_ready()
        long = {**SMALL, "num_inference_steps": 60, "height": 256, "width": 256}
        jobs = [server.client.post("/v1/jobs", json={**long, "seed": seed}).json()["id"] for seed in range(3)]
    finally:
        server.process.kill()
        server.process.wait()
    again = Server(tmp_path, bundle=bundle)
    try:
        for seed, job in enumerate(jobs):
            # A number of the former run, whose events were others.
            assert [name for name, _ in again.events(job, since=10**6)][-1] == "done"
            status = again.finish(job)
            assert status["state"] == "done", status
            record = again.client.get(f"/v1/jobs/{job}/images/0").content
            assert f'"seed": {seed}'.encode() in record
    finally:
        assert again.stop() == 0


def test_a_job_begins_while_the_one_before_is_encoded(bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "service.toml"
    config.write_text(f'slots = 1\n[models.nano]\nbundle = "{bundle}"\n')
    server = Server(tmp_path, "--config", str(config))
    try:
        server.wait_until_ready()
        fields = {**SMALL, "height": 128, "width": 128, "output_format": "webp"}
        # The first takes so long that the other waits when it ends.
        sent = [server.client.post("/v1/jobs", json={**fields, "num_inference_steps": count}) for count in (40, 1)]
        first, second = (server.finish(answer.json()["id"]) for answer in sent)
        assert first["started"] < second["started"] < first["finished"]
    finally:
        assert server.stop() == 0


def test_a_folder_has_one_service(server: Server, bundle: Path) -> None:
    command = [sys.executable, "-m", "zimage_rt.cli.main", "serve", str(bundle), "--port", "0"]
    run = subprocess.run([*command, "--data", str(server.folder / "data")], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1 and "belongs to a service that runs; end that one" in run.stderr, run.stderr


def test_a_taken_port_is_named(server: Server, bundle: Path, tmp_path: Path) -> None:
    port = server.url.rpartition(":")[2]
    command = [sys.executable, "-m", "zimage_rt.cli.main", "serve", str(bundle), "--port", port]
    run = subprocess.run([*command, "--data", str(tmp_path / "data")], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1 and f"127.0.0.1:{port} cannot be listened at" in run.stderr, run.stderr
    assert "--port" in run.stderr and "Traceback" not in run.stderr


def test_the_end_of_the_service_waits_for_its_jobs(bundle: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, bundle=bundle)
    server.wait_until_ready()
    fields = {**SMALL, "num_images": 2, "batch_noise": "comfyui", "negative_prompt": "a cat"}
    warned = server.draw(**fields)
    assert warned["seeds"] == [3, 3] and "negative_prompt" in warned["warnings"][0]
    long = {**SMALL, "num_inference_steps": 100, "height": 256, "width": 256}
    cancelled = server.client.post("/v1/jobs", json=long).json()["id"]
    server.client.delete(f"/v1/jobs/{cancelled}")
    live = {each: list(server.events(each))[-1] for each in (warned["id"], cancelled)}
    job = server.client.post("/v1/jobs", json={**SMALL, "num_inference_steps": 50}).json()["id"]
    time.sleep(0.1)
    assert server.stop() == 0
    again = Server(tmp_path, bundle=bundle)
    try:
        recorded = again.client.get(f"/v1/jobs/{job}").json()
        assert (recorded["state"], recorded["seeds"], recorded["warnings"]) == ("done", [3], [])
        assert again.client.delete(f"/v1/jobs/{job}").json() == recorded
        for each, event in live.items():
            assert [*again.events(each), *again.events(each, since=10**6)] == [event, event]
        status = again.client.get(f"/v1/jobs/{warned['id']}").json()
        assert (status["seeds"], status["warnings"]) == (warned["seeds"], warned["warnings"])
        content = again.client.get(f"/v1/jobs/{job}/images/0").content
        assert Image.open(io.BytesIO(content)).size == (64, 64)
        (tmp_path / "data" / "images" / job / "0.png").write_bytes(content[:-20])  # as a loss of power may leave it
        cut_off = again.client.get(f"/v1/jobs/{job}/images/0")
        assert cut_off.status_code == 410 and "cut off" in cut_off.json()["error"]["message"]
    finally:
        again.stop()
