"""The database of a service's folder: its tables, its connections, and the lock that one service holds."""

from __future__ import annotations

import contextlib
import fcntl
import json
import sqlite3
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .config import ConfigError

DATABASE = "service.sqlite"
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, created REAL NOT NULL, started REAL, finished REAL,
    owner TEXT NOT NULL, model TEXT NOT NULL, bundle_id TEXT NOT NULL, version TEXT NOT NULL,
    state TEXT NOT NULL, detached INTEGER NOT NULL, priority INTEGER NOT NULL, attempts INTEGER NOT NULL,
    prompt TEXT, prompt_sha256 TEXT NOT NULL, fields TEXT NOT NULL, output TEXT NOT NULL,
    timings TEXT NOT NULL DEFAULT '{}', error TEXT, warnings TEXT NOT NULL DEFAULT '[]', safety TEXT,
    images TEXT NOT NULL DEFAULT '[]'
);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, file TEXT NOT NULL, options TEXT NOT NULL,
    rows INTEGER NOT NULL, cancelled INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, standing INTEGER NOT NULL, turns TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS promised_turns (
    session TEXT PRIMARY KEY, job TEXT NOT NULL, number INTEGER NOT NULL, said TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS keys (
    name TEXT PRIMARY KEY, sha256 TEXT NOT NULL, created REAL NOT NULL, revoked REAL, limits TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS jobs_created ON jobs (created);
CREATE INDEX IF NOT EXISTS jobs_state ON jobs (state) WHERE state IN ('queued', 'running');
"""


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a service's folder: two services would each draw the jobs that are promised in it.

    Raises ConfigError if another service has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"data: {folder} cannot be used: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"data: {folder} belongs to a service that runs; end that one, or name another folder (--data)"
            ) from error
        yield


def connect(folder: Path) -> sqlite3.Connection:
    """The database of a service's folder, made if it is missing. Raises ConfigError for one of a newer version."""
    database = sqlite3.connect(folder / DATABASE, timeout=30.0, check_same_thread=False)
    database.row_factory = sqlite3.Row
    database.execute("PRAGMA journal_mode = WAL")
    # With NORMAL, losing power could undo commits whose answers were sent.
    database.execute("PRAGMA synchronous = FULL")
    _check_version(database, folder)
    database.executescript(SCHEMA)
    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    database.commit()
    return database


def open_reader(folder: Path) -> sqlite3.Connection:
    """A connection that only reads the database of a folder, which is there. Raises sqlite3.Error, ConfigError."""
    path = urllib.parse.quote(str((folder / DATABASE).absolute()))
    database = sqlite3.connect(f"file:{path}?mode=ro", timeout=5.0, uri=True)
    database.row_factory = sqlite3.Row
    _check_version(database, folder)
    return database


def _check_version(database: sqlite3.Connection, folder: Path) -> None:
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise ConfigError(f"{folder}: written by a newer zimage_rt; expected version {SCHEMA_VERSION}, got {version}")


def insert(database: sqlite3.Connection, row: Mapping[str, Any]) -> None:
    """Write a job's row over what is there of it."""
    names = ", ".join(row)
    marks = ", ".join(f":{name}" for name in row)
    changes = ", ".join(f"{name} = excluded.{name}" for name in row if name != "id")
    database.execute(f"INSERT INTO jobs ({names}) VALUES ({marks}) ON CONFLICT (id) DO UPDATE SET {changes}", dict(row))


def parsed(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its JSON columns as values."""
    columns = ("fields", "output", "timings", "error", "warnings", "safety", "images")
    return {name: json.loads(value) if name in columns and value is not None else value for name, value in row.items()}
