"""A user's visit to ComfyUI's editor on the service, in Chromium."""

from __future__ import annotations

import base64
import json
import re
import time
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import expect
from services import Server

# The middle of a node's widget, or of its title, in the window.
PLACE = """([id, name]) => {
    const node = app.graph.getNodeById(id), canvas = app.canvas, frame = canvas.canvas.getBoundingClientRect();
    const widget = node.widgets?.find((each) => each.name === name);
    const x = node.pos[0] + node.size[0] / 2, y = node.pos[1] + (widget ? widget.last_y ?? widget.y : 0) + 10;
    const { scale, offset } = canvas.ds;
    return [(x + offset[0]) * scale + frame.left, (y + offset[1]) * scale + frame.top];
}"""
IS_READY = "Boolean(window.app?.graph && window.app.extensionManager)"
# What the editor would like to know from elsewhere; the page's policy refuses it.
ELSEWHERE = {"api.comfy.org"}

# Drops a file, given in base64, on the graph.
DROP = """([content, name, type]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([Uint8Array.from(atob(content), (each) => each.charCodeAt(0))], name, { type }));
    const event = { dataTransfer: transfer, bubbles: true, cancelable: true, clientX: 640, clientY: 400 };
    for (const kind of ["dragover", "drop"])
        document.querySelector("#graph-canvas").dispatchEvent(new DragEvent(kind, event));
}"""


class Editor:
    """A user's browser profile on the editor.

    Attributes:
        problems: errors of the page.
        elsewhere: requests to other hosts, and how they ended: a status or the browser's reason.
        posted: the bodies that were sent to `/prompt`.
    """

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        size = {"width": 1280, "height": 800}
        self.context = browser.new_context(**{"locale": "en-US", "viewport": size, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.server = server
        self.problems: list[str] = []
        self.elsewhere: dict[str, str] = {}
        self.posted: list[dict[str, Any]] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._hear)
        self.page.on("request", self._see)
        self.page.on("requestfailed", lambda request: self._end(request.url, str(request.failure)))
        self.page.on("response", lambda response: self._end(response.url, str(response.status)))

    def _hear(self, message: Any) -> None:
        # Answers with an error's status are part of the tests; the templates' pictures are in another package.
        expected = ("Failed to load resource", "Failed to fetch: 404", *(f"'https://{host}/" for host in ELSEWHERE))
        if message.type == "error" and not any(text in message.text for text in expected):
            self.problems.append(message.text)

    def _see(self, request: Any) -> None:
        if request.method == "POST" and urlsplit(request.url).path == "/api/prompt":
            self.posted.append(json.loads(request.post_data))

    def _end(self, url: str, how: str) -> None:
        if url.startswith("http") and not url.startswith(self.server.url):
            self.elsewhere[url] = how

    def open(self) -> None:
        """Open the editor, and wait until it has started."""
        self.page.goto(self.server.url)
        self.wait_for(IS_READY)
        expect(self.page.locator("#splash-loader")).to_have_count(0)

    def wait_for(self, expression: str, seconds: float = 60) -> Any:
        """The value of an expression when it is true. The page's policy refuses playwright's own way."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.page.evaluate(expression):
                return value
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never came true: {expression}")

    def open_template(self, title: str) -> None:
        """Choose a template in the dialog, which a new user sees at once."""
        dialog = self.page.get_by_role("dialog")
        if self.page.evaluate("!app.graph.nodes.length"):
            expect(dialog).to_be_visible()
        else:
            self.page.get_by_role("button", name="Templates").click()
        dialog.get_by_text(title, exact=True).click()
        expect(dialog).to_be_hidden()
        self.wait_for("app.graph.nodes.length > 0")

    def drop_file(self, name: str, content: bytes, media_type: str) -> None:
        """Drop a file on the graph."""
        self.page.evaluate(DROP, [base64.b64encode(content).decode(), name, media_type])

    def close_dialog(self) -> None:
        """Close the dialog of templates that a new user sees."""
        expect(self.page.get_by_role("dialog")).to_be_visible()
        self.page.keyboard.press("Escape")
        expect(self.page.get_by_role("dialog")).to_be_hidden()

    def fill(self, node: str, **values: Any) -> None:
        """Change widgets of a node on the canvas: a double click, the value, Enter."""
        for name, value in values.items():
            self.wait_for(f"app.graph.getNodeById('{node}').widgets.some((each) => each.name === '{name}')")
            self.page.mouse.dblclick(*self.page.evaluate(PLACE, [node, name]))
            box = self.page.locator(".graphdialog input")
            box.fill(str(value))
            box.press("Enter")
            expect(box).to_have_count(0)
            assert self.widgets(node)[name] == value

    def widgets(self, node: str) -> dict[str, Any]:
        """The values of a node's widgets."""
        return dict(
            self.page.evaluate("id => app.graph.getNodeById(id).widgets.map((each) => [each.name, each.value])", node)
        )

    def run(self) -> None:
        """Press Ctrl and Enter, and wait until the workflow is queued."""
        number = len(self.posted)
        with self.page.expect_response(lambda response: urlsplit(response.url).path == "/api/prompt") as found:
            self.page.keyboard.press("Control+Enter")
        assert found.value.status == 200, found.value.text()
        assert len(self.posted) == number + 1

    def outputs(self, node: str) -> list[dict[str, str]]:
        """The images that a node shows, when there are some."""
        return self.wait_for(f"app.nodeOutputs['{node}']?.images")

    def graph(self) -> dict[str, Any]:
        """The prompt that Run would send."""
        return json.loads(self.page.evaluate("app.graphToPrompt().then((each) => JSON.stringify(each.output))"))

    def close(self) -> None:
        """End the visit; nothing of it went wrong or elsewhere, and no dialog or warning is left."""
        expect(self.page.get_by_role("dialog")).to_have_count(0)
        expect(self.page.get_by_text(re.compile(r"missing|error", re.IGNORECASE))).to_have_count(0)
        self.context.close()
        assert not self.problems
        assert {urlsplit(url).hostname for url in self.elsewhere} <= ELSEWHERE
        assert set(self.elsewhere.values()) <= {"csp"}
