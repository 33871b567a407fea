"""Metrics, the Grafana board that asks for them, and logs as JSON."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shared import ROOT

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from prometheus_client.parser import text_string_to_metric_families
from services import Server, kill

SMALL: dict[str, Any] = {"prompt": "a panda", "height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}
# What the families' types add to their names.
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
LORAS = ROOT / "checkpoints" / "zimage-nano-cyanotype"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service that has drawn two images and failed to draw one."""
    folder = tmp_path_factory.mktemp("metrics")
    config = folder / "service.toml"
    config.write_text(f'log_format = "json"\n[models.nano]\nbundle = "{bundle}"\nloras = "{LORAS}"\n')
    server = Server(folder, "--config", str(config))
    server.wait_until_ready()
    name = server.client.get("/v1/models").json()["data"][0]["loras"][0]
    assert server.draw(**SMALL, num_images=2)["state"] == "done"
    assert server.draw(**SMALL, loras={name: 0.5})["state"] == "done"
    assert server.draw(**SMALL, loras={name: 0.5})["state"] == "done"
    job = server.client.post("/v1/jobs", json={**SMALL, "num_inference_steps": 100}).json()["id"]
    server.client.delete(f"/v1/jobs/{job}")
    assert server.finish(job)["state"] == "cancelled"
    assert server.client.post("/v1/jobs", json={"prompt": ""}).status_code == 400
    assert server.client.get("/v1/nothing").status_code == 404
    yield server
    assert server.stop() == 0


def families(server: Server) -> list[Any]:
    answer = server.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return list(text_string_to_metric_families(answer.text))


def samples(server: Server) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families(server)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def test_what_happened_is_counted(server: Server) -> None:
    found = samples(server)
    assert value(found, "zimage_jobs_total", model="nano", state="done", code="ok") == 3
    assert value(found, "zimage_jobs_total", model="nano", state="cancelled", code="cancelled") == 1
    assert value(found, "zimage_images_total", model="nano") == 4
    for stage in ("queue", "encode_prompt", "denoise", "decode", "total"):
        assert value(found, "zimage_stage_seconds_count", model="nano", stage=stage) == 3
    total = value(found, "zimage_stage_seconds_sum", model="nano", stage="total")
    assert 0 < value(found, "zimage_stage_seconds_sum", model="nano", stage="denoise") < total
    jobs = {"method": "POST", "route": "/v1/jobs"}
    assert value(found, "zimage_http_seconds_count", **jobs, status="202") == 4
    assert value(found, "zimage_http_seconds_count", **jobs, status="400") == 1
    assert value(found, "zimage_http_seconds_count", method="GET", route="none", status="404") == 1
    routes = {dict(labels)["route"] for name, labels in found if name == "zimage_http_seconds_count"}
    assert "/v1/jobs/{job_id}" in routes and not any(re.search("[0-9a-f]{32}", route) for route in routes)


def test_the_state_is_read_when_it_is_asked_for(server: Server) -> None:
    found = samples(server)
    device = {"device": "none"}
    assert value(found, "zimage_queue_jobs") == 0 and value(found, "zimage_running_jobs") == 0
    assert value(found, "zimage_ready") == 1 and value(found, "zimage_disk_full") == 0
    assert value(found, "zimage_worker_up", **device) == 1 and value(found, "zimage_worker_deaths_total", **device) == 0
    assert value(found, "zimage_model_loaded", **device, model="nano") == 1


def test_uses_of_the_caches_are_counted(server: Server) -> None:
    # A LoRA that is loaded empties the cache of prompts; the last of the jobs has found both.
    for _ in range(2):
        assert server.draw(**SMALL)["state"] == "done"
    found = samples(server)
    uses = {
        (cache, result): value(found, "zimage_cache_total", device="none", cache=cache, result=result)
        for cache in ("prompt", "lora")
        for result in ("hit", "miss")
    }
    assert uses["lora", "miss"] == 1 and uses["lora", "hit"] == 1
    assert uses["prompt", "hit"] >= 1 and uses["prompt", "miss"] >= 1


def test_deaths_of_workers_are_counted(server: Server) -> None:
    (worker,) = server.workers()
    kill(worker)
    assert server.draw(**SMALL)["state"] == "done"
    assert value(samples(server), "zimage_worker_deaths_total", device="none") == 1


def queries() -> list[str]:
    """Every query of the Grafana board."""
    board = json.loads((ROOT / "examples" / "grafana-board.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return found + [each["query"]["query"] for each in board["templating"]["list"] if each["type"] == "query"]


def test_the_board_asks_for_metrics_and_labels_that_there_are(server: Server) -> None:
    labels: dict[str, set[str]] = {}
    for family in families(server):
        for suffix in SUFFIXES[family.type]:
            labels[family.name + suffix] = set()
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    asked = set()
    for query in queries():
        names = re.findall(r"zimage_\w+", query)
        assert names, query
        for name in names:
            assert name in labels, f"{query}: there is no {name}"
        asked.update(names)
        of_query = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query))
        for group in re.findall(r"by \(([^)]*)\)", query):
            of_query |= {label.strip() for label in group.split(",")}
        known = labels[names[0]]
        if known:  # of a GPU's memory and the safety filter there are none here
            assert of_query <= known, f"{query}: {names[0]} has {sorted(known)}"
    # A metric that nobody looks at is not worth its cost.
    bases = {re.sub("_(total|bucket|sum|count)$", "", name) for name in asked}
    exposed = {family.name for family in families(server) if not family.name.endswith("_created")}
    assert exposed <= bases, exposed - bases


def test_logs_are_json_with_the_jobs_ids_and_no_prompt(server: Server) -> None:
    job = server.draw(**{**SMALL, "prompt": "a secret prompt"})["id"]
    server.client.get("/v1/jobs/" + "%0a" * 300)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"\0\1\2 nonsense\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    lines = [json.loads(line) for line in server.log.splitlines()]
    (ended,) = (line for line in lines if line["logger"] == "zimage_rt.server.jobs" and line["job"] == job)
    assert (ended["model"], ended["code"], ended["key"], ended["level"]) == ("nano", "ok", "", "info")
    assert any(line["logger"] == "uvicorn.error" for line in lines)
    access = [line for line in lines if line["logger"] == "zimage_rt.server.access"]
    asked = next(line for line in access if line["method"] == "POST")
    assert (asked["route"], asked["status"]) == ("/v1/jobs", 202) and 0 < asked["seconds"] < 60
    assert all(line["route"] not in ("/metrics", "/readyz") for line in access)
    assert "secret" not in server.log and all(len(line["message"]) < 500 for line in access)
