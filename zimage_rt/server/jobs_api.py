"""`/v1/jobs`: every field of a request, progress as server-sent events, images to fetch; and `/v1/models`."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from ..checks import shown
from ..errors import RequestError
from ..image.formats import FORMATS
from ..request.codec import DIFFUSERS_NAMES, IMAGES, field_kinds
from ..request.values import read_value
from .access import Caller, caller
from .bounds import read_form, read_json
from .errors import Gone, NotFound
from .jobs import Event, Job, Output
from .schema import JobRequest, OutputFields, decode_data_url, request_fields
from .service import Service
from .worker import lora_names

router = APIRouter(prefix="/v1", tags=["jobs"])

# Comment lines keep proxies from closing a quiet stream.
KEEP_ALIVE_SECONDS = 15.0


def service_of(request: Request) -> Service:
    """The service behind the application."""
    return request.app.state.service


ServiceOf = Annotated[Service, Depends(service_of)]
CallerOf = Annotated[Caller, Depends(caller)]


@router.get("/models")
async def models(service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """The models that the caller may use, as OpenAI lists them, with what each one serves."""
    listed = []
    for name, config in service.config.models.items():
        if not who.may_use(name):
            continue
        manifest = service.manifests[name]
        shapes, pipeline = manifest.shapes, manifest.pipeline
        listed.append(
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "zimage_rt",
                "role": config.role,
                "bundle": {"name": manifest.name, "id": manifest.bundle_id, "precision": manifest.precision},
                "height": {"min": shapes.height.min, "max": shapes.height.max, "multiple": shapes.height.multiple},
                "width": {"min": shapes.width.min, "max": shapes.width.max, "multiple": shapes.width.multiple},
                "default_size": [shapes.width.opt, shapes.height.opt],
                "num_inference_steps": pipeline.num_inference_steps,
                "guidance_scale": pipeline.guidance_scale,
                "loras": sorted(lora_names(config.loras)),
                "takes_images": any(module.endswith("_vae_encoder") for module in manifest.modules),
                "takes_control_images": "controlnet" in manifest.modules,
            }
        )
    return {"object": "list", "data": listed}


# The body is described here and read by `read_request`: FastAPI would parse it before its bounds are checked.
BODY: Mapping[str, Any] = {"requestBody": {"content": {"application/json": {"schema": {}}}}}


@router.post("/jobs", status_code=202, openapi_extra=dict(BODY))
async def create(request: Request, service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """Let a request wait: JSON, or a multipart form with images. Answers with the job, whose events tell the rest."""
    fields, output = await read_request(request, service)
    job = await submit(service, who, fields, output, detached=True)
    return job.status()


@router.get("/jobs/{job_id}")
async def status(job_id: str, service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """A job's state, position, progress and times; of an older one, its record."""
    job = service.jobs.get(job_id)
    if job is not None and who.may_see(job.owner):
        return job.status() | {"position": service.queue.position(job)}
    return await _recorded(service, who, job_id)


@router.get("/jobs/{job_id}/events")
async def events(job_id: str, service: ServiceOf, who: CallerOf, request: Request) -> StreamingResponse:
    """Server-sent events: `queued`, `started`, `step` (`preview` is a JPEG in base64), `done`, `failed`, `cancelled`.

    A client that was cut off goes on after the event of its Last-Event-ID header.
    """
    job = find(service, who, job_id)
    last = request.headers.get("last-event-id", "")
    since = int(last) + 1 if last.isdecimal() else 0
    return StreamingResponse(_stream(job, since), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


@router.get("/jobs/{job_id}/images/{number}")
async def image(job_id: str, number: int, service: ServiceOf, who: CallerOf) -> Response:
    """A finished image's file, with its record inside."""
    job = service.jobs.get(job_id)
    try:
        if job is not None and who.may_see(job.owner):
            content, media_type = await service.image(job, number), media_type_of(job.output)
        else:
            recorded = (await _recorded(service, who, job_id))["files"][number]
            path = service.store.folder / "images" / recorded["file"]
            content, media_type = await asyncio.to_thread(path.read_bytes), recorded["media_type"]
    except FileNotFoundError as error:
        raise Gone(
            "images: they have expired; draw them again, or keep them for longer (queue.keep_seconds)"
        ) from error
    except (KeyError, IndexError) as error:
        raise NotFound(f"images: there is no image {number} of this job") from error
    return Response(content, media_type=media_type, headers={"Cache-Control": "private, max-age=3600"})


@router.delete("/jobs/{job_id}")
async def cancel(job_id: str, service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """Cancel a job: at once if it waits, after its step if it runs; a finished one stays as it is."""
    job = find(service, who, job_id)
    service.cancel(job)
    return job.status()


async def submit(
    service: Service, who: Caller, fields: Mapping[str, Any], output: OutputFields, *, detached: bool
) -> Job:
    """Let a caller's request wait. Raises what `Service.submit` raises, and Forbidden or RateLimited by its key."""
    model = service.model(output.model)
    who.check_model(model)
    encoded = Output(**service.output_of(output))
    return await service.submit(
        model,
        fields,
        owner=who.name,
        output=encoded,
        priority=output.priority,
        detached=detached,
        admit=who.admit,
    )


def find(service: Service, who: Caller, job_id: str) -> Job:
    """A job in memory that a caller may see. Raises NotFound."""
    job = service.jobs.get(job_id)
    if job is None or not who.may_see(job.owner):
        raise NotFound(f"jobs: there is no job {job_id[:64]!r}, or it has expired")
    return job


async def _recorded(service: Service, who: Caller, job_id: str) -> dict[str, Any]:
    row = await service.store.row(job_id)
    if row is None or not who.may_see(row["owner"]):
        raise NotFound(f"jobs: there is no job {job_id[:64]!r}, or it has expired")
    kept = ("id", "state", "model", "created", "started", "finished", "timings", "error")
    more = {} if row["safety"] is None else {"safety": row["safety"]["action"]}
    images = {"images": len(row["images"]), "files": row["images"], "position": None}
    return {name: row[name] for name in kept} | images | more


async def _stream(job: Job, since: int) -> AsyncIterator[bytes]:
    events = job.watch(since)
    pending: asyncio.Future[Event] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({pending}, timeout=KEEP_ALIVE_SECONDS)
            if not done:
                yield b": keep-alive\n\n"
                continue
            try:
                event = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield encode_event(event.name, event_json(job, event), event.number)
    finally:
        if pending is not None:
            pending.cancel()


def event_json(job: Job, event: Event) -> dict[str, Any]:
    """An event's data for a client; previews in base64."""
    data = dict(event.data)
    if isinstance(data.get("preview"), bytes):
        data["preview"] = base64.b64encode(data["preview"]).decode()
    if event.name == "done":
        data["images"] = [f"/v1/jobs/{job.id}/images/{i}" for i in range(job.status()["images"])]
        data["timings"] = dict(job.timings)
    return {"id": job.id, **data}


def encode_event(name: str, data: Mapping[str, Any], number: int | None = None) -> bytes:
    """A server-sent event."""
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def media_type_of(output: Output) -> str:
    """The media type of a job's images."""
    return f"image/{FORMATS[output.suffix].lower()}"


async def read_request(
    request: Request, service: Service, *, needs_prompt: bool = True
) -> tuple[dict[str, Any], OutputFields]:
    """The fields of a request, with its images kept as files, and how to answer. Raises RequestError."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        said = await _form(request)
    else:
        said = await read_json(request)
    uploads = {name: said.pop(name) for name in list(said) if isinstance(said[name], UploadFile)}
    for name, own in DIFFUSERS_NAMES.items():
        if name in said:
            said.setdefault(own, said.pop(name))
    fields, output = read_said(said, needs_prompt=needs_prompt)
    for name in IMAGES:
        if name in uploads:
            content = await uploads[name].read()
        elif fields.get(name) is not None:
            content = decode_data_url(fields[name], name, service.config.limits.max_body_bytes)
        else:
            continue
        fields[name] = await service.store.keep_input(content)
    return fields, output


def read_said(said: Mapping[str, Any], *, needs_prompt: bool = True) -> tuple[dict[str, Any], OutputFields]:
    """The fields of a request by what a body says, and how to answer. Raises RequestError."""
    has_prompt = needs_prompt or "prompt" in said
    try:
        body: BaseModel = JobRequest.model_validate(said if has_prompt else {**said, "prompt": ""})
    except ValidationError as error:
        raise invalid(error) from error
    fields = request_fields(body)
    if not has_prompt:
        fields.pop("prompt", None)
    return fields, OutputFields(**{name: getattr(body, name) for name in OutputFields.model_fields})


def invalid(error: ValidationError) -> RequestError:
    """The first fault that pydantic found, by its field."""
    first = error.errors()[0]
    name, *inner = (str(part) for part in first["loc"])
    # What follows a field's name is a part of it, or the branch of a union.
    field = f"{name}.{inner[0]}" if inner and f"{name}.{inner[0]}" in field_kinds() else name
    return RequestError(f"{field}: {first['msg']}, got {shown(first['input'])}", field=field)


async def _form(request: Request) -> dict[str, Any]:
    """A multipart form as JSON would say it, with its files."""
    form = await read_form(request)
    said = from_texts((name, value) for name, value in form.multi_items() if isinstance(value, str))
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            said[DIFFUSERS_NAMES.get(name, name)] = value
    return said


def from_texts(texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """A form's texts as JSON would say them: read by the fields' kinds; `second_pass.scale` is a part."""
    kinds = field_kinds()
    said: dict[str, Any] = {}
    for name, value in texts:
        own = DIFFUSERS_NAMES.get(name, name)
        outer, dot, inner = own.partition(".")
        if own in kinds and own not in IMAGES:
            converted: Any = read_value(own, kinds[own], value, Path())
            converted = list(converted) if isinstance(converted, tuple) else converted
        elif own in ("previews", "priority", "output_quality"):
            converted = int(value) if value.lstrip("-").isdecimal() else value
        else:
            converted = value
        if dot and own in kinds:
            said.setdefault(outer, {})[inner] = converted
        else:
            said[own] = converted
    return said
