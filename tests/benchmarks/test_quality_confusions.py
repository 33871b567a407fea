"""Subjects that look alike: the two measures, the table, and the sheets for a person."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from zimage_rt.benchmarks.quality import confusions
from zimage_rt.benchmarks.quality.confusions import Atlas, Measures, compose


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas.load()


@pytest.fixture(scope="module")
def names() -> list[str]:
    return confusions.atlas_names()


@pytest.fixture(scope="module")
def measures(atlas: Atlas) -> Measures:
    return Measures(atlas)


def test_the_distance_is_0_for_the_same_and_1_for_nothing_in_common() -> None:
    rows = np.array([[3.0, 0.0], [0.0, 4.0]])
    assert np.allclose(confusions.relative_distances(rows, rows), [[0, 1], [1, 0]])


def test_a_drawing_is_nearest_to_itself_by_both_measures(atlas: Atlas, measures: Measures) -> None:
    for style, subject in ((0, 0), (1, 40), (0, 173), (1, 305)):
        image = compose(atlas, style, subject, "white")
        for distances in (measures.pixels(image), measures.look(image)):
            assert np.unravel_index(int(distances.argmin()), distances.shape) == (style, subject)
            assert distances[style, subject] < 0.1


def test_the_pairs_that_everybody_sees_are_found(atlas: Atlas, names: list[str], measures: Measures) -> None:
    for a, b, style in (("red heart", "broken heart", "noto"), ("egg", "onion", "flat"), ("cat", "dog", "flat")):
        at = atlas.styles.index(style)
        finding = measures.find(compose(atlas, at, names.index(a), "white"), at, names.index(a))
        assert names[finding.look.subject] == b
        assert finding.look.own < finding.look.other < 0.5
        assert finding.pixels.own < finding.pixels.other < 0.4


def test_the_look_is_blind_to_mirroring_and_the_pixels_are_not(
    atlas: Atlas, names: list[str], measures: Measures
) -> None:
    fish = names.index("fish")
    image = compose(atlas, 0, fish, "white")
    assert measures.look(image[:, ::-1])[0, fish] == pytest.approx(measures.look(image)[0, fish], abs=0.01)
    assert measures.pixels(image[:, ::-1])[0, fish] > measures.pixels(image)[0, fish] + 0.2


def test_an_image_of_something_else_is_nearer_to_that(atlas: Atlas, names: list[str], measures: Measures) -> None:
    drawn, meant = names.index("dog"), names.index("cat")
    finding = measures.find(compose(atlas, 0, drawn, "white"), 0, meant)
    for nearest in (finding.pixels, finding.look):
        assert nearest.subject == drawn
        assert nearest.other < nearest.own


def test_the_unlabelled_sheets_show_what_the_key_says(atlas: Atlas, names: list[str], tmp_path: Path) -> None:
    images = {(0, i): compose(atlas, 0, i, "white") for i in range(110)}
    paths = confusions.write_unlabelled(atlas, names, images, tmp_path)
    key = [line.split("\t") for line in (tmp_path / "key.tsv").read_text("utf-8").splitlines()]
    assert [int(number) for number, _, _ in key] == list(range(1, 111))
    shown = [names.index(name) for _, name, _ in key]
    assert sorted(shown) == list(range(110)) != shown
    assert len(paths) == 2
    sheet = np.asarray(Image.open(paths[0]).convert("RGB"))
    cell = confusions.SHEET_CELL
    lines = np.lib.stride_tricks.sliding_window_view(sheet, cell, axis=1)  # [y, x, channel, cell]
    for number in (0, 13, 107):
        drawn = np.asarray(
            Image.fromarray(confusions.window(atlas, images[0, shown[number]])).resize(
                (cell, cell), Image.Resampling.LANCZOS
            )
        )
        middle = cell // 2
        rows, columns = np.nonzero((lines == drawn[middle].T).all((2, 3)))
        places = zip(rows - middle, columns, strict=True)
        assert any((sheet[y : y + cell, x : x + cell] == drawn).all() for y, x in places)


def test_the_command_writes_the_table_and_the_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, sheet = tmp_path / "table.md", tmp_path / "sheet.png"
    confusions.main(out=table, sheet=sheet, subjects=["red heart", "broken heart", "moai"], top=4)
    lines = table.read_text("utf-8").splitlines()
    assert table.read_text("utf-8") in capsys.readouterr().out
    assert len(lines) == 2 + 4
    assert lines[2].startswith("| red heart | classic | broken heart (classic) |") or lines[2].startswith(
        "| broken heart | classic | red heart (classic) |"
    )
    assert Image.open(sheet).width > 12 * confusions.SHEET_CELL


def test_what_a_bundle_draws_is_compared_with_its_own_drawing_too(bundle: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    confusions.main(bundle=bundle, out=table, subjects=["red heart", "fish", "crown"], unlabelled=tmp_path / "sheets")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.read_text("utf-8").splitlines()]
    assert rows[0].count("its own") == 2
    assert sorted(row[0] for row in rows[2:]) == sorted(["red heart", "fish", "crown"] * 2)
    for row in rows[2:]:
        if row[0] == "red heart":
            assert row[2].startswith("broken heart")
        assert float(row[4]) < float(row[3])
        assert float(row[7]) < float(row[6])
    assert (tmp_path / "sheets" / "1.png").is_file()


@pytest.mark.parametrize("wrong", [{"subjects": ["unicycle"]}, {"colour": "magenta"}, {"styles": ["baroque"]}])
def test_unknown_names_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(typer.BadParameter, match="has no such name"):
        confusions.main(**wrong)
