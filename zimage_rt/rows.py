"""Rows of a table to requests: columns are request fields, by their own types; templates take the rest."""

from __future__ import annotations

import dataclasses
import hashlib
import string
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import RequestError
from .metadata import PICTURES
from .request import GenerateRequest
from .tables import Row, Table

# What people write for a field.
ALIASES = {"steps": "num_inference_steps"}

TEXT, WHOLE, NUMBER, NUMBERS, FILE = "text", "a whole number", "a number", "numbers", "a path"
FLAG = "true or false"


class Template:
    """A prompt with columns in it: `a {animal} on a {colour} background`; `{{` and `}}` are braces."""

    def __init__(self, text: str) -> None:
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise RequestError(f"template: {error}; write {{{{ and }}}} for braces that are text") from error
        for _, name, spec, conversion in self._parts:
            if name is not None and (not name or spec or conversion):
                raise RequestError(f"template: expected a column's name in braces, got {text!r}")
        self.text = text
        self.columns = tuple(name for _, name, _, _ in self._parts if name is not None)

    def fill(self, values: Mapping[str, Any]) -> str:
        """The prompt of a row. Raises RequestError where the row has nothing to put in."""
        filled = []
        for literal, name, _, _ in self._parts:
            filled.append(literal)
            if name is None:
                continue
            value = values.get(name)
            if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
                raise RequestError(f"template: expected text for {{{name}}}, got {value!r}")
            filled.append(str(value).strip())
        return "".join(filled)


class RowReader:
    """Makes requests of a table's rows.

    Args:
        table: the rows.
        template: makes the prompt, in place of the column `prompt`.
        defaults: request fields that a row may say otherwise.
        seed: what the seeds of rows without one are made of.

    Raises:
        RequestError: a column is neither a request field nor in the template, or there is no prompt.
    """

    def __init__(self, table: Table, template: Template | None, defaults: Mapping[str, Any], seed: int) -> None:
        self._folder = table.path.parent
        self._template = template
        self._defaults = dict(defaults)
        self._seed = seed
        self._kinds = column_kinds()
        self._columns_are_checked = table.columns is not None
        if table.columns is not None:
            self._check([name for name in table.columns if name])

    def request(self, row: Row) -> GenerateRequest:
        """The request of a row. Raises RequestError, with the column that is wrong."""
        if row.problem is not None:
            raise RequestError(row.problem)
        values = dict(_flattened(row.values))
        if not self._columns_are_checked:
            self._check(list(values))
        fields = self._defaults | {"seed": row_seed(self._seed, row.number)}
        again: dict[str, Any] = {}
        for column, value in values.items():
            name = ALIASES.get(column, column)
            if name not in self._kinds or value is None or (self._template is not None and name == "prompt"):
                continue
            converted = _column(column, self._kinds[name], value, self._folder)
            outer, dot, inner = name.partition(".")
            if dot:
                again.setdefault(outer, {})[inner] = converted
            else:
                fields[name] = converted
        for name, inner_fields in again.items():
            fields[name] = _dataclass_of(name)(**inner_fields)
        if self._template is not None:
            fields["prompt"] = self._template.fill(row.values)
        if not str(fields.setdefault("prompt", "")).strip() and not _has_other_wishes(fields):
            raise RequestError("prompt: expected what to draw, got nothing")
        return GenerateRequest(**fields)

    def _check(self, columns: Sequence[str]) -> None:
        used = () if self._template is None else self._template.columns
        missing = [name for name in used if name not in columns]
        if missing:
            raise RequestError(f"template: there is no column {missing[0]!r}; there are: {', '.join(columns)}")
        for name in columns:
            if ALIASES.get(name, name) not in self._kinds and name not in used:
                raise RequestError(
                    f"column {name!r}: expected a request field ({', '.join(self._kinds)}) or a name that the template "
                    "has in braces; rename it, or take it out"
                )
            if name in ALIASES and ALIASES[name] in columns:
                raise RequestError(f"columns {name!r} and {ALIASES[name]!r}: expected one of them; they are the same")
        if self._template is None and "prompt" not in columns:
            raise RequestError(f"expected a column `prompt`, or a --template; there are: {', '.join(columns)}")
        if self._template is not None and "prompt" in columns and "prompt" not in used:
            raise RequestError("template: takes the place of the column `prompt`; put {prompt} in, or take it out")


def read_parts(name: str, text: str) -> Any:
    """`scale=2,strength=0.4` for a field that has parts, e.g. `second_pass`. Raises RequestError."""
    kinds = column_kinds()
    known = [kind.partition(".")[2] for kind in kinds if kind.startswith(f"{name}.")]
    parts: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        part, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or part not in known:
            raise RequestError(f"{name}: expected name=value of {', '.join(known)}, commas between them, got {item!r}")
        parts[part] = _column(f"{name}.{part}", kinds[f"{name}.{part}"], value, Path())
    return _dataclass_of(name)(**parts)


def read_numbers(name: str, text: str) -> tuple[float, ...]:
    """`1.0,0.6,0.3` for a field of numbers. Raises RequestError."""
    return _column(name, NUMBERS, text, Path())


def row_seed(base: int, number: int) -> int:
    """The seed of row `number`: 32 bits of a hash.

    Not base + number: batches of neighbouring seeds would share most of their noise, and so would the pictures of a row
    that asks for several and those of the rows after it.
    """
    return int.from_bytes(hashlib.sha256(f"{base}:{number}".encode()).digest()[:4])


def _has_other_wishes(fields: Mapping[str, Any]) -> bool:
    """Whether a request without text may be meant so: it has an image, or guidance, and is checked later."""
    return bool(fields.get("guidance_scale")) or any(fields.get(name) is not None for name in PICTURES)


def column_kinds() -> dict[str, str]:
    """What each request field that a table can hold is, by column; a part of a field of parts is `field.part`."""
    kinds: dict[str, str] = {}
    for name, hint in typing.get_type_hints(GenerateRequest).items():
        if name in PICTURES:
            kinds[name] = FILE
            continue
        for member in _members(hint):
            if dataclasses.is_dataclass(member):
                parts = typing.get_type_hints(member).items()
                kinds |= {f"{name}.{part}": kind for part, inner in parts if (kind := _kind(inner)) is not None}
        kind = _kind(hint)
        if kind is not None:
            kinds[name] = kind
    return kinds


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _kind(hint: Any) -> str | None:
    members = _members(hint)
    for member, kind in ((str, TEXT), (bool, FLAG), (int, WHOLE), (float, NUMBER), (Sequence[float], NUMBERS)):
        if member in members:
            return kind
    return None


def _dataclass_of(name: str) -> Any:
    hint = typing.get_type_hints(GenerateRequest)[name]
    return next(member for member in _members(hint) if dataclasses.is_dataclass(member))


def _flattened(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`{"second_pass": {"scale": 2}}` to `{"second_pass.scale": 2}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{part}": item for part, item in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _column(column: str, kind: str, value: Any, folder: Path) -> Any:
    """`_convert`, with the column's name in its error, a RequestError."""
    try:
        return _convert(kind, value, folder)
    except (ValueError, TypeError, OverflowError, KeyError):
        raise RequestError(f"{column}: expected {kind}, got {value!r}") from None


def _convert(kind: str, value: Any, folder: Path) -> Any:
    """A cell's text or a JSON value as the field wants it. Raises ValueError or TypeError."""
    if kind in (TEXT, FILE):
        if not isinstance(value, str):
            raise TypeError
        return value if kind == TEXT else folder / value.strip()
    if kind == FLAG:
        flags = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        return value if isinstance(value, bool) else flags[str(value).strip().lower()]
    if kind == NUMBERS:
        items = value.replace(",", " ").replace(";", " ").split() if isinstance(value, str) else list(value)
        return tuple(_convert(NUMBER, item, folder) for item in items)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    if kind == NUMBER:
        return float(value)
    try:
        return int(value) if isinstance(value, (str, int)) else _whole(value)
    except ValueError:
        # pandas writes 8.0 in a column that has gaps.
        return _whole(float(value))


def _whole(value: float) -> int:
    if not value.is_integer() or abs(value) > 2**53:
        raise ValueError
    return int(value)
