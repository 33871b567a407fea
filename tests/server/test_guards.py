"""Host and Origin, for requests and websockets; paths, names and ids that lead nowhere."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from services import Server
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse

from zimage_rt.server.config import ModelConfig, ServiceConfig
from zimage_rt.server.guard import HostGuard


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("guards"), bundle=bundle)
    yield server
    assert "Traceback" not in server.log
    server.stop()


def guarded(**config: Any) -> TestClient:
    """A client of a page and a websocket behind the guard of a service."""

    async def socket(websocket: Any) -> None:
        await websocket.accept()
        await websocket.send_text("hello")
        await websocket.close()

    app = Starlette(routes=[Route("/", lambda _: PlainTextResponse("hello")), WebSocketRoute("/ws", socket)])
    guard = HostGuard(app, ServiceConfig({"nano": ModelConfig("nano")}, **config))
    return TestClient(guard, base_url="http://127.0.0.1:8188")


def answers(client: TestClient, host: str, origin: str | None = None) -> tuple[int, int]:
    """The status of a request and of a websocket; 101 for one that was accepted."""
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    status = client.get("/", headers=headers).status_code
    try:
        with client.websocket_connect("/ws", headers=headers) as socket:
            assert socket.receive_text() == "hello"
        return status, 101
    except WebSocketDenialResponse as denied:
        return status, denied.status_code


@pytest.mark.parametrize(
    ("host", "passes"),
    [
        ("127.0.0.1:8188", True),
        ("localhost", True),
        ("LOCALHOST:1", True),
        ("[::1]:8188", True),
        ("draw.example:443", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("127.0.0.1@evil.example", False),
        ("", False),
        ("[::1", False),
        ("10.0.0.1", False),
    ],
)
def test_a_host_is_one_of_the_services_names(host: str, passes: bool) -> None:
    client = guarded(hosts=("draw.example",))
    assert answers(client, host) == ((200, 101) if passes else (403, 403))


def test_all_addresses_take_any_name_with_keys_and_addresses_alone_without() -> None:
    keyed, opened = guarded(host="0.0.0.0"), guarded(host="0.0.0.0", open=True)
    listed = guarded(host="0.0.0.0", open=True, hosts=("draw.example",))
    assert answers(keyed, "anything.example") == (200, 101) and answers(keyed, "")[0] == 403
    assert answers(opened, "10.0.0.1:8188") == (200, 101) and answers(opened, "rebound.example") == (403, 403)
    assert answers(listed, "draw.example") == (200, 101) and answers(listed, "10.0.0.1") == (403, 403)


@pytest.mark.parametrize(
    ("origin", "passes"),
    [
        (None, True),
        ("http://127.0.0.1:8188", True),
        ("https://page.example", True),
        ("http://page.example", False),
        ("http://127.0.0.1:8189", False),
        ("https://evil.example", False),
        ("null", False),
        ("", False),
        ("http://[", False),
    ],
)
def test_an_origin_is_the_services_own_or_listed(origin: str | None, passes: bool) -> None:
    client = guarded(origins=("https://page.example",))
    assert answers(client, "127.0.0.1:8188", origin) == ((200, 101) if passes else (403, 403))


def raw(server: Server, method: str, path: str, headers: list[tuple[str, str]] | None = None) -> tuple[int, bytes]:
    """An answer to a path that no client has put in order."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    connection.putrequest(method, path, skip_host=headers is not None)
    for name, value in headers or ():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs/../../etc/passwd",
        "/v1/jobs/%2e%2e/%2e%2e/etc/passwd",
        "/v1/jobs/..%2f..%2f..%2fetc%2fpasswd",
        "/v1/jobs/%2e%2e%5c%2e%2e/images/0",
        "/v1/jobs/%00/images/0",
        "/v1/jobs/a%00b",
        "/v1/jobs/%ff%fe",
        "/v1/jobs/%F0%9F%90%BC/events",
        "/v1/jobs/" + "a" * 10_000,
        "/v1/jobs/" + quote("'; DROP TABLE jobs; --"),
        "/v1/jobs/x/images/-1",
        "/v1/jobs/x/images/" + "9" * 400,
        "/../service.sqlite",
        "/%2e%2e/service.sqlite",
        "/data/service.sqlite",
        "/inputs/",
        "//etc/passwd",
    ],
)
def test_a_path_leads_to_no_file(server: Server, path: str) -> None:
    for method in ("GET", "DELETE", "POST"):
        status, body = raw(server, method, path)
        assert 400 <= status < 500, (method, status, body)
        assert b"root:" not in body and b"SQLite" not in body and b"Traceback" not in body


@pytest.mark.parametrize("name", ["../nano", "nano/../nano", "/etc/passwd", "nano\0", "..", "", "a" * 10_000, "nano "])
def test_a_model_or_lora_is_a_name_of_the_configuration(server: Server, name: str) -> None:
    answer = server.client.post("/v1/jobs", json={"prompt": "a panda", "model": name})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    answer = server.client.post("/v1/images/generations", json={"prompt": "a panda", "model": name})
    assert answer.status_code == 404
    answer = server.client.post("/v1/jobs", json={"prompt": "a panda", "loras": {name: 1.0}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "loras")
    assert str(server.folder) not in answer.text


def test_headers_of_two_kinds_are_refused(server: Server) -> None:
    own = server.url.removeprefix("http://")
    assert raw(server, "GET", "/v1/models", [("Host", own)])[0] == 200
    assert raw(server, "GET", "/v1/models", [("Host", own), ("Host", "evil.example")])[0] in (400, 403)
    two = [("Host", own), ("Origin", f"http://{own}"), ("Origin", "https://evil.example")]
    assert raw(server, "GET", "/v1/models", two)[0] == 403
    assert raw(server, "GET", "/v1/models", [])[0] in (400, 403)


def test_a_preflight_of_a_foreign_page_is_refused(server: Server) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = server.client.options("/v1/jobs", headers=headers)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
