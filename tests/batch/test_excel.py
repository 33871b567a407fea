"""Excel's own files as tables: values as text, formulas as Excel computed them, and what cannot be read by its cell."""

from __future__ import annotations

import datetime
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from batch_helpers import TINY, journal_lines, zimage

from zimage_rt.batch import excel
from zimage_rt.batch.table import read_table
from zimage_rt.errors import RequestError


def save(path: Path, *rows: list[Any], title: str = "Sheet", formats: dict[str, str] | None = None) -> Path:
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = title
    for row in rows:
        sheet.append(row)
    for cell, number_format in (formats or {}).items():
        sheet[cell].number_format = number_format
    book.save(path)
    return path


def test_values_are_text_as_excel_shows_them(tmp_path: Path) -> None:
    day = datetime.datetime(2026, 11, 27)
    path = save(
        tmp_path / "p.xlsx",
        [],
        ["SKU", "提示词", "种子", "引导", "day", "yes", "EAN"],
        [42, "一只猫\n蓝色背景", 7, 1.5, day, True, 4006381333931],
        [],
        ["A-1", " a dog ", 8.0, 0.1, day.replace(hour=9, minute=5), False, None],
        formats={"A3": "00000"},
    )
    table = read_table(path)
    assert table.columns == ("SKU", "提示词", "种子", "引导", "day", "yes", "EAN")
    assert [(row.number, row.line) for row in table.rows] == [(1, 3), (2, 5)]
    assert table.rows[0].values == {
        "SKU": "00042",
        "提示词": "一只猫\n蓝色背景",
        "种子": "7",
        "引导": "1.5",
        "day": "2026-11-27",
        "yes": "true",
        "EAN": "4006381333931",
    }
    assert table.rows[1].values == {
        "SKU": "A-1",
        "提示词": " a dog ",
        "种子": "8",
        "引导": "0.1",
        "day": "2026-11-27 09:05:00",
        "yes": "false",
    }


def with_cached_value(path: Path, value: str) -> None:
    """Put the value that Excel would have computed beside the only formula of a file."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "xl/worksheets/sheet1.xml":
                assert data.count(b"</f><v />") + data.count(b"</f><v></v>") + data.count(b"</f><v/>") == 1
                for empty in (b"</f><v />", b"</f><v></v>", b"</f><v/>"):
                    data = data.replace(empty, f"</f><v>{value}</v>".encode())
            new.writestr(name, data)
    path.write_bytes(content.getvalue())


def test_formulas_are_what_excel_computed(tmp_path: Path) -> None:
    path = save(tmp_path / "p.xlsx", ["prompt", "seed"], ["a cat", "=3+4"], ["a dog", 8])
    problem = "cell B2: its formula has no value yet; open the file in Excel and save"
    assert [row.problem for row in read_table(path).rows] == [problem, None]
    with_cached_value(path, "7")
    assert [row.values["seed"] for row in read_table(path).rows] == ["7", "8"]


def test_cells_that_cannot_be_read_fail_their_row(tmp_path: Path) -> None:
    path = save(tmp_path / "p.xlsx", ["prompt", "seed"], ["a", 2**60], ["#N/A", 1], ["b", 2], ["c", 3, "more"])
    problems = [row.problem or "" for row in read_table(path).rows]
    assert problems[0].startswith("cell B2: Excel keeps 15 digits")
    assert problems[1].startswith("cell A3: holds Excel's error #N/A")
    assert problems[2] == ""
    assert problems[3].startswith("expected 2 cells, got 3")


def test_a_sheet_is_chosen_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "p.xlsx", ["prompt"], ["first"])
    book = openpyxl.load_workbook(path)
    book.create_sheet("第二").append(["prompt"])
    book["第二"].append(["second"])
    book.save(path)
    assert read_table(path).rows[0].values == {"prompt": "first"}
    assert read_table(path, sheet="第二").rows[0].values == {"prompt": "second"}
    with pytest.raises(RequestError, match=r"sheet: expected one of 'Sheet', '第二' of p\.xlsx, got 'x'"):
        read_table(path, sheet="x")
    with pytest.raises(RequestError, match="encoding: expected CSV"):
        read_table(path, "gbk")
    (tmp_path / "p.csv").write_text("prompt\na\n")
    with pytest.raises(RequestError, match=r"sheet: expected a table in \.xlsx"):
        read_table(tmp_path / "p.csv", sheet="x")


@pytest.mark.parametrize("cut", [0, 10, 1000, -1])
def test_damaged_files_are_refused(tmp_path: Path, cut: int) -> None:
    path = save(tmp_path / "p.xlsx", ["prompt"], ["a"])
    content = path.read_bytes()
    path.write_bytes(content[:cut] if cut >= 0 else content.replace(b"PK\x01\x02", b"PK\x01\x03"))
    with pytest.raises(RequestError, match="cannot be read as an Excel file"):
        read_table(path)
    path.write_text("prompt\na\n")  # a CSV file with another's name
    with pytest.raises(RequestError, match="cannot be read as an Excel file"):
        read_table(path)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "p.xlsx", ["prompt"], ["a"])
    monkeypatch.setattr(excel, "MAX_BYTES", 1 << 10)
    with pytest.raises(RequestError, match="expected at most 0 MiB unpacked"):
        read_table(path)


def test_without_openpyxl_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "p.xlsx", ["prompt"], ["a"])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(RequestError, match=r"pip install 'zimage-rt\[xlsx\]'"):
        read_table(path)


def test_goods_of_a_sheet_become_named_images(bundle: Path, tmp_path: Path) -> None:
    path = save(
        tmp_path / "goods.xlsx",
        ["SKU", "价格", "提示词", "种子"],
        ["A-1", 9.9, "一只熊猫", 3],
        ["B-2", 15, "一只狐狸", 4],
        title="商品",
    )
    out = tmp_path / "out"
    command = ("batch", path, "-b", bundle, "-o", out, "--name", "{SKU}.png", "--sheet", "商品", *TINY)
    run = zimage(*command)
    assert run.returncode == 0, run.stderr
    assert "no request fields, and kept in the journal: SKU, 价格" in run.stderr
    assert sorted(file.name for file in out.glob("*.png")) == ["A-1.png", "B-2.png"]
    extras = [line["extra"] for line in journal_lines(out)[1:] if "row" in line]
    assert extras == [{"SKU": "A-1", "价格": "9.9"}, {"SKU": "B-2", "价格": "15"}]
