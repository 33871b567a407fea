"""JSON of untrusted files: parsed within limits, and converted to frozen dataclasses by their types.

It reads manifests, records, journals, tables, and the headers and settings inside safetensors files. Values that pass
have the types, the depth and the finite numbers that their readers expect.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ..errors import ZImageError

# Nested lists and objects. A manifest, the deepest file of this package, has 7 levels.
MAX_DEPTH = 32
MAX_DIGITS = 400

T = TypeVar("T")


def parse_json(text: str | bytes, *, half_pairs: bool = False) -> Any:
    """Parse JSON to plain values.

    Args:
        text: the JSON text.
        half_pairs: whether strings may have lone surrogates, which the caller then refuses with a better message.

    Raises:
        ValueError: it is not JSON, has a duplicate key, a number that is not finite or a lone surrogate, or is nested
            deeper than `MAX_DEPTH`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    _check(value, half_pairs)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} is there twice")
            seen.add(key)
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits; expected at most {MAX_DIGITS}")
    return int(text)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _check(value: Any, half_pairs: bool) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        following: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                following += item.keys()
                following += item.values()
            elif isinstance(item, list):
                following += item
            elif isinstance(item, str) and not half_pairs:
                _check_text(item)
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError("a number is too large")
        if not following:
            return
        level = following
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _check_text(text: str) -> None:
    """Raise ValueError for a string with a lone surrogate, which cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[:40]!r} holds half a surrogate pair, at character {error.start}") from None


def from_json(kind: type[T], value: Any, where: str, error: type[ZImageError], hint: str = "it was damaged") -> T:
    """Convert plain JSON values to a frozen dataclass, and check every key and type.

    Args:
        kind: the dataclass; its `__post_init__` checks ranges.
        value: a value from `parse_json`.
        where: its name in messages.
        error: the class of the error that is raised.
        hint: advice in messages about a missing or unknown key.
    """
    if not isinstance(value, dict):
        raise error(f"{where}: expected an object, got {_name(value)}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise error(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(fields)}. {hint}")
    missing = [name for name, field in fields.items() if name not in value and _required(field)]
    if missing:
        raise error(f"{where}: missing key {missing[0]!r}; {hint}")
    read = {key: read_value(hints[key], item, f"{where}.{key}", error, hint) for key, item in value.items()}
    try:
        return kind(**read)
    except ZImageError as problem:
        raise error(f"{where}: {problem}") from None


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def read_value(hint: Any, value: Any, where: str, error: type[ZImageError], todo: str = "it was damaged") -> Any:
    """Convert a plain JSON value to a hint's type: tuples for lists, read-only mappings for objects.

    Raises `error`, with `where` in its message, for a value of another type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        options = [arg for arg in args if arg is not type(None)]
        if value is None and len(options) < len(args):
            return None
        fitting = [option for option in options if _fits(option, value)]
        if not fitting and len(options) > 1:
            kinds = [_kind(option) for option in options] + ["nothing"] * (len(options) < len(args))
            raise error(f"{where}: expected {' or '.join(kinds)}, got {_name(value)}; {todo}")
        return read_value((fitting or options)[0], value, where, error, todo)
    if not _fits(hint, value):
        raise error(f"{where}: expected {_kind(hint)}, got {_name(value)}; {todo}")
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type[Any], hint), value, where, error, todo)
    if isinstance(value, list):
        return tuple(read_value(args[0], item, f"{where}[{i}]", error, todo) for i, item in enumerate(value))
    if isinstance(value, dict):
        items = {key: read_value(args[1], item, f"{where}.{key}", error, todo) for key, item in value.items()}
        return types.MappingProxyType(items)
    if hint is float:
        try:
            return float(value)
        except OverflowError:
            raise error(f"{where}: expected a number, got one that is too large; {todo}") from None
    return value


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value has the JSON type of a hint; its items are not checked."""
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    kind = typing.get_origin(hint) or hint
    if kind is Any:
        return True
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float))
    if kind in (int, str):
        return isinstance(value, kind)
    if issubclass(kind, Mapping):
        return isinstance(value, dict)
    return issubclass(kind, Sequence) and isinstance(value, list)


def _kind(hint: Any) -> str:
    """The name of a hint's JSON type, for messages."""
    kind = typing.get_origin(hint) or hint
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if kind in names:
        return names[kind]
    return "an object" if dataclasses.is_dataclass(hint) or issubclass(kind, Mapping) else "a list"


def _name(value: Any) -> str:
    """A value for a message: its type and, if short, its text."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    kind = "text" if isinstance(value, str) else type(value).__name__
    text = repr(value) if not isinstance(value, int) or value.bit_length() < 200 else "a very large number"
    return f"{kind} {text if len(text) <= 60 else text[:60] + '…'}"


def to_json(value: Any) -> Any:
    """Convert dataclasses, mappings and sequences to plain JSON values."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value
