"""The journal of a batch: which rows are done. A line is on the disk before the next row is begun."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from .errors import RequestError
from .files import write_whole

JOURNAL_NAME = "journal.jsonl"
# What people call the parts of a header.
LABELS = {
    "table_sha256": "table, by its sha256,",
    "zimage_batch": "kind of journal",
    "names": "meaning of sampler names",
}
SCHEMA_VERSION = 1


class Journal:
    """One file, `journal.jsonl`: a header that says what the batch is, then a line a row.

    A row's line is `{"row", "pictures": [file, …]}` or `{"row", "error"}`, with what else there is to say; the last
    line of a row counts. One process at a time may hold it. Use it in a `with` statement.

    Args:
        folder: where the pictures go; it is there.
        header: what the batch is; all of it must be as it was for a batch to go on.
        restart: forget what is done, and remove its pictures.

    Raises:
        RequestError: the folder has a batch that is another one, is held by another process, or is damaged.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], *, restart: bool = False) -> None:
        self.folder = folder
        self.path = folder / JOURNAL_NAME
        self.pictures: dict[int, list[str]] = {}
        self.errors: dict[int, str] = {}
        self._lock = _lock(folder)
        try:
            self._file = self._open({"zimage_batch": SCHEMA_VERSION, **header}, restart)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._lock.close()

    def is_done(self, row: int) -> bool:
        """Whether the pictures of a row are drawn, and still there."""
        return row in self.pictures and all((self.folder / name).is_file() for name in self.pictures[row])

    def add(self, row: int, *, pictures: list[str] | None = None, error: str | None = None, **more: Any) -> None:
        """Say that a row is done, or why it failed; on the disk when this returns."""
        line: dict[str, Any] = {"row": row}
        line |= {"pictures": pictures or []} if error is None else {"error": error}
        self._note(line)
        self._file.write(json.dumps(line | more, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _note(self, line: Mapping[str, Any]) -> None:
        row = line["row"]
        self.pictures.pop(row, None)
        self.errors.pop(row, None)
        if "error" in line:
            self.errors[row] = line["error"]
        else:
            self.pictures[row] = line["pictures"]

    def _open(self, header: dict[str, Any], restart: bool) -> IO[bytes]:
        if self.path.is_file() and not restart:
            self._go_on(header)
        else:
            self._begin(header, restart)
        for leftover in self.folder.glob(".[0-9]*.tmp"):  # of a killed process: ours alone holds the folder now
            leftover.unlink()
        return self.path.open("ab")

    def _begin(self, header: dict[str, Any], restart: bool) -> None:
        old: list[str] = []
        if restart and self.path.is_file():
            # Names alone: a journal is not to reach outside its folder.
            old = [Path(name).name for line in _lines(self.path)[0][1:] for name in line.get("pictures", [])]
        elif next(self.folder.glob("[0-9][0-9][0-9][0-9][0-9]*.png"), None) is not None:
            raise RequestError(
                f"{self.folder}: holds pictures of another batch and no {JOURNAL_NAME}; choose another folder"
            )
        write_whole(self.path, json.dumps(header, ensure_ascii=False).encode() + b"\n")
        for name in old:
            (self.folder / name).unlink(missing_ok=True)
            (self.folder / name).with_suffix(".json").unlink(missing_ok=True)

    def _go_on(self, header: dict[str, Any]) -> None:
        lines, whole = _lines(self.path)
        if not lines or "zimage_batch" not in lines[0]:
            raise RequestError(f"{self.path}: expected a batch's journal, got something else; choose another folder")
        for name in sorted(header.keys() | lines[0].keys()):
            was, now = lines[0].get(name), header.get(name)
            if was != now:
                raise RequestError(
                    f"{self.folder}: expected the {LABELS.get(name, name)} that its batch was begun with, {was!r}, got "
                    f"{now!r}; give the same again to go on, choose another folder, or draw all anew with --restart"
                )
        for line in lines[1:]:
            self._note(line)
        if whole < self.path.stat().st_size:
            # The line that a killed process was writing; its row is drawn again.
            os.truncate(self.path, whole)


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The journal's lines, and how many bytes they are: a last one without its end was cut off and is left out."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    try:
        lines = [json.loads(line) for line in content[:whole].split(b"\n")[:-1]]
        for line in lines[1:]:
            if not isinstance(line["row"], int) or not ("pictures" in line or "error" in line):
                raise ValueError(f"{line} is no row")
    except (ValueError, TypeError, KeyError) as error:
        raise RequestError(
            f"{path}: was damaged ({error}); choose another folder, and keep this one's pictures"
        ) from error
    return lines, whole


def _lock(folder: Path) -> IO[bytes]:
    """Hold the folder until the file is closed, or the process ends however it does."""
    file = (folder / f".{JOURNAL_NAME}.lock").open("wb")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no such lock on this system: two batches in one folder are then the caller's to avoid
        pass
    except BlockingIOError:
        file.close()
        raise RequestError(
            f"{folder}: another batch is being drawn there; wait for it, or choose another folder"
        ) from None
    return file
