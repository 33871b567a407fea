"""Many requests from a table, one after another; a batch that was killed goes on where it stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .engine import Engine
from .journal import Journal
from .metadata import save_picture
from .request import GenerateRequest, GenerateResult, StepInfo, resolve
from .rows import RowReader, Template
from .samplers import FORMER_SAMPLERS, FORMER_SCHEDULES
from .tables import Row, Table


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """What is the same for all rows.

    Attributes:
        template: makes the prompts from columns.
        defaults: request fields, where a row says nothing.
        seed: what the seeds of rows without one are made of.
        sidecar: write each picture's record beside it too.
    """

    template: str | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    sidecar: bool = True


class Batch:
    """A table being drawn into a folder.

    Args:
        engine: what draws.
        table: the rows.
        folder: where the pictures go; it is made.
        options: see `BatchOptions`.
        restart: draw everything anew.

    Raises:
        RequestError: a column or an option is impossible, or the folder holds another batch.
    """

    def __init__(
        self, engine: Engine, table: Table, folder: Path, options: BatchOptions, *, restart: bool = False
    ) -> None:
        self.table = table
        self._engine = engine
        self._options = options
        template = None if options.template is None else Template(options.template)
        self._reader = RowReader(table, template, options.defaults, options.seed)
        # What no row could make good fails now, not once a row.
        resolve(GenerateRequest("a prompt", **options.defaults), engine.manifest)
        folder.mkdir(parents=True, exist_ok=True)
        header = {
            "table_sha256": table.sha256,
            "template": options.template,
            "options": dict(options.defaults),
            "seed": options.seed,
            "bundle": engine.bundle_id,
            "loras": engine.loras,
            "backend": {"name": engine.backend, "options": engine.backend_options},
        }
        used = {str(row.values.get(column)) for row in table.rows for column in ("sampler", "schedule")}
        used |= {str(options.defaults.get(column)) for column in ("sampler", "schedule")}
        if used & (FORMER_SAMPLERS.keys() | FORMER_SCHEDULES.keys()):
            header["names"] = "comfyui"  # in 0.1 they were diffusers': a batch begun with those cannot go on with these
        self.journal = Journal(folder, header, restart=restart)

    @property
    def remaining(self) -> list[Row]:
        """The rows that are not done; those that failed are tried again."""
        return [row for row in self.table.rows if not self.journal.is_done(row.number)]

    def draw(
        self, row: Row, on_step: Callable[[StepInfo], None] | None = None
    ) -> tuple[GenerateResult, list[Path]] | str:
        """Draw a row, save it, and write it into the journal, in that order.

        Returns:
            the result and where its pictures are, or why the row failed.

        Raises:
            OSError: a picture or the journal cannot be written; the batch cannot go on.
        """
        try:
            result = self._engine.run(self._reader.request(row), callback=on_step)
        except Exception as error:  # whatever is wrong with a row, or with drawing it, must not cost the others
            reason = f"{type(error).__name__}: {error}"
            self.journal.add(row.number, error=reason, line=row.line)
            return reason
        paths = [self.journal.folder / name for name in self._names(row, len(result.seeds))]
        for path, pixels, record in zip(paths, result.images, result.records, strict=True):
            save_picture(path, pixels, record, sidecar=self._options.sidecar)
        self.journal.add(
            row.number,
            pictures=[path.name for path in paths],
            prompt=result.records[0].request["prompt"],
            seeds=list(result.seeds),
            timings=result.timings,
        )
        return result, paths

    @staticmethod
    def _names(row: Row, count: int) -> list[str]:
        if count == 1:
            return [f"{row.number:05d}.png"]
        return [f"{row.number:05d}-{i:03d}.png" for i in range(count)]
