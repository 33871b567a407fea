"""`/prompt`, `/queue`, `/interrupt`, `/history`, `/jobs`, and the websocket."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, Response
from starlette.background import BackgroundTask

from ...checks import shown
from ...comfyui.graph import MAX_BYTES, WorkflowError
from ...comfyui.workflow_file import is_editor_format, parse_workflow
from ...errors import RequestError, ZImageError
from ..access import Caller
from ..bounds import parse_json, parse_whole_json
from ..errors import answer_to
from ..jobs_api import CallerOf
from . import messages
from .hub import Socket
from .workflow_run import WorkflowRun
from .workflows import Workflows

router = APIRouter(include_in_schema=False)

UUID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Of a workflow's body: bytes outside of texts, and levels; ten thousand nodes have some megabytes.
MAX_STRUCTURE, MAX_DEPTH = MAX_BYTES, 64
# What the server says of itself to a client that tells its own features, and at `/features`.
FEATURES: Mapping[str, Any] = {"supports_preview_metadata": True, "max_upload_size": 64 << 20}
# Characters of a client's id.
MAX_CLIENT = 200
# A workflow's number in the queue, and entries of a page of the history.
MAX_PLACE, MAX_PAGE = 2**53, 10_000
# Keys of Comfy's own services, which clients send along: nothing here needs them, and they are not kept.
SECRETS = ("api_key_comfy_org", "auth_token_comfy_org")


def workflows_of(request: Request) -> Workflows:
    """The workflows of the service behind the application."""
    return request.app.state.workflows


WorkflowsOf = Annotated[Workflows, Depends(workflows_of)]


async def read_body(request: Request) -> dict[str, Any]:
    """The object in a request's body, whatever its Content-Type says. Raises RequestError."""
    body = await request.body()
    said = await asyncio.to_thread(parse_whole_json, body or b"{}", MAX_STRUCTURE, MAX_DEPTH)
    if not isinstance(said, dict):
        raise RequestError("body: expected a JSON object")
    return said


# --- queueing -------------------------------------------------------------------------------------------------------


@router.get("/prompt")
async def remaining(workflows: WorkflowsOf, who: CallerOf) -> dict[str, Any]:
    """How many workflows wait or run."""
    return messages.status(workflows.remaining(who.name))["status"]


@router.post("/prompt")
async def prompt(request: Request, workflows: WorkflowsOf, who: CallerOf) -> JSONResponse:
    """Let a workflow wait."""
    try:
        body = await read_body(request)
        run = await _submit(body, request.query_params.get("clientId"), workflows, who)
    except WorkflowError as error:
        return refusal(error)
    except ZImageError as error:
        return _with_details(error)
    said = {"prompt_id": run.job.id, "number": run.number, "node_errors": {}}
    # It begins when the client has its id: some look for their workflow's messages only then, and miss those of one
    # whose nodes are all cached.
    return JSONResponse(said, background=BackgroundTask(workflows.begin))


async def _submit(body: Mapping[str, Any], client: str | None, workflows: Workflows, who: Caller) -> WorkflowRun:
    sent = body.get("prompt")
    if not isinstance(sent, dict) or not sent:
        if is_editor_format(body) or sent is None:
            raise WorkflowError(_what_it_is(body), "no_prompt")
        raise WorkflowError(f"prompt: expected an object with a node by id, got {shown(sent)}", "no_prompt")
    if is_editor_format(sent):
        raise WorkflowError(_what_it_is(sent), "invalid_prompt")
    job_id = body.get("prompt_id")
    if job_id is not None and not (isinstance(job_id, str) and UUID.fullmatch(job_id)):
        raise WorkflowError(f"prompt_id: expected a UUID in lower case, got {shown(job_id)}", "invalid_prompt_id")
    number, targets = body.get("number"), body.get("partial_execution_targets")
    if number is not None and not _is_place(number):
        raise WorkflowError(f"number: expected a number from -{MAX_PLACE} to {MAX_PLACE}, got {shown(number)}")
    if targets is not None and not (isinstance(targets, list) and all(isinstance(each, str) for each in targets)):
        raise WorkflowError(f"partial_execution_targets: expected a list of node ids, got {shown(targets)}")
    extra = body.get("extra_data", {})
    if not isinstance(extra, dict):
        raise WorkflowError(f"extra_data: expected an object, got {shown(extra)}")
    extra = {name: value for name, value in extra.items() if name not in SECRETS}
    client = body.get("client_id", client)
    if isinstance(client, str):
        extra["client_id"] = client[:MAX_CLIENT]
    extra["create_time"] = int(time.time() * 1000)
    graph = await asyncio.to_thread(parse_workflow, sent, "prompt")
    run, _ = await workflows.submit(
        who,
        graph,
        sent,
        extra,
        job_id=job_id,
        number=None if number is None else float(number),
        first=bool(body.get("front", False)),
        targets=targets,
    )
    return run


def _is_place(number: Any) -> bool:
    """Whether a number is one of the queue's: no yes or no, and no more than JSON's readers keep exactly."""
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    return is_number and -MAX_PLACE <= number <= MAX_PLACE


def _what_it_is(data: Mapping[str, Any]) -> str:
    if is_editor_format(data):
        return (
            "prompt: expected a workflow in API format, got one as the editor saves it; export it with Export (API), "
            "or run the file with `zimage workflow`, which reads both"
        )
    return "prompt: expected an object with a node by id under `prompt`, got a body without it"


def refusal(error: WorkflowError) -> JSONResponse:
    """A refused workflow, in ComfyUI's shape."""
    said = {"type": error.kind, "message": str(error), "details": str(error), "extra_info": {}}
    return JSONResponse({"error": said, "node_errors": error.node_errors}, 400)


def _with_details(error: ZImageError) -> JSONResponse:
    """Another refusal, whose body ComfyUI's clients can read too."""
    answer = answer_to(error)
    said = {"type": error.code, "message": str(error), "details": str(error), "extra_info": {}}
    headers = {name: value for name, value in answer.headers.items() if name in ("retry-after", "www-authenticate")}
    return JSONResponse({"error": said, "node_errors": {}}, answer.status_code, headers)


@router.get("/queue")
async def queue(workflows: WorkflowsOf, who: CallerOf) -> dict[str, Any]:
    """The workflows that run, and those that wait."""
    runs = workflows.of(who.name)
    return {
        "queue_running": [run.queue_entry() for run in runs if run.job.state != "queued"],
        "queue_pending": [run.queue_entry() for run in runs if run.job.state == "queued"],
    }


@router.post("/queue")
async def change_queue(request: Request, workflows: WorkflowsOf, who: CallerOf) -> Response:
    """Take all workflows that wait out of the queue (`clear`), or some (`delete`)."""
    body = await read_body(request)
    named = ids_of(body, "delete")
    for run in workflows.of(who.name):
        if run.job.state == "queued" and (body.get("clear") or run.job.id in named):
            workflows.cancel(run)
    return Response()


@router.post("/interrupt")
async def interrupt(request: Request, workflows: WorkflowsOf, who: CallerOf) -> Response:
    """Stop the workflows that run, or the one of `prompt_id` if it runs. A body that is no JSON says nothing."""
    wanted = None
    with contextlib.suppress(RequestError):
        wanted = (await read_body(request)).get("prompt_id")
    for run in workflows.of(who.name):
        if run.job.state == "running" and (not wanted or wanted == run.job.id):
            workflows.cancel(run)
    return Response()


@router.post("/free")
async def free(who: CallerOf) -> Response:
    """Nothing: models stay loaded as the configuration has it."""
    return Response()


def ids_of(body: Mapping[str, Any], name: str) -> list[str]:
    """A list of ids in a body. Raises RequestError."""
    found = body.get(name, [])
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise RequestError(f"{name}: expected a list of ids, got {shown(found)}", field=name)
    return found


# --- history --------------------------------------------------------------------------------------------------------


@router.get("/history")
async def history(
    workflows: WorkflowsOf, who: CallerOf, max_items: int | None = None, offset: int = -1
) -> dict[str, Any]:
    """The workflows that have ended, by id."""
    most = None if max_items is None else max(0, min(max_items, MAX_PAGE))
    return await workflows.history.entries(who.name, most, max(-1, min(offset, MAX_PLACE)))


@router.get("/history/{job_id}")
async def one_of_history(job_id: str, workflows: WorkflowsOf, who: CallerOf) -> dict[str, Any]:
    """A workflow that has ended; empty if it has not, or is unknown."""
    found = await workflows.history.entry(who.name, job_id)
    return {} if found is None else {job_id: found[0]}


@router.post("/history")
async def change_history(request: Request, workflows: WorkflowsOf, who: CallerOf) -> Response:
    """Forget all workflows that have ended (`clear`), or some (`delete`). Their images stay."""
    body = await read_body(request)
    named = ids_of(body, "delete")
    if body.get("clear"):
        await workflows.history.remove(who.name)
    elif named:
        await workflows.history.remove(who.name, named)
    return Response()


@router.get("/jobs")
async def jobs(
    workflows: WorkflowsOf,
    who: CallerOf,
    status: str | None = None,
    workflow_id: str | None = None,
    sort_by: str = "created_at",
    sort_order: str = "desc",
    limit: int | None = None,
    offset: int = 0,
) -> JSONResponse:
    """All workflows, or those in some states."""
    known = set(messages.STATUSES.values())
    wanted = {each.strip().lower() for each in (status or "").split(",") if each.strip()} or known
    if strange := wanted - known:
        return _fault(f"status: expected some of {', '.join(messages.STATUSES.values())}, got {shown(sorted(strange))}")
    sort_by, sort_order, offset = sort_by.lower(), sort_order.lower(), max(offset, 0)
    if sort_by not in ("created_at", "execution_duration") or sort_order not in ("asc", "desc"):
        return _fault("sort_by: expected created_at or execution_duration, and sort_order asc or desc")
    if limit is not None and limit < 1:
        return _fault(f"limit: expected 1 or more, got {limit}")
    found = [messages.listed_job(run) for run in workflows.of(who.name)]
    found = [job for job in found if job["status"] in wanted]
    ended = sorted(wanted - {"pending", "in_progress"})
    found += await workflows.history.jobs(who.name, ended) if ended else []
    if workflow_id is not None:
        found = [job for job in found if job["workflow_id"] == workflow_id]
    key = _duration if sort_by == "execution_duration" else _created
    found.sort(key=key, reverse=sort_order == "desc")
    limit = None if limit is None else min(limit, MAX_PAGE)
    page = found[offset:] if limit is None else found[offset : offset + limit]
    more = offset + len(page) < len(found)
    pagination = {"offset": offset, "limit": limit, "total": len(found), "has_more": more}
    return JSONResponse({"jobs": page, "pagination": pagination})


def _fault(text: str) -> JSONResponse:
    """A refusal as ComfyUI's list of jobs says it."""
    return JSONResponse({"error": text}, 400)


def _created(job: Mapping[str, Any]) -> float:
    return float(job["create_time"])


def _duration(job: Mapping[str, Any]) -> float:
    start, end = job["execution_start_time"], job["execution_end_time"]
    return float(end - start) if start and end else 0.0


@router.get("/jobs/{job_id}")
async def job(job_id: str, workflows: WorkflowsOf, who: CallerOf) -> JSONResponse:
    """A workflow with its graph and outputs."""
    run = workflows.runs.get(job_id)
    if run is not None and who.may_see(run.job.owner):
        listed, outputs = messages.listed_job(run), run.outputs
        graph, extra = run.graph, run.extra_data
    else:
        found = await workflows.history.entry(who.name, job_id)
        if found is None:
            return JSONResponse({"error": f"job: there is no {shown(job_id)}"}, 404)
        entry, listed = found
        outputs, graph, extra = entry["outputs"], entry["prompt"][2], entry["prompt"][3]
    return JSONResponse(
        {**listed, "outputs": dict(outputs), "workflow": {"prompt": dict(graph), "extra_data": dict(extra)}}
    )


@router.post("/jobs/cancel")
async def cancel_jobs(request: Request, workflows: WorkflowsOf, who: CallerOf) -> JSONResponse:
    """Stop some workflows, and say whether any was stopped; those that have ended stay as they are."""
    try:
        named = (await read_body(request)).get("job_ids")
    except RequestError as error:
        return _fault(str(error))
    if not isinstance(named, list):
        return _fault(f"job_ids: expected a list of ids, got {shown(named)}")
    if strange := [each for each in named if not (isinstance(each, str) and UUID.fullmatch(each))]:
        said = [each if isinstance(each, str) else shown(each) for each in strange]
        return JSONResponse({"error": "job_ids: expected UUIDs in lower case", "invalid_ids": said}, 400)
    stopped = [job_id for job_id in named if _cancel(workflows, who, job_id)]
    return JSONResponse({"cancelled": bool(stopped)})


@router.post("/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, workflows: WorkflowsOf, who: CallerOf) -> dict[str, Any]:
    """Stop a workflow; one that has ended stays as it is."""
    return {"cancelled": _cancel(workflows, who, job_id)}


def _cancel(workflows: Workflows, who: Caller, job_id: str) -> bool:
    run = workflows.runs.get(job_id)
    if run is None or not who.may_see(run.job.owner) or run.job.is_finished:
        return False
    workflows.cancel(run)
    return True


# --- the websocket --------------------------------------------------------------------------------------------------


@router.websocket("/ws")
async def websocket(websocket: WebSocket) -> None:
    """Messages about a client's workflows; the client says at most what features it has."""
    workflows: Workflows = websocket.app.state.workflows
    who: Caller = websocket.state.caller
    await websocket.accept()
    sid = websocket.query_params.get("clientId", "")[:MAX_CLIENT] or uuid.uuid4().hex
    socket = Socket(websocket, who.name, sid)
    workflows.hub.add(socket)
    status = messages.status(workflows.remaining(who.name))
    workflows.hub.send(who.name, sid, "status", {**status, "sid": sid})
    running = next((run for run in workflows.of(who.name) if run.client == sid and run.node is not None), None)
    if running is not None:  # the client comes back
        data = {"node": running.node, "display_node": running.node, "prompt_id": running.job.id}
        workflows.hub.send(who.name, sid, "executing", data)
    delivering = asyncio.ensure_future(socket.deliver())
    listening = asyncio.ensure_future(_listen(websocket, socket, workflows))
    try:
        await asyncio.wait([delivering, listening], return_when=asyncio.FIRST_COMPLETED)
    finally:
        workflows.hub.remove(socket)
        for task in (delivering, listening):
            task.cancel()
        await asyncio.gather(delivering, listening, return_exceptions=True)


async def _listen(websocket: WebSocket, socket: Socket, workflows: Workflows) -> None:
    """Read what a client says to its end; only its features matter."""
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            try:
                said = parse_json((message.get("text") or "").encode())
            except RequestError:
                continue
            if said.get("type") == "feature_flags" and isinstance(said.get("data"), dict):
                socket.features = said["data"]
                workflows.hub.send(socket.owner, socket.sid, "feature_flags", FEATURES)
