"""The schema of image records: types of every field, checked before a record is used."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bundle.json_codec import from_json, read_value
from ..errors import MetadataError
from ..request.types import GenerateRequest

# A record with the prompts of a large batch is a few hundred kilobytes.
MAX_BYTES = 16 << 20

_DAMAGED = "its record was damaged"


@dataclasses.dataclass(frozen=True)
class LoraReference:
    """A LoRA in a record; see `ActiveLora`."""

    name: str
    weight: float
    path: str
    sha256: str
    settings_sha256: str = ""
    strict: bool = True


@dataclasses.dataclass(frozen=True)
class BatchReference:
    """The batch of an image; see `ImageRecord.batch`."""

    index: int
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.negative_prompts) == len(self.seeds) > self.index >= 0:
            raise MetadataError("it does not say which image of how many it is")


@dataclasses.dataclass(frozen=True)
class InputReference:
    """An input image or array: its hash, and its path if it came from a file, else its type and shape."""

    sha256: str
    path: str | None = None
    mode: str | None = None
    size: tuple[int, ...] | None = None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    type: str | None = None


def check_parts(data: Mapping[str, Any], version: str, path: Path, inputs: Sequence[str]) -> None:
    """Check a record's request, batch and LoRAs.

    Args:
        data: the record, whose top-level fields have the right types.
        version: the version of this package.
        path: the record's file, for messages.
        inputs: the request fields that are images.

    Raises:
        MetadataError: a part is invalid; the message names it.
    """
    for i, lora in enumerate(data["loras"]):
        from_json(LoraReference, lora, f"{path}: loras[{i}]", MetadataError, _DAMAGED)
    if data["batch"] is not None:
        from_json(BatchReference, data["batch"], f"{path}: batch", MetadataError, _DAMAGED)
    hints = typing.get_type_hints(GenerateRequest)
    request = data["request"]
    strange = sorted(set(request) - set(hints))
    if strange:
        raise MetadataError(
            f"{path}: was drawn with {strange[0]!r}, which this version does not know; upgrade zimage_rt from "
            f"{version} to {data['version']} or later"
        )
    for name in ("prompt", "negative_prompt", "seed"):
        if name not in request:
            raise MetadataError(f"{path}: request: missing key {name!r}; {_DAMAGED}")
    for name, value in request.items():
        where = f"{path}: request.{name}"
        if isinstance(value, dict) and "sha256" in value:
            from_json(InputReference, value, where, MetadataError, _DAMAGED)
        elif name in inputs or _is_array(hints[name]):
            if value is not None:
                raise MetadataError(f"{where}: expected nothing, or an input's sha256; {_DAMAGED}")
        else:
            read_value(hints[name], value, where, MetadataError, _DAMAGED)


def _is_array(hint: Any) -> bool:
    return bool(re.search(r"\bndarray\b", str(hint)))
