"""The editor's files, settings, user data and templates, as its requests ask for them, without a browser."""

from __future__ import annotations

import contextlib
import io
import re
import time
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("comfyui_frontend_package", reason="the extra `comfyui` is not installed")
pytest.importorskip("comfyui_workflow_templates_json", reason="the extra `comfyui` is not installed")

from starlette.testclient import TestClient

from zimage_rt.server.app import create_app
from zimage_rt.server.comfyui import packages, user_data
from zimage_rt.server.config import ComfyuiConfig, ConfigError, ModelConfig, ServiceConfig
from zimage_rt.server.database import connect
from zimage_rt.server.keys import add_key


def editor_config(bundle: Path, data: Path) -> ServiceConfig:
    return ServiceConfig({"nano": ModelConfig(str(bundle))}, data=str(data), comfyui=ComfyuiConfig(editor=True))


@pytest.fixture
def client(bundle: Path, tmp_path: Path) -> TestClient:
    connect(tmp_path).close()  # the service is not started, which would make it
    return TestClient(create_app(editor_config(bundle, tmp_path)), base_url="http://127.0.0.1")


def test_the_editors_files_come_as_they_are(client: TestClient) -> None:
    folder = packages.folder_of(packages.FRONTEND)
    page = client.get("/")
    assert page.content == (folder / "index.html").read_bytes()
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["connect-src"] == "'self' data: blob:" and policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in policy["script-src"].replace("wasm-unsafe-eval", "")
    for name, kind, cache in (
        (
            "assets/" + re.findall(rb"assets/(index-[\w-]+\.js)", page.content)[0].decode(),
            "text/javascript",
            "immutable",
        ),
        ("materialdesignicons.min.css", "text/css", "no-cache"),
        ("fonts/inter-latin-normal.woff2", "font/woff2", "no-cache"),
        ("scripts/app.js", "text/javascript", "no-cache"),
    ):
        answer = client.get(f"/{name}")
        assert answer.content == (folder / name).read_bytes(), name
        assert answer.headers["content-type"].startswith(kind) and cache in answer.headers["cache-control"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = client.get(f"/{name}", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert client.head(f"/{name}").headers["content-length"] == str(len(answer.content))
    for name in ("assets/..%2findex.html", "assets/%2e%2e/%2e%2e/__init__.py", "assets//etc/passwd", "assets/", "none"):
        answer = client.get(f"/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), name
    assert "<title>zimage" in client.get("/zimage").text.lower()
    assert client.get("/manager/version").status_code == client.get("/api/manager/queue/status").status_code == 404


def test_templates_are_those_that_run_here(client: TestClient) -> None:
    (image, *_) = client.get("/templates/index.json").json()
    names = [template["name"] for template in image["templates"]]
    assert names[:2] == ["image_z_image_turbo", "image_z_image_turbo_int8"]
    assert not {"image_z_image", "image_qwen_image", "flux_schnell", "sdxl_simple_example"} & set(names)
    assert not any("io" in template for template in image["templates"])  # their sample images are on GitHub
    chinese = client.get("/templates/index.zh.json").json()[0]["templates"]
    assert [template["name"] for template in chinese] == names
    folder = packages.folder_of(packages.TEMPLATES)
    content = client.get("/templates/image_z_image_turbo.json").content
    assert content == (folder / "image_z_image_turbo.json").read_bytes()
    for name in ("flux_schnell.json", "image_z_image_turbo-1.webp", "..%2f__init__.py", "index.schema.json"):
        assert client.get(f"/templates/{name}").status_code == 404, name


def test_settings_are_kept(client: TestClient, tmp_path: Path) -> None:
    assert client.get("/api/users").json() == {"storage": "server", "migrated": True}
    assert client.get("/settings").json() == {} and client.get("/settings/Comfy.Locale").json() is None
    # As the editor sends them: text/plain.
    assert client.post("/api/settings/Comfy.Locale", content='"zh"').status_code == 200
    assert client.post("/settings", content='{"a": [1, {"b": null}], "c": false}').status_code == 200
    assert client.get("/settings").json() == {"Comfy.Locale": "zh", "a": [1, {"b": None}], "c": False}
    assert client.get("/settings/Comfy.Locale").json() == "zh"
    for path, body in (("", "[1]"), ("", "{"), ("/a", "{"), ("/a", ""), ("/a", "[" * 100)):
        assert client.post(f"/settings{path}", content=body).status_code == 400, (path, body)
    assert client.post("/settings", json={"a" * 201: 1}).status_code == 400
    (kept,) = tmp_path.glob("comfyui/*/user/comfy.settings.json")
    kept.write_text("{ damaged")
    assert client.get("/settings").json() == {}


def test_files_are_kept_below_the_users_folder(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.get("/userdata", params={"dir": "workflows"}).status_code == 404
    assert client.get("/userdata").status_code == 400 and client.get("/v2/userdata").json() == []
    assert client.post("/userdata/workflows%2Fa.json?overwrite=false", content=b"1").json() == "workflows/a.json"
    assert client.post("/userdata/workflows%2Fa.json?overwrite=false", content=b"2").status_code == 409
    found = client.post("/userdata/workflows%2Fa.json?full_info=true", content=b"3 ").json()
    assert (found["path"], found["size"]) == ("workflows/a.json", 2)
    assert abs(found["modified"] / 1000 - time.time()) < 60 and found["created"] >= found["modified"] - 1000
    answer = client.get("/userdata/workflows%2Fa.json")
    assert answer.content == b"3 " and answer.headers["content-disposition"] == "attachment"
    # A folder of the name `move` is no order to move.
    assert client.post("/userdata/workflows%2Fmove%2Fb.json", content=b"4").json() == "workflows/move/b.json"
    assert client.post("/userdata/workflows%2F.index.json", content=b"{}").status_code == 200
    listed = {"dir": "workflows", "recurse": "true"}
    assert client.get("/userdata", params=listed).json() == ["a.json", "move/b.json"]
    assert client.get("/userdata", params={"dir": "workflows"}).json() == ["a.json"]
    assert client.get("/userdata", params={**listed, "split": "true"}).json()[1] == ["move/b.json", "move", "b.json"]
    paths = [each["path"] for each in client.get("/userdata", params={**listed, "full_info": "true"}).json()]
    assert paths == ["a.json", "move/b.json"]
    entries = client.get("/v2/userdata", params={"path": "workflows"}).json()
    assert [(each["type"], each["path"]) for each in entries] == [
        ("directory", "workflows/move"), ("file", "workflows/a.json"), ("file", "workflows/move/b.json"),
    ]  # fmt: skip
    move = "/userdata/workflows%2Fa.json/move/workflows%2Fmove%2F"
    assert client.post(f"{move}b.json?overwrite=false").status_code == 409
    assert client.post(f"{move}c%20100%25.json?overwrite=false").json() == "workflows/move/c 100%.json"
    assert client.get("/userdata/workflows%2Fa.json").status_code == 404
    assert client.delete("/userdata/workflows%2Fmove%2Fc%20100%25.json").status_code == 204
    assert client.delete("/userdata/workflows%2Fmove%2Fc%20100%25.json").status_code == 404
    # Nothing that a user keeps runs in a browser.
    for name, kind in (("a.html", "application/octet-stream"), ("a.svg", "application/octet-stream"),
                       ("a.js", "application/octet-stream"), ("user.css", "text/css")):  # fmt: skip
        client.post(f"/userdata/{name}", content=b"x")
        answer = client.get(f"/userdata/{name}")
        assert answer.headers["content-type"].partition(";")[0] == kind, name
        assert answer.headers["x-content-type-options"] == "nosniff"
    outside = ("..%2Fx", "%2Fetc%2Fx", "a%2F..%2F..%2Fx", "a%5C..%5C..%5Cx", "a%2F..")
    for name in (*outside, "a%00", "a%2F" * 9 + "x", "x" * 201):
        assert client.post(f"/userdata/{name}", content=b"x").status_code == 403, name
        assert client.get(f"/userdata/{name}").status_code == 403, name
        assert client.post(f"/userdata/user.css/move/{name}").status_code == 403, name
    assert client.post("/userdata/user.css%2Fx", content=b"x").status_code == 403  # a file is no folder
    monkeypatch.setattr(user_data, "MAX_FILE", 10)
    assert client.post("/userdata/large", content=b"x" * 11).status_code == 413
    monkeypatch.setattr(user_data, "MAX_BYTES", 12)
    assert client.post("/userdata/large", content=b"x" * 10).status_code == 507


def test_what_there_is_none_of_is_said(client: TestClient) -> None:
    for path in ("/i18n", "/global_subgraphs", "/workflow_templates", "/node_replacements", "/internal/folder_paths"):
        assert client.get(path).json() == client.get(f"/api{path}").json() == {}
    assert "log" in client.get("/internal/logs").json()
    assert client.get("/internal/logs/raw").json()["entries"][0]["m"] == client.get("/internal/logs").json()
    assert client.patch("/internal/logs/subscribe", json={"enabled": True, "clientId": "x"}).status_code == 200
    assert client.get("/internal/files/input").json() == []
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8)).save(encoded, "PNG")
    client.post("/upload/image", files={"image": ("a.png", encoded.getvalue(), "image/png")})
    assert client.get("/internal/files/input").json() == ["a.png"]
    assert client.get("/internal/files/elsewhere").status_code == 400


def test_without_the_packages_the_service_does_not_start(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = packages.version_of
    for missing in (packages.FRONTEND, packages.TEMPLATES):
        found = {name: known(name) for name in packages.FOLDERS if name != missing}
        monkeypatch.setattr(packages, "version_of", found.get)
        with pytest.raises(ConfigError, match=rf"{missing}, which is not installed.*'zimage-rt\[comfyui\]'"):
            create_app(editor_config(bundle, tmp_path))


def test_a_browser_is_asked_for_the_key(bundle: Path, tmp_path: Path) -> None:
    with contextlib.closing(connect(tmp_path)) as database:
        key = add_key(database, "alice", {})
    client = TestClient(create_app(editor_config(bundle, tmp_path)), base_url="http://127.0.0.1")
    for path in ("/", "/assets/images/favicon.ico", "/api/settings", "/templates/index.json"):
        answer = client.get(path)
        assert answer.status_code == 401
        assert answer.headers.get_list("www-authenticate") == ["Bearer", 'Basic realm="zimage", charset="UTF-8"']
    # Our own page asks for the key itself.
    assert client.get("/zimage").status_code == 200
    assert client.get("/v1/models").headers.get_list("www-authenticate") == ["Bearer"]
    assert (
        client.get("/", auth=("anybody", key)).status_code == client.get("/settings", auth=("", key)).status_code == 200
    )
    assert client.get("/", auth=("alice", f"{key}x")).status_code == 401
