"""`/v1/batches`: an image for each row of a table, drawn between other requests, and resumed after a restart.

A batch keeps its table on the disk. Its rows become jobs a few at a time, with the lowest priority of their owner, so
that a table of ten thousand rows neither fills the queue nor holds up single requests. A row's job has the batch's id
and the row's number as its own id: that is what a restarted service knows its rows by.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import UploadFile

from ..atomic_write import atomic_write
from ..batch.columns import normalized
from ..batch.rows import RowReader, Template
from ..batch.table import EXCEL, JSON_LINES, Row, Table, read_table
from ..errors import RequestError, ZImageError
from ..request.codec import IMAGES
from ..request.types import GenerateRequest, ResolvedRequest
from .access import Caller
from .bounds import read_form
from .errors import NotFound, RateLimited
from .forms import read_items
from .jobs import FINISHED, Output, QueueFull
from .jobs_api import CallerOf, ServiceOf, read_said
from .openapi import BINARY
from .schema import OutputFields
from .service import Draining, Service
from .store import StorageFull

router = APIRouter(prefix="/v1/batches", tags=["batches"])
log = logging.getLogger(__name__)

PRIORITY = -100
# Jobs of a batch that wait at once: enough that no worker idles.
AHEAD = 4
# Seconds before a row is tried again that found no room.
PAUSE = 0.5
SUFFIXES = (".csv", *EXCEL, *JSON_LINES)


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch as it is kept.

    Attributes:
        file: the table's name in the folder `batches`.
        options: `template`, `seed`, `model`, the images' `output`, what the form `said` for rows that say nothing else,
            and `warnings`.
        rows: how many there are.
        cancelled: whether no more of them are to be drawn.
    """

    id: str
    owner: str
    created: float
    file: str
    options: str
    rows: int
    cancelled: int = 0


FOR_ALL_ROWS = "say it as a field of the form, for all rows"
# Columns whose names mean something elsewhere, in the service or in OpenAI's protocol, with what to do instead.
ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("model", "output_format", "output_quality", "previews", "batch_seed", "template"), FOR_ALL_ROWS),
    "output_compression": "say output_quality as a field of the form, for all rows",
    "partial_images": "say previews as a field of the form, for all rows",
    "quality": "call it num_inference_steps, or say output_quality as a field of the form, for all rows",
    "size": "say it in the columns width and height",
    "n": "call it num_images",
    "priority": "rows come after the key's other requests; leave it out",
}
# Fields of the form that are no request's; `seed` is what `zimage batch --seed` is.
OWN_FIELDS = ("template", "batch_seed", "seed")
SEED: Mapping[str, Any] = {"type": "string", "pattern": "^[0-9]{1,18}$"}
# Fields of the form beside the table; all others are those of `/v1/jobs`.
FORM: Mapping[str, Any] = {
    "type": "object",
    "required": ["table"],
    "properties": {
        "table": {**BINARY, "description": "CSV, .xlsx or JSON lines, by its file name."},
        "template": {"type": "string", "description": "The prompt, with columns in it: a {animal}."},
        "batch_seed": {**SEED, "description": "Decides the seeds of rows without one."},
        "seed": {**SEED, "description": "The same as batch_seed; a form says one of them."},
    },
    "additionalProperties": {"type": "string"},
}
BODY: Mapping[str, Any] = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}}


@router.post("", status_code=202, openapi_extra=dict(BODY))
async def create(request: Request, service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """Draw a table: a form with the file `table` (CSV, .xlsx or JSON lines), and fields that hold for every row.

    `template` makes prompts of columns (`a {animal}`), `batch_seed` decides the seeds of rows without one; the others
    are those of `/v1/jobs` but `priority`. A table cannot name files: rows have no images.
    """
    form = await read_form(request)
    upload = form.get("table")
    if not isinstance(upload, UploadFile):
        raise RequestError("table: expected a file of a form, CSV, .xlsx or JSON lines")
    suffix = Path(upload.filename or "").suffix.lower()
    if suffix not in SUFFIXES:
        raise RequestError(f"table: expected a file name that ends in {', '.join(SUFFIXES)}, got {suffix or 'none'}")
    others = [name for name, value in form.multi_items() if value is not upload and isinstance(value, UploadFile)]
    if others:
        raise RequestError(
            f"{others[0]}: expected one file, the table, got another; rows have no images", field=others[0]
        )
    template, seed, said = _read_texts([(name, text) for name, text in form.multi_items() if isinstance(text, str)])
    defaults, output = read_said(said, needs_prompt=False)
    _refuse_files(defaults)
    service.output_of(output)
    model = service.model(output.model)
    who.check_model(model)
    options: dict[str, Any] = {
        "template": template,
        "seed": seed,
        "model": model,
        "said": said,
        "output": output.model_dump(),
    }
    file = f"{uuid.uuid4().hex}{suffix}"
    path = _folder(service) / file
    content = await upload.read()

    def keep() -> Table:
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, content)
        try:
            table = read_table(path)
            options["warnings"] = _check_columns(table, _reader(table, options, defaults), template)
        except RequestError as error:
            path.unlink()
            raise RequestError(str(error).replace(str(path), "table"), field=error.field or "table") from None
        return table

    table = await asyncio.to_thread(keep)
    batch = Batch(uuid.uuid4().hex, who.name, time.time(), file, json.dumps(options), len(table.rows))

    def insert(database: sqlite3.Connection) -> None:
        names = ", ".join(f":{name}" for name in vars(batch))
        database.execute(f"INSERT INTO batches VALUES ({names})", vars(batch))

    await service.store.run(insert)
    _feed(service, batch, table, who.admit)
    return await _status(service, batch) | {"warnings": options["warnings"]}


@router.get("")
async def listed(service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """The caller's batches, the newest first."""

    def read(database: sqlite3.Connection) -> list[Batch]:
        query = "SELECT * FROM batches WHERE owner = ? ORDER BY created DESC LIMIT 200"
        return [Batch(**dict(row)) for row in database.execute(query, (who.name,))]

    return {"batches": await _statuses(service, await service.store.run(read))}


@router.get("/{batch_id}")
async def status(batch_id: str, service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """The progress of a batch, and the jobs of its rows: `/v1/jobs/{id}` has their images."""
    batch = await _find(service, who, batch_id)
    more = {"warnings": json.loads(batch.options)["warnings"], "jobs": await _jobs(service, batch)}
    return await _status(service, batch) | more


@router.delete("/{batch_id}")
async def cancel(batch_id: str, service: ServiceOf, who: CallerOf) -> dict[str, Any]:
    """Draw no more rows of a batch; its finished images stay."""
    batch = await _find(service, who, batch_id)

    def change(database: sqlite3.Connection) -> None:
        database.execute("UPDATE batches SET cancelled = 1 WHERE id = ?", (batch_id,))

    await service.store.run(change)
    task = service.feeding.pop(batch_id, None)
    if task is not None:
        task.cancel()
    for job in list(service.jobs.values()):
        if job.id.startswith(f"{batch_id}-"):
            service.cancel(job, "the batch was cancelled; no image was made")
    return await _status(service, dataclasses.replace(batch, cancelled=1))


async def resume(service: Service) -> None:
    """Go on with the batches that a former run of the service did not end."""

    def read(database: sqlite3.Connection) -> list[Batch]:
        return [Batch(**dict(row)) for row in database.execute("SELECT * FROM batches WHERE cancelled = 0")]

    limits = {key.name: key.limits_over(service.config.keys) for key in await service.keyring.keys()}
    for batch in await service.store.run(read):
        options = json.loads(batch.options)
        if options["model"] not in service.config.models:
            continue
        ended = sum(job["state"] in ("done", "failed", "cancelled") for job in await _jobs(service, batch))
        if ended < batch.rows:
            try:
                table = await asyncio.to_thread(read_table, _folder(service) / batch.file)
            except RequestError as error:
                log.error("batch %s cannot go on: %s", batch.id, error)
                continue
            owner = Caller(service, batch.owner, limits.get(batch.owner, service.config.keys))
            _feed(service, batch, table, owner.admit)


def _feed(service: Service, batch: Batch, table: Table, admit: Callable[[ResolvedRequest], None]) -> None:
    task = asyncio.ensure_future(_draw(service, batch, table, admit))
    service.feeding[batch.id] = task
    task.add_done_callback(lambda _: service.feeding.pop(batch.id, None))


def _read_texts(texts: Iterable[tuple[str, str]]) -> tuple[str | None, int, dict[str, Any]]:
    """The template, the seed, and what a form's other texts say, as JSON would. Raises RequestError."""
    own: dict[str, str] = {}
    others: list[tuple[str, str]] = []
    for name, text in texts:
        if name in own:
            raise RequestError(f"{name}: expected it once, got it twice", field=name)
        if name in OWN_FIELDS:
            own[name] = text
        else:
            others.append((name, text))
    if {"seed", "batch_seed"} <= own.keys():
        raise RequestError("seed: expected it or batch_seed, which is the same here, got both", field="seed")
    name = "seed" if "seed" in own else "batch_seed"
    seed = own.get(name, "0")
    if not (seed.isascii() and seed.isdecimal() and len(seed) <= 18):
        raise RequestError(f"{name}: expected a whole number of at most 18 digits, got {seed[:40]!r}", field=name)
    said, _ = read_items(others)
    if "seed" in said:
        raise RequestError("seed: expected one number, got a list; a column `seed` has one per row", field="seed")
    if "priority" in said:
        message = "priority: rows of a batch come after the key's other requests; leave it out"
        raise RequestError(message, field="priority")
    template = own.get("template")
    if template is not None and "prompt" in said:
        raise RequestError("prompt: the template takes its place; leave one of them out", field="prompt")
    return template, int(seed), said


async def _draw(service: Service, batch: Batch, table: Table, admit: Callable[[ResolvedRequest], None]) -> None:
    """Let the rows of a batch wait, a few at a time, those first that no job has yet."""
    options = json.loads(batch.options)
    defaults, _ = read_said(options["said"], needs_prompt=False)
    reader = _reader(table, options, defaults)
    encoded = Output(**service.output_of(OutputFields(**options["output"])))
    known = {job["id"] for job in await _jobs(service, batch)}
    for row in table.rows:
        job_id = f"{batch.id}-{row.number:06d}"
        is_told = False
        while job_id not in known:
            if sum(job.id.startswith(f"{batch.id}-") for job in service.queue.jobs()) >= AHEAD:
                await asyncio.sleep(PAUSE)
                continue
            try:
                await service.submit(
                    options["model"],
                    _fields(reader, row),
                    owner=batch.owner,
                    output=encoded,
                    priority=PRIORITY,
                    detached=True,
                    admit=admit,
                    job_id=job_id,
                )
            except Draining:
                return
            except (RateLimited, QueueFull, StorageFull) as error:
                if not is_told:
                    log.info("batch %s waits with row %d: %s", batch.id, row.number, error)
                    is_told = True
                await asyncio.sleep(getattr(error, "retry_after", PAUSE))
                continue
            except Exception as error:  # one row must not stop the others, nor be tried for ever
                if not isinstance(error, ZImageError):
                    log.exception("row %d of batch %s failed", row.number, batch.id)
                service.reject(job_id, options["model"], batch.owner, error)
            break


def _fields(reader: RowReader, row: Row) -> dict[str, Any]:
    """The fields that a row says. Raises RequestError."""
    _refuse_files(reader.inputs(row))
    request = reader.request(row)
    defaults = {field.name: field.default for field in dataclasses.fields(GenerateRequest)}
    return {name: value for name, value in vars(request).items() if name == "prompt" or value != defaults[name]}


def _refuse_files(fields: Collection[str]) -> None:
    named = next((name for name in fields if name in IMAGES), None)
    if named is not None:
        message = f"{named}: a table over HTTP cannot name files; send such a row to /v1/jobs"
        raise RequestError(message, field=named)


def _reader(table: Table, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> RowReader:
    template = None if options["template"] is None else Template(options["template"])
    return RowReader(table, template, defaults, options["seed"])


def _check_columns(table: Table, reader: RowReader, template: str | None) -> list[str]:
    """Warnings about the columns that change nothing. Raises RequestError for one that a client expects to."""
    used = () if template is None else Template(template).columns
    extra = dict.fromkeys(column for row in table.rows for column in reader.content(row).extra if column not in used)
    for column in extra:
        advice = ELSEWHERE.get(normalized(column))
        if advice is not None:
            raise RequestError(f"column {column!r}: {advice}; to keep the column as it is, rename it", field="table")
    return [f"no request fields, and ignored: {', '.join(extra)}"] if extra else []


def _folder(service: Service) -> Path:
    return service.store.folder / "batches"


async def _find(service: Service, who: Caller, batch_id: str) -> Batch:
    def read(database: sqlite3.Connection) -> Batch | None:
        row = database.execute("SELECT * FROM batches WHERE id = ?", (batch_id,)).fetchone()
        return None if row is None else Batch(**dict(row))

    batch = await service.store.run(read)
    if batch is None or not who.may_see(batch.owner):
        raise NotFound(f"batches: there is no batch {batch_id[:64]!r}")
    return batch


async def _jobs(service: Service, batch: Batch) -> list[dict[str, Any]]:
    """The rows that have become jobs: `row`, `id`, `state`, `error`."""

    def read(database: sqlite3.Connection) -> list[dict[str, Any]]:
        query = "SELECT id, state, error FROM jobs WHERE id >= ? AND id < ? ORDER BY id"
        return [dict(row) for row in database.execute(query, (f"{batch.id}-", f"{batch.id}."))]

    return [
        {
            "row": int(job["id"].rpartition("-")[2]),
            "id": job["id"],
            "state": live.state if (live := service.jobs.get(job["id"])) else job["state"],
            "error": None if job["error"] is None else json.loads(job["error"]),
        }
        for job in await service.store.run(read)
    ]


async def _status(service: Service, batch: Batch) -> dict[str, Any]:
    return (await _statuses(service, [batch]))[0]


async def _statuses(service: Service, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """The progress of batches."""

    def read(database: sqlite3.Connection) -> list[Counter[str]]:
        query = "SELECT state, count(*) FROM jobs WHERE id >= ? AND id < ? GROUP BY state"
        ranges = [(f"{batch.id}-", f"{batch.id}.") for batch in batches]
        return [Counter(dict(database.execute(query, each).fetchall())) for each in ranges]

    found = []
    for batch, counts in zip(batches, await service.store.run(read), strict=True):
        states: dict[str, int] = {state: counts[state] for state in FINISHED}
        state = "cancelled" if batch.cancelled else "done" if sum(states.values()) == batch.rows else "running"
        found.append({"id": batch.id, "created": batch.created, "state": state, "rows": batch.rows, **states})
    return found
