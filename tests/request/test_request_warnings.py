"""Fields of a request without an effect are reported: as a Python warning, in the record, and by the command."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage

import zimage_rt
from zimage_rt.metadata.image_file import read_record
from zimage_rt.request.resolve import resolve
from zimage_rt.request.types import GenerateRequest, SecondPass

SMALL: dict[str, Any] = {"height": 64, "width": 64}
RED = np.full((64, 64, 3), (255, 0, 0), np.uint8)
BLUE = np.full((64, 64, 3), (0, 0, 255), np.uint8)


def warned(engine: zimage_rt.Engine, **fields: Any) -> tuple[str, ...]:
    return resolve(GenerateRequest("a panda", **{**SMALL, **fields}), engine.manifest).warnings


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"strength": 0.9, "num_inference_steps": 8}, "0.9 of 8 steps is all of them.*at most 0.875, or more steps"),
        ({"strength": 0.9}, "of 8 steps"),  # the bundle's own
        ({"strength": 0.5, "num_inference_steps": 1}, "0.5 of 1 step is all of them.*ask for more steps"),
        ({"strength": 0.67, "num_inference_steps": 3}, "at most 0.6666, or"),
        ({"strength": 0.95, "num_inference_steps": 8, "schedule": "karras"}, "at most 0.875"),
        ({"strength": 0.95, "sigmas": (1.0, 0.6)}, "0.95 of 2 steps is all of them.*at most 0.5"),
        ({"strength": 0.9, "mask": np.eye(64, dtype=np.uint8) * 255}, "the image's part that the mask marks is"),
    ],
)
def test_a_strength_that_ignores_the_image_is_said(engine: zimage_rt.Engine, fields: dict[str, Any], most: str) -> None:
    (text,) = warned(engine, image=RED, **fields)
    assert text.startswith("strength: ")
    assert re.search(most, text), text


@pytest.mark.parametrize(
    "fields",
    [
        {"strength": 0.875, "num_inference_steps": 8},
        {"strength": 0.6666, "num_inference_steps": 3},
        {"strength": 1.0},  # says so itself
        {"strength": 0.95, "num_inference_steps": 20},
        {"strength": 0.95, "sigmas": (0.8, 0.4)},  # all of the steps, and yet the image is there
    ],
)
def test_a_strength_that_keeps_some_of_the_image_is_not(engine: zimage_rt.Engine, fields: dict[str, Any]) -> None:
    assert warned(engine, **{"image": RED, **fields}) == ()


def test_the_image_is_ignored_just_where_it_is_said(engine: zimage_rt.Engine) -> None:
    """Two images, one result; at the strength that the warning names, two results."""
    request = GenerateRequest("a panda", image=RED, seed=3, strength=0.9, num_inference_steps=4, **SMALL)
    with pytest.warns(zimage_rt.RequestWarning, match="at most 0.75, or more steps"):
        ignored = [engine.run(dataclasses.replace(request, image=image)).images.tobytes() for image in (RED, BLUE)]
    assert ignored[0] == ignored[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begun = [
            engine.run(dataclasses.replace(request, image=image, strength=0.75)).images.tobytes()
            for image in (RED, BLUE)
        ]
    assert begun[0] != begun[1]


def test_other_fields_that_do_nothing(engine: zimage_rt.Engine) -> None:
    (text,) = warned(engine, negative_prompt="text")
    assert text == "negative_prompt: it does nothing without guidance; ask for a guidance_scale of more than 0"
    assert warned(engine, negative_prompt="text", guidance_scale=2.0) == ()
    assert warned(engine, negative_prompt=" ") == ()
    (text,) = warned(engine, second_pass=SecondPass(scale=1.0, strength=0.9))
    assert text.startswith("second_pass.strength: 0.9 of 8 steps is all of them, so that the first pass is ignored")
    assert warned(engine, second_pass=SecondPass(scale=1.0, strength=0.9, num_inference_steps=12)) == ()
    latents = np.zeros((1, 16, 8, 8), np.float32)
    assert len(warned(engine, image_latents=latents, strength=0.9, negative_prompt="text")) == 2


@pytest.mark.parametrize(
    ("fields", "needed", "given"),
    [
        ({"cfg_truncation": 0.5}, "guidance", {"guidance_scale": 2.0}),
        ({"cfg_normalization": 1.0}, "guidance", {"guidance_scale": 2.0}),
        ({"dynamic_cfg": 0.5}, "guidance", {"guidance_scale": 2.0}),
        ({"mask_feather": 4.0}, "a mask", {"image": RED, "mask": np.eye(64, dtype=bool)}),
        ({"fit": "pad"}, "an image to fit", {"image": RED}),
        ({"control_scale": 0.5}, "a control image", None),
        ({"strength": 0.5}, "an image to begin with", {"image_latents": np.zeros((1, 16, 8, 8), np.float32)}),
        ({"strength": 0.95}, "an image to begin with", None),
    ],
)
def test_a_field_without_what_it_needs_is_said(
    engine: zimage_rt.Engine, fields: dict[str, Any], needed: str, given: dict[str, Any] | None
) -> None:
    (text,) = warned(engine, **fields)
    (name,) = fields
    assert text.startswith(f"{name}: it does nothing without {needed}")
    if given is not None:
        assert warned(engine, **fields, **given) == ()


def test_defaults_need_nothing(engine: zimage_rt.Engine) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(GenerateRequest) if field.name != "prompt"}
    assert resolve(GenerateRequest("a panda", **defaults), engine.manifest).warnings == ()


def test_a_schedule_beside_sigmas_is_said(engine: zimage_rt.Engine) -> None:
    (text,) = warned(engine, schedule="karras", sigmas=(1.0, 0.5))
    assert text.startswith("schedule: it does nothing beside `sigmas`")


def test_it_is_told_at_the_callers_line_and_recorded(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    with pytest.warns(zimage_rt.RequestWarning, match="negative_prompt: it does nothing") as caught:
        result = engine.generate("a panda", "text", seed=3, num_inference_steps=1, **SMALL)
        engine.run(GenerateRequest("a panda", "text", seed=3, num_inference_steps=1, **SMALL))
    assert [Path(entry.filename).name for entry in caught] == [Path(__file__).name] * 2
    record = read_record(result.save(tmp_path / "panda.png")[0])
    assert record.warnings == [str(caught[0].message)]
    assert json.loads((tmp_path / "panda.json").read_text("utf-8"))["warnings"] == record.warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert engine.run(record.to_request()).images.tobytes() == result.images.tobytes()


def test_the_command_says_it_in_one_line(bundle: Path, tmp_path: Path) -> None:
    size = ("--height", "64", "--width", "64", "--steps", "1", "--seed", "3")
    command = [sys.executable, "-m", "zimage_rt.cli.main", "generate", str(bundle), "--negative-prompt", "text", *size]
    command += ["-p", "a panda", "-p", "a cat", "-o", str(tmp_path), "--json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stderr.splitlines() if "negative_prompt" in line]
    assert lines == [
        "warning: negative_prompt: it does nothing without guidance; ask for a guidance_scale of more than 0"
    ]
    assert "RequestWarning" not in run.stderr  # no path and line of ours
    for line in run.stdout.splitlines():
        assert json.loads(line)["warnings"] == [lines[0].removeprefix("warning: ")]


def test_a_sheet_with_a_row_without_guidance_is_no_mistake(engine: zimage_rt.Engine) -> None:
    from zimage_rt.explain import explain

    with warnings.catch_warnings():
        warnings.simplefilter("error", zimage_rt.RequestWarning)
        guided = {"negative_prompt": "text", "cfg_truncation": 0.5, "cfg_normalization": 1.0, "dynamic_cfg": 0.5}
        options: dict[str, Any] = {"steps": [1], **guided, **SMALL}
        sheet = explain(engine, "a panda", guidance_scales=(0.0, 2.0), **options)
        assert sheet.data["negative_prompt"] == "text"
        with pytest.raises(zimage_rt.RequestWarning, match="negative_prompt"):
            explain(engine, "a panda", guidance_scales=(0.0,), **options)


def test_a_denoise_that_ignores_the_image_is_said(engine: zimage_rt.Engine) -> None:
    (text,) = warned(engine, image=RED, denoise=0.9, num_inference_steps=8)
    assert re.search(r"^denoise: .* the image is ignored, as with 1; ask for at most 0\.8888, or more steps$", text)
    assert warned(engine, image=RED, denoise=1.0, num_inference_steps=8) == ()
    (text,) = warned(engine, second_pass=SecondPass(1.0, denoise=0.95), num_inference_steps=8)
    assert text.startswith("second_pass.denoise: ")


def test_a_strength_beside_a_denoise_is_said(engine: zimage_rt.Engine) -> None:
    # The strength's own measure says nothing: it would be too high.
    (text,) = warned(engine, image=RED, denoise=0.8888, strength=0.95, num_inference_steps=8)
    assert text == "strength: it does nothing beside `denoise`; leave one of them out"
    (text,) = warned(engine, second_pass=SecondPass(1.0, strength=0.3, denoise=0.5))
    assert text == "second_pass.strength: it does nothing beside `second_pass.denoise`; leave one of them out"
    defaults = {"strength": GenerateRequest.strength, "second_pass": SecondPass(1.0, strength=0.4, denoise=0.5)}
    assert warned(engine, image=RED, denoise=0.5, **defaults) == ()
    (text,) = warned(engine, denoise=1.0, strength=0.95)
    assert text.startswith("strength: it does nothing without an image")


def test_a_sessions_own_strength_is_not_said(engine: zimage_rt.Engine) -> None:
    """A turn's denoise comes before the strength that a turn has by default."""
    session = zimage_rt.Session(engine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.generate("a panda", num_inference_steps=1, seed=3, **SMALL)
        session.edit("a cat", denoise=0.5, num_inference_steps=1)
        session.refine(denoise=0.5, num_inference_steps=1)
    with pytest.warns(zimage_rt.RequestWarning, match="strength: it does nothing beside `denoise`"):
        session.refine(0.5, denoise=0.5, num_inference_steps=1)


@pytest.mark.parametrize(
    ("scale", "width", "scaled", "drawn"),
    [
        (0.9, 64, "64x64 is 57.6x57.6", "64x64"),
        (1.03, 64, "64x64 is 65.92x65.92", "64x64"),
        (1.25, 96, "96x64 is 120x80", "128x80"),
    ],
)
def test_a_rounded_size_of_the_second_pass_is_said(
    engine: zimage_rt.Engine, scale: float, width: int, scaled: str, drawn: str
) -> None:
    (text,) = warned(engine, width=width, second_pass=SecondPass(scale))
    assert text == (
        f"second_pass.scale: {scale} times {scaled}; the second pass is drawn at {drawn}, the nearest size that the "
        "bundle serves"
    )


@pytest.mark.parametrize(("scale", "side"), [(1.0, 64), (1.25, 64), (1.3333, 768), (1.1, 160)])
def test_a_scale_that_is_right_to_the_pixel_is_not(engine: zimage_rt.Engine, scale: float, side: int) -> None:
    assert warned(engine, height=side, width=side, second_pass=SecondPass(scale)) == ()


def test_a_recorded_strength_is_not_said(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    """`--denoise` comes before the strength of the image that `--like` repeats."""
    from zimage_rt.cli.like import request_like

    PilImage.fromarray(RED).save(tmp_path / "red.png")
    result = engine.generate("a panda", image=tmp_path / "red.png", strength=0.3, seed=3, **SMALL)
    path = result.save(tmp_path / "panda.png")[0]
    record = read_record(path)
    assert resolve(request_like(record, path, {"denoise": 0.5}), engine.manifest).warnings == ()
    both = request_like(record, path, {"denoise": 0.5, "strength": 0.3})
    assert resolve(both, engine.manifest).warnings == (
        "strength: it does nothing beside `denoise`; leave one of them out",
    )
