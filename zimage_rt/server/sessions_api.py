"""`/v1/sessions`: images edited turn by turn, with undo and redo, kept on the disk.

A session is a list of turns, and how many of them are not undone (`standing`). A turn is a job: `generate`, `edit` or
`refine`. Its image is kept beside the record as long as the session, so that the next turn can begin with it.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
import uuid
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..atomic_write import atomic_write
from ..errors import RequestError
from ..image.formats import media_type
from ..request.codec import IMAGES
from ..session import TASKS
from .access import Caller
from .errors import Gone, NotFound
from .jobs import Job
from .jobs_api import CallerOf, ServiceOf, read_request, submit
from .openapi import IMAGE_ANSWER, MASK_EXAMPLE, body
from .schema import TurnRequest
from .service import Service
from .store import SESSIONS

router = APIRouter(prefix="/v1/sessions", tags=["sessions"])

Task = Literal["generate", "edit", "refine"]
# The roles of `session.TASKS` by those of the configuration.
ROLE_OF = {"draft": "turbo", "final": "base", "edit": "edit"}
# A turn's strength if it says none; see `Session.edit` and `Session.refine`.
REFINE_STRENGTH = 0.3


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
    again with its own prompt, a little. The answer is the job; its events tell when the turn stands.
    """
    session = await _find(service, who, session_id)
    if session_id in service.turns or session_id in service.taking:
        raise RequestError("session: a turn of it is being drawn; wait for its job, or cancel it", field="session")
    service.taking.add(session_id)  # the next lines wait, and another turn may come meanwhile
    try:
        return await _take(session, task, request, service, who)
    finally:
        service.taking.discard(session_id)


async def _take(session: dict[str, Any], task: Task, request: Request, service: Service, who: Caller) -> dict[str, Any]:
    session_id = session["id"]
    fields, output = await read_request(request, service, needs_prompt=task != "refine")
    turns = json.loads(session["turns"])[: session["standing"]]
    if task != "generate":
        if not turns:
            raise RequestError("session: there is no image yet; take a turn `generate` first", field="session")
        fields = _following(service, task, turns[-1], fields)
    if fields.get("num_images", 1) != 1:
        raise RequestError(f"num_images: expected 1, as a session draws one image per turn, got {fields['num_images']}")
    if isinstance(fields["prompt"], list) and len(fields["prompt"]) != 1:
        raise RequestError("prompt: expected one, as a session draws one image per turn", field="prompt")
    if output.model is None:
        output = output.model_copy(update={"model": _model_for(service, task)})
    job = await submit(service, who, fields, output, detached=True)
    settling = asyncio.ensure_future(_settle(service, session_id, task, job, len(turns)))
    service.turns[session_id] = (job, settling)
    settling.add_done_callback(lambda _: service.turns.pop(session_id, None))
    return job.status() | {"session": session_id, "turn": len(turns)}


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
    """The fields of a turn that begins with the last one's image."""
    image = service.store.folder / SESSIONS / last["file"]
    kept: dict[str, Any] = {"seed": last["seed"], "image": image}
    if task == "refine":
        kept |= {"prompt": last["prompt"], "negative_prompt": last["negative_prompt"], "strength": REFINE_STRENGTH}
        kept |= {"fit": "stretch"} if fields.keys() & {"height", "width"} else {}
    elif "strength" not in fields and "denoise" not in fields:
        kept["strength"] = 1.0
    if "denoise" in fields:
        kept.pop("strength", None)
    return kept | fields | {"image": image}


def _model_for(service: Service, task: str) -> str:
    """The model of a task, by the roles of the configuration; the service's first if none has a fitting role."""
    for role in TASKS[task]:
        for name, model in service.config.models.items():
            if model.role == ROLE_OF[role]:
                return name
    return service.config.default_model


async def _settle(service: Service, session_id: str, task: str, job: Job, number: int) -> None:
    """When a turn's job is done, keep its image and let the turn stand; turns that were undone are forgotten."""
    await service.wait(job)
    if job.state != "done":
        return
    content = await service.image(job, 0)
    file = f"{session_id}-{number}-{job.id[:8]}{job.output.suffix}"
    fields = job.fields
    turn = {
        "task": task,
        "job": job.id,
        "model": job.model,
        "prompt": fields["prompt"],
        "negative_prompt": fields.get("negative_prompt", ""),
        "seed": fields["seed"],
        "size": list(job.sizes[0]),
        "created": job.created,
        "timings": dict(job.timings),
        "file": file,
    }

    def keep(database: sqlite3.Connection) -> None:
        folder = service.store.folder / SESSIONS
        folder.mkdir(exist_ok=True)
        atomic_write(folder / file, content)
        row = database.execute("SELECT turns FROM sessions WHERE id = ?", (session_id,)).fetchone()
        if row is None:
            (folder / file).unlink(missing_ok=True)
            return
        turns = json.loads(row["turns"])
        for undone in turns[number:]:
            (folder / undone["file"]).unlink(missing_ok=True)
        change = "UPDATE sessions SET turns = ?, standing = ? WHERE id = ?"
        database.execute(change, (json.dumps([*turns[:number], turn]), number + 1, session_id))

    await service.store.run(keep)


async def _move(service: Service, who: Caller, session_id: str, by: int, name: str) -> dict[str, Any]:
    session = await _find(service, who, session_id)

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
