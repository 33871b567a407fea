"""The record while its disk is full: what was not written is told so, and nothing is forgotten before it is."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from zimage_rt.server.config import ModelConfig, ServiceConfig
from zimage_rt.server.database import insert
from zimage_rt.server.jobs import Job
from zimage_rt.server.service import MAX_JOBS, Service
from zimage_rt.server.store import StorageFull, Store


def make_job(name: str) -> Job:
    return Job({"prompt": name, "seed": 1}, model="nano", owner="")


def test_a_round_that_sqlite_undoes_is_told_to_all_of_it(tmp_path: Path) -> None:
    """A full database undoes the whole transaction, not the one statement that did not fit."""

    async def run() -> None:
        store = Store(tmp_path, ServiceConfig({"nano": ModelConfig("nano")}))
        await store.open()
        pages = await store.run(lambda database: database.execute("PRAGMA page_count").fetchone()[0])
        limit = f"PRAGMA max_page_count = {pages + 2}"
        await store.run(lambda database: database.execute(limit).fetchone())
        held = threading.Event()
        first = asyncio.create_task(store.run(lambda database: held.wait(10)))
        await asyncio.sleep(0.1)  # the thread has it; the next two share a round
        small, large = store._row(make_job("small"), "done"), store._row(make_job("large"), "done")
        large["fields"] = "x" * (1 << 20)
        works = [asyncio.create_task(store.run(lambda db, row=row: insert(db, row))) for row in (small, large)]
        await asyncio.sleep(0.1)
        held.set()
        await first
        answers = await asyncio.gather(*works, return_exceptions=True)
        written = await store.row(small["id"])
        assert isinstance(answers[1], StorageFull)
        assert (written is not None) == (answers[0] is None), answers
        await store.close()

    asyncio.run(run())


def test_jobs_are_not_forgotten_before_they_are_written(bundle: Path, tmp_path: Path) -> None:
    async def run() -> None:
        service = Service(ServiceConfig({"nano": ModelConfig(str(bundle))}, data=str(tmp_path)))
        await service.store.open()
        full = True

        def write(database: sqlite3.Connection) -> None:
            if full:
                raise OSError("no space left")

        service.store.finished = lambda job, state: service.store._settled.update(  # type: ignore[method-assign]
            {job.id: asyncio.ensure_future(service.store._do(write))}  # type: ignore[dict-item]
        )
        jobs = [make_job(str(number)) for number in range(MAX_JOBS + 5)]
        for job in jobs:
            service.jobs[job.id] = job
            service._end(job, "failed", {"code": "internal", "message": "", "field": None})
        service.forget_expired()
        assert len(service.jobs) == MAX_JOBS + 5
        full = False
        await asyncio.gather(*service.store._settled.values())
        service.store._settled.clear()
        service.forget_expired()
        assert len(service.jobs) == MAX_JOBS
        await service.store.close()

    asyncio.run(run())
