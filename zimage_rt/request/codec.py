"""The codec of requests: keyword arguments, JSON objects, table cells and options to a `GenerateRequest`.

Every front end reads the request's fields through this module: Python's keyword arguments, the command line, tables,
images' records and services.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError
from .types import GenerateRequest
from .values import FILE, FLAG, NUMBER, NUMBERS, TEXT, WEIGHTS, WHOLE, read_value

# Fields that are images.
IMAGES = ("image", "mask", "control_image")

# diffusers' names of arguments that have another name here (ZImagePipeline and its image-to-image, inpainting and
# ControlNet pipelines, 0.42). A request may use either.
DIFFUSERS_NAMES: Mapping[str, str] = {
    "num_images_per_prompt": "num_images",
    "mask_image": "mask",
    "controlnet_conditioning_scale": "control_scale",
}


def make_request(**fields: Any) -> GenerateRequest:
    """A request from its fields by name; diffusers' names are accepted too.

    Raises RequestError for an unknown name, with the known ones, for a field given twice, and without a prompt.
    """
    renamed = own_names(fields)
    unknown = next((name for name in renamed if name not in GenerateRequest.__dataclass_fields__), None)
    if unknown is not None:
        known = ", ".join(GenerateRequest.__dataclass_fields__)
        raise RequestError(f"{unknown}: there is no such field; known fields: {known}")
    if "prompt" not in renamed:
        raise RequestError("prompt: expected it, got none; say what to draw")
    return GenerateRequest(**renamed)


def own_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by their own names instead of diffusers'. Raises RequestError for a field given under both."""
    renamed: dict[str, Any] = {}
    for name, value in fields.items():
        own = DIFFUSERS_NAMES.get(name, name)
        if own in renamed:
            raise RequestError(f"{own}: expected it once, got it as {own} and as {name}; they are the same", field=own)
        renamed[own] = value
    return renamed


def read_fields(
    values: Mapping[str, Any], folder: Path = Path(), labels: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Convert texts and JSON values, by field name, to the values of the fields.

    Args:
        values: by the names of `field_kinds`; `second_pass.scale` is a part of `second_pass`.
        folder: the folder that relative paths begin at.
        labels: the names for messages, by field name, for tables whose columns have other names.

    Raises:
        RequestError: a value is not of its field's kind.
    """
    labels, kinds = labels or {}, field_kinds()
    fields: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        outer, dot, inner = name.partition(".")
        converted = read_value(labels.get(name, name), kinds[name], value, folder)
        if dot:
            parts.setdefault(outer, {})[inner] = converted
        else:
            fields[name] = converted
    return fields | {name: part_type(name)(**inner) for name, inner in parts.items()}


def read_parts(name: str, text: str) -> Any:
    """Parse `scale=2,strength=0.4` for a field that has parts, e.g. `second_pass`. Raises RequestError."""
    known = parts_of(name)
    found: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        part, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or part not in known:
            raise RequestError(f"{name}: expected name=value of {', '.join(known)}, commas between them, got {item!r}")
        found[f"{name}.{part}"] = value
    return read_fields(found)[name] if found else part_type(name)()


def read_numbers(name: str, text: str) -> tuple[float, ...]:
    """Parse `1.0,0.6,0.3` for a field of numbers. Raises RequestError."""
    return read_value(name, NUMBERS, text)


@functools.cache
def field_kinds() -> Mapping[str, str]:
    """The kind of every field that text or JSON can express, by name; `second_pass.scale` is a part of a field."""
    kinds: dict[str, str] = {}
    for name, hint in typing.get_type_hints(GenerateRequest).items():
        if name in IMAGES:
            kinds[name] = FILE
            continue
        for member in members(hint):
            if dataclasses.is_dataclass(member):
                parts = typing.get_type_hints(member).items()
                kinds |= {f"{name}.{part}": kind for part, inner in parts if (kind := _kind(inner)) is not None}
        kind = _kind(hint)
        if kind is not None:
            kinds[name] = kind
    return kinds


@functools.cache
def parts_of(field: str) -> Collection[str]:
    """The names of a field's parts, e.g. `scale` of `second_pass`; empty for other fields."""
    return tuple(name.partition(".")[2] for name in field_kinds() if name.startswith(f"{field}."))


@functools.cache
def part_type(field: str) -> Any:
    """The dataclass of a field that has parts."""
    hint = typing.get_type_hints(GenerateRequest)[field]
    return next(member for member in members(hint) if dataclasses.is_dataclass(member))


def members(hint: Any) -> tuple[Any, ...]:
    """The member types of a union; a type that is no union is its only member."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _kind(hint: Any) -> str | None:
    kinds = (
        (str, TEXT),
        (bool, FLAG),
        (int, WHOLE),
        (float, NUMBER),
        (Sequence[float], NUMBERS),
        (Mapping[str, float], WEIGHTS),
    )
    return next((kind for member, kind in kinds if member in members(hint)), None)
