"""The cookbook matches its script: every recipe runs, the page is up to date, and the images show the right scenes,
those drawn here as well as those on the page.

They are not compared pixel by pixel, because other processors sum in another order, and the sheet of settings names the
bundle, whose id depends on the parity figures of its export.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_checkpoints import graphs_of
from PIL import Image
from shared import CHECKPOINT, ROOT
from zimage_rt.benchmarks.quality import adapters
from zimage_rt.benchmarks.quality.edits import names_of
from zimage_rt.benchmarks.quality.judge import DATA, Judge

PAGE = ROOT / "docs" / "cookbook.md"
NAMES = names_of(DATA)
STALE = "run docs/cookbook.py and commit"


@pytest.fixture(scope="module")
def cookbook() -> Any:
    spec = importlib.util.spec_from_file_location("cookbook", ROOT / "docs" / "cookbook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cookbook"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn(cookbook: Any, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every recipe, run here, by the name of its image."""
    with contextlib.chdir(ROOT), graphs_of(bundle, CHECKPOINT):
        return {recipe.name: recipe for recipe in cookbook.draw(bundle, tmp_path_factory.mktemp("bundles"))}


@pytest.fixture(scope="module")
def committed(drawn: dict[str, Any]) -> dict[str, list[np.ndarray]]:
    """The page's own images, cut out of its strips."""
    found = {}
    for name, recipe in drawn.items():
        strip, images, left = np.asarray(Image.open(PAGE.parent / "cookbook" / f"{name}.png").convert("RGB")), [], 0
        for height, width in (image.shape[:2] for image in recipe.images):
            images.append(strip[:height, left : left + width])
            left += width + 8
        found[name] = images
    return found


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


def seen(judge: Judge, image: np.ndarray, scene: Any) -> tuple[str | None, tuple[str, ...]]:
    """The background, where the scene names one, and the nearest of all drawings at each of the scene's places."""
    if scene.box is not None:
        left, top, side = scene.box
        cut = Image.fromarray(image[top : top + side, left : left + side])
        image = np.asarray(cut.resize((256, 256), Image.Resampling.BICUBIC))
    height, width = image.shape[:2]
    ground = judge.background(image)
    if len(scene.subjects) == 1:
        places = [(width // 2 + scene.moved[0], height // 2 + scene.moved[1])]
    else:
        places = [(width // 4, height // 2), (3 * width // 4, height // 2)]
    tables = [judge.distances(image, ground, x, y, judge.atlas.sizes["single"]["medium"]) for x, y in places]
    nearest = (judge.atlas.hexcodes[int(table.min(axis=0).argmin())] for table in tables)
    return ground if scene.colour else None, tuple(NAMES[code] for code in nearest)


def test_the_page_is_up_to_date(cookbook: Any, drawn: dict[str, Any]) -> None:
    lines = [line for recipe in drawn.values() for line in recipe.lines]
    assert "\n".join([*cookbook.header(), *lines]) + "\n" == PAGE.read_text(encoding="utf-8"), STALE
    for name, recipe in drawn.items():
        strip = cookbook.side_by_side(recipe.images)
        assert Image.open(PAGE.parent / "cookbook" / f"{name}.png").size == strip.size, f"{name}: {STALE}"
    assert {path.stem for path in (PAGE.parent / "cookbook").glob("*.png")} == set(drawn), STALE


def test_images_show_their_scenes(judge: Judge, drawn: dict[str, Any], committed: dict[str, list[np.ndarray]]) -> None:
    for name, recipe in drawn.items():
        assert recipe.scenes, f"{name}: name the scenes that its images show"
        for scene in recipe.scenes:
            for where, images in (("drawn here", recipe.images), ("on the page", committed[name])):
                found = seen(judge, images[scene.image], scene)
                assert found == (scene.colour, scene.subjects), f"{name}, image {scene.image}, {where}"


def test_a_wrong_image_on_the_page_is_detected(
    judge: Judge, drawn: dict[str, Any], committed: dict[str, list[np.ndarray]]
) -> None:
    """Each scene is looked for in an image of the page that shows another one, and is not found."""
    shown = [(name, scene) for name, recipe in drawn.items() for scene in recipe.scenes]
    for i, (name, scene) in enumerate(shown):
        # Names alone: without its colour a scene is found on every background.
        other, instead = next(
            (other, instead)
            for other, instead in (*shown[i:], *shown[:i])
            if instead.subjects != scene.subjects and instead.box is None
        )
        found = seen(judge, committed[other][instead.image], scene)[1]
        assert found != scene.subjects, f"{name}, image {scene.image}, in place of which stands {other}"


def test_images_without_a_scene_have_their_effects(
    drawn: dict[str, Any], committed: dict[str, list[np.ndarray]]
) -> None:
    for images in (drawn["lora"].images, committed["lora"]):
        distances = [adapters.distance_from_style(image) for image in images]
        assert all(later < earlier for earlier, later in pairwise(distances))
        assert distances[-1] < adapters.IN_STYLE
    for images in (drawn["previews"].images, committed["previews"]):
        left = [np.abs(image.astype(float) - images[-1]).mean() for image in images]
        assert all(later < earlier for earlier, later in pairwise(left))
    for images in (drawn["shapes"].images, committed["shapes"]):
        # Above and below what was given it is dark, nearly as fitted; the orange between has a mean of 148.
        padded = images[2].astype(float)
        assert padded[:40].mean() < 60
        assert padded[-40:].mean() < 60
        assert padded[60:-60].mean() > 100
    for images in (drawn["inpaint"].images, committed["inpaint"]):
        assert (images[2][:, 150:] == images[0][:, 150:]).all()


def test_an_image_drawn_again_is_the_same_to_the_byte(drawn: dict[str, Any]) -> None:
    """On one machine, also from another process."""
    first, second, third = drawn["the_same_image_again"].images
    assert first.tobytes() == second.tobytes() != third.tobytes()
