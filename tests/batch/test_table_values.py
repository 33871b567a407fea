"""No value of a row stops a batch or is misread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from batch_helpers import DEFAULTS, TINY, draw_all, journal_lines, write, zimage

import zimage_rt
from zimage_rt.batch.columns import field_of
from zimage_rt.batch.rows import RowReader, Template
from zimage_rt.batch.table import read_table
from zimage_rt.errors import RequestError
from zimage_rt.request.values import FILE, FLAG, NUMBER, NUMBERS, TEXT, WHOLE, read_value

HOSTILE = [
    ('{"prompt": "half \\ud800"}', "RequestError: prompt:"),
    ('{"prompt": "a", "negative_prompt": "half \\udc00 of it"}', "RequestError: negative_prompt:"),
    ('{"prompt": "a", "image": "half \\ud800.png"}', "RequestError: image: expected a path"),
    ('{"prompt": "a", "image": "nul\\u0000.png"}', "RequestError: image: expected a path"),
    ('{"prompt": "a", "image": " "}', "RequestError: image: expected a path"),
    ('{"prompt": "a", "sampler": "\\ud800"}', "RequestError: sampler:"),
    ('{"prompt": "a", "sampler": []}', "RequestError: sampler: expected text, got []"),
    ('{"prompt": "a", "vae": {"tiny": 1}}', "RequestError: vae: expected text, got {'tiny': 1}"),
    ('{"prompt": "a", "guidance_scale": "1+2j"}', "RequestError: guidance_scale: expected a number, got '1+2j'"),
    ('{"prompt": "a", "guidance_scale": true}', "RequestError: guidance_scale: expected a number, got True"),
    ('{"prompt": "a", "guidance_scale": [1]}', "RequestError: guidance_scale: expected a number, got [1]"),
    ('{"prompt": "a", "guidance_scale": 1' + "0" * 390 + "}", "RequestError: guidance_scale: expected a number"),
    ('{"prompt": "a", "seed": 1' + "0" * 500 + "}", "RequestError: is not JSON: a number of 501 digits"),
    ('{"prompt": "a", "seed": 1' + "0" * 5000 + "}", "RequestError: is not JSON: a number of 5001 digits"),
    ('{"prompt": "a", "seed": "1' + "0" * 5000 + '"}', "RequestError: seed: expected a whole number"),
    ('{"prompt": "a", "seed": -1}', "RequestError: seed: expected 0 to"),
    ('{"prompt": "a", "shift": 1e309}', "RequestError: is not JSON: a number is too large"),
    ('{"prompt": "a", "shift": "1e309"}', "RequestError: shift: expected a number, got '1e309'"),
    ('{"prompt": "a", "shift": NaN}', "RequestError: is not JSON: NaN is no number"),
    ('{"prompt": "a", "shift": -Infinity}', "RequestError: is not JSON: -Infinity is no number"),
    ('{"prompt": "a", "prompt": "b"}', "RequestError: is not JSON: key 'prompt' is there twice"),
    (
        '{"prompt": "a", "second_pass": {"scale": 1, "scale": 2}}',
        "RequestError: is not JSON: key 'scale' is there twice",
    ),
    ('{"prompt": "a", "second_pass": {}}', "RequestError: column 'second_pass'"),
    ('{"prompt": "a", "second_pass": []}', "RequestError: column 'second_pass'"),
    ('{"prompt": "a", "second_pass": {"scale": {"x": 1}}}', "RequestError: second_pass.scale: expected a number"),
    ('{"prompt": "a", "truncate_prompt": 1}', "RequestError: truncate_prompt: expected true or false, got 1"),
    ('{"prompt": "a", "sigmas": ["1", "0.5"]}', "RequestError: sigmas: expected numbers, got ['1', '0.5']"),
    ('{"prompt": "a", "sigmas": {"1": 1}}', "RequestError: sigmas: expected numbers"),
    ('{"prompt": 7}', "RequestError: prompt: expected text, got 7"),
    ('{"prompt": "a", "latents": [1]}', "RequestError: column 'latents'"),
    ('{"prompt": "a", "seeed": 7}', "RequestError: column 'seeed'"),
    ('{"prompt": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "RequestError: is not JSON: nested deeper than 32"),
    ('{"prompt": "a", "x": ' + "[" * 50 + "]" * 50 + "}", "RequestError: is not JSON: nested deeper than 32"),
    ('"a"', "RequestError: expected an object, got str"),
    ("\x00", "RequestError: is not JSON"),
]


def test_no_row_stops_the_others_and_every_failure_is_typed(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    lines = [line for line, _ in HOSTILE]
    lines.append('{"prompt": "the last", "备注": "half \\ud83d", "SKU\\udfff": [1, {"a": null}]}')
    table, out = write(tmp_path / "p.jsonl", "\n".join(lines)), tmp_path / "out"
    for _ in range(2):  # the journal can be read again, and a rerun ends as the first run did
        tried, work = draw_all(engine, table, out)
        reasons = work.errors
        assert {
            number: reasons[number][:200]
            for number in reasons
            if not reasons[number].startswith(HOSTILE[number - 1][1])
        } == {}
        assert sorted(reasons) == list(range(1, len(HOSTILE) + 1))
    assert tried == list(range(1, len(HOSTILE) + 1))
    assert max(map(len, reasons.values())) < 3000
    drawn = next(line for line in journal_lines(out)[1:] if "pictures" in line)
    assert drawn["extra"] == {"备注": "half \ud83d", "SKU\udfff": [1, {"a": None}]}


def test_half_a_character_does_not_stop_the_command(bundle: Path, tmp_path: Path) -> None:
    text = '{"prompt": "a cat", "negative_prompt": "\\ud83d"}\n{"prompt": "一只猫 \\ud83d\\ude00", "x": "\\ud800"}\n'
    table = write(tmp_path / "p.jsonl", text)
    for drawn in (1, 0):
        run = zimage("batch", table, "-b", bundle, "-o", tmp_path / "out", *TINY)
        assert run.returncode == 1, run.stderr
        assert "Traceback" not in run.stderr
        assert "row 1 (line 1): RequestError: negative_prompt" in run.stderr
        assert [json.loads(line)["prompt"] for line in run.stdout.splitlines()] == ["一只猫 😀"] * drawn


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (WHOLE, " +8 ", 8),
        (WHOLE, "8.0", 8),
        (WHOLE, "８", 8),
        (WHOLE, 8.0, 8),
        (WHOLE, "1e3", 1000),
        (WHOLE, "18446744073709551615", 2**64 - 1),
        (WHOLE, "8.5", None),
        (WHOLE, "1_000", None),
        (WHOLE, "1,000", None),
        (WHOLE, "٣", None),
        (WHOLE, "2²", None),
        (WHOLE, "0x10", None),
        (WHOLE, 2.0**60, None),
        (WHOLE, None, None),
        (NUMBER, "1.5", 1.5),
        (NUMBER, ".5", 0.5),
        (NUMBER, "１．５", 1.5),
        (NUMBER, "1,5", None),
        (NUMBER, "nan", None),
        (NUMBER, "infinity", None),
        (NUMBER, "1_0.5", None),
        (NUMBER, False, None),
        (NUMBERS, "1, 0.5;0.25", (1.0, 0.5, 0.25)),
        (NUMBERS, [1, 0.5], (1.0, 0.5)),
        (NUMBERS, [True], None),
        (NUMBERS, "", None),
        (NUMBERS, " 1  0.5\t,\n.25 ", (1.0, 0.5, 0.25)),
        (NUMBERS, "１，0.5；0.25", (1.0, 0.5, 0.25)),
        (NUMBERS, "1;;x", None),
        (NUMBERS, "1,,0.5", None),
        (NUMBERS, "1, ,0.5", None),
        (NUMBERS, "1，;0.5", None),
        (NUMBERS, "1,0.5,", None),
        (NUMBERS, ",1", None),
        (FLAG, "Yes", True),
        (FLAG, "0", False),
        (FLAG, True, True),
        (FLAG, 1.0, None),
        (FLAG, [], None),
        (TEXT, "", ""),
        (TEXT, 1, None),
        (TEXT, ["a"], None),
        (FILE, " a.png ", Path("in/a.png")),
        (FILE, "\ud800", None),
        (FILE, 5, None),
    ],
)
def test_cells_are_read_by_their_kind(kind: str, value: Any, expected: Any) -> None:
    if expected is None:
        with pytest.raises(RequestError, match=f"column: expected {kind}, got"):
            read_value("column", kind, value, Path("in"))
    else:
        found = read_value("column", kind, value, Path("in"))
        assert (type(found), found) == (type(expected), expected)


# Columns by the names that people give them


@pytest.mark.parametrize(
    ("column", "field"),
    [
        ("Prompt", "prompt"),
        ("Negative Prompt", "negative_prompt"),
        ("negative-prompt", "negative_prompt"),
        ("STEPS", "num_inference_steps"),
        ("提示词", "prompt"),
        ("负面提示词", "negative_prompt"),
        ("种子", "seed"),
        ("宽度", "width"),
        ("高", "height"),
        ("步数", "num_inference_steps"),
        ("引导系数", "guidance_scale"),
        ("张数", "num_images"),
        ("图片", "image"),
        ("遮罩", "mask"),
        ("强度", "strength"),
        ("采样器", "sampler"),
        ("调度器", "schedule"),
        ("Second_Pass.Scale", "second_pass.scale"),
        ("CFG", None),
        ("SKU", None),
        ("价格", None),
        ("latents", None),
    ],
)
def test_columns_by_other_names(column: str, field: str | None) -> None:
    assert field_of(column) == field


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("prompt,CFG Scale", "subtract 1 and call it guidance_scale"),
        ("prompt,cfg", "subtract 1 and call it guidance_scale"),
        ("prompt,数量", "call it 张数 for images"),
        ("prompt,promt", "'prompt' is one"),
        ("prompt,Prompt", "columns 'prompt' and 'Prompt': expected one of them"),
        ("prompt,提示词", "columns 'prompt' and '提示词'"),
        ("提示,x", "column '提示': expected a request field"),
    ],
)
def test_columns_that_may_mean_something_else_are_refused(tmp_path: Path, header: str, message: str) -> None:
    table = read_table(write(tmp_path / "p.csv", f"{header}\na,1\n"))
    with pytest.raises(RequestError) as caught:
        RowReader(table, None, DEFAULTS, 0)
    assert message in str(caught.value)


def test_a_templates_words_stay_its_own(tmp_path: Path) -> None:
    """A column that a template names is no field by another name for it; by the field's own name it is both."""
    table = read_table(write(tmp_path / "p.csv", "动物,数量,高,seed\n猫,3,高的,7\n"))
    (row,) = table.rows
    request = RowReader(table, Template("{高}{动物}{数量}只，{seed}"), {}, 0).request(row)
    assert (request.prompt, request.seed, request.height) == ("高的猫3只，7", 7, None)


def test_a_line_says_what_stands_between_cells(tmp_path: Path) -> None:
    for text in ("sep=;\r\nprompt;seed\r\na, b;7\r\n", '"sep=;"\nprompt;seed\n"a, b";7\n'):
        table = read_table(write(tmp_path / "p.csv", text, "utf-8-sig"))
        assert table.columns == ("prompt", "seed")
        assert [(row.number, row.line, row.values) for row in table.rows] == [(1, 3, {"prompt": "a, b", "seed": "7"})]
    table = read_table(write(tmp_path / "p.csv", "sep=|\nprompt|seed\na|7\n"))
    assert table.rows[0].values == {"prompt": "a", "seed": "7"}
    with pytest.raises(RequestError, match="expected sep= with what stands between cells"):
        read_table(write(tmp_path / "p.csv", 'sep="\nprompt\na\n'))


@pytest.mark.parametrize("name", ["p.xls", "p.ods", "p.numbers"])
def test_other_programs_tables_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match=r"expected CSV, \.xlsx or JSON lines; save it as \.xlsx"):
        read_table(write(tmp_path / name, "x"))
