"""The record of requests, searched; and a request of it, made ready to be drawn again."""

from __future__ import annotations

import dataclasses
import datetime
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..request.codec import make_request
from ..request.types import GenerateRequest
from .database import parsed
from .jobs import FINISHED
from .recorded_fields import fields_from_json, inputs_of

STATES = ("queued", "running", *FINISHED)
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclasses.dataclass(frozen=True)
class Search:
    """A search of the record; None is any value.

    Attributes:
        since: created at this Unix time or later.
        key: the name of their key; empty for none.
        state: `queued`, `running`, `done`, `failed` or `cancelled`.
        model: its name.
        grep: in the prompt or the error, in any case of Latin letters.
        limit: at most so many, the newest; 0 for all.
    """

    since: float | None = None
    key: str | None = None
    state: str | None = None
    model: str | None = None
    grep: str | None = None
    limit: int = 0


def search_jobs(database: sqlite3.Connection, search: Search) -> Iterator[dict[str, Any]]:
    """The records that a search finds, the newest first, their JSON columns parsed. Raises RequestError."""
    if search.state is not None and search.state not in STATES:
        raise RequestError(f"state: expected one of {', '.join(STATES)}, got {search.state!r}")
    terms: list[str] = ["1"]
    values: list[str | float] = []
    for column, value in (("owner", search.key), ("state", search.state), ("model", search.model)):
        if value is not None:
            terms.append(f"{column} = ?")
            values.append(value)
    if search.since is not None:
        terms.append("created >= ?")
        values.append(search.since)
    if search.grep is not None:
        pattern = "%" + re.sub(r"([\\%_])", r"\\\1", search.grep) + "%"
        terms.append(r"(prompt LIKE ? ESCAPE '\' OR error LIKE ? ESCAPE '\')")
        values += [pattern, pattern]
    query = f"SELECT * FROM jobs WHERE {' AND '.join(terms)} ORDER BY created DESC LIMIT ?"
    for row in database.execute(query, (*values, search.limit or -1)):
        yield parsed(dict(row))


def find_job(database: sqlite3.Connection, job_id: str) -> dict[str, Any]:
    """The record of a job. Raises RequestError if there is none."""
    row = database.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise RequestError(f"id: the record has no job {job_id!r}; `zimage log` lists them")
    return parsed(dict(row))


def read_since(text: str, now: float | None = None) -> float:
    """The Unix time of `90s`, `30m`, `2h`, `7d`, `1w` ago, or of a date and time in ISO 8601. Raises RequestError."""
    found = re.fullmatch(r"(\d{1,9})([smhdw])", text)
    if found:
        return (time.time() if now is None else now) - int(found[1]) * UNITS[found[2]]
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise RequestError(f"--since: expected a time ago such as 2h or 7d, or a date, got {text!r}") from None


def request_again(row: Mapping[str, Any], folder: Path) -> GenerateRequest:
    """The request of a record.

    Args:
        row: see `find_job`.
        folder: the service's, with the input images.

    Raises:
        RequestError: no image was made, or the record lacks what it was made from.
    """
    if row["state"] != "done":
        raise RequestError(f"id: {row['id']} is {row['state']}, so that there is no image to compare with")
    fields = row["fields"]
    if "prompt" not in fields:
        raise RequestError(
            f"prompt: the record of {row['id']} holds its SHA-256 alone, because the service runs with "
            "`record_prompts = false`; it cannot be drawn again"
        )
    if "workflow" in fields:
        raise RequestError(f"id: {row['id']} is a workflow; its PNGs carry it, and `zimage workflow` runs them again")
    for name in inputs_of(fields):
        if not (folder / name).is_file():
            raise RequestError(f"image: {folder / name}, which {row['id']} was made from, is there no longer")
    return make_request(**fields_from_json(fields, folder))


def pixels_recorded(row: Mapping[str, Any]) -> list[str]:
    """The SHA-256 of each image's pixels as they were drawn, before the safety filter blurred any."""
    drawn = [image["drawn_sha256"] for image in (row["safety"] or {}).get("images", ())]
    return drawn or [image["pixels_sha256"] for image in row["images"]]
