"""The service's memory: a record of every request in SQLite, input and finished images as files.

One thread writes. It commits everything that has arrived since the last commit at once, so that a busy service waits
for the disk once per round. While the disk is full it tries again, and what is not written yet stays in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import queue
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .._version import __version__
from ..atomic_write import atomic_write
from ..errors import ZImageError
from ..image.formats import FORMATS, media_type
from .config import ConfigError, ServiceConfig
from .database import connect, insert, open_reader, parsed
from .jobs import FINISHED, Image, Job, Output, State
from .recorded_fields import INPUTS, SESSIONS, fields_from_json, fields_to_json, inputs_of
from .retention import remove_images, remove_inputs, remove_records

log = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds before the next try while the disk is full, and how long an answer waits for its record.
RETRY_SECONDS, ANSWER_SECONDS = 1.0, 5.0
# Seconds between two looks for inputs that no record names.
INPUTS_SECONDS = 3600.0
# Bytes of images that may wait to be written; beyond, new jobs are refused.
MAX_PENDING = 512 << 20


class StorageFull(ZImageError):
    """The disk under the service's data is full."""

    code = "storage_full"


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """A finished image on the disk."""

    path: Path
    media_type: str
    pixels_sha256: str


class Store:
    """The record and the files of a service. Made on one thread, used from the event loop."""

    def __init__(self, folder: Path, config: ServiceConfig) -> None:
        self.folder = folder
        self._config = config
        self.bundle_ids: dict[str, str] = {}  # by model; the service says them
        self._queue: queue.SimpleQueue[tuple[Callable[[sqlite3.Connection], Any], asyncio.Future[Any]] | None]
        self._queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="zimage-store", daemon=True)
        self._settled: dict[str, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Future[None]] = set()
        self._pending = 0
        self._inputs = threading.Lock()
        self._next_look = time.monotonic() + INPUTS_SECONDS
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_disk_full = False

    # --- life -----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Make the folder and the database, or take what is there. Raises ConfigError."""
        self._loop = asyncio.get_running_loop()
        try:
            for name in (INPUTS, "images"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            with contextlib.closing(connect(self.folder)):
                pass
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"data: {self.folder} cannot be used: {error}") from error
        self._thread.start()

    async def close(self) -> None:
        """Write what waits, and end."""
        if self._thread.is_alive():
            self._queue.put(None)
            await asyncio.to_thread(self._thread.join)

    def check_room(self) -> None:
        """Raise StorageFull while finished images wait in memory because the disk is full."""
        if self._pending > MAX_PENDING:
            raise StorageFull(f"the disk under {self.folder} is full; ask again when there is room")

    # --- inputs ---------------------------------------------------------------------------------------------------

    def holds_input(self, value: object) -> bool:
        """Whether a field's value is a file of `keep_input` or of a session, not a path that a client wrote."""
        return isinstance(value, Path) and value.parent in (self.folder / INPUTS, self.folder / SESSIONS)

    async def keep_input(self, content: bytes) -> Path:
        """Keep an uploaded image under its hash; the file. Raises StorageFull."""
        path = self.folder / INPUTS / hashlib.sha256(content).hexdigest()

        def keep() -> Path:
            with self._inputs:
                try:
                    if path.exists():
                        os.utime(path)  # so that it is not removed for its age
                    else:
                        atomic_write(path, content)
                except OSError as error:
                    raise StorageFull(f"an uploaded image cannot be kept: {error.strerror or error}") from error
            return path

        return await asyncio.to_thread(keep)

    # --- jobs -----------------------------------------------------------------------------------------------------

    async def promise(self, job: Job) -> None:
        """Write a job that waits, so that it outlives the service. Raises StorageFull."""
        row = self._row(job, "queued")
        try:
            await self._do(lambda database: insert(database, row), retry=False)
        except sqlite3.OperationalError as error:
            raise StorageFull(f"the job cannot be kept: {error}") from error

    def finished(self, job: Job, state: State) -> None:
        """Write how a job ended, and its images; `settled` waits for it."""
        row = self._row(job, state, finished=time.time())
        images = [image for image in job.images if isinstance(image, Image)]
        size = sum(len(image.content) for image in images)
        self._pending += size
        done = asyncio.get_running_loop().create_future()
        self._settled[job.id] = done
        folder, durable = self.folder / "images" / job.id, job.detached

        def write(database: sqlite3.Connection) -> list[StoredImage]:
            stored = write_images(folder, images, durable)
            insert(database, {**row, "images": json.dumps([_image_json(image) for image in stored])})
            return stored

        async def settle() -> None:
            stored = await self._do(write)
            self._pending -= size
            job.stored = stored
            if stored:
                job.images = ()  # they are on the disk
            self._settled.pop(job.id, None)
            if not done.done():
                done.set_result(None)

        self._tasks.add(task := asyncio.ensure_future(settle()))
        task.add_done_callback(self._tasks.discard)

    async def settled(self, job: Job) -> None:
        """Return when a finished job is written, or after a few seconds if the disk does not take it."""
        done = self._settled.get(job.id)
        if done is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(done), ANSWER_SECONDS)

    def is_settled(self, job: Job) -> bool:
        """Whether a finished job is written."""
        return job.id not in self._settled

    async def unfinished(self) -> list[Job]:
        """The promised jobs that a former run of the service did not end, the oldest first."""
        known = self._config.models

        def read(database: sqlite3.Connection) -> list[Job]:
            query = "SELECT * FROM jobs WHERE state IN ('queued', 'running') ORDER BY created"
            rows = [dict(row) for row in database.execute(query)]
            for row in rows:
                if not row["detached"] or row["model"] not in known:
                    error = {"code": "dropped", "message": "the service ended before it was drawn", "field": None}
                    change = "UPDATE jobs SET state = 'failed', error = ?, finished = ? WHERE id = ?"
                    database.execute(change, (json.dumps(error), time.time(), row["id"]))
            return [self._job(row) for row in rows if row["detached"] and row["model"] in known]

        return await self._do(read)

    async def ended(self, job_id: str) -> Job | None:
        """A job that a former run of the service ended, with its images on the disk; None if there is none."""

        def read(database: sqlite3.Connection) -> dict[str, Any] | None:
            found = database.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
            return None if found is None else dict(found)

        row = await self._do(read)
        if row is None or row["state"] not in FINISHED:
            return None
        job = self._job(row)
        job.state, job.finished, job.timings = row["state"], row["finished"], json.loads(row["timings"])
        job.stored = [
            StoredImage(self.folder / "images" / image["file"], image["media_type"], image["pixels_sha256"])
            for image in json.loads(row["images"])
        ]
        return job

    async def row(self, job_id: str) -> dict[str, Any] | None:
        """The record of a job, its JSON columns parsed; None if there is none."""

        def read(database: sqlite3.Connection) -> dict[str, Any] | None:
            found = database.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
            return None if found is None else parsed(dict(found))

        return await self._do(read)

    async def prune(self, inputs_in_use: Collection[str] = ()) -> None:
        """Remove the records beyond `retain_days` and `retain_rows`, expired images, and inputs of no record.

        Args:
            inputs_in_use: names of inputs of jobs that have not ended, which stay.
        """
        config = self._config.queue
        await self._do(lambda database: remove_records(database, config))
        await asyncio.to_thread(remove_images, self.folder / "images", config)
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + INPUTS_SECONDS
            await asyncio.to_thread(self._remove_inputs, inputs_in_use)

    def look_at_inputs(self) -> None:
        """Let the next `prune` look at the inputs, too, which it does once an hour: it reads the whole record."""
        self._next_look = time.monotonic()

    def _remove_inputs(self, in_use: Collection[str]) -> None:
        with contextlib.closing(open_reader(self.folder)) as database:
            rows = database.execute("""SELECT fields FROM jobs WHERE fields LIKE '%"input"%'""")
            named = {Path(name).name for row in rows for name in inputs_of(json.loads(row["fields"]))}
        keep = self._config.queue.retain_input_bytes
        remove_inputs(self.folder / INPUTS, keep, named=named, in_use=in_use, lock=self._inputs)

    # --- rows -----------------------------------------------------------------------------------------------------

    def _row(self, job: Job, state: State, finished: float | None = None) -> dict[str, Any]:
        prompt = job.fields["prompt"]
        text = prompt if isinstance(prompt, str) else "\n".join(prompt)
        return {
            "id": job.id,
            "created": job.created,
            "started": job.started,
            "finished": finished,
            "owner": job.owner,
            "model": job.model,
            "bundle_id": self.bundle_ids.get(job.model, ""),
            "version": __version__,
            "state": state,
            "detached": job.detached,
            "priority": job.priority,
            "attempts": job.attempts,
            "prompt": text if self._config.record_prompts else None,
            "prompt_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "fields": json.dumps(fields_to_json(job.fields, with_prompts=self._config.record_prompts or not finished)),
            "output": json.dumps(dataclasses.asdict(job.output)),
            "timings": json.dumps(dict(job.timings)),
            "error": None if job.error is None else json.dumps(dict(job.error)),
            "warnings": json.dumps(list(job.warnings)),
            "safety": None if job.safety is None else json.dumps(job.safety),
        }

    def _job(self, row: Mapping[str, Any]) -> Job:
        """A job as it was promised."""
        job = Job(
            fields_from_json(json.loads(row["fields"]), self.folder),
            model=row["model"],
            owner=row["owner"],
            output=Output(**json.loads(row["output"])),
            priority=row["priority"],
            detached=True,
            job_id=row["id"],
        )
        job.created = row["created"]
        return job

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run on the writing thread; returns when it is committed. Raises StorageFull."""
        try:
            return await self._do(work, retry=False)
        except (sqlite3.OperationalError, OSError) as error:
            raise StorageFull(f"the service's record cannot be written: {error}") from error

    # --- the writing thread -----------------------------------------------------------------------------------------

    async def _do(self, work: Callable[[sqlite3.Connection], T], *, retry: bool = True) -> T:
        """Run on the writing thread, and return when it is committed; with `retry`, again while the disk is full."""
        while True:
            future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
            self._queue.put((work, future))
            try:
                result = await future
            except (sqlite3.OperationalError, OSError) as error:
                if not retry:
                    raise
                if not self.is_disk_full:
                    log.error("%s cannot be written: %s; it is tried again", self.folder, error)
                self.is_disk_full = True
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self.is_disk_full = False
            return result

    def _write(self) -> None:
        """The thread's life: rounds of everything that has arrived, each with one commit."""
        database = connect(self.folder)
        ended = False
        while not ended:
            entries = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    entries.append(self._queue.get_nowait())
            answers: list[tuple[asyncio.Future[Any], Any, Exception | None]] = []
            for entry in entries:
                if entry is None:
                    ended = True
                    continue
                work, future = entry
                was_open = database.in_transaction
                try:
                    result, error = work(database), None
                except Exception as caught:  # the caller gets it
                    result, error = None, caught
                    if was_open and not database.in_transaction:
                        # A full disk makes SQLite undo the whole round: what came before is not written either.
                        answers = [(each, None, known or caught) for each, _, known in answers]
                answers.append((future, result, error))
            failed: Exception | None = None
            try:
                database.commit()
            except sqlite3.Error as caught:
                failed = caught
                database.rollback()
            for future, result, error in answers:
                self._answer(future, result, error or failed)
        database.close()

    def _answer(self, future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
        def settle() -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(settle)


def write_images(folder: Path, images: Sequence[Image], durable: bool) -> list[StoredImage]:
    """Write a job's images as `0.png`, …; all of them, or OSError and none. `durable` waits for the disk."""
    if not images:
        return []
    stored = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            suffix = next(suffix for suffix in FORMATS if image.media_type == media_type(suffix))
            path = folder / f"{number}{suffix}"
            if durable:
                atomic_write(path, image.content)
            else:
                path.write_bytes(image.content)
            stored.append(StoredImage(path, image.media_type, image.record["pixels_sha256"]))
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return stored


def _image_json(image: StoredImage) -> dict[str, str]:
    return {
        "file": os.path.join(image.path.parent.name, image.path.name),  # noqa: PTH118
        "media_type": image.media_type,
        "pixels_sha256": image.pixels_sha256,
    }
