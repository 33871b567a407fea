"""ComfyUI's own editor over the service, in real Chromium with real workers."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("comfyui_frontend_package", reason="the extra `comfyui` is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from editor_visits import Editor  # noqa: E402
from page_visits import CHROMIUM  # noqa: E402
from services import Server  # noqa: E402

from zimage_rt.server.database import connect  # noqa: E402
from zimage_rt.server.keys import add_key  # noqa: E402

expect = playwright.expect
TURBO = "Z-Image-Turbo: Text to Image"
# The template's subgraph, and its node that saves.
HOST, SAVE = "57", "9"


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with two users; its client is alice's."""
    folder = tmp_path_factory.mktemp("editor")
    (folder / "data").mkdir()
    with contextlib.closing(connect(folder / "data")) as database:
        keys = {name: add_key(database, name, {}) for name in ("alice", "bob")}
    models = "".join(f'[models.{role}]\nbundle = "{bundle}"\nrole = "{role}"\n' for role in ("turbo", "base"))
    (folder / "service.toml").write_text(f"preview_share = 1\nslots = 1\n{models}")
    server = Server(folder, "--config", str(folder / "service.toml"), "--comfyui")
    server.wait_until_ready()
    server.client.auth = ("alice", keys["alice"])
    server.keys = keys  # type: ignore[attr-defined]
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Callable[[str], Editor]]:
    """Opens the editor for a user, in a profile of its own."""
    visits = []

    def visit(name: str) -> Editor:
        credentials = {"username": name, "password": server.keys[name]}  # type: ignore[attr-defined]
        visits.append(Editor(browser, server, http_credentials=credentials))
        visits[-1].open()
        return visits[-1]

    yield visit
    for each in visits:
        each.close()


@pytest.fixture
def editor(visit: Callable[[str], Editor], server: Server) -> Editor:
    """The editor as alice finds it who never was here."""
    shutil.rmtree(server.folder / "data" / "comfyui", ignore_errors=True)
    server.client.post("/history", json={"clear": True})
    return visit("alice")


def pixels(server: Server, image: dict[str, str]) -> np.ndarray:
    answer = server.client.get("/view", params=image)
    assert answer.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def test_the_template_runs_and_its_image_opens_it_again(editor: Editor, bundle: Path, tmp_path: Path) -> None:
    page, server = editor.page, editor.server
    editor.open_template(TURBO)
    editor.fill(HOST, width=256, height=256, steps=20)
    page.mouse.click(640, 760)
    editor.run()
    expect(page.locator("body")).to_contain_text(re.compile(r"KSampler\s*\d+%"))
    preview = editor.wait_for("Object.values(app.nodePreviewImages)[0]?.[0]")
    assert preview.startswith("blob:")
    size = page.evaluate(
        "async (url) => { const each = new Image(); each.src = url; await each.decode(); return each.naturalWidth }",
        preview,
    )
    assert size == 256
    (image,) = editor.outputs(SAVE)
    drawn = pixels(server, image)
    assert drawn.shape == (256, 256, 3)
    # The same, without a service or an editor.
    (tmp_path / "sent.json").write_text(json.dumps(editor.posted[0]["prompt"]))
    command = [sys.executable, "-m", "zimage_rt.cli.main", "workflow", "sent.json", "-b", str(bundle.absolute()), "-o"]
    subprocess.run([*command, "out"], cwd=tmp_path, check=True, capture_output=True)
    (path,) = (tmp_path / "out").glob("*.png")
    assert (np.asarray(Image.open(path)) == drawn).all()
    # The saved file has the workflow.
    saved = server.client.get("/view", params=image).content
    page.get_by_role("button", name="Create a new blank workflow").click()
    editor.wait_for("app.graph.nodes.length === 0")
    page.mouse.click(640, 760)  # away from the tabs, which show their name to a mouse that rests on them
    expect(page.get_by_role("dialog")).to_have_count(0)
    editor.drop_file("saved.png", saved, "image/png")
    editor.wait_for("app.graph.nodes.length > 0")
    assert editor.widgets(HOST)["width"] == 256
    assert editor.graph() == editor.posted[0]["prompt"]


def test_jobs_are_queued_cancelled_and_forgotten(editor: Editor) -> None:
    page, client = editor.page, editor.server.client
    editor.open_template(TURBO)
    editor.fill(HOST, width=256, height=256, steps=90)
    page.mouse.click(640, 760)
    for _ in range(3):
        editor.run()
    page.get_by_test_id("queue-overlay-toggle").click()
    rows = page.locator("[data-job-id]")
    expect(rows).to_have_count(3)
    queue = client.get("/queue").json()
    running, *waiting = [entry[1] for entry in [*queue["queue_running"], *queue["queue_pending"]]]
    cancelled = page.locator(f"[data-job-id='{waiting[0]}']")
    cancelled.hover()
    cancelled.get_by_role("button", name="Cancel").click()
    expect(rows).to_have_count(2)
    assert [entry[1] for entry in client.get("/queue").json()["queue_pending"]] == waiting[1:]
    page.get_by_role("button", name="Clear queued").click()
    expect(rows).to_have_count(1)
    page.get_by_role("button", name="Cancel current run").click()
    row = page.locator(f"[data-job-id='{running}']")
    row.hover()
    row.get_by_role("button", name="Delete").click()
    expect(rows).to_have_count(0)
    assert client.get("/history").json() == {} and client.get("/queue").json()["queue_running"] == []


def test_workflows_and_settings_are_kept_per_user(visit: Callable[[str], Editor], editor: Editor) -> None:
    page, client = editor.page, editor.server.client
    editor.open_template(TURBO)
    editor.fill(HOST, width=64, steps=3)
    page.get_by_role("button", name="Hide Minimap").click()
    page.mouse.click(640, 760)
    page.keyboard.press("Control+s")
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("textbox").fill("mine/a fox 100%")
    with page.expect_response(re.compile("/api/userdata/workflows")) as saved:
        dialog.get_by_role("textbox").press("Enter")
    assert saved.value.status == 200
    listed = client.get("/userdata", params={"dir": "workflows", "recurse": "true"}).json()
    assert listed == ["mine/a fox 100%.json"]
    again = visit("alice")
    expect(again.page.get_by_role("dialog")).to_be_hidden()
    expect(again.page.get_by_role("button", name="Show Minimap")).to_be_visible()
    again.page.keyboard.press("w")
    again.page.get_by_text("mine", exact=True).click()
    again.page.get_by_text("a fox 100%").first.click()
    again.wait_for(f"Boolean(app.graph.getNodeById('{HOST}'))")
    found = again.widgets(HOST)
    assert (found["width"], found["height"], found["steps"]) == (64, 1024, 3)
    other = visit("bob")
    other.open_template(TURBO)
    expect(other.page.get_by_role("button", name="Hide Minimap")).to_be_visible()
    other.page.mouse.click(640, 760)
    with other.page.expect_response(re.compile("/api/userdata.dir=workflows")) as listing:
        other.page.keyboard.press("w")
        other.page.get_by_role("button", name="Refresh").click()
    assert listing.value.status == 404


def test_other_templates_run(editor: Editor) -> None:
    editor.open_template("Z-Image-Turbo Int8: Text to Image")
    editor.fill(HOST, width=128, height=64, steps=2)
    editor.page.mouse.click(640, 760)
    editor.run()
    (image,) = editor.outputs(SAVE)
    assert pixels(editor.server, image).shape == (64, 128, 3)
    editor.open_template("Z-Image: Text to Image")
    editor.fill("94", megapixels=0.1, multiple=16)
    editor.fill("76", steps_1=2)
    editor.page.mouse.click(640, 760)
    editor.run()
    (image,) = editor.outputs("95")
    assert pixels(editor.server, image).shape == (320, 320, 3)
    models = [node["inputs"] for node in editor.posted[-1]["prompt"].values() if node["class_type"] == "UNETLoader"]
    assert models[0]["unet_name"] == "z_image_bf16.safetensors"
