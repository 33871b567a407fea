"""The quality judge, on images composed from its own atlas: right ones pass, wrong ones fail."""

import numpy as np
import pytest
from judge_images import compose
from zimage_rt.benchmarks.quality import edits
from zimage_rt.benchmarks.quality.judge import DATA, Judge, summarise
from zimage_rt.benchmarks.quality.prompts import read_prompts


@pytest.fixture(scope="module")
def judge():
    return Judge()


def test_right_images_pass(judge):
    judged = []
    for prompt in read_prompts(40):
        scene = prompt["scene"]
        judged.append((prompt, judge.score(compose(judge, scene, shift=(5, -6)), scene)))
    figures = summarise(judged)
    assert figures["colour"] == 1
    assert figures["places"] == 1
    for name in (
        "subject",
        "subject_pair",
        "subject_word",
        "style",
        *(["glyphs"] if judge.atlas.glyphs is not None else []),
    ):
        assert figures[name] >= 0.95, name


def test_swapped_places_are_seen(judge):
    for prompt in [p for p in read_prompts(60) if len(p["scene"]["subjects"]) == 2][:12]:
        answers = judge.score(compose(judge, prompt["scene"], order=-1), prompt["scene"])
        assert answers["places"] == [False]
        assert answers["subject_pair"] == [False, False]


@pytest.mark.parametrize("field", ["colour", "style", "subjects"])
def test_a_wrong_part_is_seen(judge, field):
    atlas = judge.atlas
    prompts = [p for p in read_prompts(60) if p["scene"]["layout"] == "single"][:10]
    wrong = []
    for prompt in prompts:
        drawn = dict(prompt["scene"])
        choices = {"colour": list(atlas.colours), "style": atlas.styles, "subjects": atlas.hexcodes}
        value = drawn[field][0] if field == "subjects" else drawn[field]
        names = choices[field]
        other = names[(names.index(value) + 1) % len(names)]
        drawn[field] = [other] if field == "subjects" else other
        answers = judge.score(compose(judge, drawn), prompt["scene"])
        wrong.append(answers[{"subjects": "subject"}.get(field, field)][0])
    assert sum(wrong) <= 1


def test_wrong_letters_are_seen(judge):
    if judge.atlas.glyphs is None:
        pytest.skip("this data has no glyphs")
    hits = []
    for prompt in [p for p in read_prompts(200) if p["scene"].get("word")][:20]:
        word = prompt["scene"]["word"]
        other = "".join("ZQXJKVW"[i] if c.isascii() else "酒" for i, c in enumerate(word))
        hits += judge.score(compose(judge, dict(prompt["scene"], word=other)), prompt["scene"])["glyphs"]
        hits += judge.score(compose(judge, dict(prompt["scene"], word="")), prompt["scene"])["glyphs"]
    assert np.mean(hits) < 0.1


def test_an_empty_image_holds_no_subject(judge):
    prompts = [p for p in read_prompts(200) if p["scene"]["layout"] == "single"]
    hits = []
    for prompt in prompts:
        scene = dict(prompt["scene"], subjects=[])
        hits += judge.score(compose(judge, scene), prompt["scene"])["subject"]
    assert np.mean(hits) < 0.15


def test_prompts_are_the_same_every_time():
    prompts = read_prompts(10_000)
    assert len(prompts) >= 500
    assert len({p["seed"] for p in prompts}) == len(prompts)
    assert {p["language"] for p in prompts} == {"zh", "en", "mixed"}


def test_edits_draw_the_new_and_keep_the_other_half(engine):
    """The real engine on the first cases."""
    figures = edits.measure(engine, DATA, 3)
    assert figures["new on the left"] == 1
    assert figures["bytes kept"] == 1
    assert figures["right after"] == figures["right before"] == 1


def test_edits_are_of_subjects_that_were_not_there():
    for prompt, scene in edits.cases(DATA, 30):
        before, after = prompt["scene"]["subjects"], scene["subjects"]
        assert after[1] == before[1]
        assert after[0] not in before
        assert " on the left and " in edits.describe(scene, edits.names_of(DATA))
