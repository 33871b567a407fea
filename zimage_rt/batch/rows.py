"""Conversion of a table's rows to requests: columns are request fields, other columns are for templates."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks import shown
from ..errors import RequestError
from ..request.codec import IMAGES, parts_of, read_fields
from ..request.types import GenerateRequest
from ..request.values import FILE, WHOLE, read_value
from .columns import check_extra, field_of, is_own_name
from .table import Row, Table


class Template:
    """A text with columns in braces: `a {animal} on a {colour} background`; `{{` and `}}` are literal braces.

    Args:
        text: the template.
        what: its name in errors.

    Raises:
        RequestError: braces are unbalanced, or have more than a column's name in them.
    """

    def __init__(self, text: str, what: str = "template") -> None:
        self._what = what
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise RequestError(f"{what}: {error}; write {{{{ and }}}} for braces that are text") from error
        for _, name, spec, conversion in self._parts:
            if name is not None and (not name or spec or conversion):
                raise RequestError(f"{what}: expected a column's name in braces, got {text!r}")
        self.text = text
        self.columns = tuple(name for _, name, _, _ in self._parts if name is not None)

    def fill(self, values: Mapping[str, Any]) -> str:
        """Fill in the values of a row. Raises RequestError if the row lacks one."""
        filled = []
        for literal, name, _, _ in self._parts:
            filled.append(literal)
            if name is None:
                continue
            value = values.get(name)
            if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
                raise RequestError(f"{self._what}: expected text for {{{name}}}, got {shown(value)}")
            filled.append(str(value).strip())
        return "".join(filled)


@dataclasses.dataclass(frozen=True)
class RowContent:
    """The identity of a row, and its other columns.

    Attributes:
        key: hash of the columns that its images and file names depend on; rows with one key differ only in their seeds.
        extra: the other columns, for the journal.
    """

    key: str
    extra: Mapping[str, Any]


class RowReader:
    """Converts a table's rows to requests.

    Args:
        table: the rows.
        template: template of the prompt, in place of the column `prompt`.
        defaults: request fields that rows can override.
        seed: the base of the seeds of rows without one, see `row_seed`.
        name: template of a row's file names; its columns may have any name.

    Raises:
        RequestError: a column looks like a misspelt request field, or there is no prompt.
    """

    def __init__(
        self,
        table: Table,
        template: Template | None,
        defaults: Mapping[str, Any],
        seed: int,
        name: Template | None = None,
    ) -> None:
        self._folder = table.path.parent
        self._template = template
        self._name = name
        self._defaults = dict(defaults)
        self._seed = seed
        self._columns_are_checked = table.columns is not None
        if table.columns is not None:
            self._check([column for column in table.columns if column])

    def request(self, row: Row) -> GenerateRequest:
        """The request of a row. Raises RequestError, with the invalid column."""
        if row.problem is not None:
            raise RequestError(row.problem)
        values = _flatten_parts(row.values)
        if not self._columns_are_checked:
            self._check(list(values))
        said: dict[str, Any] = {}
        labels: dict[str, str] = {}
        for column, value in values.items():
            name = self._field(column)
            if name is None or value is None or (self._template is not None and name == "prompt"):
                continue
            said[name], labels[name] = value, column
        fields = self._defaults | {"seed": row_seed(self._seed, row.number)} | read_fields(said, self._folder, labels)
        if self._template is not None:
            fields["prompt"] = self._template.fill(row.values)
        if not str(fields.setdefault("prompt", "")).strip() and not _may_omit_prompt(fields):
            raise RequestError("prompt: expected what to draw, got nothing")
        return GenerateRequest(**fields)

    def content(self, row: Row) -> RowContent:
        """The content of a row, even of one that cannot be drawn."""
        values = _flatten_parts(row.values)
        used: dict[str, Any] = {} if row.problem is None else {"problem": row.problem}
        extra: dict[str, Any] = {}
        for column, value in values.items():
            field = self._field(column)
            if field is None:
                extra[column] = value
            else:
                used[f"field {field}"] = value
        for template in (self._template, self._name):
            used |= {f"column {column}": row.values.get(column) for column in (template.columns if template else ())}
        return RowContent(hash_json(used), extra)

    def inputs(self, row: Row) -> dict[str, Path]:
        """The image files that a row names, by field, without invalid paths, which fail later."""
        found: dict[str, Path] = {}
        for column, value in row.values.items():
            name = self._field(column)
            if name is not None and name in IMAGES and value is not None:
                with contextlib.suppress(RequestError):
                    found[name] = read_value(column, FILE, value, self._folder)
        return found

    def count(self, row: Row) -> int:
        """The number of images of a row; 1 if its value is no number, with which the row fails later."""
        for column, value in row.values.items():
            if self._field(column) == "num_images" and value is not None:
                try:
                    return read_value(column, WHOLE, value)
                except RequestError:
                    return 1
        return self._defaults.get("num_images", 1)

    def _field(self, column: str) -> str | None:
        """A column's request field, or None. An alias of a field that the template uses is no field."""
        if self._template is not None and column in self._template.columns and not is_own_name(column):
            return None
        return field_of(column)

    def _check(self, columns: Sequence[str]) -> None:
        taken = {template.text: template.columns for template in (self._template, self._name) if template is not None}
        used = {column for names in taken.values() for column in names}
        for what, template in (("template", self._template), ("name", self._name)):
            missing = [name for name in (() if template is None else template.columns) if name not in columns]
            if missing:
                raise RequestError(f"{what}: there is no column {missing[0]!r}; there are: {', '.join(columns)}")
        seen: dict[str, str] = {}
        for column in columns:
            field = self._field(column)
            if field is None:
                if column not in used:
                    check_extra(column)
            elif field in seen:
                raise RequestError(f"columns {seen[field]!r} and {column!r}: expected one of them; they are the same")
            else:
                seen[field] = column
        if self._template is None and "prompt" not in seen:
            raise RequestError(f"expected a column `prompt`, or a --template; there are: {', '.join(columns)}")
        if self._template is not None and "prompt" in seen and seen["prompt"] not in used:
            raise RequestError("template: takes the place of the column `prompt`; put {prompt} in, or take it out")


def row_seed(base: int, number: int) -> int:
    """The seed of row `number`: 32 bits of a hash of base and number.

    With base + number, batches of neighbouring seeds would share most of their noise. So would the images of a row
    with several and those of the next rows.
    """
    return int.from_bytes(hashlib.sha256(f"{base}:{number}".encode()).digest()[:4])


def hash_json(value: Any) -> str:
    """SHA-256 (hex) of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _may_omit_prompt(fields: Mapping[str, Any]) -> bool:
    """Whether a request may be without a prompt: it has an image, or guidance; `resolve` checks the rest."""
    return bool(fields.get("guidance_scale")) or any(fields.get(name) is not None for name in IMAGES)


def _flatten_parts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten `{"second_pass": {"scale": 2}}` to `{"second_pass.scale": 2}`; other objects are unchanged."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value and parts_of(name):
            flat |= {f"{name}.{part}": item for part, item in value.items()}
        else:
            flat[name] = value
    return flat
