"""JSON and events with images in them."""

from __future__ import annotations

import base64
import json

import pytest

pytest.importorskip("pydantic_core", reason="the extra `server` is not installed")

from zimage_rt.server.encoding import Base64, encode_event, encode_json


def test_images_stand_where_they_were_put() -> None:
    images = [b"", b"\x00\xff" * 1000, "é".encode()]
    value = {"一": 'a "quote"\n', "data": [{"b64_json": Base64(image)} for image in images], "n": None, "x": 0.5}
    texts = [base64.b64encode(image).decode() for image in images]
    expected = {"一": 'a "quote"\n', "data": [{"b64_json": text} for text in texts], "n": None, "x": 0.5}
    assert json.loads(encode_json(value)) == expected
    assert encode_json({"a": [1, "b"]}) == b'{"a":[1,"b"]}'
    with pytest.raises(ValueError, match="got object"):
        encode_json({"a": object()})


def test_an_event_has_its_lines() -> None:
    event = encode_event("step", {"preview": Base64(b"jpeg"), "text": "a\nb"}, 3)
    assert event == b'id: 3\nevent: step\ndata: {"preview":"anBlZw==","text":"a\\nb"}\n\n'
    assert encode_event("done", {}).startswith(b"event: done\n")
