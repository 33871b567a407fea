"""The journal of a batch, which records finished rows. A row's line is on the disk before the next row begins."""

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
# Names of a header's keys in messages.
LABELS = {"loras": "LoRAs, with the hashes of their files,", "options": "options, with the hashes of their files,"}
# Since version 2 rows are identified by content, and a line has the sizes of images and the hashes of inputs.
SCHEMA_VERSION = 2
# Names of temporary files (`atomic_write`).
TEMPORARY = re.compile(r"\.\d+(-\d+)?\.tmp$")
# Keys of a drawn row's line besides `row`, and their types.
LINE_KEYS: Mapping[str, type] = {"pictures": list, "sizes": list, "key": str, "inputs": dict, "extra": dict}


class Journal:
    """The file `journal.jsonl`: a header that describes the batch, then one line per row.

    A row's line is `{"row", "key", "pictures": [file, …], "sizes": [bytes, …], "inputs", "extra"}` or
    `{"row", "key", "error"}`, possibly with other keys; the last line of a row is valid. A line
    `{"claims": [file, …]}` reserves names that the batch will write. Only one process can open the journal at a time.
    Use it in a `with` statement.

    Args:
        folder: the folder of the images, which exists.
        header: the description of the batch, which must be unchanged to resume it.
        restart: discard finished rows and remove their images.

    Attributes:
        lines: the last line of each row, by number.
        claims: file names that belong to the batch, drawn or not.

    Raises:
        RequestError: the folder's batch is another one or of an older version, its journal is damaged, or another
            process has it open.
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
    def images(self) -> dict[int, list[str]]:
        """The file names of the images of each drawn row, by number."""
        return {row: line["pictures"] for row, line in self.lines.items() if "error" not in line}

    @property
    def errors(self) -> dict[int, str]:
        """The errors of failed rows, by number."""
        return {row: line["error"] for row, line in self.lines.items() if "error" in line}

    def add(self, row: int, *, error: str | None = None, **more: Any) -> None:
        """Add a row that is done, or its error; the line is on the disk when this returns."""
        self.add_lines([{"row": row, **({} if error is None else {"error": error}), **more}])

    def add_lines(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines of rows or claims in one write."""
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
            # The disk is full: half a line would damage the lines after it.
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
        for leftover in self.folder.glob(".*.tmp"):  # from a killed process, as only this one holds the folder's lock
            if TEMPORARY.search(leftover.name):
                leftover.unlink()
        return self.path.open("ab", buffering=0)

    def _create(self, header: dict[str, Any], restart: bool) -> None:
        old: list[str] = []
        claims: list[str] = []
        if restart and self.path.is_file():
            lines = _lines(self.path)[0][1:]
            # Only file names, so that a journal cannot reach outside its folder.
            old = [Path(name).name for line in lines for name in line.get("pictures", [])]
            claims = [name for line in lines for name in line.get("claims", [])]
        elif any(path.suffix.lower() in FORMATS for path in self.folder.glob("[0-9][0-9][0-9][0-9][0-9]*")):
            raise RequestError(
                f"{self.folder}: holds images of another batch and no {JOURNAL_NAME}; choose another folder"
            )
        # A killed process may have left an image under a claimed name, which still belongs to the batch.
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
    """Encode a line of the file; lone surrogates, which UTF-8 cannot encode, are JSON escapes."""
    try:
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(line).encode() + b"\n"


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The journal's complete lines, and their size in bytes; a last line that was cut off is left out."""
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
    """Raise ValueError unless a line is a valid row or claims. Rows of version 1 had only the names of images."""
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
    """Whether a value is a list of valid file names."""
    return isinstance(value, list) and all(isinstance(item, str) and item and _is_name(item) for item in value)


def _is_name(text: str) -> bool:
    try:
        checks.path(text, "name")
    except RequestError:
        return False
    return True


def _lock(folder: Path) -> IO[bytes]:
    """Lock the folder until the returned file is closed or the process ends."""
    file = (folder / f".{JOURNAL_NAME}.lock").open("wb")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no such locks on this system: the user must avoid two batches in one folder
        pass
    except BlockingIOError:
        file.close()
        raise RequestError(
            f"{folder}: another batch is being drawn there; wait for it, or choose another folder"
        ) from None
    return file
