"""A user's visit to the page of the service, in Chromium."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import expect
from services import Server

CHROMIUM = Path("/usr/bin/chromium")


class Visit:
    """A user's browser profile on the page."""

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        self.context = browser.new_context(**{"locale": "en-US", **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.server, self.problems = server, []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._hear)
        self.open()

    def _hear(self, message: Any) -> None:
        # Answers with an error's status are part of the tests.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.problems.append(message.text)

    def open(self) -> None:
        self.page.goto(self.server.url)
        expect(self.page.locator("#model option")).not_to_have_count(0)

    def fill(
        self, prompt: str = "a panda", size: tuple[int, int] = (64, 64), steps: int = 2, seed: int | None = None
    ) -> None:
        page = self.page
        page.fill("#prompt", prompt)
        if page.get_attribute("#settings", "open") is None:
            page.click("#settings > summary")
        for name, value in (("width", size[0]), ("height", size[1]), ("steps", steps)):
            page.fill(f"#{name}", str(value))
        if seed is not None:
            page.uncheck("#new-seed")
            page.fill("#seed", str(seed))

    def draw(self, **fields: Any) -> None:
        """Fill in what is given and draw, to the end."""
        if fields:
            self.fill(**fields)
        number = self.page.locator("#gallery li").count() + 1
        self.page.click("#draw")
        self.wait_for_images(number)

    def wait_for_images(self, number: int) -> None:
        expect(self.page.locator("#gallery li")).to_have_count(number, timeout=20_000)

    def download(self, link: str = "#download") -> np.ndarray:
        """The pixels of what a link gives."""
        with self.page.expect_download() as found:
            self.page.click(link)
        return np.asarray(Image.open(io.BytesIO(found.value.path().read_bytes())))

    def recipe(self) -> dict[str, Any]:
        """The request of the shown image, as its recipe says it."""
        self.page.click("#open-details")
        found = json.loads(self.page.inner_text("#recipe-json"))
        self.page.click("#details-close")
        return found

    def is_wider_than_the_window(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


def png(pixels: np.ndarray) -> dict[str, Any]:
    """A file as a user chooses it."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return {"name": "chosen.png", "mimeType": "image/png", "buffer": encoded.getvalue()}


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), np.uint8)
