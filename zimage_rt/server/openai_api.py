"""OpenAI's Images protocol: generations and edits, as one answer or as a stream, with our own fields beside theirs.

Written after the openai-openapi description of 2026-08 and the calls of openai for Python 3.57 and for Node.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import ValidationError

from ..checks import shown
from ..errors import RequestError, ZImageError
from ..request.codec import IMAGES, own_names
from .access import Caller
from .bounds import check_pixels, read_form, read_json
from .encoding import Base64, encode_event, encode_json
from .errors import answer, error_body
from .forms import is_form, read_items
from .jobs import Job
from .jobs_api import CallerOf, ServiceOf, invalid, keep_images, read_said, submit
from .openapi import ALPHA_MASK_EXAMPLE, EVENTS, IMAGE_EXAMPLE, body
from .schema import (
    QUALITY,
    REQUEST_FIELDS,
    SIZE,
    EditsRequest,
    ImagesFields,
    ImagesRequest,
    OutputFields,
    decode_data_url,
)
from .service import Service

router = APIRouter(prefix="/v1/images", tags=["openai"])

OWN = tuple(ImagesFields.model_fields)
GONE = "the client has gone away; no image was made"
ANSWERS: Mapping[int | str, Any] = {
    200: {"description": "The images; with `stream`, server-sent events.", "content": dict(EVENTS)}
}
GENERATIONS_BODY: Mapping[str, Any] = body(
    ImagesRequest,
    {"prompt": "a lighthouse in a storm, oil painting", "size": "256x256"},
    {"prompt": "一只熊猫，蓝色背景", "size": "256x256", "n": 2, "seed": 7, "output_format": "webp"},
    {"prompt": "a red car", "size": "256x256", "stream": True, "partial_images": 2},
)
EDITS_BODY: Mapping[str, Any] = body(
    EditsRequest,
    {"prompt": "the same in winter", "images": [{"image_url": IMAGE_EXAMPLE}], "strength": 0.6},
    {
        "prompt": "a red hat",
        "images": [{"image_url": IMAGE_EXAMPLE}],
        "mask": {"image_url": ALPHA_MASK_EXAMPLE},
    },
    files=("image", "image[]", "mask"),
    without=("images",),
)


@router.post("/generations", responses=dict(ANSWERS), openapi_extra=dict(GENERATIONS_BODY))
async def generations(request: Request, service: ServiceOf, who: CallerOf) -> Response:
    """Draw images from a prompt."""
    said = await read_json(request)
    return await _answer(request, service, who, said, {}, "image_generation")


@router.post("/edits", responses=dict(ANSWERS), openapi_extra=dict(EDITS_BODY))
async def edits(request: Request, service: ServiceOf, who: CallerOf) -> Response:
    """Draw over an image: all of it, or where the mask's alpha is 0."""
    if is_form(request.headers.get("content-type", "")):
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
    if said.get("size", "auto") == "auto" and not said.keys() & {"width", "height"}:
        fields["fit_size"] = "nearest"  # of the image's own size
    return await _answer(request, service, who, said, fields, "image_edit")


async def _form(request: Request) -> tuple[dict[str, Any], list[bytes], bytes | None]:
    """The fields of a form, the images in their order, and the mask."""
    form = await read_form(request)
    said, uploads = read_items(form.multi_items(), ("image", "image[]", "mask"))
    images = [await upload.read() for name, upload in uploads if name != "mask"]
    masks = [await upload.read() for name, upload in uploads if name == "mask"]
    if len(masks) > 1:
        raise RequestError("mask: expected it once, got it twice", field="mask")
    return said, images, masks[0] if masks else None


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


async def _request_of(
    service: Service, said: Mapping[str, Any], fields: Mapping[str, Any]
) -> tuple[dict[str, Any], OutputFields, ImagesFields]:
    """The fields of a `GenerateRequest`, how to answer, and OpenAI's own fields.

    Args:
        service: has the models.
        said: the body.
        fields: the image and mask of an edit, and what follows from them if the body does not say it.

    Raises:
        RequestError: a field is unknown, not of its kind, or said twice: by OpenAI's name and by ours.
    """
    ours = own_names({name: value for name, value in said.items() if name not in OWN})
    if unknown := next((name for name in ours if name not in REQUEST_FIELDS), None):
        raise RequestError(f"{unknown}: there is no such field")
    try:
        own = ImagesFields.model_validate({name: said[name] for name in OWN if said.get(name) is not None})
    except ValidationError as error:
        raise invalid(error) from error
    if own.background == "transparent":
        raise RequestError("background: expected opaque or auto, got 'transparent'; these models draw no transparency")
    model = service.model(own.model)
    pipeline = service.manifests[model].pipeline
    _refuse_doubles(own, ours, fields)
    if own.n is not None:
        ours["num_images"] = own.n
    if (size := SIZE.fullmatch(own.size)) and size[1] is not None:
        ours |= {"width": int(size[1]), "height": int(size[2])}
    if QUALITY[own.quality] != 1.0:
        ours.setdefault("num_inference_steps", max(1, round(pipeline.num_inference_steps * QUALITY[own.quality])))
    output: dict[str, Any] = {"model": model, "output_format": own.output_format}
    if own.output_compression is not None and own.output_format != "png":
        output["output_quality"] = max(1, own.output_compression)  # theirs begins at 0, a file's at 1
    if own.stream and own.partial_images:
        steps = ours.get("num_inference_steps") or pipeline.num_inference_steps
        output["previews"] = max(1, steps // (own.partial_images + 1)) if isinstance(steps, int) else 0
    wanted, answered = read_said(ours | output)
    wanted |= {name: value for name, value in fields.items() if name not in ours}
    await keep_images(service, wanted)
    return wanted, answered, own


def _refuse_doubles(own: ImagesFields, ours: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Raise RequestError if OpenAI's name of something and ours are both said: one of them would be dropped."""
    same: dict[str, tuple[str, ...]] = {
        "n": () if own.n is None else ("num_images",),
        "size": () if own.size == "auto" else ("width", "height"),
        "images": tuple(name for name in IMAGES if name in fields),
    }
    for theirs, names in same.items():
        if doubled := next((name for name in names if ours.get(name) is not None), None):
            raise RequestError(f"{doubled}: expected {theirs} or {doubled}, got both; they are the same", field=doubled)


async def _answer(
    request: Request,
    service: Service,
    who: Caller,
    said: Mapping[str, Any],
    fields: Mapping[str, Any],
    event: str,
) -> Response:
    wanted, output, own = await _request_of(service, said, fields)
    job = await submit(service, who, wanted, output, detached=False)
    described = {
        "size": own.size,
        "quality": own.quality,
        "background": "opaque",
        "output_format": output.output_format,
    }
    named = {"X-Zimage-Job": job.id}
    if own.stream:
        events = _stream(service, job, described, event, own.partial_images)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store", **named})
    await wait_attached(request, service, job)
    # The answer is made while the record is written, and sent when it is.
    body = None if job.error is not None else await _body(request, service, job, own.response_format, described)
    await service.store.settled(job)
    if job.error is not None:
        return answer(job.error, named)
    return Response(encode_json(body), media_type="application/json", headers=named)


async def _body(
    request: Request, service: Service, job: Job, response_format: str, described: Mapping[str, Any]
) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    for number in range(job.status()["images"]):
        if response_format == "url":
            data.append({"url": f"{request.base_url}v1/jobs/{job.id}/images/{number}"})
        else:
            data.append({"b64_json": Base64(await service.image(job, number))})
    safety = {} if job.safety is None else {"safety": job.safety["action"]}
    more = safety | ({"warnings": list(job.warnings)} if job.warnings else {})
    usage = await service.usage(job)
    return {"created": int(job.created), "data": data, **described, **_drawn_size(job), **more, "usage": usage}


def _drawn_size(job: Job) -> dict[str, str]:
    """The `size` of a finished job's images, whatever the request left open."""
    return {"size": "{}x{}".format(*job.sizes[0])} if job.sizes else {}


async def wait_attached(request: Request, service: Service, job: Job) -> None:
    """Return when a job has ended whose client holds the connection; a client that has gone away cancels it."""
    waiting = asyncio.ensure_future(job.wait())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            service.cancel(job, GONE)
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
                content = {"b64_json": Base64(step.data["preview"]), "partial_image_index": sent}
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
            content = {"b64_json": Base64(await service.image(job, number))}
            data = {"type": f"{event}.completed", "created_at": int(job.created), **described, **content}
            yield encode_event(f"{event}.completed", data | _drawn_size(job) | {"usage": usage})
        yield b"data: [DONE]\n\n"
    except ZImageError as error:
        yield encode_event("error", error_body(error.code, str(error)))
    finally:
        service.cancel(job, GONE)
