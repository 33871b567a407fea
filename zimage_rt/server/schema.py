"""The request over HTTP: a pydantic model with the fields that the request codec knows."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from ..errors import RequestError
from ..request.codec import IMAGES, field_kinds, members, part_type
from ..request.types import GenerateRequest
from ..request.values import FLAG, NUMBER, NUMBERS, TEXT, WEIGHTS, WHOLE

# JSON's types of the codec's kinds.
TYPES: Mapping[str, Any] = {
    TEXT: str,
    WHOLE: int,
    NUMBER: float,
    NUMBERS: list[float],
    FLAG: bool,
    WEIGHTS: dict[str, float],
}
DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
IMAGE_HELP = "An image as a data URL (data:image/png;base64,…), or the name of a part of a multipart form."


def _documented() -> dict[str, str]:
    """The description of every field of `GenerateRequest`, from its docstring."""
    text = (GenerateRequest.__doc__ or "").partition("Attributes:")[2]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        head = re.match(r" {8}(\w+(?:, \w+)*): (.*)", line)
        if head:
            names = head[1].split(", ")
            found |= dict.fromkeys(names, head[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _parts(field: str) -> type[BaseModel]:
    kinds = field_kinds()
    parts = {
        part.name: (TYPES[kinds[f"{field}.{part.name}"]] | None, part.default)
        for part in dataclasses.fields(part_type(field))
    }
    name = part_type(field).__name__
    return create_model(name, __config__=ConfigDict(extra="forbid", strict=True), **parts)  # type: ignore[call-overload]


def _request_fields() -> dict[str, Any]:
    kinds, help_texts = field_kinds(), _documented()
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(GenerateRequest):
        hint = typing.get_type_hints(GenerateRequest)[field.name]
        kind: Any
        if field.name in IMAGES:
            kind, text = str | None, IMAGE_HELP
        elif any(dataclasses.is_dataclass(member) for member in members(hint)):
            kind, text = _parts(field.name) | None, help_texts.get(field.name, "")
        elif field.name in kinds:
            kind, text = TYPES[kinds[field.name]], help_texts.get(field.name, "")
            if field.name in ("prompt", "negative_prompt"):
                kind = kind | list[str]
            if field.name == "seed":
                kind = kind | list[int]
            kind = kind if field.default is not None and field.name != "prompt" else kind | None
        else:
            continue  # arrays, which JSON has not
        default = ... if field.default is dataclasses.MISSING else field.default
        fields[field.name] = (Annotated[kind, Field(description=text)], default)
    return fields


class OutputFields(BaseModel):
    """The encoding of a job's images, and how much of its progress is told."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str | None, Field(description="A name of /v1/models; the default is the service's first.")] = None
    output_format: Annotated[str, Field(pattern="^(png|jpeg|webp)$", description="png, jpeg or webp.")] = "png"
    output_quality: Annotated[
        int | None, Field(ge=1, le=100, description="Of jpeg and webp. By default 95 for jpeg; webp keeps every pixel.")
    ] = None
    previews: Annotated[
        int, Field(ge=0, le=1000, description="A preview in the events after every so many steps; 0 for none.")
    ] = 0
    priority: Annotated[
        int, Field(ge=-100, le=100, description="Jobs of one key with a higher priority are drawn first.")
    ] = 0


# OpenAI's names of qualities, with the share of the bundle's own steps that each stands for.
QUALITY: Mapping[str, float] = {"auto": 1.0, "low": 0.5, "medium": 1.0, "standard": 1.0, "high": 1.5, "hd": 1.5}
SIZE = re.compile(r"auto|([0-9]{2,5})x([0-9]{2,5})")
IGNORED = "Taken for the sake of OpenAI's clients; it changes nothing here."


class ImagesFields(BaseModel):
    """The fields of OpenAI's Images protocol beside the prompt; our own fields stand beside them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str | None, Field(description="A name of /v1/models; the default is the service's first.")] = None
    n: Annotated[int | None, Field(ge=1, le=10, description="How many images to draw.")] = None
    size: Annotated[
        str, Field(pattern=f"^({SIZE.pattern})$", description="WIDTHxHEIGHT such as 1024x1024, or auto.")
    ] = "auto"
    quality: Annotated[
        Literal["auto", "low", "medium", "standard", "high", "hd"],
        Field(description="Half, all, or one and a half times the model's own steps; num_inference_steps says more."),
    ] = "auto"
    output_format: Annotated[Literal["png", "jpeg", "webp"], Field(description="The file's format.")] = "png"
    output_compression: Annotated[
        int | None, Field(ge=0, le=100, description="The quality of a JPEG or WebP file; 100 is the best.")
    ] = None
    response_format: Annotated[
        Literal["b64_json", "url"], Field(description="The image in the answer, or an address to fetch it from.")
    ] = "b64_json"
    stream: Annotated[bool, Field(description="Answer with server-sent events.")] = False
    partial_images: Annotated[int, Field(ge=0, le=3, description="Previews in the stream.")] = 0
    background: Annotated[
        str | None, Field(description="opaque or auto; transparent is refused, as no model here draws it.")
    ] = None
    moderation: Annotated[str | None, Field(description=IGNORED)] = None
    style: Annotated[str | None, Field(description=IGNORED)] = None
    user: Annotated[str | None, Field(description=IGNORED)] = None
    input_fidelity: Annotated[str | None, Field(description=IGNORED)] = None


class ImageUrl(BaseModel):
    """An image in a JSON body."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image_url: Annotated[str, Field(pattern="^data:image/", description=IMAGE_HELP)]


JobRequest: Any = create_model("JobRequest", __base__=OutputFields, **_request_fields())
JobRequest.__doc__ = "A request: every field of zimage_rt.GenerateRequest that JSON can say, and how to answer."

_TURN_IMAGE = f"{IMAGE_HELP} Of `generate` alone: `edit` and `refine` begin with the session's own image."
_TURN_FIELDS: dict[str, Any] = {
    "prompt": (str | None, None),
    "image": (Annotated[str | None, Field(description=_TURN_IMAGE)], None),
}
TurnRequest: Any = create_model("TurnRequest", __base__=JobRequest, **_TURN_FIELDS)
TurnRequest.__doc__ = "A turn of a session: what it leaves out is the current image's."
ImagesRequest: Any = create_model("ImagesRequest", __base__=ImagesFields, **_request_fields())
ImagesRequest.__doc__ = "A request in OpenAI's protocol, with our own fields beside theirs."
_EDITS_FIELDS: dict[str, Any] = {
    "images": (
        Annotated[list[ImageUrl], Field(min_length=1, max_length=1, description="The image to draw over.")],
        ...,
    ),
    "mask": (
        Annotated[ImageUrl | None, Field(description="An image whose alpha is 0 where to draw; else everywhere.")],
        None,
    ),
}
EditsRequest: Any = create_model("EditsRequest", __base__=ImagesRequest, **_EDITS_FIELDS)
EditsRequest.__doc__ = "A request to draw over an image; `mask` is OpenAI's."

OUTPUT_FIELDS = tuple(OutputFields.model_fields)
REQUEST_FIELDS = tuple(name for name in JobRequest.model_fields if name not in OUTPUT_FIELDS)


def request_fields(body: BaseModel) -> dict[str, Any]:
    """The fields of a `GenerateRequest` that a body says; the others keep their defaults."""
    said = {name: getattr(body, name) for name in REQUEST_FIELDS if name in body.model_fields_set}
    return {
        name: part_type(name)(**value.model_dump(exclude_unset=True)) if isinstance(value, BaseModel) else value
        for name, value in said.items()
    }


def decode_data_url(text: str, field: str, max_bytes: int) -> bytes:
    """The bytes of an image in a data URL. Raises RequestError; other URLs are never fetched."""
    head = DATA_URL.match(text)
    if head is None:
        what = "a URL of another kind" if "://" in text[:20] else "other text"
        raise RequestError(
            f"{field}: expected a data URL (data:image/png;base64,…) or a part of the form, got {what}; the service "
            "fetches nothing"
        )
    if (len(text) - head.end()) * 3 // 4 > max_bytes:
        raise RequestError(f"{field}: expected at most {max_bytes} bytes, got more")
    try:
        return base64.b64decode(text[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{field}: the data URL is no base64: {error}") from error
