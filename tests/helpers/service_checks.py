"""Checks of a service under load: answers against their requests, and the record against both."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zimage_rt.metadata.image_file import KEY
from zimage_rt.metadata.references import pixels_sha256

FINISHED = ("done", "failed", "cancelled")


@dataclasses.dataclass
class Attempt:
    """One request that was sent, and what came of it.

    Attributes:
        prompt: names this attempt alone, so that its row is found without an id.
        seed, steps: of its first image.
        is_plain: whether prompt, seed and steps are all that an engine needs to draw it again.
        job: its id, if the client was told.
        state: what the client saw last; None if it hung up, was refused, or was never told.
        images: the SHA-256 of the pixels of every image that came.
    """

    prompt: str
    seed: int
    steps: int
    is_plain: bool = True
    job: str | None = None
    state: str | None = None
    images: list[str] = dataclasses.field(default_factory=list)


def check_image(content: bytes, prompt: str, seed: int) -> str:
    """The SHA-256 of a PNG's pixels. Raises AssertionError unless it has the recipe of its own request."""
    with Image.open(io.BytesIO(content)) as image:
        record = json.loads(image.text[KEY])  # type: ignore[attr-defined]
        pixels = np.asarray(image)
    found = pixels_sha256(pixels)
    assert record["pixels_sha256"] == found, "the record is that of other pixels"
    assert record["request"]["prompt"] == prompt, (record["request"]["prompt"], prompt)
    assert record["request"]["seed"] == seed, (record["request"]["seed"], seed)
    return found


def lost_jobs(log: str) -> int:
    """How many jobs workers had when they died, by the service's log."""
    return sum(int(count) for count in re.findall(r"died with (\d+) jobs", log))


def check_record(database: Path, attempts: list[Attempt], lost: int) -> dict[str, Any]:
    """Compare the record with what the clients saw; the faults, by kind, and counts of the states.

    Args:
        database: the service's SQLite file.
        attempts: all that were sent.
        lost: jobs that workers had when they died; no others may have been drawn twice.
    """
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        connection.row_factory = sqlite3.Row
        rows = [dict(row) for row in connection.execute("SELECT * FROM jobs")]
        integrity = connection.execute("PRAGMA integrity_check").fetchone()[0]
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    faults: dict[str, list[str]] = {}

    def wrong(kind: str, what: str) -> None:
        faults.setdefault(kind, []).append(what)

    if integrity != "ok":
        wrong("damaged database", integrity)
    for prompt, found in by_prompt.items():
        if len(found) > 1:
            wrong("recorded twice", prompt)
    known = {attempt.prompt: attempt for attempt in attempts}
    for prompt in by_prompt.keys() - known.keys():
        wrong("nobody asked for it", prompt)
    for row in rows:
        if row["state"] not in FINISHED:
            wrong("did not end", f"{row['id']} {row['state']}")
    for attempt in attempts:
        if attempt.state is None:
            continue
        row = next(iter(by_prompt.get(attempt.prompt, ())), None)
        if row is None:
            wrong("lost", f"{attempt.prompt} {attempt.job}")
        elif row["state"] != attempt.state:
            wrong("another state", f"{attempt.prompt}: seen {attempt.state}, recorded {row['state']}")
        elif attempt.job is not None and row["id"] != attempt.job:
            wrong("another id", attempt.prompt)
        elif attempt.state == "done":
            recorded = [image["pixels_sha256"] for image in json.loads(row["images"])]
            if recorded != attempt.images:
                wrong("other images", attempt.prompt)
    again = sum(max(0, row["attempts"] - 1) for row in rows)
    if again > lost:
        wrong("drawn twice", f"{again} times, and {lost} jobs were lost with a worker")
    return {
        "faults": {kind: {"count": len(each), "first": each[:3]} for kind, each in faults.items()},
        "recorded": dict(Counter(row["state"] for row in rows)),
        "errors": dict(Counter(json.loads(row["error"])["code"] for row in rows if row["error"])),
        "lost_with_a_worker": lost,
        "drawn_again": again,
    }
