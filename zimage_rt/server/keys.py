"""API keys: made, listed and revoked in the service's SQLite, and read there by the service that runs.

A key is 32 random bytes and only its SHA-256 is kept. A slow password hash would add nothing: it protects secrets that
can be guessed, and these cannot.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import json
import logging
import secrets
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks import shown
from ..errors import RequestError, ZImageError
from .config import KeyLimits
from .database import DATABASE, open_reader

log = logging.getLogger(__name__)

# What a key begins with, so that people and scanners of source code know one when they see it.
PREFIX = "zimage-"
RANDOM_BYTES = 32
MAX_NAME = 64
# Seconds after which a change of the table is seen.
FRESH_SECONDS = 0.5


class KeysUnreadable(ZImageError):
    """The keys could not be read since the service started, so that nobody is known."""

    code = "internal"


@dataclasses.dataclass(frozen=True)
class Key:
    """A key as it is kept.

    Attributes:
        name: of its owner; jobs and records have it.
        sha256: of the key, in hex.
        created, revoked: Unix times; a key that holds has no `revoked`.
        limits: its own fields of `KeyLimits`, over those of the configuration.
    """

    name: str
    sha256: str
    created: float
    revoked: float | None
    limits: Mapping[str, Any]

    def limits_over(self, defaults: KeyLimits) -> KeyLimits:
        """The key's limits: its own, and the configuration's otherwise."""
        return dataclasses.replace(defaults, **self.limits)


def hash_key(key: str) -> str:
    """The SHA-256 of a key, in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def add_key(database: sqlite3.Connection, name: str, limits: Mapping[str, Any]) -> str:
    """Make a key and return it; it cannot be had again. The name of a revoked key may get another.

    Raises:
        RequestError: the name is empty, too long or unprintable, or has a key that holds.
    """
    if not name.strip() or not name.isprintable() or len(name) > MAX_NAME:
        raise RequestError(f"name: expected 1 to {MAX_NAME} printable characters, got {shown(name)}")
    KeyLimits(**limits)  # checks them
    key = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    if any(known.name == name and known.revoked is None for known in read_keys(database)):
        raise RequestError(f"name: {name!r} has a key already; revoke it first, or choose another name")
    database.execute(
        "INSERT OR REPLACE INTO keys (name, sha256, created, revoked, limits) VALUES (?, ?, ?, NULL, ?)",
        (name, hash_key(key), time.time(), json.dumps(dict(limits))),
    )
    database.commit()
    return key


def revoke_key(database: sqlite3.Connection, name: str) -> None:
    """Revoke a key; its row stays, so that a service does not become open. Raises RequestError if there is none."""
    changed = database.execute("UPDATE keys SET revoked = ? WHERE name = ? AND revoked IS NULL", (time.time(), name))
    database.commit()
    if not changed.rowcount:
        raise RequestError(f"name: there is no key {name!r} that holds; `zimage keys list` shows them")


def read_keys(database: sqlite3.Connection) -> list[Key]:
    """All keys, the oldest first."""
    rows = database.execute("SELECT name, sha256, created, revoked, limits FROM keys ORDER BY created")
    return [Key(row[0], row[1], row[2], row[3], json.loads(row[4])) for row in rows]


def has_key(folder: Path) -> bool:
    """Whether the record of a folder has a key that holds; there may be no record yet."""
    if not (folder / DATABASE).is_file():
        return False
    with contextlib.closing(open_reader(folder)) as database:
        return any(key.revoked is None for key in read_keys(database))


class Keyring:
    """The keys of a running service, read again when a request comes and they may have changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys: Sequence[Key] | None = None
        self._read = -FRESH_SECONDS
        self._reading = asyncio.Lock()

    async def keys(self) -> Sequence[Key]:
        """All keys, at most `FRESH_SECONDS` old; the last known ones if the record cannot be read now.

        Raises KeysUnreadable: none are known yet. No keys would mean that none is needed.
        """
        if time.monotonic() - self._read >= FRESH_SECONDS:
            async with self._reading:
                if time.monotonic() - self._read >= FRESH_SECONDS:
                    await self._read_again()
        if self._keys is None:
            raise KeysUnreadable("the service cannot read its keys; its log has the reason")
        return self._keys

    async def _read_again(self) -> None:
        try:
            self._keys = await asyncio.to_thread(self._load)
        except (sqlite3.Error, ZImageError) as error:
            log.error("the keys of %s cannot be read: %s; the last known ones hold", self._folder, error)
        self._read = time.monotonic()

    def _load(self) -> list[Key]:
        with contextlib.closing(open_reader(self._folder)) as database:
            return read_keys(database)


def find_key(keys: Sequence[Key], text: str) -> Key | None:
    """The key that a caller shows, if it holds; the time that it takes says nothing of the others."""
    sha256 = hash_key(text)
    found = None
    for key in keys:
        if hmac.compare_digest(key.sha256, sha256) and key.revoked is None:
            found = key
    return found
