"""The judges of the style LoRA and the ControlNet, on images composed from the judge's atlas."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from lora_files import random_lora_of
from PIL import Image
from shared import ROOT
from zimage_rt.benchmarks.quality import adapters
from zimage_rt.benchmarks.quality.judge import DATA, Atlas, Judge


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas.load(DATA)


@pytest.fixture(scope="module")
def cases(atlas: Atlas) -> list[adapters.Case]:
    return adapters.shifted_cases(atlas, DATA, 12)


def drawn(atlas: Atlas, case: adapters.Case, place: tuple[int, int]) -> np.ndarray:
    """A case's scene with its drawing at a place."""
    size = atlas.sizes["single"]["medium"]
    canvas = Image.new("RGB", (256, 256), tuple(round(255 * v) for v in atlas.colours[case.scene["colour"]]))
    style, subject = atlas.styles.index(case.scene["style"]), atlas.hexcodes.index(case.scene["subjects"][0])
    sprite = Image.fromarray(atlas.sprites[style, subject]).resize((size, size), Image.Resampling.BICUBIC)
    canvas.paste(sprite, (place[0] - size // 2, place[1] - size // 2), sprite)
    return np.asarray(canvas)


def test_the_style_is_a_small_distance(atlas, cases):
    for case in cases:
        canvas = drawn(atlas, case, case.usual)
        assert adapters.distance_from_style(canvas) > 2 * adapters.IN_STYLE
        styled = np.rint(adapters.cyanotype(canvas.astype(np.float32))).astype(np.uint8)
        assert adapters.distance_from_style(styled) < 1


def test_subjects_are_found_in_the_style(atlas, cases):
    judge = Judge(adapters.in_the_style(atlas))
    found = []
    for case in cases:
        styled = np.rint(adapters.cyanotype(drawn(atlas, case, case.usual).astype(np.float32))).astype(np.uint8)
        found += judge.score(styled, case.scene)["subject"]
    assert np.mean(found) >= 0.95


def test_the_scripts_have_the_same_style():
    """The training scripts are no part of the package, and are read in a process of their own."""
    code = (
        "import torch, cyanotype, numpy as np; from zimage_rt.benchmarks.quality import adapters; "
        "p = np.random.default_rng(0).integers(0, 256, (1, 4, 5, 3)).astype(np.float32); "
        "x = cyanotype.cyanotype(torch.from_numpy(p).permute(0, 3, 1, 2) / 127.5 - 1); "
        "assert np.abs(((x + 1) * 127.5).permute(0, 2, 3, 1).numpy() - adapters.cyanotype(p)).max() < 0.01"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "checkpoints" / "training", check=True)


def test_a_drawing_is_found_where_it_was_shown(atlas, cases):
    judge = Judge(atlas)
    there = [adapters.locate(judge, drawn(atlas, case, case.shown), case) for case in cases]
    usual = [adapters.locate(judge, drawn(atlas, case, case.usual), case) for case in cases]
    assert all(answers["where shown"] for answers in there)
    assert np.mean([answers["subject there"] for answers in there]) >= 0.95
    assert not any(answers["where shown"] for answers in usual)
    assert np.mean([answers["subject there"] for answers in usual]) < 0.15


def test_silhouettes_are_on_the_token_grid_at_their_places(atlas, cases):
    for case in cases:
        card = adapters.silhouette(atlas, case)
        assert card.shape == (256, 256, 3)
        rows, columns = np.nonzero(card[..., 0] > 8)
        for seen, place in ((columns, case.shown[0]), (rows, case.shown[1])):
            assert place - 58 <= seen.min() <= seen.max() < place + 58
        assert all((a - b) % 16 == 0 for a, b in zip(case.shown, case.usual, strict=True))
    assert len({case.shown for case in cases}) > 5


def test_a_lora_leaves_no_byte_behind(engine, tmp_path):
    """The real engine on the first case, with random numbers as the LoRA."""
    lora = random_lora_of(engine.manifest, tmp_path / "random.safetensors", seed=3)
    figures = adapters.measure_lora(engine, lora, DATA, 1, tmp_path / "pictures")
    assert figures["bytes back"] == 1
    assert figures["distance without"] != figures["distance at 1"]
    assert len(list((tmp_path / "pictures").iterdir())) == 1
