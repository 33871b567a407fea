"""The journal of a batch: which rows are done. A line is on the disk before the next row is begun."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from .. import checks
from ..atomic_write import atomic_write, named_error
from ..bundle.json_codec import parse_json
from ..checks import shown
from ..errors import RequestError
from ..image.formats import FORMATS, sidecar_path

log = logging.getLogger(__name__)

JOURNAL_NAME = "journal.jsonl"
# What people call the parts of a header.
LABELS = {"loras": "LoRAs, with the hashes of their files,", "options": "options, with the hashes of their files,"}
# 2: a row is known by what it is drawn from, and its line holds the sizes of its images and the hashes of its inputs.
SCHEMA_VERSION = 2
# How a file is called while it is written (`files.write_whole`).
TEMPORARY = re.compile(r"\.\d+(-\d+)?\.tmp$")
# Keys of a row's line beside `row`, and what each must be; the first two, or an error, must be there.
LINE_KEYS: Mapping[str, type] = {"pictures": list, "sizes": list, "key": str, "inputs": dict, "extra": dict}


class Journal:
    """One file, `journal.jsonl`: a header that says what the batch is, then a line a row.

    A row's line is `{"row", "key", "pictures": [file, …], "sizes": [bytes, …], "inputs", "extra"}` or
    `{"row", "key", "error"}`, with what else there is to say; the last line of a row counts. A line
    `{"claims": [file, …]}` says which names the batch is going to write. One process at a time may hold the journal.
    Use it in a `with` statement.

    Args:
        folder: where the images go; it is there.
        header: what the batch is; all of it must be as it was for a batch to go on.
        restart: forget what is done, and remove its images.

    Attributes:
        lines: the last line of each row, by its number.
        claims: names that are the batch's, drawn or not.

    Raises:
        RequestError: the folder has a batch that is another one or of an older version, is held by another process, or
            is damaged.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], *, restart: bool = False) -> None:
        self.folder = folder
        self.path = folder / JOURNAL_NAME
        self.lines: dict[int, dict[str, Any]] = {}
        self.claims: set[str] = set()
        self._lock = _lock(folder)
        try:
            self._file = self._open(json.loads(_encoded({"zimage_batch": SCHEMA_VERSION, **header})), restart)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._lock.close()

    @property
    def pictures(self) -> dict[int, list[str]]:
        """The images of each row that was drawn."""
        return {row: line["pictures"] for row, line in self.lines.items() if "error" not in line}

    @property
    def errors(self) -> dict[int, str]:
        """Why each row failed that did."""
        return {row: line["error"] for row, line in self.lines.items() if "error" in line}

    def add(self, row: int, *, error: str | None = None, **more: Any) -> None:
        """Say that a row is done, or why it failed; on the disk when this returns."""
        self.add_lines([{"row": row, **({} if error is None else {"error": error}), **more}])

    def add_lines(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write lines of rows, or of claims, all at once."""
        encoded = [_encoded(line) for line in lines]
        for line in encoded:
            self._remember(json.loads(line))
        self._append(b"".join(encoded))

    def _append(self, content: bytes) -> None:
        descriptor = self._file.fileno()
        before = os.fstat(descriptor).st_size
        try:
            while content:
                content = content[os.write(descriptor, content) :]
            os.fsync(descriptor)
        except OSError as error:
            # A full disk: half a line would spoil the lines after it.
            with contextlib.suppress(OSError):
                os.truncate(descriptor, before)
            raise named_error(error, self.path) from error

    def _remember(self, line: dict[str, Any]) -> None:
        if "row" in line:
            self.lines[line["row"]] = line
            self.claims.update(line.get("pictures", ()))
        else:
            self.claims.update(line["claims"])

    def _open(self, header: dict[str, Any], restart: bool) -> IO[bytes]:
        if self.path.is_file() and not restart:
            self._resume(header)
        else:
            self._create(header, restart)
        for leftover in self.folder.glob(".*.tmp"):  # of a killed process: ours alone holds the folder now
            if TEMPORARY.search(leftover.name):
                leftover.unlink()
        return self.path.open("ab", buffering=0)

    def _create(self, header: dict[str, Any], restart: bool) -> None:
        old: list[str] = []
        claims: list[str] = []
        if restart and self.path.is_file():
            lines = _lines(self.path)[0][1:]
            # Names alone: a journal is not to reach outside its folder.
            old = [Path(name).name for line in lines for name in line.get("pictures", [])]
            claims = [name for line in lines for name in line.get("claims", [])]
        elif any(path.suffix.lower() in FORMATS for path in self.folder.glob("[0-9][0-9][0-9][0-9][0-9]*")):
            raise RequestError(
                f"{self.folder}: holds images of another batch and no {JOURNAL_NAME}; choose another folder"
            )
        # A killed process may have left an image under a claimed name: it stays the batch's.
        atomic_write(self.path, _encoded(header) + (_encoded({"claims": claims}) if claims else b""))
        self.claims.update(claims)
        for name in old:
            (self.folder / name).unlink(missing_ok=True)
            sidecar_path(self.folder / name).unlink(missing_ok=True)

    def _resume(self, header: dict[str, Any]) -> None:
        lines, whole = _lines(self.path)
        if not lines or "zimage_batch" not in lines[0]:
            raise RequestError(f"{self.path}: expected a batch's journal, got something else; choose another folder")
        anew = "choose another folder, or draw all anew with --restart"
        version = lines[0]["zimage_batch"]
        if version != SCHEMA_VERSION:
            problem = (
                "was begun by an older zimage_rt, whose journal does not say which LoRAs and input images its rows "
                f"were drawn with: {anew}, or end it with that version"
            )
            if not isinstance(version, int) or version > SCHEMA_VERSION:
                problem = f"expected a journal of version {SCHEMA_VERSION}, got {shown(version)}; upgrade zimage_rt"
            raise RequestError(f"{self.path}: {problem}")
        for name in sorted(header.keys() | lines[0].keys()):
            was, now = lines[0].get(name), header.get(name)
            if was != now:
                raise RequestError(
                    f"{self.folder}: expected the {LABELS.get(name, name)} that its batch was begun with, {was!r}, got "
                    f"{now!r}; give the same again to go on, {anew}"
                )
        for line in lines[1:]:
            self._remember(line)
        if whole < self.path.stat().st_size:
            # A killed process left half a line; its row is drawn again.
            log.warning("%s: the last line was cut off and is removed", self.path)
            os.truncate(self.path, whole)


def _encoded(line: Mapping[str, Any]) -> bytes:
    """A line of the file. Half a character in it, which UTF-8 cannot hold, is written as JSON's escape."""
    try:
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(line).encode() + b"\n"


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The journal's lines, and how many bytes they are: a last one without its end was cut off and is left out."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    try:
        lines = [parse_json(line, half_pairs=True) for line in content[:whole].split(b"\n")[:-1]]
        for number, line in enumerate(lines):
            if not isinstance(line, dict):
                raise ValueError(f"line {number + 1} is no object")
            if number > 0:
                _check_line(line, lines[0].get("zimage_batch"))
    except ValueError as error:
        raise RequestError(
            f"{path}: was damaged ({error}); choose another folder, and keep this one's images"
        ) from error
    return lines, whole


def _check_line(line: Mapping[str, Any], version: Any) -> None:
    """Raise ValueError unless a line is one of a row or of claims. Version 1 had names alone."""
    if "claims" in line:
        right = _are_names(line["claims"])
    else:
        kinds: dict[str, type] = {"error": str} if "error" in line else {"pictures": list}
        if version == SCHEMA_VERSION:
            kinds |= {"key": str} if "error" in line else LINE_KEYS
        row = line.get("row")
        right = isinstance(row, int) and not isinstance(row, bool) and row > 0
        right = right and all(isinstance(line.get(name), kind) for name, kind in kinds.items())
        right = right and ("pictures" not in kinds or _are_names(line["pictures"]))
        if right and "sizes" in kinds:
            sizes = line["sizes"]
            right = len(sizes) == len(line["pictures"]) and all(type(size) is int for size in sizes)
            right = right and all(isinstance(sha256, str) for sha256 in line["inputs"].values())
    if not right:
        raise ValueError(f"{shown(line)} is no row")


def _are_names(value: Any) -> bool:
    """Whether it is a list of names that a file can have."""
    return isinstance(value, list) and all(isinstance(item, str) and item and _is_name(item) for item in value)


def _is_name(text: str) -> bool:
    try:
        checks.path(text, "name")
    except RequestError:
        return False
    return True


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
