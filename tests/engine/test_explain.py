"""Contact sheets: contents and layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import zimage_rt
from zimage_rt.errors import RequestError, RequestWarning
from zimage_rt.explain import KEY, MAX_STRIP, Explanation, explain
from zimage_rt.image import fonts
from zimage_rt.image.contact_sheet import MARGIN, Section, SheetImage, _Pen, draw_sheet
from zimage_rt.image.fonts import find_font

SMALL = {"height": 64, "width": 96}


def pixels(sheet: Image.Image) -> np.ndarray:
    return np.asarray(sheet.convert("RGB"))


def holds(sheet: np.ndarray, image: np.ndarray) -> bool:
    """Whether the sheet has these pixels somewhere."""
    height, width = image.shape[:2]
    corners = np.argwhere((sheet[: -height + 1, : -width + 1] == image[0, 0]).all(-1))
    return any((sheet[y : y + height, x : x + width] == image).all() for y, x in corners)


@pytest.fixture(scope="module")
def sheet(engine: zimage_rt.Engine) -> Explanation:
    return explain(engine, "一只 panda", steps=[3, 1], guidance_scales=[2.0, 0.0], seed=4, cell=96, **SMALL)


def test_every_image_is_the_one_drawn_alone(engine: zimage_rt.Engine, sheet: Explanation) -> None:
    there = pixels(sheet.image)
    for steps in (1, 3):
        for scale in (0.0, 2.0):
            # A cell of the image's own size, so that its very pixels are on the sheet.
            alone = engine.generate(
                "一只 panda", seed=4, num_inference_steps=steps, guidance_scale=scale, vae="tiny", **SMALL
            )
            assert holds(there, alone.images[0])


def test_the_steps_between_are_on_the_sheet(engine: zimage_rt.Engine, sheet: Explanation) -> None:
    previews: list[np.ndarray] = []
    engine.generate(
        "一只 panda",
        seed=4,
        num_inference_steps=3,
        guidance_scale=0.0,
        callback=lambda info: previews.append(info.preview()[0]),
        **SMALL,
    )
    # The strip is no wider than two columns above it, so that its three images are 88 pixels wide.
    there = pixels(sheet.image)
    small = [np.asarray(Image.fromarray(one).resize((88, 59), Image.Resampling.LANCZOS)) for one in previews]
    assert all(holds(there, one) for one in small)


def test_the_file_records_its_settings(engine: zimage_rt.Engine, sheet: Explanation, tmp_path: Path) -> None:
    path = sheet.save(tmp_path / "deeper" / "sheet.png")
    data = json.loads(Image.open(path).info[KEY])
    assert data == sheet.data
    assert (data["prompt"], data["seed"], data["width"]) == ("一只 panda", 4, 96)
    assert data["bundle_id"] == engine.bundle_id
    cells = [(cell["guidance_scale"], cell["num_inference_steps"], cell["evaluations"]) for cell in data["cells"]]
    assert cells == [(0.0, 1, 1), (0.0, 3, 3), (2.0, 1, 1), (2.0, 3, 3)]
    assert all(cell["seconds"] > 0 for cell in data["cells"])
    with pytest.raises(RequestError, match=r"ends in \.png, got sheet\.jpg"):
        sheet.save(tmp_path / "sheet.jpg")


def test_without_times_a_sheet_comes_out_the_same(engine: zimage_rt.Engine) -> None:
    fields: dict[str, Any] = {"steps": [1], "guidance_scales": [0.0, 2.0], "cell": 96, **SMALL}
    timed, first, second = (pixels(explain(engine, "a cat", times=t, **fields).image) for t in (True, False, False))
    assert first.tobytes() == second.tobytes()
    assert timed.tobytes() != first.tobytes()


def test_defaults_are_the_bundles_and_evaluations_are_counted(engine: zimage_rt.Engine) -> None:
    done: list[tuple[int, int]] = []
    fields: dict[str, Any] = {"sampler": "heun", "on_image": lambda *count: done.append(count), **SMALL}
    data = explain(engine, "a cat", guidance_scales=[0.0], **fields).data
    # Heun's second order evaluates twice a step, but for the last.
    assert [(cell["num_inference_steps"], cell["evaluations"]) for cell in data["cells"]] == [
        (1, 1),
        (2, 3),
        (4, 7),
        (8, 15),
    ]
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_long_runs_are_thinned_out(engine: zimage_rt.Engine) -> None:
    from zimage_rt.explain import _is_shown

    assert [_is_shown(step, MAX_STRIP) for step in range(MAX_STRIP)] == [True] * MAX_STRIP
    shown = [step for step in range(100) if _is_shown(step, 100)]
    assert (len(shown), shown[0], shown[-1]) == (MAX_STRIP, 0, 99)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": []}, "expected 1 to 100 images, got 0 x 4"),
        ({"steps": range(1, 50)}, "expected 1 to 100 images, got 49 x 4"),
        ({"steps": [0]}, "num_inference_steps: expected 1 to 1000, got 0"),
        ({"guidance_scales": [-1.0]}, "guidance_scale: expected a finite number, 0 or more"),
        ({"cell": 5}, "cell: expected 88 to 1024 pixels, got 5"),
        ({"stepz": 5}, "known fields: prompt"),
        ({"font": "no/such.ttf", "steps": [1], "guidance_scales": [0.0], **SMALL}, "cannot be read as a TrueType font"),
    ],
)
def test_nonsense_is_refused(engine: zimage_rt.Engine, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        explain(engine, "a cat", **fields)
    assert message in str(caught.value)


def test_sheets_of_other_shapes_are_whole() -> None:
    tall, wide = np.full((128, 32, 3), 9, np.uint8), np.full((32, 128, 3), 200, np.uint8)
    for image in (tall, wide):
        row = [SheetImage(image, "a label that is much wider than its image") for _ in range(3)]
        text = "word " * 60 + "一" * 300 + "x" * 500
        there = pixels(draw_sheet([text, "second"], [Section("title", None, [("row", row)], 128)]))
        assert holds(there, image)
        for edge in (there[: MARGIN // 2], there[-MARGIN // 2 :], there[:, : MARGIN // 2], there[:, -MARGIN // 2 :]):
            assert (edge == 255).all()  # nothing runs over the edge


def test_the_command_writes_a_sheet(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    base = [sys.executable, "-m", "zimage_rt.cli.main", "explain", str(bundle), "-p", "a panda", "-o", str(path)]
    options = ["--steps", "1,2", "--guidance", "0,1.5", "--height", "64", "--width", "64", "--seed", "3", "--json"]
    run = subprocess.run([*base, *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    data = json.loads(run.stdout)
    assert (data["file"], data["height"], data["seed"], len(data["cells"])) == (str(path), 64, 3, 4)
    assert Image.open(path).size[0] > 300
    run = subprocess.run([*base, "--steps", "1;2"], capture_output=True, text=True)
    assert run.returncode == 1
    assert "--steps: expected numbers with commas between them, got '1;2'" in run.stderr


# Fonts

DEJAVU = "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf"


def test_pillows_own_font_is_kept_for_what_it_has() -> None:
    font = find_font("A panda, 50 %")
    assert font.missing("A panda, 50 %") == []
    assert font.missing("猫a猫") == ["猫"]


@pytest.mark.skipif(not Path(DEJAVU).is_file(), reason="needs DejaVu Sans")
def test_a_font_of_the_system_is_found_for_what_pillows_lacks(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.ttf"
    damaged.write_bytes(b"no font")
    places = [("/no/such.ttf", 0), (str(damaged), 0), (DEJAVU, 0)]
    assert find_font("панда", []).missing("панда") == sorted(set("панда"))
    font = find_font("панда 猫", places)  # the one that has the most
    assert font.missing("панда 猫") == ["猫"]
    assert find_font("a panda", places).missing("п") == ["п"]  # not looked for


def test_a_character_without_a_font_is_reported_once_and_never_a_box(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = SheetImage(np.full((96, 96, 3), 128, np.uint8), "label")
    sections = [Section("title", None, [("row", [cell])], 96)]
    monkeypatch.setattr(fonts, "PLACES", ())
    with pytest.warns(RequestWarning) as caught:
        draw_sheet(["一只 panda", "第二"], sections)
    (warning,) = caught
    assert "no font found here has 一二只第, drawn as _" in str(warning.message)
    assert "fonts-noto-cjk" in str(warning.message)
    (line,) = _Pen(find_font("一只")).wrapped("一只 panda", 10_000, 18)
    assert line == "__ panda   (_: not in this font; give --font, or read the file's own text)"


def test_a_font_that_is_given_is_used_whatever_it_lacks() -> None:
    if not Path(DEJAVU).is_file():
        pytest.skip("needs DejaVu Sans")
    cell = SheetImage(np.full((96, 96, 3), 128, np.uint8), "label")
    with pytest.warns(RequestWarning, match=r"DejaVuSans\.ttf has 猫, drawn as _ on the sheet; name another"):
        draw_sheet(["猫"], [Section("title", None, [("row", [cell])], 96)], DEJAVU)


@pytest.mark.skipif(
    not any(Path(path).is_file() for path, _ in fonts.PLACES[:-1]), reason="needs a font with Chinese characters"
)
def test_chinese_titles_are_drawn_with_a_font_of_the_system() -> None:
    assert find_font("一只熊猫，蓝色背景").missing("一只熊猫，蓝色背景") == []
