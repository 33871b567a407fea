"""Output files: formats, sidecar records, and outputs that are refused before anything is drawn."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_helpers import TINY, write, zimage
from PIL import Image

import zimage_rt
from zimage_rt.atomic_write import atomic_write, check_folder
from zimage_rt.errors import MetadataError, RequestError
from zimage_rt.image.formats import EXIF_FOLDER, USER_COMMENT, check_quality, encode_image, sidecar_path
from zimage_rt.metadata.a1111 import parameters_text
from zimage_rt.metadata.image_file import read_record
from zimage_rt.metadata.save import check_output

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def result(engine: zimage_rt.Engine) -> zimage_rt.GenerateResult:
    return engine.generate("一只熊猫", seed=7, **SMALL)


@pytest.mark.parametrize(("name", "kind"), [("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")])
def test_other_formats_hold_the_parameters_and_a_sidecar_the_record(
    result: zimage_rt.GenerateResult, tmp_path: Path, name: str, kind: str
) -> None:
    (path,) = result.save(tmp_path / name)
    assert sorted(file.name for file in tmp_path.iterdir()) == [name, f"{name}.json"]
    with Image.open(path) as image:
        assert (image.format, image.size) == (kind, (64, 64))
        comment = image.getexif().get_ifd(EXIF_FOLDER)[USER_COMMENT]
        difference = np.abs(np.asarray(image.convert("RGB"), int) - result.images[0])
    assert difference.mean() < 3
    assert kind == "JPEG" or difference.max() == 0  # every pixel is kept
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == parameters_text(read_record(path))
    assert read_record(path) == read_record(tmp_path / f"{name}.json")
    assert read_record(path).request["prompt"] == "一只熊猫"
    (tmp_path / f"{name}.json").unlink()
    with pytest.raises(MetadataError, match=rf"expected {name}\.json beside it, which holds its record"):
        read_record(path)
    with pytest.raises(MetadataError, match="there is no such file"):
        read_record(tmp_path / "none.jpg")


def test_one_name_in_several_formats_keeps_each_record(
    engine: zimage_rt.Engine, result: zimage_rt.GenerateResult, tmp_path: Path
) -> None:
    jpeg = result.save(tmp_path / "a.jpg")[0]
    png = engine.generate("a cat", seed=8, **SMALL).save(tmp_path / "a.png")[0]
    assert [read_record(path).request["seed"] for path in (jpeg, png)] == [7, 8]
    assert [sidecar_path(path).name for path in (jpeg, png)] == ["a.jpg.json", "a.json"]


def test_quality_is_for_formats_that_have_one(result: zimage_rt.GenerateResult, tmp_path: Path) -> None:
    for suffix in (".jpg", ".webp"):
        sizes = [result.save(tmp_path / f"a{suffix}", quality=quality)[0].stat().st_size for quality in (5, 90, None)]
        assert sizes[0] < sizes[1] < sizes[2]
    for suffix, quality, message in (
        (".png", 90, "a PNG keeps every pixel"),
        (".jpg", 0, "1 to 100, got 0"),
        (".jpg", 101, "1 to 100, got 101"),
        (".webp", True, "1 to 100, got True"),
    ):
        with pytest.raises(RequestError, match=message):
            check_quality(suffix, quality)
    with pytest.raises(RequestError, match="a PNG keeps every pixel"):
        result.save(tmp_path / "folder", quality=90)
    assert not (tmp_path / "folder").exists()


def test_parameters_that_exif_cannot_hold_are_in_the_sidecar_alone() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    long, short = (encode_image(pixels, ".jpg", {}, "猫" * count) for count in (40_000, 4))
    assert len(long) < len(short)
    with pytest.raises(RequestError, match=r"cannot write these pixels as WEBP .* use \.png"):
        encode_image(np.zeros((8, 20_000, 3), np.uint8), ".webp", {}, "")  # at most 16383


# Refused before drawing


@pytest.mark.parametrize(
    ("make", "where", "message"),
    [
        (None, "x.bmp", r"ends in \.png, \.jpg, \.jpeg, \.webp, or a folder, got x\.bmp"),
        (None, "x.pgn", r"got x\.pgn; for a folder of that name, make it first"),
        (lambda folder: (folder / "x.png").mkdir(), "x.png", r"expected an image's file, got the folder .*x\.png"),
        (lambda folder: (folder / "f").touch(), "f/x.png", "expected a folder, got .*/f, which is a file"),
        (lambda folder: (folder / "f").touch(), "f", "expected a folder, got .*/f, which is a file"),
        (lambda folder: (folder / "l").symlink_to("nowhere"), "l/x.png", "l is a link that leads nowhere"),
        (None, "a" * 300 + "/x.png", "is too long a name"),
        (None, "a\0b/x.png", "expected a path"),
        (None, "\ud800/x.png", "expected a path"),
    ],
)
def test_outputs_that_cannot_be_written(
    tmp_path: Path, make: Callable[[Path], object] | None, where: str, message: str
) -> None:
    if make is not None:
        make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RequestError, match=message):
        check_output(tmp_path / where)
    assert sorted(tmp_path.iterdir()) == before


def test_outputs_that_can_be_written_leave_nothing_behind(tmp_path: Path) -> None:
    for where in ("x.png", "new/deeper/x.webp", "folder", "run-1.5", "v2"):
        check_output(tmp_path / where)
    (tmp_path / "x.bmp").mkdir()
    check_output(tmp_path / "x.bmp")  # a folder that is there may be called anything else
    assert [path.name for path in tmp_path.iterdir()] == ["x.bmp"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody may write, also as root")
def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(RequestError, match=r"output: /proc/x cannot be written \(/proc: "):
        check_folder(Path("/proc/x"))


def test_commands_refuse_outputs_before_they_load_an_engine(tmp_path: Path) -> None:
    """The bundle that is named does not exist, and nobody notices."""
    (tmp_path / "file").touch()
    table = write(tmp_path / "p.csv", "prompt\na cat\n")
    bundle = tmp_path / "nowhere"
    for command, message in (
        (("generate", bundle, "-p", "a", "-o", tmp_path / "x.gif"), "got x.gif"),
        (("generate", bundle, "-p", "a", "-o", tmp_path / "file" / "x.png"), "which is a file"),
        (("generate", bundle, "-p", "a", "-o", tmp_path / "x.png", "--quality", 9), "a PNG keeps every pixel"),
        (("explain", bundle, "-p", "a", "-o", tmp_path / "x.jpg"), "ends in .png"),
        (("batch", table, "-b", bundle, "-o", tmp_path / "file"), "which is a file"),
        (("batch", table, "-b", bundle, "-o", tmp_path / "out", "--format", "gif"), "format: expected one of png"),
        (("batch", table, "-b", bundle, "-o", tmp_path / "out", "--format", "png", "--quality", 9), "a PNG keeps"),
        (("batch", table, "-b", bundle, "--name", "{prompt}.jpg", "--format", "webp"), "format: expected that of"),
    ):
        run = zimage(*command)
        assert run.returncode == 1
        assert message in run.stderr
        assert "nowhere" not in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "p.csv"]


FULL = """
import resource, signal, sys
from pathlib import Path
from zimage_rt.atomic_write import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
atomic_write(Path(sys.argv[1]), bytes(100_000))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a limit of file sizes")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    run = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == f"OSError: [Errno 27] File too large: '{path}'"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"none/cat\.png"):
        atomic_write(tmp_path / "none" / "cat.png", b"")


def test_commands_write_other_formats(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    run = zimage("generate", bundle, "-p", "a cat", "--seed", 3, "-o", path, "--quality", 80, *TINY)
    assert run.returncode == 0, run.stderr
    assert Image.open(path).format == "JPEG"
    run = zimage("generate", bundle, "--like", path, "-o", tmp_path / "again.webp", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["same"] is True  # as it was drawn, not as the JPEG shows it
    run = zimage("generate", bundle, "-p", "a", "-p", "b", "-o", tmp_path / "two.webp", *TINY)
    assert run.returncode == 0, run.stderr
    assert sorted(file.name for file in tmp_path.glob("two*.webp")) == ["two-000.webp", "two-001.webp"]
    table = write(tmp_path / "p.csv", "prompt\na cat\n")
    run = zimage("batch", table, "-b", bundle, "-o", tmp_path / "out", "--format", "webp", "--quality", 60, *TINY)
    assert run.returncode == 0, run.stderr
    assert Image.open(tmp_path / "out" / "00001.webp").format == "WEBP"
    assert read_record(tmp_path / "out" / "00001.webp").request["prompt"] == "a cat"


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_full_disk_leaves_the_image_and_its_record_as_they_were(
    result: zimage_rt.GenerateResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    result.save(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(before) == 2
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:  # the sidecar fits, the image does not
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            dataclasses.replace(result, images=255 - result.images).save(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_file_of_somebody_elses_is_no_sidecar(bundle: Path, result: zimage_rt.GenerateResult, tmp_path: Path) -> None:
    own = tmp_path / "keep.json"
    own.write_text('{"mine": 1}')
    with pytest.raises(RequestError, match=r"keep.json is there and is no record of an image"):
        result.save(tmp_path / "keep.png")
    command = [sys.executable, "-m", "zimage_rt.cli.main", "generate", bundle, "-p", "a", "-o", tmp_path / "keep.png"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 1 and "keep.json is there" in run.stderr
    assert own.read_text() == '{"mine": 1}'
    assert [file.name for file in tmp_path.iterdir()] == ["keep.json"]
    result.save(tmp_path / "keep.png", sidecar=False)
    assert own.read_text() == '{"mine": 1}'


def test_a_file_of_somebody_elses_in_a_folder_is_passed_over(result: zimage_rt.GenerateResult, tmp_path: Path) -> None:
    own = tmp_path / f"000-{result.seeds[0]}.json"
    own.write_text('{"mine": 1}')
    assert [path.name for path in result.save(tmp_path)] == [f"001-{result.seeds[0]}.png"]
    assert own.read_text() == '{"mine": 1}'
