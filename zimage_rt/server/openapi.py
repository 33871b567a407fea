"""The OpenAPI description beside the routes: errors, and bodies that the routes read themselves, with examples."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

BINARY: Mapping[str, Any] = {"type": "string", "format": "binary"}


def _example(mode: str, color: Any) -> str:
    """A data URL of 64x64 pixels of one colour."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.new(mode, (64, 64), color).save(encoded, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()


# An image, a white mask, and a mask of OpenAI's kind, transparent where to draw.
IMAGE_EXAMPLE, MASK_EXAMPLE = _example("RGB", (176, 64, 32)), _example("1", 1)
ALPHA_MASK_EXAMPLE = _example("LA", (0, 0))
# An answer of an image's file, and one of server-sent events; `responses` of a route.
IMAGE_ANSWER: Mapping[int | str, Any] = {
    200: {
        "description": "The image's file.",
        "content": {kind: {"schema": dict(BINARY)} for kind in ("image/png", "image/jpeg", "image/webp")},
    }
}
EVENT: Mapping[str, Any] = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("id", "event", "data")},
    "required": ["data"],
}
EVENTS: Mapping[str, Any] = {"text/event-stream": {"schema": dict(EVENT)}}
EVENTS_ANSWER: Mapping[int | str, Any] = {200: {"description": "Server-sent events.", "content": dict(EVENTS)}}


class ErrorObject(BaseModel):
    """An error, as OpenAI's clients read it."""

    message: str = Field(description="What was expected, what came, and what to do.")
    type: str = Field(description="OpenAI's kind of error.")
    param: str | None = Field(description="The field that is to blame.")
    code: str = Field(description="The error's own name, which does not change.")


class ErrorAnswer(BaseModel):
    """The body of every answer that refuses."""

    error: ErrorObject


RETRY_AFTER: Mapping[str, Any] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
# Of every route: any of them can be refused by its key, its limits, its host or its size.
ERRORS: Mapping[int | str, Any] = {
    429: {"model": ErrorAnswer, "description": "Ask again after `Retry-After`.", "headers": dict(RETRY_AFTER)},
    "4XX": {"model": ErrorAnswer, "description": "The request cannot be served; `message` says why."},
    "5XX": {"model": ErrorAnswer, "description": "The service cannot do it now, or failed."},
}


def json_schema(model: Any) -> dict[str, Any]:
    """A model's JSON schema without references, as bodies that a route reads itself have no place for them."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolved(definitions[value["$ref"].rpartition("/")[2]])
            return {key: resolved(item) for key, item in value.items()}
        return [resolved(item) for item in value] if isinstance(value, list) else value

    return resolved(schema)


def body(
    model: Any,
    *examples: Mapping[str, Any],
    files: Sequence[str] = (),
    without: Sequence[str] = (),
    required: bool = True,
) -> dict[str, Any]:
    """`openapi_extra` of a route that reads its body itself.

    Args:
        model: of the JSON body.
        examples: of the JSON body.
        files: parts of a form that are images; without them there is no form.
        without: fields that a form does not have.
        required: whether there must be a body.
    """
    schema = json_schema(model)
    content: dict[str, Any] = {"application/json": {"schema": schema, "examples": _numbered(examples)}}
    if files:
        fields = {
            name: _in_a_form(each) for name, each in schema["properties"].items() if name not in (*files, *without)
        }
        form = {"type": "object", "properties": fields | {name: dict(BINARY) for name in files}}
        needed = [name for name in schema.get("required", ()) if name in fields]
        content["multipart/form-data"] = {
            "schema": form | ({"required": needed} if needed else {}) | {"additionalProperties": False}
        }
    return {"requestBody": {"required": required, "content": content}}


def _in_a_form(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a field as a form's text: numbers and flags as such, what has parts as a text."""
    kinds = [each for each in schema.get("anyOf", (schema,)) if each.get("type") not in ("null", "array", "object")]
    described = {key: schema[key] for key in ("title", "description") if key in schema}
    return {**(kinds[0] if kinds else {"type": "string"}), **described}


def _numbered(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        f"{number}. {json.dumps(list(example), ensure_ascii=False)[1:-1]}": {"value": dict(example)}
        for number, example in enumerate(examples, 1)
    }
