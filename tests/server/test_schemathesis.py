"""schemathesis over the service's OpenAPI: no answer 500, none that the description does not have."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from services import Server

# A schema cannot say what fields mean to each other: sizes in steps of a bundle, sigmas that fall, files that are
# images. Such a request may be answered 400. Ids by lot are 404, or 410.
CONFIG = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", 400, 404, 410, 429]
"""
SMALL = {"height": 64, "width": 64, "num_inference_steps": 2}


# What is drawn by lot must not take the test's time: all but small images of few steps are refused.
SERVICE = """
[models.nano]
bundle = "{bundle}"
[limits]
max_pixels = 4096
max_steps = 2
[queue]
drain_seconds = 0
"""


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("schemathesis")
    (folder / "service.toml").write_text(SERVICE.format(bundle=bundle.absolute()))
    server = Server(folder, "--config", str(folder / "service.toml"))
    server.wait_until_ready()
    yield server
    server.stop()


def operations(description: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_every_route_describes_its_errors_and_its_body(server: Server) -> None:
    description = server.client.get("/openapi.json").json()
    for path, method, operation in operations(description):
        refused = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
        assert refused == {"$ref": "#/components/schemas/ErrorAnswer"}, (path, method)
    forms = {path for path, _, operation in operations(description) if "multipart/form-data" in str(operation)}
    assert forms == {"/v1/batches", "/v1/jobs", "/v1/images/edits", "/v1/sessions/{session_id}/turns/{task}"}


def test_the_examples_are_drawn(server: Server) -> None:
    session = server.client.post("/v1/sessions").json()["id"]
    paths = server.client.get("/openapi.json").json()["paths"]
    turns = iter(("generate", "edit", "refine"))  # one example of each, in this order
    drawn = 0
    for path in ("/v1/jobs", "/v1/images/generations", "/v1/images/edits", "/v1/sessions/{session_id}/turns/{task}"):
        content = paths[path]["post"]["requestBody"]["content"]["application/json"]
        for example in content["examples"].values():
            small = {"size": "64x64", "num_inference_steps": 1} if "images" in path else SMALL
            url = path.format(session_id=session, task=next(turns)) if "{task}" in path else path
            answer = server.client.post(url, json={**example["value"], **small})
            assert answer.status_code in (200, 202), (url, example, answer.text)
            if answer.status_code == 202:
                assert server.finish(answer.json()["id"])["state"] == "done"
            drawn += 1
    assert drawn == 11


def test_nothing_breaks_the_description(server: Server, tmp_path: Path) -> None:
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    command += [f"{server.url}/openapi.json", "--phases", "coverage,fuzzing", "--max-examples", "3", "--no-color"]
    command += [
        "--generation-deterministic",
        "--no-shrink",
        "--continue-on-failure",
        "--request-timeout",
        "60",
        "--max-time",
        "30",
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "Traceback" not in server.log
    assert server.client.get("/readyz").status_code == 200
