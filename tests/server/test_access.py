"""API keys: made, shown once, revoked while the service runs, and jobs that only their owners see."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from services import Server
from starlette.testclient import TestClient, WebSocketDenialResponse

from zimage_rt.cli.main import app
from zimage_rt.errors import RequestError, ZImageError
from zimage_rt.server.app import create_app
from zimage_rt.server.config import KeyLimits, ModelConfig, ServiceConfig
from zimage_rt.server.database import connect
from zimage_rt.server.keys import add_key, find_key, hash_key, read_keys, revoke_key
from zimage_rt.server.main import run

SMALL: dict[str, Any] = {"prompt": "a panda", "height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}


def keys(*arguments: str) -> str:
    """Standard output of `zimage keys`."""
    result = CliRunner().invoke(app, ["keys", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with the keys of alice and bob."""
    folder = tmp_path_factory.mktemp("access")
    return folder, {name: keys("add", name, "--data", str(folder / "data")).strip() for name in ("alice", "bob")}


@pytest.fixture(scope="module")
def server(bundle: Path, owners: tuple[Path, dict[str, str]]) -> Iterator[Server]:
    server = Server(owners[0], bundle=bundle)
    server.wait_until_ready()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def clients(server: Server, owners: tuple[Path, dict[str, str]]) -> dict[str, httpx.Client]:
    return {name: httpx.Client(base_url=server.url, headers=bearer(key), timeout=60) for name, key in owners[1].items()}


def test_a_key_is_shown_once_and_kept_as_its_hash(tmp_path: Path) -> None:
    with contextlib.closing(connect(tmp_path)) as database:
        key = add_key(database, "alice", {"max_jobs": 2})
        (kept,) = read_keys(database)
        assert (kept.name, kept.sha256, kept.revoked) == ("alice", hash_key(key), None)
        assert kept.limits_over(KeyLimits(max_jobs=9, max_steps=8)) == KeyLimits(max_jobs=2, max_steps=8)
        assert find_key([kept], key) == kept and find_key([kept], key + "x") is None and find_key([kept], "") is None
        with pytest.raises(RequestError, match="'alice' has a key already"):
            add_key(database, "alice", {})
        revoke_key(database, "alice")
        assert find_key(read_keys(database), key) is None
        with pytest.raises(RequestError, match="no key 'alice' that holds"):
            revoke_key(database, "alice")
        assert add_key(database, "alice", {}) != key and len(read_keys(database)) == 1
        for name in ("", " ", "a" * 65, "a\nb"):
            with pytest.raises(RequestError, match="name: expected 1 to 64"):
                add_key(database, name, {})
        with pytest.raises(ZImageError, match=r"keys\.max_jobs: expected 0 or more"):
            add_key(database, "bob", {"max_jobs": -1})
    assert key.encode() not in (tmp_path / "service.sqlite").read_bytes()


def test_keys_are_listed_with_their_limits(tmp_path: Path) -> None:
    data = ("--data", str(tmp_path / "new"))
    key = keys("add", "alice", *data, "--max-pixels", "4096", "--models", "nano,base").strip()
    listed = json.loads(keys("list", *data, "--json"))
    assert listed["limits"] == {"max_pixels": 4096, "models": ["nano", "base"]} and listed["revoked"] is None
    assert key not in keys("list", *data) and "alice" in keys("list", *data)
    config = tmp_path / "service.toml"
    config.write_text('data = "new"\n[models.nano]\nbundle = "nano"\n')
    assert keys("revoke", "alice", "--config", str(config)) == ""
    assert json.loads(keys("list", *data, "--json"))["revoked"] is not None
    with pytest.raises(RequestError, match="has no record of a service"):
        keys("list", "--data", str(tmp_path / "none"))


def test_a_running_service_sees_a_change_within_a_second(bundle: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, bundle=bundle)
    data = str(tmp_path / "data")

    def status_after(expected: int, **headers: str) -> int:
        end = time.monotonic() + 1.0
        while (status := server.client.get("/v1/models", headers=headers).status_code) != expected:
            if time.monotonic() > end:
                break
        return status

    try:
        assert server.client.get("/v1/models").status_code == 200  # loopback, before the first key
        key = keys("add", "alice", "--data", data).strip()
        assert status_after(401) == 401
        assert status_after(200, **bearer(key)) == 200
        keys("revoke", "alice", "--data", data)
        assert status_after(401, **bearer(key)) == 401
        assert server.client.get("/v1/models").status_code == 401  # not open again
    finally:
        server.stop()


def test_a_key_is_needed_and_stands_in_the_header_alone(server: Server, owners: tuple[Path, dict[str, str]]) -> None:
    key = owners[1]["alice"]
    answer = server.client.get("/v1/models")
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "unauthorized"
    assert "Authorization: Bearer KEY" in answer.json()["error"]["message"]
    assert server.client.get("/v1/models", params={"key": key, "api_key": key}).status_code == 401
    for header in (key, f"Basic {key}", "Bearer", f"Bearer {key}x", f"Bearer {hash_key(key)}"):
        assert server.client.get("/v1/models", headers={"Authorization": header}).status_code == 401
    assert server.client.get("/v1/models", headers={"Authorization": f"bearer {key}"}).status_code == 200
    for path in ("/v1/jobs", "/v1/images/generations", "/v1/images/edits"):
        assert server.client.post(path, json=SMALL).status_code == 401
    for path in ("/metrics", "/openapi.json", "/docs", "/v1", "/nothing", "//v1/models", "/healthz/"):
        assert server.client.get(path).status_code == 401
    assert server.client.get("/healthz").status_code == 200
    assert server.client.get("/readyz").status_code == 200


def test_only_its_owner_sees_and_cancels_a_job(clients: dict[str, httpx.Client]) -> None:
    alice, bob = clients["alice"], clients["bob"]
    job = alice.post("/v1/jobs", json={**SMALL, "num_inference_steps": 60}).json()["id"]
    for method, path in (("GET", ""), ("GET", "/events"), ("GET", "/images/0"), ("DELETE", "")):
        answer = bob.request(method, f"/v1/jobs/{job}{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), (method, path)
    assert alice.get(f"/v1/jobs/{job}").json()["state"] in ("queued", "running")
    assert alice.delete(f"/v1/jobs/{job}").status_code == 200
    while (state := alice.get(f"/v1/jobs/{job}").json()["state"]) not in ("cancelled", "done"):
        time.sleep(0.02)
    assert state == "cancelled"
    # As OpenAI's clients ask, and after the job has gone to the record.
    answer = bob.post("/v1/images/generations", json={"prompt": "a panda", "size": "64x64", "num_inference_steps": 1})
    drawn = answer.headers["x-zimage-job"]
    assert bob.get(f"/v1/jobs/{drawn}/images/0").status_code == 200
    assert alice.get(f"/v1/jobs/{drawn}/images/0").status_code == 404


def test_another_address_needs_a_key_before_it_is_listened_at(bundle: Path, tmp_path: Path) -> None:
    models = {"nano": ModelConfig(str(bundle))}
    config = ServiceConfig(models, host="0.0.0.0", data=str(tmp_path / "data"))
    with pytest.raises(RequestError, match="has no API keys; add one with `zimage keys add`"):
        run(config, print)
    keys("add", "alice", "--data", config.data)
    keys("revoke", "alice", "--data", config.data)
    with pytest.raises(RequestError, match="has no API keys"):
        run(config, print)
    key = keys("add", "alice", "--data", config.data).strip()
    server = Server(tmp_path, "--host", "0.0.0.0", bundle=bundle)
    try:
        assert server.client.get("/v1/models").status_code == 401
        assert server.client.get("/v1/models", headers=bearer(key)).status_code == 200
    finally:
        server.stop()


def test_an_open_service_serves_callers_without_a_key(bundle: Path, tmp_path: Path) -> None:
    with contextlib.closing(connect(tmp_path)) as database:
        key = add_key(database, "alice", {"models": []})
    config = ServiceConfig({"nano": ModelConfig(str(bundle))}, data=str(tmp_path), open=True)
    client = TestClient(create_app(config), base_url="http://127.0.0.1")
    listed = [client.get("/v1/models", headers=headers).json()["data"] for headers in ({}, bearer("x"), bearer(key))]
    assert [len(models) for models in listed] == [1, 1, 0]  # a key that is known has its limits


def test_a_websocket_needs_a_key_too(bundle: Path, tmp_path: Path) -> None:
    with contextlib.closing(connect(tmp_path)) as database:
        add_key(database, "alice", {})
    config = ServiceConfig({"nano": ModelConfig(str(bundle))}, data=str(tmp_path))
    client = TestClient(create_app(config), base_url="http://127.0.0.1")
    with (
        pytest.raises(WebSocketDenialResponse) as denied,
        client.websocket_connect("/ws", headers={"Host": "127.0.0.1"}),
    ):
        pass
    assert denied.value.status_code == 401


def test_a_service_that_cannot_read_its_keys_serves_nobody(bundle: Path, tmp_path: Path) -> None:
    config = ServiceConfig({"nano": ModelConfig(str(bundle))}, data=str(tmp_path))
    (tmp_path / "service.sqlite").write_bytes(b"no database" * 100)
    answer = TestClient(create_app(config), base_url="http://127.0.0.1").get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
    assert str(tmp_path) not in answer.text
