"""Tables and batches for tests: small ones, drawn in one step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import zimage_rt
from zimage_rt.batch.batch import Batch, BatchOptions
from zimage_rt.batch.table import read_table

TINY = ("--height", 64, "--width", 64, "--steps", 1)
DEFAULTS = {"height": 64, "width": 64, "num_inference_steps": 1}


def zimage(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """A command of `zimage`, in a process of its own."""
    command = [sys.executable, "-m", "zimage_rt.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **more)


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def journal_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's journal, the header first."""
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()]


def draw_all(engine: zimage_rt.Engine, table: Path, out: Path, **options: Any) -> tuple[list[int], Batch]:
    """Draw what is not done of a table; the numbers of the rows that were tried, and the batch, which is closed."""
    fields = {"defaults": DEFAULTS, **options}
    work = Batch(engine, read_table(table), out, BatchOptions(**fields))
    with work.journal:
        tried = [row.number for row in work.remaining]
        for row in work.remaining:
            work.draw(row)
    return tried, work
