"""A new bundle takes the old one's place at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from zimage_rt.export import replace_folder
from zimage_rt.export.errors import ExportError
from zimage_rt.export.replace_folder import replacing

from zimage_rt.bundle.folders import find_leftovers


def put(out: Path, text: str) -> None:
    with replacing(out) as folder:
        (folder / "manifest.json").write_text(text)


@pytest.mark.parametrize("exchanges", [True, False])
def test_the_new_bundle_replaces_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    if not exchanges:  # as on a file system that cannot
        monkeypatch.setattr(replace_folder, "exchange", lambda one, other: False)
    for text in ("1", "2"):
        put(tmp_path / "bundle", text)
        assert (tmp_path / "bundle" / "manifest.json").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_bundle_stands_there_at_every_instant(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    put(out, "0")
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    if not replace_folder.exchange(one, other):
        pytest.skip("this file system cannot exchange names")
    missing, stop = [], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            try:
                (out / "manifest.json").stat()
            except FileNotFoundError:
                missing.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(200):
        put(out, str(i))
    stop.set()
    watcher.join()
    assert not missing
    assert (out / "manifest.json").read_text() == "199"


def test_a_failed_export_leaves_the_old_bundle(tmp_path: Path) -> None:
    put(tmp_path / "bundle", "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "bundle"):
        raise ZeroDivisionError
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text("a file"), lambda path: (path / "photos").mkdir(parents=True)]
)
def test_what_is_no_bundle_is_left_alone(tmp_path: Path, make) -> None:
    make(tmp_path / "bundle")
    with pytest.raises(ExportError, match="is not a bundle; it is left alone"):
        put(tmp_path / "bundle", "new")
    assert len(list(tmp_path.iterdir())) == 1


def test_what_killed_exports_left_is_found_and_removed(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    put(out, "old")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = [tmp_path / f".bundle.new-{ended.pid}-abc", tmp_path / f".bundle.old-{ended.pid}"]
    alive = tmp_path / f".bundle.new-{os.getpid()}-abc"
    other = tmp_path / f".bundle2.new-{ended.pid}-abc"
    for path in (*dead, alive, other):
        path.mkdir()
    assert find_leftovers(out) == sorted(dead)
    put(out, "new")
    assert not any(path.exists() for path in dead)
    assert alive.is_dir() and other.is_dir()


def test_an_old_bundle_caught_between_two_renames_is_put_back(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    put(out, "old")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    out.rename(tmp_path / f".bundle.old-{ended.pid}")
    with pytest.raises(ZeroDivisionError), replacing(out):
        raise ZeroDivisionError
    assert (out / "manifest.json").read_text() == "old"
