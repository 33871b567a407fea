"""OpenAI's own Python client against the service: generate, edit with a mask, stream, errors, retries."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

openai = pytest.importorskip("openai", reason="openai is not installed")
pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from services import Server  # noqa: E402

import zimage_rt  # noqa: E402

STEPS = {"num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("openai")
    (folder / "service.toml").write_text(f'preview_share = 1\n[models.nano]\nbundle = "{bundle}"\n')
    server = Server(folder, "--config", str(folder / "service.toml"))
    server.wait_until_ready()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def png(array: np.ndarray) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(array).save(encoded, "PNG")
    return encoded.getvalue()


def test_generate(client: Any, engine: zimage_rt.Engine) -> None:
    answer = client.images.generate(prompt="a panda", size="96x64", n=2, extra_body=STEPS)
    expected = engine.generate("a panda", width=96, height=64, num_images=2, **STEPS).images
    assert [pixels(image.b64_json).tobytes() for image in answer.data] == [image.tobytes() for image in expected]
    assert answer.size == "96x64" and answer.output_format == "png"
    assert answer.usage.output_tokens == 2 * 6 * 4
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").owned_by == "zimage_rt"
    with pytest.raises(openai.NotFoundError, match="there is no model 'none'"):
        client.models.retrieve("none")


def test_formats_and_quality(client: Any, engine: zimage_rt.Engine) -> None:
    steps = engine.manifest.pipeline.num_inference_steps
    low = client.images.generate(prompt="a panda", size="64x64", quality="low", extra_body={"seed": 3})
    expected = engine.generate("a panda", width=64, height=64, seed=3, num_inference_steps=steps // 2).images[0]
    assert pixels(low.data[0].b64_json).tobytes() == expected.tobytes()
    for name, magic in (("jpeg", b"\xff\xd8"), ("webp", b"RIFF")):
        answer = client.images.generate(
            prompt="a panda", size="64x64", output_format=name, output_compression=50, extra_body=STEPS
        )
        assert base64.b64decode(answer.data[0].b64_json).startswith(magic)
    url = client.images.generate(prompt="a panda", size="64x64", response_format="url", extra_body=STEPS).data[0].url
    assert "/v1/jobs/" in url


def test_an_edit_with_a_mask_keeps_the_rest(client: Any) -> None:
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)
    mask = np.full((64, 64, 4), 255, np.uint8)
    mask[:32, :, 3] = 0  # transparent: to be edited
    for given in (png(image), [png(image)]):
        answer = client.images.edit(
            image=given, mask=png(mask), prompt="a panda", extra_body={**STEPS, "num_inference_steps": 1}
        )
        drawn = pixels(answer.data[0].b64_json)
        assert (drawn[32:] == image[32:]).all() and (drawn[:32] != image[:32]).any()


def test_an_edit_without_a_mask_begins_with_the_image(client: Any, engine: zimage_rt.Engine) -> None:
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)
    answer = client.images.edit(image=png(image), prompt="a panda", extra_body={**STEPS, "strength": 0.5})
    expected = engine.generate("a panda", image=image, strength=0.5, **STEPS).images[0]
    assert pixels(answer.data[0].b64_json).tobytes() == expected.tobytes()
    with pytest.raises(openai.BadRequestError, match="expected one image, got 2"):
        client.images.edit(image=[png(image), png(image)], prompt="a panda")
    with pytest.raises(openai.BadRequestError, match="width: expected"):
        client.images.edit(image=png(image), prompt="a panda", extra_body={**STEPS, "width": 63})
    url = f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"
    with pytest.raises(openai.BadRequestError, match="expected images or image, got both"):
        said = {"prompt": "a panda", "images": [{"image_url": url}], "image": url}
        client.post("/images/edits", body=said, cast_to=object)
    with pytest.raises(openai.BadRequestError, match="expected an image with transparency"):
        client.images.edit(image=png(image), mask=png(image), prompt="a panda")


def test_a_stream_has_partial_images_and_then_the_whole(client: Any, engine: zimage_rt.Engine) -> None:
    fields = {"seed": 3, "num_inference_steps": 6}
    events = list(
        client.images.generate(prompt="a panda", size="64x64", stream=True, partial_images=2, extra_body=fields)
    )
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    expected = engine.generate("a panda", width=64, height=64, **fields).images[0]
    assert pixels(events[-1].b64_json).tobytes() == expected.tobytes() and events[-1].usage.output_tokens == 16
    image = png(np.zeros((64, 64, 3), np.uint8))
    warned = client.images.generate(prompt="a panda", size="64x64", extra_body={**STEPS, "negative_prompt": "a cat"})
    assert "negative_prompt" in warned.model_extra["warnings"][0]
    sized = client.images.generate(prompt="a panda", extra_body={**STEPS, "width": 96, "height": 64})
    assert sized.size == "96x64"
    edited = list(client.images.edit(image=image, prompt="a panda", stream=True, extra_body=STEPS))
    assert [event.type for event in edited] == ["image_edit.completed"]


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"size": "63x64"}, openai.BadRequestError, "width"),
        ({"size": "large"}, openai.BadRequestError, "size"),
        ({"n": 11}, openai.BadRequestError, "n"),
        ({"prompt": " "}, openai.BadRequestError, "prompt"),
        ({"model": "gpt-image-2"}, openai.NotFoundError, "model"),
        ({"extra_body": {"stepz": 2}}, openai.BadRequestError, "stepz"),
        ({"stream": True, "partial_images": 9}, openai.BadRequestError, "partial_images"),
        ({"background": "transparent"}, openai.BadRequestError, "background"),
        ({"n": 2, "extra_body": {"num_images": 3}}, openai.BadRequestError, "num_images"),
        ({"n": 2, "extra_body": {"num_images_per_prompt": 3}}, openai.BadRequestError, "num_images"),
        ({"size": "64x64", "extra_body": {"width": 96}}, openai.BadRequestError, "width"),
    ],
)
def test_errors_are_those_of_the_client(client: Any, fields: dict[str, Any], error: type, param: str) -> None:
    with pytest.raises(error) as caught:
        client.images.generate(**{"prompt": "a panda", **fields})
    assert caught.value.param == param and caught.value.code


def test_a_full_queue_is_asked_again(bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "service.toml"
    config.write_text(f'slots = 1\n[models.nano]\nbundle = "{bundle}"\n[queue]\nmax_waiting = 1\n')
    server = Server(tmp_path, "--config", str(config))
    try:
        server.wait_until_ready()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        long = {"prompt": "a panda", "num_inference_steps": 30, "height": 128, "width": 128}
        for _ in range(2):
            assert server.client.post("/v1/jobs", json=long).status_code == 202
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt="a panda", extra_body=STEPS)
        assert int(caught.value.response.headers["retry-after"]) >= 1 and caught.value.code == "queue_full"
        patient = client.with_options(max_retries=8)
        assert patient.images.generate(prompt="a panda", size="64x64", extra_body=STEPS).data[0].b64_json
    finally:
        server.stop()
