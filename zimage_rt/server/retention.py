"""Retention of what a service keeps: by age, by number and by size."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .config import QueueConfig

# Seconds that an input is kept at least: its request may not have been checked yet.
INPUTS_GRACE = 600.0


def remove_records(database: sqlite3.Connection, config: QueueConfig) -> None:
    """Remove the records of ended jobs beyond `retain_days` and `retain_rows`."""
    finished = "state NOT IN ('queued', 'running')"
    if config.retain_days:
        oldest = time.time() - 86400 * config.retain_days
        database.execute(f"DELETE FROM jobs WHERE {finished} AND created < ?", (oldest,))
    beyond = f"SELECT id FROM jobs WHERE {finished} ORDER BY created DESC LIMIT -1 OFFSET ?"
    database.execute(f"DELETE FROM jobs WHERE id IN ({beyond})", (config.retain_rows,))


def remove_images(folder: Path, config: QueueConfig) -> None:
    """Remove the folders of jobs that are older than `keep_seconds`, and the oldest beyond `keep_bytes`."""
    kept = 0
    for modified, job in sorted(_by_time(folder), reverse=True):
        with contextlib.suppress(OSError):
            kept += sum(file.stat().st_size for file in job.iterdir())
        if time.time() - modified > config.keep_seconds or kept > config.keep_bytes:
            shutil.rmtree(job, ignore_errors=True)


def remove_inputs(
    folder: Path, keep_bytes: int, *, named: Collection[str], in_use: Collection[str], lock: AbstractContextManager[Any]
) -> None:
    """Remove input images that nothing needs.

    Args:
        folder: of the inputs; their names are their hashes.
        keep_bytes: of those that records name; the oldest go first.
        named: by records.
        in_use: by jobs that have not ended; they stay.
        lock: held while a file is removed, so that none is that was just uploaded again.
    """
    kept = 0
    for modified, path in sorted(_by_time(folder), reverse=True):
        with lock, contextlib.suppress(OSError):
            status = path.stat()
            is_young = time.time() - modified < INPUTS_GRACE or status.st_mtime != modified
            is_kept = path.name in named and kept + status.st_size <= keep_bytes
            if is_young or is_kept or path.name in in_use:
                kept += status.st_size
            else:
                path.unlink()


def _by_time(folder: Path) -> list[tuple[float, Path]]:
    """The entries of a folder with their times of modification; those that are just removed are left out."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime, path))
    return found
