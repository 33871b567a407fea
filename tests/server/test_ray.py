"""The service on real Ray with two CPU replicas: both draw, one is killed, and no request is lost."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("ray", reason="the extra `ray` is not installed")

import httpx
import yaml
from services import Server, kill
from shared import ROOT

from zimage_rt.errors import RequestError
from zimage_rt.server.config import ConfigError
from zimage_rt.server.ray_app import ENGINES, app

pytestmark = pytest.mark.ray

START_SECONDS = 120
PNG = b"\x89PNG"


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class RayServer(Server):
    """`serve run` with a cluster of its own: the same client as of `zimage serve`."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self._log, self._log_start = folder, folder / "server.log", 0
        port = free_port()
        deployed = folder / "serve.yaml"
        application = {
            "name": "zimage",
            "import_path": "zimage_rt.server.ray_app:app",
            "args": {"config": str(config), "min_replicas": 2, "max_replicas": 2},
        }
        http = {"host": "127.0.0.1", "port": port}
        deployed.write_text(yaml.safe_dump({"http_options": http, "applications": [application]}))
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
        command = [sys.executable, "-m", "ray.serve.scripts", "run", str(deployed)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
            )
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.client.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if "Deploying app 'zimage' failed" in self.log:
                break
            time.sleep(0.2)
        raise AssertionError(f"no replica became ready: {self.log}")

    def workers(self) -> list[int]:
        """The processes of the replicas with engines, among this cluster's."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                if f"ray::ServeReplica:zimage:{ENGINES}" in (entry / "cmdline").read_text("utf-8", "replace"):
                    pid = int(entry.name)
                    ancestor = pid
                    while ancestor not in (0, 1, self.process.pid):
                        ancestor = parent_of(ancestor)
                    found += [pid] if ancestor == self.process.pid else []
            except OSError:
                continue
        return found

    def wait_for_workers(self, count: int, without: int | None = None) -> list[int]:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            found = [pid for pid in self.workers() if pid != without]
            if len(found) == count:
                return found
            time.sleep(0.2)
        raise AssertionError(f"expected {count} replicas, got {found}: {self.log}")


def write_config(folder: Path, bundle: Path, **fields: Any) -> Path:
    lines = [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
    path = folder / "service.toml"
    path.write_text("\n".join([*lines, f'[models.nano]\nbundle = "{bundle}"\nwarm = ["128x128"]\n']))
    return path


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayServer]:
    folder = tmp_path_factory.mktemp("ray")
    running = RayServer(folder, write_config(folder, bundle, open=True, slots=1, preview_share=1))
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.process.send_signal(signal.SIGINT)
        try:
            running.process.wait(60)
        finally:
            running.client.close()
            if running.process.poll() is None:
                os.killpg(running.process.pid, signal.SIGKILL)


def draw_many(server: RayServer, count: int) -> list[dict[str, Any]]:
    ids = []
    for seed in range(count):
        answer = server.client.post("/v1/jobs", json={"prompt": "a panda", "seed": seed, "width": 128, "height": 128})
        assert answer.status_code == 202, answer.text
        ids.append(answer.json()["id"])
    return [server.finish(job) for job in ids]


def test_both_replicas_draw(server: RayServer) -> None:
    replicas = server.wait_for_workers(2)
    before = {pid: cpu_seconds(pid) for pid in replicas}
    statuses = draw_many(server, 12)
    assert [status["state"] for status in statuses] == ["done"] * 12
    assert all(cpu_seconds(pid) - before[pid] > 0.3 for pid in replicas), "a replica drew nothing"


def test_a_replica_draws_the_bytes_of_a_worker_process(server: RayServer, bundle: Path, tmp_path: Path) -> None:
    fields = {"prompt": "a panda", "seed": 5, "width": 128, "height": 128, "num_inference_steps": 3}
    image = server.client.get(f"/v1/jobs/{server.draw(**fields)['id']}/images/0").content
    form = {"prompt": "a fox", "seed": "6", "strength": "0.6"}
    answer = server.client.post("/v1/jobs", data=form, files={"image": ("panda.png", image, "image/png")})
    assert answer.status_code == 202, answer.text
    edited = server.finish(answer.json()["id"])
    assert edited["state"] == "done", edited

    import io

    import numpy as np
    from PIL import Image

    import zimage_rt

    def pixels(content: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(content)))

    path = tmp_path / "panda.png"
    path.write_bytes(image)
    drawn = server.client.get(f"/v1/jobs/{edited['id']}/images/0").content
    with zimage_rt.Engine.load(bundle) as engine:
        assert np.array_equal(pixels(image), engine.generate(**fields).images[0])
        expected = engine.generate("a fox", seed=6, strength=0.6, image=path).images[0]
    assert np.array_equal(pixels(drawn), expected)
    assert str(server.folder) not in drawn.decode("latin-1"), "a record must not name the service's folders"


def test_events_arrive_one_by_one(server: RayServer) -> None:
    body = {"prompt": "a fox", "previews": 10, "num_inference_steps": 50}
    job = server.client.post("/v1/jobs", json=body).json()["id"]
    names, seen = [], []
    for name, data in server.events(job):
        names.append(name)
        if name == "step" and data["step"] in (1, 25):
            status = server.client.get(f"/v1/jobs/{job}").json()
            seen.append((status["state"], status["progress"]["step"] < 50))
    assert names == ["queued", "started", *["step"] * 50, "done"]
    assert seen == [("running", True)] * 2, "events must not wait for each other"


def wait_until_idle(server: RayServer) -> None:
    """Return when no replica computes, long before `LONG` could have been drawn."""
    replicas = server.workers()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        before = {pid: cpu_seconds(pid) for pid in replicas}
        time.sleep(0.5)
        if all(cpu_seconds(pid) - before[pid] < 0.2 for pid in replicas):
            return
    raise AssertionError("a replica still draws what nobody wants")


# Minutes on a CPU.
LONG = {"prompt": "a fox", "num_inference_steps": 100}


def test_a_cancelled_job_frees_its_replica(server: RayServer) -> None:
    job = server.client.post("/v1/jobs", json={**LONG, "num_images": 8}).json()["id"]
    for name, _ in server.events(job):
        if name == "step":
            break
    server.client.delete(f"/v1/jobs/{job}")
    assert server.finish(job)["state"] == "cancelled"
    wait_until_idle(server)


def test_a_client_that_goes_away_frees_its_replica(server: RayServer) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/images/generations", json={**LONG, "n": 8}, timeout=3)
    wait_until_idle(server)
    assert server.draw(prompt="a fox", width=128, height=128)["state"] == "done"


def test_openai_streams_through_rays_proxy(server: RayServer) -> None:
    from openai import OpenAI

    client = OpenAI(api_key="none", base_url=f"{server.url}/v1")
    events = list(client.images.generate(prompt="a panda", model="nano", stream=True, partial_images=2))
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 2,
        "image_generation.completed",
    ]


def test_a_killed_replica_loses_no_request(server: RayServer) -> None:
    replicas = server.wait_for_workers(2)
    long = {"prompt": "a fox", "width": 224, "height": 224, "num_inference_steps": 100}

    def generate(seed: int) -> tuple[str, str]:
        answer = httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "a panda", "seed": seed}, timeout=90)
        assert answer.status_code == 200, answer.text
        return answer.headers["X-Zimage-Job"], answer.json()["data"][0]["b64_json"]

    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        jobs = [server.client.post("/v1/jobs", json={**long, "seed": seed}).json()["id"] for seed in range(2)]
        for job in jobs:  # each replica draws one of them
            next(name for name, _ in server.events(job) if name == "step")
        before = {pid: cpu_seconds(pid) for pid in replicas}
        time.sleep(0.3)
        victim, other = sorted(replicas, key=lambda pid: before[pid] - cpu_seconds(pid))  # the busier one first
        waiting = [clients.submit(generate, seed) for seed in range(6)]
        kill(victim)
        statuses = [server.finish(job, 120) for job in jobs]
        images = [future.result() for future in waiting]
    assert [status["state"] for status in statuses] == ["done"] * 2, statuses
    assert len({image for _, image in images}) == 6
    attempts = [
        data["attempt"]
        for job in [*jobs, *(job for job, _ in images)]
        for name, data in server.events(job)
        if name == "started"
    ]
    assert sorted(attempts) == [1] * 8 + [2], "one job was lost, and drawn once more"
    for job in jobs:
        assert server.client.get(f"/v1/jobs/{job}/images/0").content.startswith(PNG)
        assert server.client.get(f"/v1/jobs/{job}/images/1").status_code == 404
    replicas = server.wait_for_workers(2, without=victim)
    assert other in replicas, "Ray starts one replica again"
    server.wait_until_ready()
    assert server.draw(prompt="a fox", width=128, height=128)["state"] == "done"


def test_strangers_are_refused_without_keys(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no API keys"):
        app({"config": str(write_config(tmp_path, bundle))})


def test_wrong_arguments_are_refused(bundle: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, bundle, open=True))
    with pytest.raises(ConfigError, match="max_replicas: expected 3 or more, got 2"):
        app({"config": config, "min_replicas": 3, "max_replicas": 2})
    with pytest.raises(ValueError, match="Extra inputs"):
        app({"config": config, "replicas": 2})
    gpus = str(write_config(tmp_path, bundle, open=True, devices=[0, 1]))
    with pytest.raises(ConfigError, match="gpus_per_replica"):
        app({"config": gpus})
