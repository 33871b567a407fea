"""The history of workflows, as `/history` and `/api/jobs` tell it: rows of the service's database.

A service that records no prompts keeps it in memory alone: a workflow is its prompts.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from ..store import Store

T = TypeVar("T")

SCHEMA = """
CREATE TABLE IF NOT EXISTS comfyui_history (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, number REAL NOT NULL, ended REAL NOT NULL, status TEXT NOT NULL,
    job TEXT NOT NULL, entry TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS comfyui_history_owner ON comfyui_history (owner, ended);
"""
# Entries of an owner; ComfyUI keeps as many.
MAX_ENTRIES = 10_000


class History:
    """The workflows that have ended, by owner."""

    def __init__(self, store: Store, *, is_kept: bool) -> None:
        self._store = store
        self._memory = None if is_kept else sqlite3.connect(":memory:", check_same_thread=False)
        if self._memory is not None:
            self._memory.row_factory = sqlite3.Row

    async def open(self) -> None:
        """Make the table."""

        def make(database: sqlite3.Connection) -> None:
            for statement in SCHEMA.split(";"):
                database.execute(statement)

        await self._do(make)

    async def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return work(self._memory) if self._memory is not None else await self._store.run(work)

    async def add(self, owner: str, job: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
        """Add a workflow that has ended.

        Args:
            owner: the key's name.
            job: as `/api/jobs` lists it.
            entry: as `/history` has it.

        Raises:
            StorageFull: it cannot be written.
        """
        row = (
            job["id"],
            owner,
            entry["prompt"][0],
            time.time(),
            job["status"],
            json.dumps(job),
            json.dumps(entry),
        )

        def add(database: sqlite3.Connection) -> None:
            database.execute("INSERT OR REPLACE INTO comfyui_history VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            oldest = "SELECT id FROM comfyui_history WHERE owner = ? ORDER BY ended DESC LIMIT -1 OFFSET ?"
            database.execute(f"DELETE FROM comfyui_history WHERE id IN ({oldest})", (owner, MAX_ENTRIES))

        await self._do(add)

    async def entries(self, owner: str, most: int | None = None, offset: int = -1) -> dict[str, Any]:
        """The entries of an owner by id, the oldest first: all, or so many from an offset, or the newest ones."""

        def read(database: sqlite3.Connection) -> list[sqlite3.Row]:
            count = database.execute("SELECT count(*) FROM comfyui_history WHERE owner = ?", (owner,)).fetchone()[0]
            first = max(0, count - most) if offset < 0 and most is not None else max(0, offset)
            query = "SELECT id, entry FROM comfyui_history WHERE owner = ? ORDER BY ended LIMIT ? OFFSET ?"
            return list(database.execute(query, (owner, -1 if most is None else most, first)))

        return {row["id"]: json.loads(row["entry"]) for row in await self._do(read)}

    async def entry(self, owner: str, job_id: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """A workflow's entry, and the job as `/api/jobs` lists it; None if there is none."""

        def read(database: sqlite3.Connection) -> sqlite3.Row | None:
            query = "SELECT entry, job FROM comfyui_history WHERE owner = ? AND id = ?"
            return database.execute(query, (owner, job_id)).fetchone()

        row = await self._do(read)
        return None if row is None else (json.loads(row["entry"]), json.loads(row["job"]))

    async def knows(self, job_id: str) -> bool:
        """Whether a workflow of any owner has an id."""

        def read(database: sqlite3.Connection) -> bool:
            return database.execute("SELECT 1 FROM comfyui_history WHERE id = ?", (job_id,)).fetchone() is not None

        return await self._do(read)

    async def jobs(self, owner: str, statuses: Collection[str]) -> list[dict[str, Any]]:
        """The jobs of an owner that ended in one of some states, the newest first."""

        def read(database: sqlite3.Connection) -> list[sqlite3.Row]:
            marks = ", ".join("?" for _ in statuses)
            query = f"SELECT job FROM comfyui_history WHERE owner = ? AND status IN ({marks}) ORDER BY ended DESC"
            return list(database.execute(query, (owner, *statuses)))

        return [json.loads(row["job"]) for row in await self._do(read)]

    async def remove(self, owner: str, jobs: Sequence[str] | None = None) -> None:
        """Forget some workflows of an owner, or all. Their images and the service's record stay."""

        def remove(database: sqlite3.Connection) -> None:
            if jobs is None:
                database.execute("DELETE FROM comfyui_history WHERE owner = ?", (owner,))
            else:
                pairs = [(owner, job) for job in jobs]
                database.executemany("DELETE FROM comfyui_history WHERE owner = ? AND id = ?", pairs)

        await self._do(remove)

    async def prune(self, retain_days: int) -> None:
        """Forget workflows that ended so many days ago; 0 keeps them."""
        if retain_days:
            oldest = time.time() - 86400 * retain_days
            await self._do(lambda database: database.execute("DELETE FROM comfyui_history WHERE ended < ?", (oldest,)))
