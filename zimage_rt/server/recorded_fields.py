"""The fields of a request as JSON in the record, with its images by their places in the service's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..metadata.references import to_reference
from ..request.codec import IMAGES
from ..request.types import SecondPass

# Folders of a service's data with images that a request may name: those that clients sent, and those of turns.
INPUTS, SESSIONS = "inputs", "sessions"
# Fields with prompts: a workflow has those of its nodes.
PROMPTS = ("prompt", "negative_prompt", "workflow")


def fields_to_json(fields: Mapping[str, Any], *, with_prompts: bool = True) -> dict[str, Any]:
    """A request's fields as JSON; images, which are files of `inputs` or `sessions`, by their names."""
    found = {}
    for name, value in fields.items():
        if name in IMAGES and isinstance(value, Path):
            found[name] = {"input": value.name}
            if value.parent.name != INPUTS:
                found[name]["folder"] = value.parent.name
        elif with_prompts or name not in PROMPTS:
            found[name] = to_reference(name, value)
    return found


def inputs_of(fields: Mapping[str, Any]) -> list[str]:
    """The images in a record's fields, by their paths in the service's folder: `inputs/…` or `sessions/…`."""
    return [_place(value) for value in fields.values() if isinstance(value, dict) and "input" in value]


def _place(value: Mapping[str, str]) -> str:
    return f"{value.get('folder', INPUTS)}/{value['input']}"


def fields_from_json(fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of a request from what `fields_to_json` made of them; `folder` is the service's."""
    found: dict[str, Any] = {
        name: folder / _place(value) if isinstance(value, dict) and "input" in value else value
        for name, value in fields.items()
    }
    if isinstance(found.get("second_pass"), dict):
        found["second_pass"] = SecondPass(**found["second_pass"])
    return found
