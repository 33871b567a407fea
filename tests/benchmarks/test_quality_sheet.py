"""The contact sheet of prompts for a model card: the choice of prompts, and their captions."""

from __future__ import annotations

from zimage_rt.benchmarks.quality import sheet
from zimage_rt.benchmarks.quality.judge import DATA
from zimage_rt.benchmarks.quality.prompts import kind_of


def test_the_lot_is_always_the_same_and_of_the_kinds_asked_for() -> None:
    prompts = sheet.chosen_prompts(DATA, 16)
    assert prompts == sheet.chosen_prompts(DATA, 16)
    assert len({p["caption"] for p in prompts}) == 16
    assert len({kind_of(p) for p in prompts}) > 1
    assert {kind_of(p) for p in sheet.chosen_prompts(DATA, 16, ["unseen_single"])} == {"unseen_single"}


def test_what_is_wrong_is_named() -> None:
    answers = {"subject_pair": [True, False], "style": [True, True], "colour": [False]}
    assert sheet.verdict(answers) == f"{sheet.WRONG}pair, colour"
    assert sheet.verdict({"subject": [True]}) == ""
