"""Limits per key with their true Retry-After, and bounds of what is sent, before it is decoded."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import limits.storage.memory
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from services import Server

from zimage_rt.errors import RequestError
from zimage_rt.server.bounds import MAX_DEPTH, MAX_FIELD_BYTES, MAX_STRUCTURE, check_pixels, parse_json
from zimage_rt.server.config import ConfigError, read_config
from zimage_rt.server.database import connect
from zimage_rt.server.keys import add_key
from zimage_rt.server.rate import Rates, seconds_until
from zimage_rt.server.service import Service

SMALL: dict[str, Any] = {"prompt": "a panda", "height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}
LONG: dict[str, Any] = {**SMALL, "height": 256, "width": 256, "num_inference_steps": 100}
KEYS: dict[str, dict[str, Any]] = {
    "free": {},
    "slow": {"requests_per_minute": 3},
    "small": {"megapixel_steps_per_minute": 1},
    "single": {"max_jobs": 1},
    "reader": {"max_jobs": 0},
    "bounded": {"max_pixels": 64 * 64, "max_steps": 4, "models": ["nano"]},
    "other": {"models": ["second"]},
}
MAX_BODY, MAX_PIXELS = 2 << 20, 1_000_000


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("limits")
    config = folder / "service.toml"
    config.write_text(
        f"[limits]\nmax_body_bytes = {MAX_BODY}\nmax_input_pixels = {MAX_PIXELS}\n"
        f'[models.nano]\nbundle = "{bundle}"\n[models.second]\nbundle = "{bundle}"\nload = false\n'
        "[keys]\nmax_steps = 100\n"
    )
    (folder / "data").mkdir()
    with contextlib.closing(connect(folder / "data")) as database:
        found = {name: add_key(database, name, limits) for name, limits in KEYS.items()}
    server = Server(folder, "--config", str(config))
    server.client.headers["Authorization"] = f"Bearer {found['free']}"
    (folder / "keys.json").write_text(json.dumps(found))
    server.wait_until_ready()
    yield server
    assert "Traceback" not in server.log
    server.stop()


def client(server: Server, name: str) -> httpx.Client:
    key = json.loads((server.folder / "keys.json").read_text())[name]
    return httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def refused(answer: httpx.Response, status: int, code: str) -> str:
    """The message of an error."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code, error
    return str(error["message"])


def cancel(owner: httpx.Client, job: str) -> None:
    """Cancel a job, and return when it has ended."""
    owner.delete(f"/v1/jobs/{job}")
    while owner.get(f"/v1/jobs/{job}").json()["state"] not in ("cancelled", "done"):
        time.sleep(0.02)


# --- limits per key ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("previous", [0, 1, 7, 10])
@pytest.mark.parametrize("current", [0, 3, 9, 10])
@pytest.mark.parametrize("left", [0.25, 17.5, 59.75])
@pytest.mark.parametrize("cost", [1, 4, 10])
def test_a_request_is_admitted_after_so_many_seconds_and_not_before(
    previous: int, current: int, left: float, cost: int
) -> None:
    amount = 10

    def is_admitted(seconds: float) -> bool:
        """The library's rule; after the minute's end the current one is the previous."""
        if seconds < left:
            count = previous * (left - seconds) / 60 + current
        else:
            count = current * max(0.0, 60 - (seconds - left)) / 60
        return math.floor(count) + cost <= amount

    if not is_admitted(0.0):
        wait = seconds_until(amount, cost, previous, current, left)
        assert is_admitted(wait) and (wait == 1 or not is_admitted(wait - 1))


def test_a_rate_is_what_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000_020.0
    monkeypatch.setattr(limits.storage.memory.time, "time", lambda: now)
    rates = Rates()
    assert [rates.spend("requests", "a", 3) for _ in range(3)] == [0, 0, 0]
    wait = rates.spend("requests", "a", 3)
    assert 1 <= wait <= 61
    assert rates.spend("requests", "b", 3) == 0 and rates.spend("other", "a", 3) == 0
    now += wait - 1
    assert rates.spend("requests", "a", 3) > 0
    now += 1
    assert rates.spend("requests", "a", 3) == 0


def test_requests_per_minute(server: Server) -> None:
    slow = client(server, "slow")
    answers = [slow.post("/v1/jobs", json={"prompt": ""}) for _ in range(7)]  # a minute may end between two of them
    statuses = [answer.status_code for answer in answers]
    assert statuses[:4] in ([400, 400, 400, 429], [400] * 4)  # what is refused counts, too
    answer = answers[statuses.index(429)]
    message = refused(answer, 429, "rate_limited")
    assert "key 'slow' may send 3 requests per minute (requests_per_minute)" in message
    assert 1 <= int(answer.headers["retry-after"]) <= 61 and f"in {answer.headers['retry-after']} s" in message
    assert slow.get("/v1/models").status_code == 200


def test_megapixel_steps_per_minute(server: Server) -> None:
    small = client(server, "small")
    message = refused(small.post("/v1/jobs", json=LONG), 403, "forbidden")
    assert "may draw 1 megapixel-steps per minute" in message and "this request alone has 6.55" in message
    half = {**SMALL, "height": 256, "width": 256, "num_inference_steps": 4, "num_images": 2}  # 0.52
    answers = [small.post("/v1/jobs", json=half) for _ in range(5)]
    statuses = [answer.status_code for answer in answers]
    assert statuses[0] == 202 and set(statuses) == {202, 429}
    answer = answers[statuses.index(429)]
    assert "this request has 0.524; ask again in" in refused(answer, 429, "rate_limited")
    assert 1 <= int(answer.headers["retry-after"]) <= 121


def test_jobs_at_once(server: Server) -> None:
    single = client(server, "single")
    job = single.post("/v1/jobs", json=LONG).json()["id"]
    answer = single.post("/v1/jobs", json=SMALL)
    assert "may have 1 jobs at once (max_jobs), and has 1" in refused(answer, 429, "rate_limited")
    assert int(answer.headers["retry-after"]) >= 1
    assert client(server, "free").post("/v1/jobs", json=SMALL).status_code == 202
    cancel(single, job)
    with ThreadPoolExecutor(8) as pool:  # none slips in beside another
        answers = list(pool.map(lambda _: single.post("/v1/jobs", json=LONG), range(8)))
    assert sorted(answer.status_code for answer in answers) == [202] + [429] * 7
    cancel(single, next(answer.json()["id"] for answer in answers if answer.status_code == 202))
    assert single.post("/v1/jobs", json=SMALL).status_code == 202
    assert "draw nothing" in refused(client(server, "reader").post("/v1/jobs", json=SMALL), 403, "forbidden")


def test_sizes_steps_and_models(server: Server) -> None:
    bounded = client(server, "bounded")
    assert bounded.post("/v1/jobs", json=SMALL).status_code == 202
    message = refused(bounded.post("/v1/jobs", json={**SMALL, "width": 80}), 403, "forbidden")
    assert "may draw 4096 pixels (max_pixels), got 80x64" in message
    scaled = {**SMALL, "second_pass": {"scale": 2.0}}
    assert "got 128x128" in refused(bounded.post("/v1/jobs", json=scaled), 403, "forbidden")
    message = refused(bounded.post("/v1/jobs", json={**SMALL, "num_inference_steps": 5}), 403, "forbidden")
    assert "may ask for 4 (max_steps), got 5" in message
    answer = bounded.post("/v1/images/generations", json={"prompt": "a panda", "model": "second", "size": "64x64"})
    assert "may use nano (models), got second" in refused(answer, 403, "forbidden")
    assert [model["id"] for model in bounded.get("/v1/models").json()["data"]] == ["nano"]
    assert [model["id"] for model in client(server, "other").get("/v1/models").json()["data"]] == ["second"]
    answer = client(server, "free").post("/v1/jobs", json={**SMALL, "num_inference_steps": 101})
    assert answer.status_code == 400  # of the service, whoever asks


def test_a_configuration_that_cannot_hold_is_refused(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "service.toml"
    file.write_text(f'[models.nano]\nbundle = "{bundle}"\nloras = "none"\n')
    with pytest.raises(ConfigError, match=rf"models\.nano\.loras: {tmp_path}/none is no folder"):
        Service(read_config(file))
    file.write_text(f'[models.nano]\nbundle = "{bundle}"\n[limits]\nmax_steps = -1\n')
    with pytest.raises(ConfigError, match=r"limits\.max_steps: expected 0 or more, got -1"):
        read_config(file)


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_413(server: Server) -> None:
    body = json.dumps({"prompt": "a" * MAX_BODY}).encode()

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]

    for path in ("/v1/jobs", "/v1/images/generations"):
        for content in (body, chunks()):
            answer = server.client.post(path, content=content, headers={"Content-Type": "application/json"})
            refused(answer, 413, "too_large")
    answer = server.client.post("/v1/images/edits", files={"image": b"\0" * MAX_BODY}, data={"prompt": "a"})
    refused(answer, 413, "too_large")
    assert server.client.post("/v1/jobs", json={**SMALL, "prompt": "a panda " * 10}).status_code == 202


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[" * 100_000, f"at most {MAX_DEPTH} levels"),
        (b'{"prompt": ' + b"[" * 40 + b"]" * 40 + b"}", f"at most {MAX_DEPTH} levels"),
        (b"[" + b"[]," * 200_000 + b"[]]", f"at most {MAX_STRUCTURE} bytes outside of texts"),
        (b'{"prompt": [' + b'"",' * 300_000 + b'""]}', f"at most {MAX_STRUCTURE} bytes outside of texts"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "expected JSON"),
        (b'{"prompt": "' + b'\\"' * 400_000, "expected JSON"),
        (b'{"prompt": "' + b'\\"' * 400_000 + b"\\", "expected JSON"),
        (b'{"prompt": "a\xff"}', "expected JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"prompt": "a panda", "\\u0000": 1}', "Extra inputs"),
    ],
)
def test_json_has_a_bounded_structure(server: Server, body: bytes, message: str) -> None:
    answer = server.client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert message in refused(answer, 400, "invalid_request")


def test_json_texts_are_long_and_may_hold_brackets() -> None:
    url = "data:image/png;base64," + "A" * 3_000_000
    said = {"prompt": '[[[[{{{{ "quoted" \\' * 100, "image": url, "sigmas": [0.5] * 1000, "loras": {"a": 1.0}}
    assert parse_json(json.dumps(said).encode()) == said
    assert parse_json(b"") == {}


def test_forms_have_few_parts_and_short_texts(server: Server) -> None:
    many = {f"field{number}": "x" for number in range(101)}
    for path in ("/v1/jobs", "/v1/images/edits"):
        files = [("image", ("a.png", b"", "image/png"))]
        refused(server.client.post(path, data={"prompt": "a", **many}, files=files), 400, "invalid_request")
        refused(server.client.post(path, data={"prompt": "a"}, files=files * 18), 400, "invalid_request")
        long = {"prompt": "a" * (MAX_FIELD_BYTES + 1)}
        assert "exceeded maximum size" in refused(
            server.client.post(path, data=long, files=files), 400, "invalid_request"
        )
        refused(
            server.client.post(path, content=b"--x", headers={"Content-Type": "multipart/form-data"}),
            400,
            "invalid_request",
        )


def png(width: int, height: int) -> bytes:
    """A PNG whose header says its size; its few pixels come too short."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1001, 1000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_pixels_are_counted_in_the_header(server: Server, size: tuple[int, int]) -> None:
    large = png(*size)
    url = "data:image/png;base64," + base64.b64encode(large).decode()
    encoded = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(encoded, "PNG")
    small = encoded.getvalue()
    post = server.client.post
    answers = [
        post("/v1/jobs", json={**SMALL, "image": url}),
        post("/v1/jobs", data={"prompt": "a"}, files={"image": large}),
        post("/v1/images/edits", data={"prompt": "a"}, files={"image": large}),
        post("/v1/images/edits", data={"prompt": "a"}, files={"image": small, "mask": large}),
        post("/v1/images/edits", json={"prompt": "a", "images": [{"image_url": url}]}),
    ]
    for answer in answers:
        message = refused(answer, 400, "invalid_request")
        assert f"expected at most {MAX_PIXELS} pixels" in message and str(server.folder) not in message
    with pytest.raises(RequestError, match="image: expected at most 9 pixels, got 5x2"):
        check_pixels(png(5, 2), "image", 9)
    check_pixels(b"no image", "image", 9)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("data:image/png;base64,!!!!", "is no base64"),
        ("data:image/png;base64,AAA", "is no base64"),
        ("data:image/png,AAAA", "expected a data URL"),
        ("data:text/html;base64,AAAA", "expected a data URL"),
        ("file:///etc/passwd", "the service fetches nothing"),
        ("//example.com/a.png", "the service fetches nothing"),
        ("data:image/svg+xml;base64,PHN2Zz4=", "cannot be read as"),
    ],
)
def test_a_data_url_is_an_image(server: Server, image: str, message: str) -> None:
    assert message in refused(server.client.post("/v1/jobs", json={**SMALL, "image": image}), 400, "invalid_request")
