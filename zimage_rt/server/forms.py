"""Multipart forms: texts by the kinds of their fields, lists and parts as clients write them, and files."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile

from ..errors import RequestError
from ..request.codec import DIFFUSERS_NAMES, IMAGES, field_kinds
from ..request.values import FLAG, NUMBER, NUMBERS, WEIGHTS, WHOLE, read_value

# Kinds of the fields that a `GenerateRequest` does not have: ours, and OpenAI's.
KINDS: Mapping[str, str] = {
    "previews": WHOLE, "priority": WHOLE, "output_quality": WHOLE,
    "n": WHOLE, "partial_images": WHOLE, "output_compression": WHOLE, "stream": FLAG,
}  # fmt: skip
# OpenAI's clients write a list as `name[]`, repeated, and an object's part as `name[part]`.
LISTED, NESTED = re.compile(r"(\w+)\[\]"), re.compile(r"(\w+)\[([^\[\]]+)\]")


def is_form(content_type: str) -> bool:
    """Whether a Content-Type header announces a multipart form."""
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def read_items(
    items: Iterable[tuple[str, UploadFile | str]], files: Collection[str] = IMAGES
) -> tuple[dict[str, Any], list[tuple[str, UploadFile]]]:
    """The fields of a form as JSON would say them, and its files by their names, in order.

    Args:
        items: the form's parts.
        files: the names that files may have.

    Raises:
        RequestError: a text is not of its field's kind, a file has another name, or a field is said twice.
    """
    kinds = {**KINDS, **field_kinds()}
    said: dict[str, Any] = {}
    uploads: list[tuple[str, UploadFile]] = []
    for name, value in items:
        own = DIFFUSERS_NAMES.get(name, name)
        if isinstance(value, UploadFile):
            if own not in files:
                raise RequestError(f"{name}: expected files as {', '.join(files)} alone", field=name)
            uploads.append((own, value))
            continue
        outer, inner = _place(own, kinds)
        said_before = said.setdefault(outer, {} if inner else []) if inner is not None else None
        if inner is None:
            if outer in said:
                raise RequestError(f"{outer}: expected it once, got it twice", field=outer)
            said[outer] = _read(outer, kinds.get(outer), value)
        elif inner and isinstance(said_before, dict):
            kind = NUMBER if kinds.get(outer) == WEIGHTS else kinds.get(f"{outer}.{inner}")
            said_before[inner] = _read(f"{outer}.{inner}", kind, value)
        elif not inner and isinstance(said_before, list):
            said_before.append(_read(outer, NUMBER if kinds.get(outer) == NUMBERS else kinds.get(outer), value))
        else:
            raise RequestError(f"{outer}: expected a value, a list or parts of it, got two of them", field=outer)
    return said, uploads


def _place(name: str, kinds: Mapping[str, str]) -> tuple[str, str | None]:
    """The field of a part, and the part of the field: None for all of it, empty for an item of its list."""
    if found := LISTED.fullmatch(name):
        return found[1], ""
    if (found := NESTED.fullmatch(name)) and (kinds.get(found[1]) == WEIGHTS or f"{found[1]}.{found[2]}" in kinds):
        return found[1], found[2]
    if "." in name and name in kinds:
        outer, _, inner = name.partition(".")
        return outer, inner
    return name, None


def _read(name: str, kind: str | None, text: str) -> Any:
    if kind is None or name in IMAGES:
        return text
    if kind == WEIGHTS and text.lstrip().startswith(("{", "[")):
        raise RequestError(f"{name}: expected name=weight, with commas between several, got JSON", field=name)
    value = read_value(name, kind, text, Path())
    return list(value) if isinstance(value, tuple) else value
