"""Matching of a table's rows to a journal's, by content instead of position."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bundle.verify import hash_file
from ..image.formats import is_whole
from .rows import RowContent, hash_json
from .table import Row


@dataclasses.dataclass(frozen=True)
class Plan:
    """A table's rows matched to a journal.

    Attributes:
        rows: the table's rows with their numbers in the batch, which determine their names and seeds.
        contents: the content of each row, by number.
        known: numbers of the rows that are in the journal.
        removed: numbers of drawn rows of the journal that are no longer in the table; their images remain.
    """

    rows: tuple[Row, ...]
    contents: Mapping[int, RowContent]
    known: frozenset[int]
    removed: tuple[int, ...]


def plan_rows(rows: Sequence[Row], read: Callable[[Row], RowContent], lines: Mapping[int, Mapping[str, Any]]) -> Plan:
    """Number the rows of a table so that rows of the journal keep their numbers, in linear time.

    A row is in the journal if its content is, at any position. Of several equal rows the one with the same other
    columns is used, else the first. Any other row gets the number of its position in the table, if that is unused or
    belonged to a removed row: a changed row replaces its old images. Otherwise it gets a new number.
    """
    contents = [read(row) for row in rows]
    exact: dict[tuple[str, str], deque[int]] = defaultdict(deque)
    alike: dict[str, deque[int]] = defaultdict(deque)
    for number, line in lines.items():
        exact[line["key"], hash_json(line.get("extra", {}))].append(number)
        alike[line["key"]].append(number)
    numbers: list[int | None] = [None] * len(rows)
    taken: set[int] = set()
    for found in (
        [exact.get((content.key, hash_json(dict(content.extra)))) for content in contents],
        [alike.get(content.key) for content in contents],
    ):
        for place, candidates in enumerate(found):
            while numbers[place] is None and candidates:
                number = candidates.popleft()
                if number not in taken:
                    numbers[place] = number
                    taken.add(number)
    known = frozenset(taken)
    for place, known_number in enumerate(numbers):
        if known_number is None and place + 1 not in taken:
            numbers[place] = place + 1
    taken.update(number for number in numbers if number is not None)
    unused = (number for number in itertools.count(max(lines, default=0) + 1) if number not in taken)
    numbered = [next(unused) if number is None else number for number in numbers]
    taken.update(numbered)
    return Plan(
        rows=tuple(dataclasses.replace(row, number=number) for row, number in zip(rows, numbered, strict=True)),
        contents=dict(zip(numbered, contents, strict=True)),
        known=known,
        removed=tuple(number for number, line in lines.items() if number not in taken and "error" not in line),
    )


class DoneRows:
    """Checks whether the drawn rows of a journal are still valid."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hashes: dict[Path, str | None] = {}

    def are_whole(self, line: Mapping[str, Any]) -> bool:
        """Whether a row's images exist and are complete."""
        return all(
            is_whole(self._folder / Path(name).name, size)
            for name, size in zip(line["pictures"], line["sizes"], strict=True)
        )

    def has_changed_inputs(self, line: Mapping[str, Any], inputs: Mapping[str, Path]) -> bool:
        """Whether an input image of a row has changed; missing inputs count as unchanged."""
        return any(self._hash(path) not in (None, line["inputs"].get(field)) for field, path in inputs.items())

    def _hash(self, path: Path) -> str | None:
        """The SHA-256 of a file, read once for all rows; None if it cannot be read."""
        if path not in self._hashes:
            try:
                self._hashes[path] = hash_file(path).sha256
            except (OSError, ValueError):
                self._hashes[path] = None
        return self._hashes[path]
