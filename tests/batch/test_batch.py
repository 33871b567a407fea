"""Batches: common formats of tables, requests from rows, and a batch that is killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_helpers import DEFAULTS, TINY, journal_lines, write, zimage
from PIL import Image

import zimage_rt
from zimage_rt.batch.batch import Batch, BatchOptions
from zimage_rt.batch.journal import Journal
from zimage_rt.batch.rows import RowReader, Template, row_seed
from zimage_rt.batch.table import Table, read_table
from zimage_rt.errors import RequestError
from zimage_rt.metadata.image_file import read_record
from zimage_rt.request.types import SecondPass


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "zimage_rt.cli.main", "batch", *map(str, arguments)]


def zimage_batch(*arguments: object) -> subprocess.CompletedProcess[str]:
    return zimage("batch", *arguments)


# Tables


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_of_every_kind_is_read(tmp_path: Path, encoding: str, delimiter: str, end: str) -> None:
    lines = [
        delimiter.join(["prompt", "seed", "备注"]),
        delimiter.join(["一只熊猫，蓝色背景", "7", ""]),
        "",
        delimiter.join([f'"a cat{delimiter} ""blue""{end}and red"', "", "好"]),
        delimiter * 2,
        delimiter.join(["白色背景上的苹果"]),
    ]
    table = read_table(write(tmp_path / "prompts.csv", end.join(lines) + end, encoding))
    assert table.columns == ("prompt", "seed", "备注")
    assert [row.values for row in table.rows] == [
        {"prompt": "一只熊猫，蓝色背景", "seed": "7"},
        {"prompt": f'a cat{delimiter} "blue"{end}and red', "备注": "好"},
        {"prompt": "白色背景上的苹果"},
    ]
    assert [row.line for row in table.rows] == [2, 4, 7]


def test_a_list_of_prompts_is_a_table_of_one_column(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "p.csv", 'prompt\na cat, blue; or not\n"a ""big"" dog, red"\n'))
    assert [row.values["prompt"] for row in table.rows] == ["a cat, blue; or not", 'a "big" dog, red']


def test_json_lines_are_read_and_bad_ones_are_rows_that_fail(tmp_path: Path) -> None:
    text = '{"prompt": "一只猫", "seed": 3}\n\n{"prompt": \n[1]\n{"prompt": "a\\u2028b"}\n'
    rows = read_table(write(tmp_path / "p.jsonl", text, "utf-8-sig")).rows
    assert rows[0].values == {"prompt": "一只猫", "seed": 3}
    assert [row.line for row in rows] == [1, 3, 4, 5]
    assert rows[1].problem is not None
    assert rows[1].problem.startswith("is not JSON")
    assert rows[2].problem == "expected an object, got list"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got no rows"),
        (b"prompt,seed\n", "got no rows"),
        (b"prompt,prompt\na,b\n", "column 'prompt' is there twice"),
        (b'prompt,seed\n"a cat,1\nb,2\n', "line 2: unexpected end of data"),
        (b"prompt\n\xff\xff\xff\n", "its text is not UTF-8, UTF-16 or GB18030"),
    ],
)
def test_another_file_is_refused_as_a_table(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(content)
    with pytest.raises(RequestError) as caught:
        read_table(path)
    assert message in str(caught.value)


def test_an_encoding_can_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "prompt\nun café\n", "latin-1")
    assert read_table(path, "latin-1").rows[0].values == {"prompt": "un café"}
    cat = write(tmp_path / "cat.csv", "prompt\na 猫\n", "gbk")  # as bytes also UTF-8: "a è"
    with pytest.raises(RequestError, match=r"may be UTF-8, with 'è' in it, or GB18030, with '猫'; .* --encoding"):
        read_table(cat)
    assert read_table(cat, "gbk").rows[0].values == {"prompt": "a 猫"}
    assert read_table(write(cat, "prompt\nun café, très bon\n")).rows[0].values == {"prompt": "un café, très bon"}
    assert read_table(write(cat, "prompt\n猫\n")).rows[0].values == {"prompt": "猫"}
    with pytest.raises(RequestError, match="encoding: expected a name"):
        read_table(path, "klingon")
    with pytest.raises(RequestError, match="its text is not ascii"):
        read_table(path, "ascii")
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        read_table(tmp_path / "none.csv")


# Rows


def table_of(tmp_path: Path, text: str, name: str = "p.csv") -> Table:
    return read_table(write(tmp_path / name, text))


def requests(table: Table, template: str | None = None, **defaults: Any) -> list[zimage_rt.GenerateRequest]:
    reader = RowReader(table, None if template is None else Template(template), defaults, seed=5)
    return [reader.request(row) for row in table.rows]


def test_columns_are_request_fields_by_their_types(tmp_path: Path) -> None:
    text = (
        "prompt;negative_prompt;steps;seed;guidance_scale;sigmas;image;second_pass.scale;second_pass.method;vae\n"
        "a cat;text;8.0;18446744073709551615;1.5;1.0 0.5,0.25;in/red.png;1.5;latent;full\n"
        "a dog;;;;;;;;;\n"
    )
    first, second = requests(table_of(tmp_path, text), num_inference_steps=4, guidance_scale=0.5)
    assert first == zimage_rt.GenerateRequest(
        "a cat",
        "text",
        num_inference_steps=8,
        seed=2**64 - 1,
        guidance_scale=1.5,
        sigmas=(1.0, 0.5, 0.25),
        image=tmp_path / "in" / "red.png",
        second_pass=SecondPass(scale=1.5, method="latent"),
        vae="full",
    )
    assert second == zimage_rt.GenerateRequest(
        "a dog", num_inference_steps=4, guidance_scale=0.5, seed=row_seed(5, 2), second_pass=None
    )


def test_json_values_are_request_fields_too(tmp_path: Path) -> None:
    line = {"prompt": "a cat", "sigmas": [1, 0.5], "second_pass": {"scale": 2}, "seed": 7, "vae": None}
    (request,) = requests(table_of(tmp_path, json.dumps(line), "p.jsonl"))
    assert request == zimage_rt.GenerateRequest("a cat", sigmas=(1.0, 0.5), second_pass=SecondPass(2.0), seed=7)


def test_flags_and_names_are_columns(tmp_path: Path) -> None:
    columns = "prompt,truncate_prompt,shift,sampler,fit_size,batch_noise,denoise"
    text = f"{columns}\na,Yes,2.5,lcm,nearest,comfyui,0.5\nb,0,,,,,\n"
    first, second = requests(table_of(tmp_path, text))
    assert (first.truncate_prompt, first.shift, first.sampler) == (True, 2.5, "lcm")
    assert (first.fit_size, first.batch_noise, first.denoise) == ("nearest", "comfyui", 0.5)
    assert second.truncate_prompt is False
    with pytest.raises(RequestError, match="truncate_prompt: expected true or false, got 'maybe'"):
        requests(table_of(tmp_path, "prompt,truncate_prompt\na,maybe\n"))


def test_no_text_goes_with_guidance_or_an_image(tmp_path: Path) -> None:
    (request,) = requests(table_of(tmp_path, "prompt,guidance_scale\n,1.5\n"))
    assert request.prompt == ""
    (request,) = requests(table_of(tmp_path, "prompt,image\n,red.png\n"))
    assert request.prompt == ""


def test_templates_take_columns(tmp_path: Path) -> None:
    table = table_of(tmp_path, "animal,colour,seed\npanda,blue,1\n 猫 ,red,\n")
    prompts = [request.prompt for request in requests(table, "a {animal} on {{a}} {colour} background, {animal}")]
    assert prompts == ["a panda on {a} blue background, panda", "a 猫 on {a} red background, 猫"]
    # Braces in a prompt of a table are text.
    assert requests(table_of(tmp_path, "prompt\na {cat}\n"))[0].prompt == "a {cat}"


def test_seeds_follow_from_the_base_and_the_row() -> None:
    seeds = [row_seed(base, row) for base in range(4) for row in range(1, 201)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert row_seed(0, 2) == 2468915676  # written in journals: it must stay as it is


@pytest.mark.parametrize(
    ("text", "template", "message"),
    [
        ("prompt,stepz\na,1\n", None, "column 'stepz': expected a request field (prompt, negative_prompt, height"),
        ("prompt,latents\na,1\n", None, "column 'latents'"),
        ("animal\ncat\n", "a {animal} on {colour}", "template: there is no column 'colour'; there are: animal"),
        ("seed\n1\n", None, "expected a column `prompt`, or a --template"),
        ("prompt,animal\na,b\n", "a {animal}", "takes the place of the column `prompt`"),
        ("prompt,steps,num_inference_steps\na,1,1\n", None, "columns 'steps' and 'num_inference_steps'"),
        ("animal\ncat\n", "a {animal", "template: "),
        ("animal\ncat\n", "a {animal!r}", "expected a column's name in braces"),
        ("animal\ncat\n", "a {animal.__class__}", "there is no column 'animal.__class__'"),
        ("animal\ncat\n", "a {}", "expected a column's name in braces"),
        ("prompt,seed\na,seven\n", None, "seed: expected a whole number, got 'seven'"),
        ("prompt,seed\na,7.5\n", None, "seed: expected a whole number, got '7.5'"),
        ("prompt,steps\na,inf\n", None, "steps: expected a whole number, got 'inf'"),
        ("prompt,strength\na,much\n", None, "strength: expected a number, got 'much'"),
        ("prompt,sigmas\na,1 x\n", None, "sigmas: expected numbers, got '1 x'"),
        ("prompt,seed\n,7\n", None, "prompt: expected what to draw, got nothing"),
        ("prompt,seed\na,7,8\n", None, "expected 2 cells, got 3"),
        ("animal,x\n,1\n", "a {animal} {x}", "template: expected text for {animal}, got None"),
    ],
)
def test_rows_that_make_no_request(tmp_path: Path, text: str, template: str | None, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        requests(table_of(tmp_path, text), template)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": 5}, "prompt: expected text, got 5"),
        ({"prompt": "a", "seed": True}, "seed: expected a whole number, got True"),
        ({"prompt": "a", "seed": [1]}, "seed: expected a whole number, got [1]"),
        ({"prompt": "a", "sigmas": 1}, "sigmas: expected numbers, got 1"),
        ({"prompt": "a", "second_pass": {"size": 2}}, "column 'second_pass.size'"),
        ({"seed": 1}, "expected a column `prompt`"),
    ],
)
def test_json_rows_that_make_no_request(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        requests(table_of(tmp_path, json.dumps(line), "p.jsonl"))
    assert message in str(caught.value)


# The journal


HEADER = {"bundle": "a", "seed": 0}


def done(*names: str, **more: Any) -> dict[str, Any]:
    """A line of a row that was drawn, but for its number."""
    return {"key": "k", "pictures": list(names), "sizes": [1] * len(names), "inputs": {}, "extra": {}, **more}


def test_a_truncated_line_is_ignored(tmp_path: Path) -> None:
    with Journal(tmp_path, HEADER) as journal:
        journal.add(1, **done("00001.png"))
        journal.add(2, error="RequestError: no", key="k")
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"row": 3, "pict')
    (tmp_path / ".00003.png.77.tmp").touch()
    (tmp_path / ".sku 9.png.77-140.tmp").touch()
    (tmp_path / ".mine.tmp").touch()
    with Journal(tmp_path, HEADER) as journal:
        assert journal.images == {1: ["00001.png"]}
        assert journal.errors == {2: "RequestError: no"}
        assert path.read_bytes() == whole
        assert [path.name for path in tmp_path.glob("*.tmp")] == [".mine.tmp"]


def test_a_folder_belongs_to_one_batch(tmp_path: Path) -> None:
    with Journal(tmp_path, HEADER), pytest.raises(RequestError, match="another batch is being drawn there"):
        Journal(tmp_path, HEADER)
    with pytest.raises(RequestError, match=r"expected the bundle .* begun with, 'a', got 'b'; .* --restart"):
        Journal(tmp_path, HEADER | {"bundle": "b"})
    (tmp_path / "journal.jsonl").unlink()
    (tmp_path / "00001.png").touch()
    with pytest.raises(RequestError, match="holds images of another batch"):
        Journal(tmp_path, HEADER)


# Batches


def test_the_engines_own_faults_fail_a_row_and_not_the_batch(
    engine: zimage_rt.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine.run

    def faulty(request: zimage_rt.GenerateRequest, **more: Any) -> zimage_rt.GenerateResult:
        if request.prompt == "b":
            raise RuntimeError("the library fell over")
        return run(request, **more)

    monkeypatch.setattr(engine, "run", faulty)
    table = table_of(tmp_path, "prompt\na\nb\nc\n")
    work = Batch(engine, table, tmp_path / "out", BatchOptions(defaults=DEFAULTS))
    with work.journal as journal:
        drawn = [work.draw(row) for row in work.remaining]
        assert drawn[1] == "RuntimeError: the library fell over"
        assert sorted(journal.images) == [1, 3]
    monkeypatch.undo()
    work = Batch(engine, table, tmp_path / "out", BatchOptions(defaults=DEFAULTS))
    with work.journal as journal:
        assert [row.number for row in work.remaining] == [2]  # failed rows are tried again
        assert not isinstance(work.draw(work.remaining[0]), str)
        assert journal.errors == {}
        assert work.remaining == []
    with pytest.raises(RequestError, match="height: expected"):
        Batch(engine, table, tmp_path / "none", BatchOptions(defaults={"height": 100}))
    assert not (tmp_path / "none").exists()


def test_an_image_of_a_batch_is_the_one_drawn_alone(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    table = table_of(tmp_path, "prompt,num_images\n一只熊猫,1\na cat,2\n")
    work = Batch(engine, table, tmp_path / "out", BatchOptions(defaults=DEFAULTS, seed=3, sidecar=False))
    with work.journal:
        for row in table.rows:
            work.draw(row)
    names = sorted(path.name for path in (tmp_path / "out").glob("*[!k]"))
    assert names == ["00001.png", "00002-000.png", "00002-001.png", "journal.jsonl"]
    alone = engine.generate("一只熊猫", seed=row_seed(3, 1), **DEFAULTS)
    assert (np.asarray(Image.open(tmp_path / "out" / "00001.png")) == alone.images[0]).all()
    assert read_record(tmp_path / "out" / "00002-001.png").request["seed"] == row_seed(3, 2) + 1


@pytest.fixture
def two_hundred(tmp_path: Path) -> Path:
    animals = ("panda", "猫咪", "penguin", "dog")
    rows = "".join(f"{animals[i % 4]},{i}\n" for i in range(200))
    return write(tmp_path / "prompts.csv", "animal,number\n" + rows, "gbk")


def test_a_batch_killed_twice_draws_every_row_exactly_once(bundle: Path, two_hundred: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (two_hundred, "-b", bundle, "-o", out, "--template", "a {animal} {number}", "--seed", 9, *TINY)
    printed: list[int] = []
    for until in (50, 120, None):
        process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(json.loads(line)["row"])
            if len(printed) == until:
                process.send_signal(signal.SIGKILL)
                break
        _, errors = process.communicate()
        assert process.returncode == (0 if until is None else -signal.SIGKILL), errors
    header, *lines = journal_lines(out)
    assert header["options"] == DEFAULTS
    assert [line["row"] for line in lines] == list(range(1, 201))  # nothing twice, nothing lost
    # What was drawn but not yet printed when the process was killed is not printed again.
    assert len(set(printed)) == len(printed)
    names = [f"{row:05d}" for row in range(1, 201)]
    present = sorted(path.name for path in out.iterdir() if not path.name.startswith(".journal"))
    assert present == sorted([f"{name}{end}" for name in names for end in (".json", ".png")] + ["journal.jsonl"])
    for row in (1, 50, 51, 120, 121, 200):
        record = read_record(out / f"{row:05d}.png")
        assert record.request["prompt"] == f"a {('panda', '猫咪', 'penguin', 'dog')[(row - 1) % 4]} {row - 1}"
        assert record.request["seed"] == row_seed(9, row)
    # All is done: the same command draws nothing.
    run = zimage_batch(*arguments)
    assert (run.returncode, run.stdout) == (0, "")
    assert "200 of 200 rows are done already" in run.stderr
    # Another seed is another batch, unless it is said.
    write(two_hundred, "animal,number\npanda,1\n")
    run = zimage_batch(*arguments, "--seed", 10)
    assert run.returncode == 1
    assert "--restart" in run.stderr
    assert len(list(out.glob("*.png"))) == 200
    run = zimage_batch(*arguments, "--seed", 10, "--restart")
    assert run.returncode == 0, run.stderr
    assert [path.name for path in out.glob("*.png")] == ["00001.png"]


def test_ctrl_c_stops_a_batch_in_one_line(bundle: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "p.csv", "prompt\n" + "".join(f"cat {i}\n" for i in range(500)))
    arguments = command(table, "-b", bundle, "-o", tmp_path / "out", *TINY)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "zimage: stopped"
    assert "of 500 rows are done; the same command resumes" in errors


LOST = """
import os, signal, sys, time
from zimage_rt.batch.batch import Batch

class Pressed:
    def __del__(self):  # Python ignores what is raised here
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

draw = Batch.draw
def interrupted(self, row):
    Pressed()
    return draw(self, row)
Batch.draw = interrupted
from zimage_rt.cli.main import main
main()
"""


def test_a_ctrl_c_that_python_drops_stops_a_batch_too(bundle: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "p.csv", "prompt\na cat\na dog\n")
    arguments = ["batch", table, "-b", bundle, "-o", tmp_path / "out", *TINY]
    run = subprocess.run([sys.executable, "-c", LOST, *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 130, run.stderr
    assert "1 of 2 rows are done; the same command resumes" in run.stderr


def test_failed_rows_are_told_and_the_rest_is_drawn(bundle: Path, tmp_path: Path) -> None:
    text = "prompt;seed;height\na cat;7;64\na dog;seven;64\na panda;8;100\n一只猫;9;80\n"
    out = tmp_path / "out"
    run = zimage_batch(write(tmp_path / "p.csv", text), "-b", bundle, "-o", out, *TINY)
    assert run.returncode == 1
    records = [json.loads(line) for line in run.stdout.splitlines()]
    assert [(record["row"], record["seed"], record["prompt"]) for record in records] == [
        (1, 7, "a cat"),
        (4, 9, "一只猫"),
    ]
    assert Image.open(records[1]["file"]).size == (64, 80)
    assert set(records[0]["timings"]) == {"encode_prompt", "denoise", "decode", "total"}
    errors = {line["row"]: line["error"] for line in journal_lines(out)[1:] if "error" in line}
    assert errors[2] == "RequestError: seed: expected a whole number, got 'seven'"
    assert errors[3].startswith("RequestError: height: expected 64 to 2048")
    assert "row 2 (line 3): RequestError: seed" in run.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_lines_stay_on_standard_output_beside_a_live_bar(bundle: Path, tmp_path: Path) -> None:
    import pty

    table = write(tmp_path / "p.csv", "prompt\na cat\na dog\n")
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        command(table, "-b", bundle, "-o", tmp_path / "out", *TINY), stdout=subprocess.PIPE, stderr=terminal, text=True
    )
    os.close(terminal)
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    assert process.wait() == 0
    assert [json.loads(line)["row"] for line in lines] == [1, 2]
    assert b"2/2" in os.read(master, 1 << 16)
    os.close(master)


def test_lines_are_json_where_standard_output_cannot_hold_a_prompt(bundle: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "p.csv", "prompt\n一只猫 \U0001f600\n")
    run = subprocess.run(
        command(table, "-b", bundle, "-o", tmp_path / "out", *TINY),
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "gbk"},
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.decode("gbk"))["prompt"] == "一只猫 \U0001f600"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(lambda path: path.write_text("seed\n1\n"), "expected a column `prompt`"), (Path.unlink, "cannot be read")],
)
def test_errors_are_one_line(bundle: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    path = write(tmp_path / "p.csv", "prompt\na cat\n")
    spoil(path)
    run = zimage_batch(path, "-b", bundle, "-o", tmp_path / "out")
    assert run.returncode == 1
    assert message in run.stderr.replace("\n", " ")
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()
