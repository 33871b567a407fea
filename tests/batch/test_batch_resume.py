"""Resumed batches: rows that count as done, and rows that are drawn again after changes of tables, inputs and LoRAs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from batch_helpers import DEFAULTS, draw_all, journal_lines, write
from lora_files import random_lora_of
from PIL import Image

import zimage_rt
from zimage_rt.batch import plan as batch_plan
from zimage_rt.batch.batch import Batch, BatchOptions
from zimage_rt.batch.plan import plan_rows
from zimage_rt.batch.rows import RowContent, row_seed
from zimage_rt.batch.table import Row, read_table
from zimage_rt.bundle.verify import hash_file
from zimage_rt.errors import RequestError
from zimage_rt.image.formats import is_whole


def test_a_changed_lora_is_another_batch(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    table = write(tmp_path / "p.csv", "prompt\na cat\na dog\n")
    file = random_lora_of(engine.manifest, tmp_path / "style.safetensors", seed=1)
    other = random_lora_of(engine.manifest, tmp_path / "other.safetensors", seed=2)
    try:
        engine.load_lora(file, 0.5)
        draw_all(engine, table, tmp_path / "out")
        header = journal_lines(tmp_path / "out")[0]
        assert header["loras"] == [
            {
                "name": "style",
                "weight": 0.5,
                "sha256": hash_file(file).sha256,
                "settings_sha256": "",
                "strict": True,
            }
        ]
        engine.unload_lora("style")
        shutil.copy(other, file)  # the same name, another style
        engine.load_lora(file, 0.5)
        with pytest.raises(RequestError, match="expected the LoRAs, with the hashes of their files,"):
            draw_all(engine, table, tmp_path / "out")
    finally:
        for name in list(engine.loras):
            engine.unload_lora(name)


def test_a_changed_input_image_is_drawn_again(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    for name in ("a", "b", "c"):
        red.save(tmp_path / f"{name}.png")
    table = write(tmp_path / "p.csv", "prompt,image,strength\na cat,a.png,0.3\na dog,b.png,0.3\na cat,c.png,0.3\n")
    draw_all(engine, table, tmp_path / "out", defaults={**DEFAULTS, "num_inference_steps": 4})
    assert journal_lines(tmp_path / "out")[1]["inputs"] == {"image": hash_file(tmp_path / "a.png").sha256}
    before = (tmp_path / "out" / "00002.png").read_bytes()
    blue.save(tmp_path / "b.png")
    (tmp_path / "c.png").unlink()  # contradicts nothing that was drawn from it
    tried, work = draw_all(engine, table, tmp_path / "out", defaults={**DEFAULTS, "num_inference_steps": 4})
    assert tried == [2]
    assert work.notes == ["1 rows are drawn again, because their input images were changed: 2"]
    assert (tmp_path / "out" / "00002.png").read_bytes() != before
    assert draw_all(engine, table, tmp_path / "out", defaults={**DEFAULTS, "num_inference_steps": 4})[0] == []


def test_a_changed_image_of_an_option_is_another_batch(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    table = write(tmp_path / "p.csv", "prompt\na cat\n")
    options = {"defaults": {**DEFAULTS, "image": tmp_path / "a.png"}}
    draw_all(engine, table, tmp_path / "out", **options)
    assert draw_all(engine, table, tmp_path / "out", **options)[0] == []
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "a.png")
    with pytest.raises(RequestError, match="expected the options, with the hashes of their files,"):
        draw_all(engine, table, tmp_path / "out", **options)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_image_that_is_not_whole_is_drawn_again(engine: zimage_rt.Engine, tmp_path: Path, suffix: str) -> None:
    table, out = write(tmp_path / "p.csv", "prompt\n" + "a cat\n" * 6), tmp_path / "out"
    draw_all(engine, table, out, format=suffix)
    files = [out / f"{number:05d}.{suffix}" for number in range(1, 7)]
    whole = [file.read_bytes() for file in files]
    files[0].write_bytes(b"")
    files[1].write_bytes(whole[1][: len(whole[1]) // 2])
    files[2].write_bytes(whole[2][:-20] + bytes(20))  # as some file systems leave a file after a power loss
    files[3].unlink()
    Image.open(files[4]).rotate(90).save(files[4])  # somebody's own change: it is theirs
    mine = files[4].read_bytes()
    tried, work = draw_all(engine, table, out, format=suffix)
    # A WebP file says only how long it is.
    assert tried == ([1, 2, 4] if suffix == "webp" else [1, 2, 3, 4])
    assert "images are gone or cut off" in work.notes[0]
    assert files[4].read_bytes() == mine
    assert files[0].read_bytes()[:200] == whole[0][:200]
    assert draw_all(engine, table, out, format=suffix)[0] == []


def test_a_row_added_moved_changed_or_removed(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    table, out = tmp_path / "p.csv", tmp_path / "out"
    write(table, "SKU,prompt,price\nA1,a cat,9\nB2,a dog,8\nC3,a panda,7\n")
    assert draw_all(engine, table, out)[0] == [1, 2, 3]
    before = {path.name: path.read_bytes() for path in out.glob("*.png")}
    # C3 moves up and costs more, B2's prompt is changed where it stands, A1 is gone, D4 is new.
    write(table, "SKU,prompt,price\nC3,a panda,6.5\nB2,a red dog,8\nD4,a fox,5\n")
    tried, work = draw_all(engine, table, out)
    assert tried == [2, 4]
    assert [row.number for row in work.rows] == [3, 2, 4]
    assert [note for note in work.notes if "no longer" in note] == [
        "1 rows of the journal are no longer in the table; their images stay: 00001.png"
    ]
    for name in ("00001.png", "00003.png"):
        assert (out / name).read_bytes() == before[name]
    lines = {line["row"]: line for line in journal_lines(out)[1:]}
    assert lines[3]["extra"] == {"SKU": "C3", "price": "6.5"}
    assert lines[2]["prompt"] == "a red dog"
    assert lines[2]["seeds"] == [row_seed(0, 2)]
    assert lines[4]["seeds"] == [row_seed(0, 4)]
    assert draw_all(engine, table, out)[0] == []


def test_alike_rows_keep_their_other_columns() -> None:
    def read(row: Row) -> RowContent:
        return RowContent(row.values["prompt"], {"sku": row.values["sku"]})

    def table(*pairs: str) -> list[Row]:
        return [Row(i + 1, i + 2, {"prompt": pair[0], "sku": pair[1]}) for i, pair in enumerate(pairs)]

    lines = {n: {"key": "p", "extra": {"sku": sku}} for n, sku in ((1, "x"), (2, "y"))}
    plan = plan_rows(table("pz", "px", "py", "qw"), read, lines)
    assert [row.number for row in plan.rows] == [3, 1, 2, 4]
    assert (plan.known, plan.removed) == ({1, 2}, ())
    plan = plan_rows(table("py"), read, lines)
    assert ([row.number for row in plan.rows], plan.removed) == ([2], (1,))


def test_ten_thousand_rows_are_looked_at_once_each(
    engine: zimage_rt.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each other row: the start of a large batch takes time in proportion to it."""
    count = 10_000
    table = read_table(write(tmp_path / "p.csv", "prompt,SKU\n" + "".join(f"cat {i},{i}\n" for i in range(count))))
    options = BatchOptions(defaults=DEFAULTS, name="{SKU}.png")
    looked: list[str] = []

    def look(path: Path, size: int) -> bool:
        looked.append(path.name)
        return True

    monkeypatch.setattr(batch_plan, "is_whole", look)
    work = Batch(engine, table, tmp_path / "out", options)
    with work.journal as journal:
        journal.add_lines(
            {
                "row": row.number,
                "key": work._contents[row.number].key,
                "pictures": [f"{row.values['SKU']}.png"],
                "sizes": [1],
                "inputs": {},
                "extra": {"SKU": row.values["SKU"]},
            }
            for row in work.rows[:-1]
        )
    work = Batch(engine, table, tmp_path / "out", options)
    with work.journal:
        assert [row.number for row in work.remaining] == [count]
        assert [row.number for row in work.remaining] == [count]
    assert looked == [f"{i}.png" for i in range(count - 1)]


# Names


def test_columns_name_the_files(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    text = "SKU,prompt,张数\nA-1,a cat,\n苹果 2,a dog,2\n"
    table, out = write(tmp_path / "p.csv", text), tmp_path / "out"
    draw_all(engine, table, out, name="{SKU}.jpg", sidecar=False)
    names = ["A-1.jpg", "苹果 2-000.jpg", "苹果 2-001.jpg"]
    assert sorted(path.name for path in out.glob("*.jpg")) == names
    assert [Image.open(out / name).format for name in names] == ["JPEG"] * 3
    # A row more, above the others: theirs stay.
    write(table, "SKU,prompt,张数\nB-0,a fox,\nA-1,a cat,\n苹果 2,a dog,2\n")
    assert draw_all(engine, table, out, name="{SKU}.jpg", sidecar=False)[0] == [3]
    assert (out / "B-0.jpg").is_file()


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("sku,prompt\na,x\nb,x\na,y\n", "{sku}.png", "rows 1 (line 2) and 3 (line 4) would both be 'a'"),
        ("sku,prompt\nA,x\na,y\n", "{sku}.png", "would both be 'a'"),
        ("sku,prompt,num_images\na-001,x,1\na,y,2\n", "{sku}", "would both be 'a-001'"),
        ("sku,prompt\na,x\n,y\n", "{sku}.png", "row 2 (line 3): name: expected text for {sku}, got None"),
        ("sku,prompt\n../a,x\n", "{sku}.png", "without path parts"),
        ("sku,prompt\na\\b,x\n", "{sku}.png", "without path parts"),
        ("sku,prompt\n.a,x\n", "{sku}.png", "neither begins nor ends with a dot"),
        ("sku,prompt\nCON,x\n", "{sku}.png", "Windows"),
        (f"sku,prompt\n{'猫' * 61},x\n", "{sku}.png", "at most 180 bytes"),
        ("sku,prompt\na,x\n", "{sku}/{prompt}.png", "without path parts"),
        ("sku,prompt\na,x\n", "{ean}.png", "name: there is no column 'ean'"),
        ("sku,prompt\na,x\n", "{sku", "name: "),
        ("sku,prompt\na,x\n", "all.png", None),
        ("sku,prompt\na,x\nb,x\n", "all.png", "would both be 'all'"),
    ],
)
def test_names_are_checked_before_anything_is_drawn(
    engine: zimage_rt.Engine, tmp_path: Path, text: str, name: str, message: str | None
) -> None:
    table = read_table(write(tmp_path / "p.csv", text))
    options = BatchOptions(defaults=DEFAULTS, name=name)
    if message is None:
        Batch(engine, table, tmp_path / "out", options).journal.__exit__()
        return
    with pytest.raises(RequestError) as caught:
        Batch(engine, table, tmp_path / "out", options)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_file_of_somebody_else_is_not_replaced(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    table = write(tmp_path / "p.csv", "sku,prompt\na,x\nb,y\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")  # the goods' own photograph
    with pytest.raises(RequestError, match=r"b\.png is there already, and not of this batch"):
        draw_all(engine, table, tmp_path, name="{sku}.png")
    assert Image.open(tmp_path / "b.png").size == (8, 8)
    (tmp_path / "b.png").unlink()
    options = BatchOptions(defaults=DEFAULTS, name="{sku}.png")
    work = Batch(engine, read_table(table), tmp_path, options)
    with work.journal:
        work.draw(work.rows[0])
        # As if the process were killed between an image and its line.
        shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    kept = (tmp_path / "journal.jsonl").read_bytes()
    assert draw_all(engine, table, tmp_path, name="{sku}.png")[0] == [2]
    (tmp_path / "journal.jsonl").write_bytes(kept)
    work = Batch(engine, read_table(table), tmp_path, options, restart=True)
    with work.journal:
        assert [path.name for path in tmp_path.glob("*.png")] == ["b.png"]
        assert [work.draw(row) for row in work.remaining]
    assert draw_all(engine, table, tmp_path, name="{sku}.png")[0] == []


# The journal


def test_a_journal_of_an_older_version_is_refused_with_the_reason(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    table = write(tmp_path / "p.csv", "prompt\na cat\n")
    out = tmp_path / "out"
    out.mkdir()
    old = [
        {"zimage_batch": 1, "table_sha256": "a", "template": None, "options": {}, "seed": 0, "loras": {"style": 1.0}},
        {"row": 1, "pictures": ["00001.png"], "prompt": "a cat", "seeds": [1], "timings": {}},
    ]
    (out / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    (out / "00001.png").touch()
    with pytest.raises(RequestError, match="older zimage_rt, whose journal does not say which LoRAs and input images"):
        draw_all(engine, table, out)
    work = Batch(engine, read_table(table), out, BatchOptions(defaults=DEFAULTS), restart=True)
    with work.journal:
        assert not (out / "00001.png").exists()
        assert [row.number for row in work.remaining] == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}\nnot JSON\n", "was damaged"),
        (b"5\n", "line 1 is no object"),
        (b"[]\n{}\n", "line 1 is no object"),
        (b"{}\n", "expected a batch's journal"),
        (b"", "expected a batch's journal"),
        (b'{"zimage_batch": 3}\n', "expected a journal of version 2, got 3; upgrade"),
        (b'{"zimage_batch": {}}\n', "expected a journal of version 2, got {}"),
        (b"[" * 100_000 + b"\n", "was damaged"),
        (b"\xff\xfe\n", "was damaged"),
        *(
            (b'{"zimage_batch": 2}\n' + line + b"\n", "is no row")
            for line in (
                b"{}",
                b'{"row": true, "error": "x", "key": "k"}',
                b'{"row": 0, "error": "x", "key": "k"}',
                b'{"row": 1, "error": 5, "key": "k"}',
                b'{"row": 1, "error": "x"}',
                b'{"row": 1, "key": "k", "pictures": "a.png", "sizes": [1], "inputs": {}, "extra": {}}',
                b'{"row": 1, "key": "k", "pictures": ["a.png"], "sizes": [], "inputs": {}, "extra": {}}',
                b'{"row": 1, "key": "k", "pictures": ["a.png"], "sizes": ["1"], "inputs": {}, "extra": {}}',
                b'{"row": 1, "key": "k", "pictures": ["a.png"], "sizes": [1], "inputs": {"image": 1}, "extra": {}}',
                b'{"row": 1, "key": "k", "pictures": ["a.png"], "sizes": [1], "inputs": {}, "extra": []}',
                b'{"claims": [1]}',
            )
        ),
    ],
)
def test_a_journal_that_is_none_is_refused(
    engine: zimage_rt.Engine, tmp_path: Path, content: bytes, message: str
) -> None:
    table = write(tmp_path / "p.csv", "prompt\na cat\n")
    (tmp_path / "journal.jsonl").write_bytes(content)
    with pytest.raises(RequestError) as caught:
        draw_all(engine, table, tmp_path)
    assert message in str(caught.value)
    assert (tmp_path / "journal.jsonl").read_bytes() == content


def test_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    content = path.read_bytes()
    size = len(content)
    assert is_whole(path, size)
    assert is_whole(path, size + 5)  # another size, but an image: somebody's own
    spoiled = bytearray(content)
    spoiled[size // 2] ^= 255
    path.write_bytes(spoiled)
    assert is_whole(path, size)  # its end is there: damage inside is for `read_record` to find
    assert not is_whole(path, size + 5)
    path.write_bytes(content[:-1])
    assert not is_whole(path, size - 1)
    path.unlink()
    assert not is_whole(path, size)
    path.mkdir()
    assert not is_whole(path, size)


def test_a_row_with_fewer_images_leaves_none_of_the_old_ones(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for count in (3, 1, 2):
        draw_all(engine, write(tmp_path / "p.csv", f"prompt,num_images\na panda,{count}\n"), out)
        assert len(list(out.glob("*.png"))) == len(list(out.glob("*.json"))) == count


def test_a_journal_with_a_name_that_no_file_can_have_is_refused(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    table, out = write(tmp_path / "p.csv", "prompt\na panda\n"), tmp_path / "out"
    draw_all(engine, table, out)
    path = out / "journal.jsonl"
    content = path.read_text()
    for name in ("00001\\ud83d.png", "00001\\u0000.png", ""):
        path.write_text(content.replace("00001.png", name))
        for restart in (False, True):
            with pytest.raises(RequestError, match="was damaged"):
                Batch(engine, read_table(table), out, BatchOptions(defaults=DEFAULTS), restart=restart)
    assert (out / "00001.png").is_file()
