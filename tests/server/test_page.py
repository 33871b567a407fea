"""The page at `/`, in real Chromium with real workers: what a user does, and what the headers let nobody do."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shared import ROOT

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from page_visits import CHROMIUM, Visit, noise, png  # noqa: E402
from services import Server  # noqa: E402

import zimage_rt  # noqa: E402
from zimage_rt.server.page import FOLDER, MEDIA_TYPES  # noqa: E402

LORA = ROOT / "checkpoints" / "zimage-nano-cyanotype" / "cyanotype.safetensors"
expect = playwright.expect


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "loras").mkdir()
    (folder / "loras" / LORA.name).symlink_to(LORA)
    (folder / "service.toml").write_text(f'preview_share = 1\n[models.nano]\nbundle = "{bundle}"\nloras = "loras"\n')
    server = Server(folder, "--config", str(folder / "service.toml"))
    server.wait_until_ready()
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
def visit(browser: Any, server: Server) -> Iterator[Visit]:
    visit = Visit(browser, server)
    yield visit
    problems = visit.problems
    visit.context.close()
    assert not problems


# --- files ----------------------------------------------------------------------------------------------------------


def test_files_come_with_strict_headers(server: Server) -> None:
    for path in ["", *(f"web/{file.name}" for file in FOLDER.iterdir())]:
        answer = server.client.get(f"/{path}")
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        again = server.client.get(f"/{path}", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for path in ("web/", "web/none.js", "web/..%2fpage.py", "web/%2e%2e/page.py", "web//etc/passwd"):
        assert server.client.get(f"/{path}").status_code == 404, path
    assert server.client.head("/").headers["content-type"].startswith("text/html")


def test_files_are_whole_and_call_nobody_else(tmp_path: Path) -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert all(Path(name).suffix in MEDIA_TYPES for name in texts)
    for name, text in texts.items():
        found = set(re.findall(r"https?://[^\s\"']+", text)) - {"http://www.w3.org/2000/svg"}
        assert not found, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(| on\w+=\"", text), name
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert {path.name for path in (tmp_path / "zimage_rt" / "server" / "web").iterdir()} == set(texts)


def test_both_languages_have_every_text() -> None:
    texts = (FOLDER / "texts.js").read_text(encoding="utf-8")
    tables = [
        set(re.findall(r"^  (\w+):", part, re.M)) for part in re.split(r"^const \w\w = \{", texts, flags=re.M)[1:]
    ]
    assert len(tables) == 2 and tables[0] == tables[1]
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    named = set(re.findall(r"data-(?:text|label|placeholder)=\"(\w+)\"", html))
    for path in FOLDER.glob("*.js"):
        named |= set(re.findall(r"\btext\(\"(\w+)\"", path.read_text(encoding="utf-8")))
    assert named <= tables[0]


# --- drawing --------------------------------------------------------------------------------------------------------


def test_an_image_is_drawn_and_seen(visit: Visit, engine: zimage_rt.Engine) -> None:
    visit.draw(prompt="一只熊猫", size=(96, 64), steps=3, seed=7)
    page = visit.page
    expect(page.locator("#image")).to_be_visible()
    assert page.locator("#image").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [96, 64]
    expected = engine.generate("一只熊猫", width=96, height=64, num_inference_steps=3, seed=7).images[0]
    assert visit.download().tobytes() == expected.tobytes()
    page.check("#new-seed")
    visit.draw()
    assert visit.recipe()["seed"] != 7
    page.click("#reuse-seed")
    seed = visit.recipe()["seed"]
    visit.draw()
    assert visit.recipe()["seed"] == seed and not page.is_checked("#new-seed")


def test_previews_positions_and_cancelling(visit: Visit) -> None:
    page = visit.page
    visit.fill(size=(256, 256), steps=100)
    page.select_option("#count", "4")
    page.click("#draw")
    expect(page.locator("#strip li")).to_have_count(4)
    expect(page.locator("#progress-text")).to_have_text("Waiting, 1 before this one")
    page.locator("#strip button").first.click()
    expect(page.locator("#image")).to_have_attribute("src", re.compile("^data:image/jpeg"), timeout=20_000)
    expect(page.locator("#progress-text")).to_have_text(re.compile(r"^Step \d+ of 100$"))
    assert 0 < page.locator("#bar").evaluate("bar => bar.value") < 1
    for left in (3, 2, 1, 0):
        page.click("#cancel")
        expect(page.locator("#strip li")).to_have_count(left)
    expect(page.locator("#status")).to_have_text("Cancelled")
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#progress")).to_be_hidden()


def test_errors_are_shown_at_their_fields(visit: Visit) -> None:
    page = visit.page
    visit.fill(prompt="a panda", size=(63, 64))
    page.click("#settings > summary")  # closed
    page.click("#draw")
    field = page.locator("[data-field~=width]")
    expect(field.locator(".error")).to_contain_text("expected 64 to")
    expect(page.locator("#width")).to_be_focused()
    expect(page.locator("#width")).to_have_attribute("aria-invalid", "true")
    page.fill("#width", "64")
    page.fill("#prompt", " ")
    page.click("#draw")
    expect(page.locator("[data-field=prompt] .error")).to_contain_text("prompt")
    expect(field.locator(".error")).to_have_count(0)
    page.fill("#steps", "500")
    page.fill("#prompt", "a panda")
    page.click("#draw")
    expect(page.locator("[data-field=num_inference_steps] .error")).to_contain_text("at most 100 here")
    visit.draw(prompt="a panda")
    expect(page.locator("#form .error:visible")).to_have_count(0)


def test_loras_are_offered_with_weights(visit: Visit) -> None:
    page = visit.page
    visit.draw(seed=3)
    plain = visit.download()
    page.check("#loras [type=checkbox]")
    page.get_by_label("Weight of cyanotype").fill("0.8")
    visit.draw()
    assert visit.recipe()["loras"] == {"cyanotype": 0.8}
    assert (visit.download() != plain).any()


# --- images to begin with -------------------------------------------------------------------------------------------


def test_an_image_is_chosen_or_dropped(visit: Visit, engine: zimage_rt.Engine) -> None:
    page, image = visit.page, noise(64, 96)
    visit.fill(steps=4, seed=3)
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no image"})
    expect(page.locator("#input .error")).to_have_text("This file cannot be read as an image.")
    page.set_input_files("#file", png(image))
    expect(page.locator("#chosen-image")).to_be_visible()
    assert (page.input_value("#width"), page.input_value("#height")) == ("96", "64")
    page.fill("#strength", "0.5")
    visit.draw()
    fields = {"num_inference_steps": 4, "seed": 3, "strength": 0.5}
    expected = engine.generate("a panda", image=image, **fields).images[0]
    assert visit.download().tobytes() == expected.tobytes()
    page.click("#remove-image")
    transfer = page.evaluate_handle(
        """bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
            return transfer;
        }""",
        list(png(noise(128, 64))["buffer"]),
    )
    page.dispatch_event("main", "drop", {"dataTransfer": transfer})
    expect(page.locator("#chosen-image")).to_be_visible()
    assert (page.input_value("#width"), page.input_value("#height")) == ("64", "128")


def test_a_painted_mask_keeps_the_rest(visit: Visit) -> None:
    page, image = visit.page, noise(96, 96)
    visit.fill(steps=1)
    page.set_input_files("#file", png(image))
    page.click("#paint")
    box = page.locator("#mask-canvas").bounding_box()
    for start, end in ((0.1, 0.9), (0.9, 0.1)):  # a cross; its second line is undone
        page.mouse.move(box["x"] + start * box["width"], box["y"] + 0.1 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + end * box["width"], box["y"] + 0.9 * box["height"], steps=5)
        page.mouse.up()
    page.click("#mask-undo")
    page.check("[name=tool][value=erase]")
    page.mouse.click(box["x"] + 0.1 * box["width"], box["y"] + 0.1 * box["height"])
    page.click("#mask-done")
    expect(page.locator("#strength")).to_have_value("1")
    visit.draw()
    drawn = visit.download()
    page.click("#open-details")
    mask = visit.download("#details-mask")[..., 0]
    assert visit.download("#details-input").tobytes() == image.tobytes()
    assert mask.shape == (96, 96) and set(np.unique(mask)) == {0, 255}
    assert mask[48, 48] == 255 and mask[86, 86] == 255  # painted
    assert mask[10, 86] == 0 and mask[86, 10] == 0 and mask[10, 10] == 0  # untouched, undone, erased
    assert (drawn[mask == 0] == image[mask == 0]).all()
    assert (drawn[mask == 255] != image[mask == 255]).any(axis=-1).mean() > 0.9


# --- session, gallery, recipes --------------------------------------------------------------------------------------


def test_a_session_is_a_strip_of_turns_with_undo(visit: Visit) -> None:
    page = visit.page
    visit.draw(seed=3)
    first = visit.download()
    page.click("#edit")
    page.click("#mask-all")
    page.click("#mask-done")
    expect(page.locator("#prompt")).to_be_focused()
    visit.draw(prompt="a fox")
    assert page.locator("#chosen").is_hidden()  # the next edit begins with the new image
    page.click("#refine")
    visit.wait_for_images(3)
    recipe = visit.recipe()
    assert (recipe["strength"], recipe["prompt"], recipe["image"]) == (
        0.3,
        "a fox",
        "image.png",
    ) and "mask" not in recipe
    expect(page.locator("#strip span")).to_have_text(["Draw", "Edit", "Refine"])
    page.click("#undo")
    page.click("#undo")
    expect(page.locator("#strip span")).to_have_text(["Draw"])
    assert visit.download().tobytes() == first.tobytes()
    page.click("#redo")
    expect(page.locator("#strip span")).to_have_text(["Draw", "Edit"])
    page.click("#new-session")
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#gallery li")).to_have_count(3)
    page.locator("#gallery button").last.click()
    page.click("#details-continue")
    assert visit.download().tobytes() == first.tobytes()


def test_the_gallery_and_jobs_on_their_way_outlive_the_page(visit: Visit) -> None:
    page = visit.page
    visit.draw(prompt="a fox", seed=4)
    drawn = visit.download()
    visit.fill(prompt="a panda", size=(192, 192), steps=20)
    page.click("#draw")
    expect(page.locator("#strip li")).to_have_count(2)
    visit.open()
    assert page.input_value("#prompt") == "a panda" and page.input_value("#seed") == "4"
    visit.wait_for_images(2)  # the one on its way was followed again
    page.locator("#strip button").first.click()
    assert visit.download().tobytes() == drawn.tobytes()
    page.locator("#gallery button").first.click()
    page.click("#details-delete")
    expect(page.locator("#gallery li")).to_have_count(1)
    visit.open()
    expect(page.locator("#gallery li")).to_have_count(1)


def test_recipes_repeat_an_image(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.fill("#negative", "the sun; $HOME")
    visit.draw(prompt="a 'red' <b>fox</b>", size=(64, 80), steps=3)
    drawn = visit.download()
    expect(page.locator("#caption")).to_contain_text("a 'red' <b>fox</b>")  # text, no markup
    page.click("#repeat")
    visit.wait_for_images(2)
    assert visit.download().tobytes() == drawn.tobytes()
    page.locator("#gallery button").first.click()
    page.click("#copy-json")
    recipe = json.loads(page.evaluate("navigator.clipboard.readText()"))
    page.click("#copy-command")
    words = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert words[:3] == ["zimage", "generate", "engines/nano"]
    path = tmp_path / "again.png"
    command = [sys.executable, "-m", "zimage_rt.cli.main", *words[1:], "-o", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert np.asarray(Image.open(path)).tobytes() == drawn.tobytes()
    status = visit.server.draw(**recipe)
    found = visit.server.client.get(f"/v1/jobs/{status['id']}/images/0").content
    assert np.asarray(Image.open(io.BytesIO(found))).tobytes() == drawn.tobytes()
    page.click("#details-use")
    assert page.input_value("#seed") == str(recipe["seed"]) and not page.is_checked("#new-seed")


def test_the_sheet_is_a_grid_of_steps_and_guidance(visit: Visit) -> None:
    page = visit.page
    visit.fill(seed=3)
    page.click("#open-sheet")
    page.fill("#sheet-steps", "one")
    page.press("#sheet-steps", "Enter")
    expect(page.locator("#sheet-error")).to_contain_text("Expected numbers")
    page.fill("#sheet-steps", "1, 2")
    page.fill("#sheet-guidance", "0, 2")
    page.press("#sheet-guidance", "Enter")
    expect(page.locator("#sheet-table img")).to_have_count(4, timeout=20_000)
    expect(page.locator("#sheet-table th")).to_have_text(["steps 1", "steps 2", "guidance 0", "guidance 2"])
    expect(page.locator("#sheet-error")).to_be_hidden()
    page.locator("#sheet-table button").last.click()
    recipe = json.loads(page.inner_text("#recipe-json"))
    assert (recipe["num_inference_steps"], recipe["guidance_scale"], recipe["seed"]) == (2, 2, 3)


def test_a_job_that_is_done_before_its_answer_is_shown(visit: Visit) -> None:
    page = visit.page

    def answer_late(route: Any) -> None:
        job = route.fetch().json()
        assert visit.server.finish(job["id"])["state"] == "done"
        route.fulfill(status=202, json={**job, "state": "done"})

    page.route("**/v1/jobs", answer_late)
    visit.draw(steps=1)
    expect(page.locator("#image")).to_be_visible()
    page.click("#open-sheet")
    page.fill("#sheet-steps", "1")
    page.fill("#sheet-guidance", "0")
    page.press("#sheet-guidance", "Enter")
    expect(page.locator("#sheet-table img")).to_have_count(1, timeout=20_000)
    page.locator("#sheet-table button").click()
    assert json.loads(page.inner_text("#recipe-json"))["num_inference_steps"] == 1


# --- who may use it -------------------------------------------------------------------------------------------------


def test_chinese_is_chosen_by_the_browser_and_by_the_switch(browser: Any, server: Server) -> None:
    visit = Visit(browser, server, locale="zh-CN")
    page = visit.page
    expect(page.locator("#draw")).to_have_text("绘制")
    assert page.get_attribute("html", "lang") == "zh-CN"
    visit.draw(prompt="一只熊猫")
    expect(page.locator("#status")).to_have_text("图像已完成。")
    page.click("#language")
    expect(page.locator("#draw")).to_have_text("Draw")
    expect(page.locator("#strip span")).to_have_text(["Draw"])
    visit.open()
    expect(page.locator("#draw")).to_have_text("Draw")
    visit.context.close()
    assert not visit.problems


def test_the_keyboard_is_enough(visit: Visit) -> None:
    page = visit.page
    visit.fill()
    visit.open()

    def tab_to(identifier: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            found = page.evaluate(
                """() => {
                    const element = document.activeElement;
                    const outer = element.closest("label, .segments");
                    const isSeen = (each) => each && getComputedStyle(each).outlineStyle !== "none";
                    const label = element.getAttribute("aria-label") || element.labels?.[0]?.textContent;
                    return [element.id, [element, outer].some(isSeen), label || element.textContent];
                }"""
            )
            assert found[1] and found[2].strip(), f"{found}: not seen, or without a name"
            if found[0] == identifier:
                return
        raise AssertionError(f"{identifier} cannot be reached")

    tab_to("prompt")
    page.keyboard.type("a panda")
    tab_to("steps")
    page.keyboard.press("Control+A")
    page.keyboard.type("2")
    page.keyboard.press("Control+Enter")
    visit.wait_for_images(1)
    expect(page.locator("#steps")).to_be_focused()
    expect(page.locator("#status")).to_have_text("The image is there.")
    tab_to("edit")
    page.keyboard.press("Enter")
    expect(page.locator("#mask-canvas")).to_be_focused()
    for key in ("Space", "Shift+ArrowRight", "Shift+ArrowRight", "Space", "ArrowDown", "BracketRight", "Enter"):
        page.keyboard.press(key)
    expect(page.locator("#status")).to_have_text("Brush lifted")
    page.keyboard.press("Enter")
    page.keyboard.press("Control+z")
    tab_to("mask-done")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("a fox")
    page.keyboard.press("Control+Enter")
    visit.wait_for_images(2)
    assert visit.recipe()["mask"] == "mask.png" and visit.recipe()["prompt"] == "a fox"


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_phone_never_scrolls_sideways(browser: Any, server: Server, locale: str) -> None:
    visit = Visit(browser, server, locale=locale, viewport={"width": 360, "height": 740}, has_touch=True)
    page = visit.page
    assert page.get_attribute("#settings", "open") is None and not visit.is_wider_than_the_window()
    visit.fill(prompt="a panda " + "x" * 200)
    page.select_option("#count", "4")
    page.click("#draw")
    visit.wait_for_images(4)
    assert not visit.is_wider_than_the_window()
    for opener, dialog in (("#edit", "mask"), ("#open-details", "details"), ("#open-sheet", "sheet")):
        page.click(opener)
        expect(page.locator(f"#{dialog}-dialog")).to_be_visible()
        assert not visit.is_wider_than_the_window(), dialog
        width = page.locator(f"#{dialog}-dialog").evaluate("each => each.scrollWidth - each.clientWidth")
        assert width <= 0, dialog
        page.keyboard.press("Escape")
    visit.context.close()
    assert not visit.problems


def test_a_key_is_asked_for_when_the_service_wants_one(visit: Visit) -> None:
    page = visit.page
    expect(page.locator("#key-form")).to_be_hidden()

    def guard(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer zk-secret":
            route.continue_()
        else:
            error = {"error": {"message": "a key is missing", "type": "", "param": None, "code": "unauthorized"}}
            route.fulfill(status=401, json=error)

    page.route("**/v1/**", guard)
    page.goto(visit.server.url)
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("zk-secret")
    page.keyboard.press("Enter")
    expect(page.locator("#model option")).to_have_count(1)
    expect(page.locator("#key-form")).to_be_hidden()
    visit.draw(prompt="a panda")
