"""Measurements of guidance and negative prompts, on a system that draws from the judge's atlas."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from judge_images import compose
from zimage_rt.benchmarks.quality import guidance
from zimage_rt.benchmarks.quality.edits import names_of
from zimage_rt.benchmarks.quality.judge import DATA, UNSEEN, Judge

NAMES = names_of(DATA)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


class Stubborn:
    """Draws every prompt's scene, but what it likes better where there is no guidance and no negative prompt of it."""

    name = "stubborn"

    def __init__(self, judge: Judge, prompts: list[guidance.Prompt]) -> None:
        self._judge = judge
        self._scenes = {p["seed"]: p["scene"] for p in prompts}

    def liked(self, scene: dict[str, Any]) -> str:
        codes = self._judge.atlas.hexcodes
        return codes[(codes.index(scene["subjects"][0]) + 1) % len(codes)]

    def generate(self, prompts: list[str], seeds: list[int], **options: Any) -> list[np.ndarray]:
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            scene, negative = self._scenes[seed], options.get("negative_prompt")
            kept = NAMES[self.liked(scene)] in negative if negative is not None else options["guidance_scale"] > 0
            subjects = scene["subjects"] if kept else [self.liked(scene), *scene["subjects"][1:]]
            # Where the prompt is a bare name, the background is white, but for whom white is told to avoid.
            own = {"colour": "red" if negative == "white background" else "white"} if prompt in NAMES.values() else {}
            images.append(compose(self._judge, {**scene, "subjects": subjects, **own}))
        return images


def test_figures_at_each_scale_are_the_judges(judge: Judge) -> None:
    prompts = guidance.chosen_prompts(DATA, 8)
    assert {guidance.kind_of(p) for p in prompts} == {"single", "pair"}
    figures = guidance.measure_scales(Stubborn(judge, prompts), DATA, prompts, 1, processes=1)
    assert tuple(figures) == guidance.SCALES
    assert figures[0.0]["subject"] == 0
    assert figures[0.0]["subject_pair"] == 0.5
    assert all(figures[scale][name] == 1 for scale in guidance.SCALES[1:] for name in ("subject", "subject_pair"))
    drawn = ElementTree.fromstring(guidance.draw_svg(figures, "title"))
    curves = [line.get("points", "").split() for line in drawn.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(points) for points in curves] == [len(guidance.SCALES)] * len(guidance.CURVES)
    first, last = (float(curves[0][i].split(",")[1]) for i in (0, -1))
    assert first > last  # higher on the page is more


def test_unseen_phrasings_have_curves_of_their_own(judge: Judge) -> None:
    prompts = guidance.chosen_prompts(DATA, 4, (f"{UNSEEN}single",))
    assert all(p["unseen"] for p in prompts)
    figures = guidance.measure_scales(Stubborn(judge, prompts), DATA, prompts, 1, processes=1)
    assert figures[0.0]["subject"] == 0
    assert figures[6.0]["subject"] == 1


def test_what_a_negative_prompt_names_is_looked_for_again(judge: Judge) -> None:
    prompts = guidance.chosen_prompts(DATA, 4, ("single",))
    figures = guidance.measure_negative(Stubborn(judge, prompts), judge, prompts, "subject", NAMES, 1, 2.0)
    assert figures == {"drawn": 4, "different": 4, "seen again, named": 0, "seen again, control": 1}


def test_colours_are_asked_for_where_the_prompt_says_none(judge: Judge) -> None:
    prompts = guidance.chosen_prompts(DATA, 3, ("single",))
    figures = guidance.measure_negative(Stubborn(judge, prompts), judge, prompts, "colour", NAMES, 1, 2.0)
    assert figures["drawn"] == 3
    assert figures["different"] == 1
    assert figures["seen again, named"] == 0
    assert figures["seen again, control"] == 1
    assert figures["subject right, named"] == figures["subject right, control"] == 0
