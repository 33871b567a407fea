"""`/v1/sessions`: images edited turn by turn, with undo and redo, kept on the disk.

A session is a list of turns, and how many of them are not undone (`standing`). A turn is a job: `generate`, `edit` or
`refine`. Its image is kept beside the record as long as the session, so that the next turn can begin with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import io
import json
import logging
import sqlite3
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..atomic_write import atomic_write
from ..errors import RequestError
from ..image.formats import media_type
from ..request.codec import IMAGES
from ..session import EDIT_STRENGTH, REFINE_STRENGTH, TASKS
from .access import Caller
from .errors import Gone, NotFound
from .jobs import Job
from .jobs_api import CallerOf, ServiceOf, read_request, submit
from .openapi import IMAGE_ANSWER, MASK_EXAMPLE, body
from .recorded_fields import SESSIONS
from .schema import OutputFields, TurnRequest
from .service import Service
from .store import StorageFull

log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/sessions", tags=["sessions"])

Task = Literal["generate", "edit", "refine"]
# The roles of `session.TASKS` by those of the configuration.
ROLE_OF = {"draft": "turbo", "final": "base", "edit": "edit"}


@dataclasses.dataclass(frozen=True)
class Promise:
    """A turn that is drawn; a row of the table `promised_turns` until it stands.

    Attributes:
        session, job: their ids.
        number: the turn's.
        said: the turn's `task`, `prompt` and `negative_prompt`; JSON.
    """

    session: str
    job: str
    number: int
    said: str


@router.post("", status_code=201)
async def create(service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """Begin a session."""
    session = {"id": uuid.uuid4().hex, "owner": who.name, "created": time.time(), "standing": 0, "turns": "[]"}

    def insert(database: sqlite3.Connection) -> None:
        database.execute("INSERT INTO sessions VALUES (:id, :owner, :created, :standing, :turns)", session)

    await service.store.run(insert)
    return _shown(session)


@router.get("")
async def listed(service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """The caller's sessions, the newest first."""

    def read(database: sqlite3.Connection) -> list[dict[str, Any]]:
        query = "SELECT * FROM sessions WHERE owner = ? ORDER BY created DESC LIMIT 200"
        return [dict(row) for row in database.execute(query, (who.name,))]

    return {"sessions": [_shown(session) for session in await service.store.run(read)]}


@router.get("/{session_id}")
async def status(session_id: str, service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """A session: its turns in order, and how many of them are not undone."""
    return _shown(await _find(service, who, session_id))


@router.delete("/{session_id}")
async def delete(session_id: str, service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """Delete a session with its images."""
    session = await _find(service, who, session_id)

    def remove(database: sqlite3.Connection) -> None:
        database.execute("DELETE FROM sessions WHERE id = ?", (session_id,))
        database.execute("DELETE FROM promised_turns WHERE session = ?", (session_id,))
        for turn in json.loads(session["turns"]):
            if turn.get("file"):
                (service.store.folder / SESSIONS / turn["file"]).unlink(missing_ok=True)

    await service.store.run(remove)
    return {"id": session_id, "deleted": True}


TURN_BODY: Mapping[str, Any] = body(
    TurnRequest,
    {"prompt": "a lighthouse in a storm, oil painting", "height": 256, "width": 256, "seed": 7},
    {"prompt": "a lighthouse in a storm, with a red door", "mask": MASK_EXAMPLE},
    {"num_inference_steps": 12},
    files=IMAGES,
)


@router.post("/{session_id}/turns/{task}", status_code=202, openapi_extra=dict(TURN_BODY))
async def take(session_id: str, task: Task, request: Request, service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """Take a turn: the fields are those of `/v1/jobs`. What it does not say is the current image's.

    `edit` draws the current image anew after another prompt, all of it or where `mask` is white; `refine` draws it
    again with its own prompt, a little. Both refuse `image`; `generate` may begin with one. The answer is the job; its
    events tell when the turn stands.
    """
    await _find(service, who, session_id)
    _check_free(service, session_id)
    service.taking.add(session_id)  # the next lines wait, and another turn may come meanwhile
    try:
        # Again, as the session may have been moved before it was taken.
        return await _take(await _find(service, who, session_id), task, request, service, who)
    finally:
        service.taking.discard(session_id)


def _check_free(service: Service, session_id: str) -> None:
    """Raise RequestError while a turn of a session is drawn."""
    if session_id in service.turns or session_id in service.taking:
        raise RequestError("session: a turn of it is being drawn; wait for its job, or cancel it", field="session")


async def _take(session: dict[str, Any], task: Task, request: Request, service: Service, who: Caller) -> dict[str, Any]:
    session_id = session["id"]
    fields, output = await read_request(request, service, needs_prompt=task != "refine")
    turns = json.loads(session["turns"])[: session["standing"]]
    if task != "generate":
        if not turns:
            undone = ", as its turns are undone; bring one back with `redo`, or"
            why = " yet;" if session["turns"] == "[]" else undone
            raise RequestError(f"session: there is no image{why} take a turn `generate` first", field="session")
        fields = _following(service, task, turns[-1], fields)
    if fields.get("num_images", 1) != 1:
        raise RequestError(f"num_images: expected 1, as a session draws one image per turn, got {fields['num_images']}")
    if isinstance(fields["prompt"], list) and len(fields["prompt"]) != 1:
        raise RequestError("prompt: expected one, as a session draws one image per turn", field="prompt")
    if output.model is None:
        output = output.model_copy(update={"model": _model_for(service, task)})
    said = {"task": task, "prompt": fields["prompt"], "negative_prompt": fields.get("negative_prompt", "")}
    promise = Promise(session_id, uuid.uuid4().hex, len(turns), json.dumps(said))
    job = await _promised(service, who, fields, output, promise)
    _let_stand(service, promise, job)
    return job.status() | {"session": session_id, "turn": len(turns)}


async def _promised(
    service: Service, who: Caller, fields: Mapping[str, Any], output: OutputFields, promise: Promise
) -> Job:
    """Let a turn's job wait. The turn is written before the job is, so that no job is drawn again without its turn."""

    def insert(database: sqlite3.Connection) -> None:
        values = vars(promise)
        database.execute("INSERT OR REPLACE INTO promised_turns VALUES (:session, :job, :number, :said)", values)

    await service.store.run(insert)
    try:
        return await submit(service, who, fields, output, detached=True, job_id=promise.job)
    except BaseException:
        with contextlib.suppress(StorageFull):  # the next run forgets a turn without a job
            await service.store.run(functools.partial(_forget, promise=promise))
        raise


async def resume(service: Service) -> None:
    """Let the turns stand, when they are drawn, that a former run of the service promised."""

    def read(database: sqlite3.Connection) -> list[Promise]:
        return [Promise(**dict(row)) for row in database.execute("SELECT * FROM promised_turns")]

    for promise in await service.store.run(read):
        job = service.jobs.get(promise.job) or await service.store.ended(promise.job)
        if job is None:  # it was refused, or never answered
            await service.store.run(functools.partial(_forget, promise=promise))
        else:
            _let_stand(service, promise, job)


@router.post("/{session_id}/undo")
async def undo(session_id: str, service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """Take the last turn back; it can be redone until another is taken."""
    return await _move(service, who, session_id, -1, "undo")


@router.post("/{session_id}/redo")
async def redo(session_id: str, service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """Bring back the turn that `undo` took."""
    return await _move(service, who, session_id, 1, "redo")


@router.get("/{session_id}/turns/{number}/image", response_class=Response, responses=dict(IMAGE_ANSWER))
async def image(session_id: str, number: int, service: ServiceOf, who: CallerOf) -> Response:
    """A turn's image, with its record inside."""
    turns = json.loads((await _find(service, who, session_id))["turns"])
    if not 0 <= number < len(turns):
        raise NotFound(f"turns: there is no turn {number} in this session")
    path = service.store.folder / SESSIONS / turns[number]["file"]
    try:
        content = await asyncio.to_thread(path.read_bytes)
    except FileNotFoundError as error:
        raise Gone("image: its file is gone from the service's disk") from error
    return Response(content, media_type=media_type(path.suffix))


def _following(service: Service, task: str, last: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a turn that begins with the last one's image. Raises RequestError if it says another."""
    if fields.get("image") is not None:
        raise RequestError(
            f"image: expected none, as `{task}` begins with the session's own image; take a turn `generate` with "
            "it first",
            field="image",
        )
    image = service.store.folder / SESSIONS / last["file"]
    kept: dict[str, Any] = {"seed": last["seed"], "image": image}
    if task == "refine":
        kept |= {"prompt": last["prompt"], "negative_prompt": last["negative_prompt"]}
        kept |= {"fit": "stretch"} if fields.keys() & {"height", "width"} else {}
    if fields.get("denoise") is None:  # which would go before the strength
        kept["strength"] = REFINE_STRENGTH if task == "refine" else EDIT_STRENGTH
    return kept | fields | {"image": image}


def _model_for(service: Service, task: str) -> str:
    """The model of a task, by the roles of the configuration; the service's first if none has a fitting role."""
    for role in TASKS[task]:
        for name, model in service.config.models.items():
            if model.role == ROLE_OF[role]:
                return name
    return service.config.default_model


def _let_stand(service: Service, promise: Promise, job: Job) -> None:
    """Keep a turn when its job is done; its session takes no other until then."""
    settling = asyncio.ensure_future(_settle(service, promise, job))
    service.turns[promise.session] = (job, settling)
    settling.add_done_callback(lambda _: service.turns.pop(promise.session, None))


async def _settle(service: Service, promise: Promise, job: Job) -> None:
    """When a turn's job is done, keep its image and let the turn stand; turns that were undone are forgotten."""
    await service.wait(job)
    content = None
    if job.state == "done":
        try:
            content = await service.image(job, 0)
        except FileNotFoundError:
            log.warning("turn %s of session %s: its image has expired", promise.number, promise.session)

    def end(database: sqlite3.Connection) -> None:
        if content is not None:
            _keep(database, service.store.folder / SESSIONS, promise, job, content)
        _forget(database, promise)

    await service.store.run(end)


def _keep(database: sqlite3.Connection, folder: Path, promise: Promise, job: Job, content: bytes) -> None:
    """Write a turn and its image, unless its session was deleted."""
    from PIL import Image

    row = database.execute("SELECT turns FROM sessions WHERE id = ?", (promise.session,)).fetchone()
    if row is None:
        return
    folder.mkdir(exist_ok=True)
    file = f"{promise.session}-{promise.number}-{job.id[:8]}{job.output.suffix}"
    atomic_write(folder / file, content)
    with Image.open(io.BytesIO(content)) as opened:
        size = list(opened.size)
    said = json.loads(promise.said)
    turn = {
        "task": said["task"],
        "job": job.id,
        "model": job.model,
        "prompt": said["prompt"],
        "negative_prompt": said["negative_prompt"],
        "seed": job.fields["seed"],
        "size": size,
        "created": job.created,
        "timings": dict(job.timings),
        "file": file,
    }
    turns = json.loads(row["turns"])
    for undone in turns[promise.number :]:
        (folder / undone["file"]).unlink(missing_ok=True)
    change = "UPDATE sessions SET turns = ?, standing = ? WHERE id = ?"
    values = (json.dumps([*turns[: promise.number], turn]), promise.number + 1, promise.session)
    database.execute(change, values)


def _forget(database: sqlite3.Connection, promise: Promise) -> None:
    database.execute("DELETE FROM promised_turns WHERE session = ? AND job = ?", (promise.session, promise.job))


async def _move(service: Service, who: Caller, session_id: str, by: int, name: str) -> dict[str, Any]:
    session = await _find(service, who, session_id)
    _check_free(service, session_id)

    def move(database: sqlite3.Connection) -> dict[str, Any] | None:
        row = dict(database.execute("SELECT * FROM sessions WHERE id = ?", (session["id"],)).fetchone())
        standing = row["standing"] + by
        if not 0 <= standing <= len(json.loads(row["turns"])):
            return None
        database.execute("UPDATE sessions SET standing = ? WHERE id = ?", (standing, session_id))
        return row | {"standing": standing}

    moved = await service.store.run(move)
    if moved is None:
        raise RequestError(f"{name}: there is no turn to {name}")
    return _shown(moved)


async def _find(service: Service, who: Caller, session_id: str) -> dict[str, Any]:
    def read(database: sqlite3.Connection) -> dict[str, Any] | None:
        row = database.execute("SELECT * FROM sessions WHERE id = ?", (session_id,)).fetchone()
        return None if row is None else dict(row)

    job, settling = service.turns.get(session_id, (None, None))
    if job is not None and settling is not None and job.is_finished:
        await asyncio.wait({settling})  # so that a turn stands as soon as its job is done
    session = await service.store.run(read)
    if session is None or not who.may_see(session["owner"]):
        raise NotFound(f"sessions: there is no session {session_id[:64]!r}")
    return session


def _shown(session: dict[str, Any]) -> dict[str, Any]:
    """A session for a client: files are fetched by their turns' numbers."""
    turns = [{key: value for key, value in turn.items() if key != "file"} for turn in json.loads(session["turns"])]
    return {"id": session["id"], "created": session["created"], "standing": session["standing"], "turns": turns}
