"""`/v1/jobs`: every field of a request, progress as server-sent events, images to fetch; and `/v1/models`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from ..checks import shown
from ..errors import RequestError
from ..image.formats import is_cut_off, media_type
from ..request.codec import IMAGES, field_kinds, own_names
from .access import Caller, caller
from .bounds import read_form, read_json
from .encoding import Base64, encode_event
from .errors import Gone, NotFound
from .forms import is_form, read_items
from .jobs import Event, Job, Output, seeds_of
from .openapi import EVENTS_ANSWER, IMAGE_ANSWER, IMAGE_EXAMPLE, body
from .schema import JobRequest, OutputFields, decode_data_url, request_fields
from .service import Service
from .worker import lora_names

router = APIRouter(prefix="/v1", tags=["jobs"])

# Comment lines keep proxies from closing a quiet stream.
KEEP_ALIVE_SECONDS = 15.0
LAST_EVENT_ID = re.compile("[0-9]{1,9}")


def service_of(request: Request) -> Service:
    """The service behind the application."""
    return request.app.state.service


ServiceOf = Annotated[Service, Depends(service_of)]
CallerOf = Annotated[Caller, Depends(caller)]


@router.get("/models")
async def models(service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """The models that the caller may use, as OpenAI lists them, with what each one serves."""
    listed = [_model(service, name) for name in service.config.models if who.may_use(name)]
    return {"object": "list", "data": listed}


@router.get("/models/{name}")
async def model(name: str, service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """A model by its name."""
    if name not in service.config.models or not who.may_use(name):
        raise NotFound(f"models: there is no model {name[:64]!r}; /v1/models lists them")
    return _model(service, name)


def _model(service: Service, name: str) -> dict[str, Any]:
    config, manifest = service.config.models[name], service.manifests[name]
    shapes, pipeline = manifest.shapes, manifest.pipeline
    return {
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


JOB_BODY: Mapping[str, Any] = body(
    JobRequest,
    {"prompt": "a lighthouse in a storm, oil painting", "height": 256, "width": 256, "seed": 7},
    {"prompt": "一只熊猫，蓝色背景", "num_images": 2, "output_format": "jpeg", "output_quality": 90, "previews": 2},
    {"prompt": "the same in winter", "image": IMAGE_EXAMPLE, "strength": 0.6},
    files=IMAGES,
)


@router.post("/jobs", status_code=202, openapi_extra=dict(JOB_BODY))
async def create(request: Request, service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """Let a request wait: JSON, or a multipart form with images. Answers with the job, whose events tell the rest."""
    fields, output = await read_request(request, service)
    job = await submit(service, who, fields, output, detached=True)
    return job.status()


@router.get("/jobs/{job_id}")
async def status(job_id: str, service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """A job's state, position, progress and times; of an older one, its record."""
    job = _in_memory(service, who, job_id)
    if job is not None:
        return job.status() | {"position": service.queue.position(job)}
    return await _recorded(service, who, job_id)


@router.get("/jobs/{job_id}/events", response_class=StreamingResponse, responses=dict(EVENTS_ANSWER))
async def events(job_id: str, service: ServiceOf, who: CallerOf, request: Request) -> StreamingResponse:
    """Server-sent events: `queued`, `started`, `step` (`preview` is a JPEG in base64), `done`, `failed`, `cancelled`.

    A client that was cut off goes on after the event of its Last-Event-ID header. Of an older job there is the last.
    """
    job = _in_memory(service, who, job_id)
    if job is None:
        stream = _recorded_end(await _recorded(service, who, job_id))
    else:
        last = request.headers.get("last-event-id", "")
        stream = _stream(service, job, job.place_after(int(last)) if LAST_EVENT_ID.fullmatch(last) else 0)
    return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


@router.get("/jobs/{job_id}/images/{number}", response_class=Response, responses=dict(IMAGE_ANSWER))
async def image(job_id: str, number: int, service: ServiceOf, who: CallerOf) -> Response:
    """A finished image's file, with its record inside."""
    job = _in_memory(service, who, job_id)
    try:
        if job is not None:
            content, kind = await service.image(job, number), media_type(job.output.suffix)
        else:
            files = (await _recorded(service, who, job_id))["files"]
            if not 0 <= number < len(files):
                raise KeyError(number)
            path = service.store.folder / "images" / files[number]["file"]
            content, kind = await asyncio.to_thread(path.read_bytes), files[number]["media_type"]
            if is_cut_off(content, path.suffix):
                # The disk is not waited for before such an image is delivered.
                raise Gone("images: the file was cut off when the service lost power; draw it again")
    except FileNotFoundError as error:
        raise Gone(
            "images: they have expired; draw them again, or keep them for longer (queue.keep_seconds)"
        ) from error
    except KeyError as error:
        raise NotFound(f"images: there is no image {number} of this job") from error
    return Response(content, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})


@router.delete("/jobs/{job_id}")
async def cancel(job_id: str, service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """Cancel a job: at once if it waits, after its step if it runs; a finished one stays as it is."""
    job = _in_memory(service, who, job_id)
    if job is None:
        return await _recorded(service, who, job_id)
    service.cancel(job)
    return job.status()


async def submit(
    service: Service,
    who: Caller,
    fields: Mapping[str, Any],
    output: OutputFields,
    *,
    detached: bool,
    job_id: str | None = None,
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
        job_id=job_id,
    )


def _in_memory(service: Service, who: Caller, job_id: str) -> Job | None:
    """A job in memory that a caller may see, if there is one."""
    job = service.jobs.get(job_id)
    return job if job is not None and who.may_see(job.owner) else None


async def _recorded(service: Service, who: Caller, job_id: str) -> dict[str, Any]:
    """The status of an older job, with its `files`, by its record. Raises NotFound."""
    row = await service.store.row(job_id)
    if row is None or not who.may_see(row["owner"]):
        raise NotFound(f"jobs: there is no job {job_id[:64]!r}, or it has expired")
    kept = ("id", "state", "model", "created", "started", "finished", "timings", "warnings", "error")
    more = {} if row["safety"] is None else {"safety": row["safety"]["action"]}
    images = {"images": len(row["images"]), "files": row["images"], "position": None}
    seeds = seeds_of(row["fields"], len(row["images"]))
    return {name: row[name] for name in kept} | {"seeds": seeds} | images | more


async def _recorded_end(status: Mapping[str, Any]) -> AsyncIterator[bytes]:
    """The event that ended an older job."""
    data = {"error": status["error"]}
    if status["state"] == "done":
        data = {name: status[name] for name in ("seeds", "warnings")} | _result(status)
    yield encode_event(status["state"], {"id": status["id"], **data}, 0)


def _result(status: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the event `done` that a job's status has: addresses of images, times."""
    images = [f"/v1/jobs/{status['id']}/images/{number}" for number in range(status["images"])]
    return {"images": images, "timings": status["timings"]}


async def _stream(service: Service, job: Job, since: int) -> AsyncIterator[bytes]:
    """The events of a job to its end, or to that of the service; the client then asks the next one."""
    events = job.watch(since)
    pending: asyncio.Future[Event] | None = None
    drained = asyncio.ensure_future(service.has_drained.wait())
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(events))
            either: set[asyncio.Future[Any]] = {pending, drained}
            done, _ = await asyncio.wait(either, timeout=KEEP_ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                yield b": keep-alive\n\n"
                continue
            if pending not in done:
                return
            try:
                event = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield encode_event(event.name, event_json(job, event), event.number)
    finally:
        drained.cancel()
        if pending is not None:
            pending.cancel()


def event_json(job: Job, event: Event) -> dict[str, Any]:
    """An event's data for a client, for `encode_event`."""
    data = dict(event.data)
    if isinstance(data.get("preview"), bytes):
        data["preview"] = Base64(data["preview"])
    if event.name == "done":
        data |= _result(job.status())
    return {"id": job.id, **data}


async def read_request(
    request: Request, service: Service, *, needs_prompt: bool = True
) -> tuple[dict[str, Any], OutputFields]:
    """The fields of a request, with its images kept as files, and how to answer. Raises RequestError."""
    uploads: list[tuple[str, UploadFile]] = []
    if is_form(request.headers.get("content-type", "")):
        said, uploads = read_items((await read_form(request)).multi_items())
    else:
        said = await read_json(request)
    fields, output = read_said(own_names(said), needs_prompt=needs_prompt)
    for name, upload in uploads:
        if fields.get(name) is not None:
            raise RequestError(f"{name}: expected it once, got it twice", field=name)
        fields[name] = await service.store.keep_input(await upload.read())
    await keep_images(service, fields)
    return fields, output


async def keep_images(service: Service, fields: dict[str, Any]) -> None:
    """Keep the images of a request that are data URLs as files, so that no text of a client's is taken for a path.

    Raises RequestError for a text that is none, StorageFull.
    """
    for name in IMAGES:
        if isinstance(fields.get(name), str):
            content = decode_data_url(fields[name], name, service.config.limits.max_body_bytes)
            fields[name] = await service.store.keep_input(content)


def read_said(said: Mapping[str, Any], *, needs_prompt: bool = True) -> tuple[dict[str, Any], OutputFields]:
    """The fields of a request by what a body says, and how to answer. Raises RequestError."""
    has_prompt = needs_prompt or "prompt" in said
    try:
        read: BaseModel = JobRequest.model_validate(said if has_prompt else {**said, "prompt": ""})
    except ValidationError as error:
        raise invalid(error) from error
    fields = request_fields(read)
    if not has_prompt:
        fields.pop("prompt", None)
    return fields, OutputFields(**{name: getattr(read, name) for name in OutputFields.model_fields})


def invalid(error: ValidationError) -> RequestError:
    """The first fault that pydantic found, by its field."""
    first = error.errors()[0]
    name, *inner = [str(part) for part in first["loc"]] or ["body"]  # no place: a field's name is no text
    # What follows a field's name is a part of it, or the branch of a union.
    field = f"{name}.{inner[0]}" if inner and f"{name}.{inner[0]}" in field_kinds() else name
    if first["type"] in ("extra_forbidden", "missing"):
        field = ".".join((name, *inner))
    if first["type"] == "missing":
        return RequestError(f"{field}: expected {'a text' if field == 'prompt' else 'it'}, got nothing", field=field)
    return RequestError(f"{field}: {first['msg']}, got {shown(first['input'])}", field=field)
