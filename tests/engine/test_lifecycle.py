"""An engine from `load` to `close`: memory given back, errors with codes and fields, one logger per room."""

from __future__ import annotations

import gc
import inspect
import logging
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zimage_rt.export import errors as export_errors

import zimage_rt
from zimage_rt import errors
from zimage_rt.errors import EngineClosed, RequestError, ZImageError
from zimage_rt.request.codec import DIFFUSERS_NAMES, make_request

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 5}


def test_a_with_block_closes_the_engine(bundle: Path) -> None:
    with zimage_rt.Engine.load(bundle, verify=False) as engine:
        latents = engine.generate("a panda", **SMALL).latents
        transformer = weakref.ref(engine.pipeline.module("transformer"))
    gc.collect()
    assert transformer() is None  # sessions and weights are gone
    for call in (
        lambda: engine.generate("a panda", **SMALL),
        lambda: engine.generate("a panda", **SMALL, loras={}),
        lambda: engine.encode_prompt("a panda"),
        lambda: engine.decode(latents, "tiny"),
        lambda: engine.pipeline,
    ):
        with pytest.raises(EngineClosed, match="was closed; load the bundle again"):
            call()
    engine.close()  # again: nothing happens
    assert engine.loras == {}


def test_close_waits_for_a_request(bundle: Path) -> None:
    engine = zimage_rt.Engine.load(bundle, verify=False)
    inside, go_on, results = threading.Event(), threading.Event(), []

    def on_step(info: zimage_rt.StepInfo) -> None:
        inside.set()
        go_on.wait(10)

    drawing = threading.Thread(target=lambda: results.append(engine.generate("a panda", **SMALL, callback=on_step)))
    drawing.start()
    assert inside.wait(10)
    closing = threading.Thread(target=engine.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    go_on.set()
    closing.join(10)
    drawing.join(10)
    assert not closing.is_alive() and len(results) == 1


def test_every_error_has_a_code_of_its_own() -> None:
    kinds = {
        kind
        for module in (errors, export_errors)
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, ZImageError)
    }
    assert len(kinds) > 15 and all("code" in vars(kind) for kind in kinds)
    assert len({kind.code for kind in kinds}) == len(kinds)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"height": 63}, "height"),
        ({"prompt": ""}, "prompt"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"seed": -1}, "seed"),
        ({"sampler": "eulr"}, "sampler"),
        ({"num_images": 99}, "num_images"),
        ({"prompt": ["a"] * 99}, "prompt"),
        ({"num_images": 8, "prompt": ["a", "b"]}, "num_images"),
        ({"second_pass": zimage_rt.SecondPass(scale=99.0)}, "second_pass.scale"),
        ({"vae": "large"}, "vae"),
        ({"colour": "blue"}, "colour"),
        ({"image": np.zeros((64, 64, 3), np.uint8), "latents": np.zeros((1, 16, 8, 8), np.float32)}, "image"),
        ({"mask": np.zeros((64, 64), np.uint8)}, "mask"),
    ],
)
def test_a_request_error_names_its_field(engine: zimage_rt.Engine, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        engine.generate(**{"prompt": "a panda", **SMALL, **fields})
    assert (caught.value.field, caught.value.code) == (field, "invalid_request")


def test_diffusers_names_are_taken(engine: zimage_rt.Engine) -> None:
    names = {"num_images_per_prompt": 2, "mask_image": "m.png", "controlnet_conditioning_scale": 0.5}
    assert names.keys() == DIFFUSERS_NAMES.keys()
    request = make_request(prompt="a panda", **names)
    assert (request.num_images, request.mask, request.control_scale) == (2, "m.png", 0.5)
    assert len(engine.generate("a panda", **SMALL, num_images_per_prompt=2)) == 2
    with pytest.raises(RequestError, match="num_images: expected it once"):
        make_request(prompt="a panda", num_images=1, num_images_per_prompt=2)


def test_a_result_has_its_images_by_number(engine: zimage_rt.Engine) -> None:
    result = engine.generate("a panda", **SMALL, num_images=2)
    assert [one.seeds for one in result] == [(5,), (6,)]
    assert result[-1].images.tobytes() == result.images[1:].tobytes() and len(result[1].records) == 1
    with pytest.raises(IndexError, match="expected an index below 2, got 2"):
        result[2]


def test_rooms_log_under_their_names(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="zimage_rt"), zimage_rt.Engine.load(bundle, verify=False) as engine:
        engine.generate("a panda", **SMALL)
    told = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert any(name == "zimage_rt.engine" and "loaded from" in text for name, _, text in told)
    assert any(level == "DEBUG" and "1 images of 64x64" in text for _, level, text in told)
    assert all(name.startswith("zimage_rt") for name, _, _ in told)
    assert not logging.getLogger("zimage_rt").handlers or isinstance(
        logging.getLogger("zimage_rt").handlers[0], logging.NullHandler
    )
