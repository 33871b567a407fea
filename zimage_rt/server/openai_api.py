"""OpenAI's Images protocol: generations and edits, as one answer or as a stream, with our own fields beside theirs.

Written after the openai-openapi description of 2026-08 and the calls of openai for Python 3.57 and for Node.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from ..checks import shown
from ..errors import RequestError, ZImageError
from .access import Caller
from .bounds import check_pixels, read_form, read_json
from .errors import answer, error_body
from .jobs import Job
from .jobs_api import CallerOf, ServiceOf, encode_event, invalid, submit
from .schema import REQUEST_FIELDS, JobRequest, OutputFields, decode_data_url, request_fields
from .service import Service

router = APIRouter(prefix="/v1/images", tags=["openai"])

FORMATS = ("png", "jpeg", "webp")
# The share of the bundle's own steps that a quality stands for.
QUALITY: Mapping[str, float] = {"auto": 1.0, "low": 0.5, "medium": 1.0, "standard": 1.0, "high": 1.5, "hd": 1.5}
SIZE = re.compile(r"(\d{2,5})x(\d{2,5})")
MAX_N, MAX_PARTIAL_IMAGES = 10, 3
# OpenAI's fields; `background`, `moderation`, `style`, `user` and `input_fidelity` change nothing here.
OWN = (
    "model", "n", "size", "quality", "output_format", "output_compression", "response_format", "stream",
    "partial_images", "background", "moderation", "style", "user", "input_fidelity",
)  # fmt: skip


@router.post("/generations")
async def generations(request: Request, service: ServiceOf, who: CallerOf) -> Response:
    """Draw images from a prompt."""
    said = await read_json(request)
    return await _answer(request, service, who, said, {}, "image_generation")


@router.post("/edits")
async def edits(request: Request, service: ServiceOf, who: CallerOf) -> Response:
    """Draw over an image: all of it, or where the mask's alpha is 0."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        said, images, mask = await _form(request)
    else:
        said = await read_json(request)
        images, mask = _images_of_json(said, service)
    if len(images) != 1:
        raise RequestError(
            f"image: expected one image, got {len(images)}; these models draw over one image at a time", field="image"
        )
    fields: dict[str, Any] = {"image": await service.store.keep_input(images[0])}
    if mask is not None:
        converted = await asyncio.to_thread(mask_of_alpha, mask, service.config.limits.max_input_pixels)
        fields |= {"mask": await service.store.keep_input(converted), "strength": 1.0}
    if said.get("size", "auto") == "auto":
        fields["fit_size"] = "nearest"
    return await _answer(request, service, who, said, fields, "image_edit")


async def _form(request: Request) -> tuple[dict[str, Any], list[bytes], bytes | None]:
    """The fields of a form, the images in their order, and the mask."""
    said: dict[str, Any] = {}
    images: list[bytes] = []
    mask: bytes | None = None
    form = await read_form(request)
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            content = await value.read()
            if name in ("image", "image[]"):
                images.append(content)
            elif name == "mask":
                mask = content
            else:
                raise RequestError(f"{name}: expected the files image, image[] and mask alone")
        else:
            said[name] = _plain(value)
    return said, images, mask


def _plain(text: str) -> Any:
    """A form's text as JSON would have it: `true`, `2` and `0.5` are no texts."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (bool, int, float, dict)) else text


def _images_of_json(said: dict[str, Any], service: Service) -> tuple[list[bytes], bytes | None]:
    most = service.config.limits.max_body_bytes

    def read(value: Any, field: str) -> bytes:
        url = value.get("image_url") if isinstance(value, dict) else value
        if not isinstance(url, str):
            raise RequestError(f"{field}: expected an object with image_url, got {shown(value)}", field=field)
        return decode_data_url(url, field, most)

    images = said.pop("images", None)
    if not isinstance(images, list):
        raise RequestError("images: expected a list of objects with image_url")
    mask = said.pop("mask", None)
    return [read(image, "images") for image in images], None if mask is None else read(mask, "mask")


def mask_of_alpha(content: bytes, max_pixels: int) -> bytes:
    """A mask with alpha 0 where to edit, as a PNG that is white there. Raises RequestError."""
    from PIL import Image

    check_pixels(content, "mask", max_pixels)
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "WEBP")) as image:
            if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
                raise RequestError("mask: expected an image with transparency, which marks what to edit; got none")
            alpha = image.convert("RGBA").getchannel("A")
    except RequestError:
        raise
    except Exception as error:  # Pillow has no error of its own for damaged files
        raise RequestError(f"mask: cannot be read as an image: {error}; expected an undamaged PNG") from error
    encoded = io.BytesIO()
    alpha.point(lambda value: 255 if value == 0 else 0).save(encoded, "PNG")
    return encoded.getvalue()


def _request_of(
    service: Service, said: Mapping[str, Any], fields: Mapping[str, Any]
) -> tuple[dict[str, Any], OutputFields]:
    """The fields of a `GenerateRequest` and how to answer. Raises RequestError."""
    own = {name: said[name] for name in OWN if said.get(name) is not None}
    model = service.model(own.get("model"))
    pipeline = service.manifests[model].pipeline
    ours: dict[str, Any] = {name: value for name, value in said.items() if name not in OWN}
    if unknown := next((name for name in ours if name not in REQUEST_FIELDS), None):
        raise RequestError(f"{unknown}: there is no such field")
    if "n" in own:
        if not isinstance(own["n"], int) or not 1 <= own["n"] <= MAX_N:
            raise RequestError(f"n: expected 1 to {MAX_N}, got {shown(own['n'])}")
        ours["num_images"] = own["n"]
    size = own.get("size", "auto")
    if size != "auto":
        found = SIZE.fullmatch(str(size))
        if found is None:
            raise RequestError(f"size: expected auto or WIDTHxHEIGHT such as 1024x1024, got {shown(size)}")
        ours |= {"width": int(found[1]), "height": int(found[2])}
    quality = own.get("quality", "auto")
    if quality not in QUALITY:
        raise RequestError(f"quality: expected one of {', '.join(QUALITY)}, got {shown(quality)}")
    if QUALITY[quality] != 1.0:
        ours.setdefault("num_inference_steps", max(1, round(pipeline.num_inference_steps * QUALITY[quality])))
    output: dict[str, Any] = {"model": model, "output_format": own.get("output_format", "png")}
    if output["output_format"] not in FORMATS:
        raise RequestError(f"output_format: expected one of {', '.join(FORMATS)}, got {shown(output['output_format'])}")
    if "output_compression" in own and output["output_format"] != "png":
        # Theirs is the quality of the file, 0 to 100; a file's least is 1.
        output["output_quality"] = max(1, own["output_compression"]) if own["output_compression"] != 100 else 100
    if own.get("stream"):
        partial = own.get("partial_images", 0)
        if not isinstance(partial, int) or not 0 <= partial <= MAX_PARTIAL_IMAGES:
            raise RequestError(f"partial_images: expected 0 to {MAX_PARTIAL_IMAGES}, got {shown(partial)}")
        steps = ours.get("num_inference_steps") or pipeline.num_inference_steps
        output["previews"] = max(1, steps // (partial + 1)) if partial and isinstance(steps, int) else 0
    try:
        body = JobRequest.model_validate(ours | output)
    except ValidationError as error:
        raise invalid(error) from error
    answer_fields = {name: getattr(body, name) for name in OutputFields.model_fields}
    return {**request_fields(body), **{k: v for k, v in fields.items() if k not in ours}}, OutputFields(**answer_fields)


async def _answer(
    request: Request,
    service: Service,
    who: Caller,
    said: Mapping[str, Any],
    fields: Mapping[str, Any],
    event: str,
) -> Response:
    wanted, output = _request_of(service, said, fields)
    job = await submit(service, who, wanted, output, detached=False)
    described = {
        "size": said.get("size", "auto"),
        "quality": said.get("quality", "auto"),
        "background": "opaque",
        "output_format": output.output_format,
    }
    if said.get("stream"):
        partial = said.get("partial_images") or 0
        body = _stream(service, job, described, event, partial)
        return StreamingResponse(body, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    await wait_attached(request, service, job)
    if job.error is not None:
        return answer(job.error)
    data = []
    for number in range(job.status()["images"]):
        if said.get("response_format") == "url":
            data.append({"url": f"{request.base_url}v1/jobs/{job.id}/images/{number}"})
        else:
            data.append({"b64_json": base64.b64encode(await service.image(job, number)).decode()})
    safety = {} if job.safety is None else {"safety": job.safety["action"]}
    return JSONResponse(
        {"created": int(job.created), "data": data, **described, **safety, "usage": await service.usage(job)},
        headers={"X-Zimage-Job": job.id},
    )


async def wait_attached(request: Request, service: Service, job: Job) -> None:
    """Wait for a job whose client holds the connection; a client that has gone away cancels it."""
    waiting = asyncio.ensure_future(service.wait(job))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            service.cancel(job, "the client has gone away")
            await waiting
    finally:
        gone.cancel()
        waiting.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    service: Service, job: Job, described: Mapping[str, Any], event: str, partial: int
) -> AsyncIterator[bytes]:
    """Partial images, then the finished ones; an error is data with an error object, which the clients raise."""
    sent = 0
    try:
        async for step in job.watch():
            if step.name == "step" and "preview" in step.data and sent < partial:
                content = {"b64_json": base64.b64encode(step.data["preview"]).decode(), "partial_image_index": sent}
                data = {"type": f"{event}.partial_image", "created_at": int(time.time()), **described, **content}
                yield encode_event(f"{event}.partial_image", data | {"output_format": "jpeg"})
                sent += 1
        await service.store.settled(job)
        if job.error is not None:
            error = job.error
            yield encode_event("error", error_body(error["code"], error["message"], error.get("field")))
            return
        usage = await service.usage(job)
        for number in range(job.status()["images"]):
            content = {"b64_json": base64.b64encode(await service.image(job, number)).decode()}
            data = {
                "type": f"{event}.completed",
                "created_at": int(job.created),
                **described,
                **content,
                "usage": usage,
            }
            yield encode_event(f"{event}.completed", data | {"usage": usage})
        yield b"data: [DONE]\n\n"
    except ZImageError as error:
        yield encode_event("error", error_body(error.code, str(error)))
    finally:
        service.cancel(job, "the client has gone away")
