"""Damaged and hostile uploads: each is refused with a reason, and none reaches a worker."""

from __future__ import annotations

import base64
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from damaged_uploads import damaged_uploads, encoded
from services import Server

FIELDS = {"prompt": "a panda"}


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("uploads"), bundle=bundle)
    server.wait_until_ready()
    yield server
    assert server.stop() == 0


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


def test_damaged_uploads_are_refused_with_a_reason(server: Server) -> None:
    before = 0
    for number, (kind, content) in enumerate(damaged_uploads(60)):
        url = "data:image/png;base64," + base64.b64encode(content).decode()
        way = number // 9 % 4
        path = "/v1/jobs" if way < 2 else "/v1/images/edits"
        if way % 2:
            answer = server.client.post(path, data=FIELDS, files={"image": ("a.png", content)})
        else:
            body = {**FIELDS, "image": url} if way == 0 else {**FIELDS, "images": [{"image_url": url}]}
            answer = server.client.post(path, json=body)
        error = answer.json()["error"]
        assert answer.status_code == 400, (kind, answer.status_code, error)
        assert error["code"] == "invalid_request" and error["param"] in ("image", "height", "width"), (kind, error)
        assert len(error["message"]) > 20 and str(server.folder) not in error["message"], (kind, error)
        if number == 20:
            before = resident(server.process.pid)
    assert resident(server.process.pid) - before < 100 << 20  # less than one of the bombs
    with sqlite3.connect(server.folder / "data" / "service.sqlite") as database:
        assert database.execute("SELECT count(*) FROM jobs").fetchone() == (0,)
    assert "Traceback" not in server.log


def test_files_and_texts_of_a_form_have_their_names(server: Server) -> None:
    file = {"zzz": ("a.png", b"not looked at")}
    for path in ("/v1/jobs", "/v1/images/edits"):
        answer = server.client.post(path, data=FIELDS, files=file)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "zzz", answer.text
    twice = [("image", ("a.png", b"a")), ("image", ("a.png", b"b"))]
    answer = server.client.post("/v1/jobs", data=FIELDS, files=twice)
    assert answer.status_code == 400 and "once" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"priority": "--5"}, "priority"),
        ({"priority": "²"}, "priority"),
        ({"second_pass": "x", "second_pass.scale": "2"}, "second_pass"),
        ({"second_pass.scale": "2", "second_pass": "x"}, "second_pass"),
        ({"second_pass[scale]": "a lot"}, "second_pass.scale"),
        ({"loras[style]": "0.5"}, "loras"),
        ({"loras": '{"style": 0.5}'}, "loras"),
        ({"seed": "1" * 5000}, "seed"),
        ({"image": "/etc/passwd"}, "image"),
    ],
)
def test_texts_of_a_form_are_refused_by_their_names(server: Server, fields: dict[str, str], param: str) -> None:
    parts = {name: (None, text) for name, text in {**FIELDS, **fields}.items()}  # no file names: no files
    answer = server.client.post("/v1/jobs", files=parts)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_a_form_that_is_cut_off_is_refused(server: Server) -> None:
    def part(name: str, text: str, more: str = "") -> str:
        return f'--B\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{text}\r\n'

    table = part("table", "prompt\na\n", '; filename="a.csv"')
    headers = {"Content-Type": "multipart/form-data; boundary=B"}
    for path, first in (("jobs", part("prompt", "a")), ("batches", table), ("images/edits", part("prompt", "a"))):
        whole = first + part("height", "64") + part("width", "64") + "--B--\r\n"
        cuts = [whole.rindex(end) for end in ("64", "\r\n--B--", "-\r\n")] + [len(first)]
        for cut in cuts:
            answer = server.client.post(f"/v1/{path}", content=whole[:cut], headers=headers)
            assert answer.status_code == 400 and "cut off" in answer.json()["error"]["message"], answer.text
    whole = part("prompt", "a") + part("height", "64") + part("width", "64") + "--B--"
    for end in ("", "\r\n", "\r\nwhat comes after is nothing"):
        assert server.client.post("/v1/jobs", content=whole + end, headers=headers).status_code == 202


def test_messages_name_what_a_form_is(server: Server) -> None:
    answer = server.client.post("/v1/jobs", data={"prompt": "a panda"})  # as `curl -d` sends it
    assert answer.status_code == 400 and "multipart/form-data (curl -F)" in answer.json()["error"]["message"]
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = server.client.post("/v1/jobs", content='{"prompt": "a", "height": 63}', headers=headers)
    assert answer.json()["error"]["param"] == "height"  # JSON all the same
    answer = server.client.post("/v1/jobs", files={"prompt": (None, "a"), "loras": (None, '{"style": 0.5}')})
    assert "expected name=weight" in answer.json()["error"]["message"]


def test_a_prompt_of_digits_is_a_text(server: Server) -> None:
    image = encoded(random.Random(0), "PNG")
    fields = {"prompt": "2024", "user": "7", "size": "64x64", "num_inference_steps": "1", "n": "1", "stream": "false"}
    answer = server.client.post("/v1/images/edits", data=fields, files={"image[]": ("a.png", image)})
    assert answer.status_code == 200, answer.text
    job = answer.headers["x-zimage-job"]
    with sqlite3.connect(server.folder / "data" / "service.sqlite") as database:
        assert database.execute("SELECT prompt FROM jobs WHERE id = ?", (job,)).fetchone() == ("2024",)
