"""Batches: the requests of a table, one after another; a batch that was killed can be resumed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..atomic_write import check_folder
from ..bundle.verify import hash_file
from ..checks import MAX_SHOWN, shown_text
from ..engine import Engine
from ..errors import RequestError
from ..image.formats import FORMATS, check_quality, sidecar_path
from ..metadata.image_file import save_image
from ..request.resolve import resolve
from ..request.types import GenerateRequest, StepInfo
from ..result import GenerateResult
from .journal import Journal
from .names import row_stems
from .plan import DoneRows, plan_rows
from .rows import RowReader, Template
from .table import Row, Table

log = logging.getLogger(__name__)

# Characters of a row's error in the journal; longer ones are cut.
MAX_REASON = 20 * MAX_SHOWN
# Request fields that are valid only with an image, which a row may have.
BESIDE_IMAGE = ("denoise", "strength", "mask")


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """The options of a batch, the same for all rows.

    Attributes:
        template: template of the prompts, with columns in it.
        defaults: request fields of rows that do not have them.
        seed: the base of the seeds of rows without one, see `row_seed`.
        sidecar: also write each image's record beside it.
        name: template of the file names, e.g. `{sku}.png`; the row's number if None.
        format: `png`, `jpg` or `webp`; if None, by the ending of `name`, else PNG.
        quality: 1 to 100 for JPEG and WebP, see `formats.encode_image`.
    """

    template: str | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    sidecar: bool = True
    name: str | None = None
    format: str | None = None
    quality: int | None = None

    @property
    def suffix(self) -> str:
        """The suffix of the image files. Raises RequestError for an unsupported format."""
        named = next((suffix for suffix in FORMATS if (self.name or "").casefold().endswith(suffix)), None)
        wanted = None if self.format is None else f".{self.format.removeprefix('.').lower()}"
        if wanted is not None and wanted not in FORMATS:
            known = ", ".join(suffix[1:] for suffix in FORMATS)
            raise RequestError(f"format: expected one of {known}, got {self.format!r}")
        if wanted is not None and named is not None and FORMATS[wanted] != FORMATS[named]:
            raise RequestError(f"format: expected that of the name {self.name!r}, got {self.format!r}; leave one out")
        return named or wanted or ".png"


class Batch:
    """A table whose rows are drawn into a folder.

    A row that is done stays done while its content is unchanged, even if it moves in the table. It is drawn again if
    its images are missing or cut off, or if its input images have changed. A missing input does not invalidate the
    images that were drawn from it.

    Args:
        engine: the engine that draws the images.
        table: the rows.
        folder: the folder of the images, which is created.
        options: see `BatchOptions`.
        restart: draw all rows again.

    Attributes:
        rows: the table's rows with their numbers in the batch; rows that were added later may have numbers beyond the
            length of the table.
        notes: differences to the previous run in the folder, one sentence each.

    Raises:
        RequestError: a column or an option is invalid, two rows have one name, or the folder has another batch.
    """

    def __init__(
        self, engine: Engine, table: Table, folder: Path, options: BatchOptions, *, restart: bool = False
    ) -> None:
        self.table = table
        self.notes: list[str] = []
        self._engine = engine
        self._options = options
        self._suffix = options.suffix
        check_quality(self._suffix, options.quality)
        check_folder(folder)
        template = None if options.template is None else Template(options.template)
        name = None if options.name is None else Template(options.name, "name")
        self._reader = RowReader(table, template, options.defaults, options.seed, name)
        # Errors that every row would have are raised now, not once per row.
        resolve(GenerateRequest("a prompt", **_checkable_defaults(options.defaults)), engine.manifest)
        if name is not None:
            row_stems(table.rows, self._reader, name)
        folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(folder, self._header(), restart=restart)
        try:
            plan = plan_rows(table.rows, self._reader.content, self.journal.lines)
            self.rows, self._contents = plan.rows, plan.contents
            self._stems = {} if name is None else row_stems(plan.rows, self._reader, name)
            self._claim_names()
            self._done = self._find_done(plan.known)
        except BaseException:
            self.journal.__exit__()
            raise
        log.info("batch in %s: %d rows, %d of them done", folder, len(self.rows), len(self._done))
        extra = dict.fromkeys(column for content in self._contents.values() for column in content.extra)
        if extra:
            self.notes.append(f"no request fields, and kept in the journal: {', '.join(extra)}")
        if plan.removed:
            self.notes.append(
                f"{len(plan.removed)} rows of the journal are no longer in the table; their images stay: "
                f"{', '.join(self.journal.images[plan.removed[0]])}{', …' if len(plan.removed) > 1 else ''}"
            )

    @property
    def remaining(self) -> list[Row]:
        """The rows that are not done, including those that failed."""
        return [row for row in self.rows if row.number not in self._done]

    @property
    def errors(self) -> dict[int, str]:
        """The errors of the table's failed rows, by number."""
        return {number: error for number, error in self.journal.errors.items() if number in self._contents}

    def draw(
        self, row: Row, on_step: Callable[[StepInfo], None] | None = None
    ) -> tuple[GenerateResult, list[Path]] | str:
        """Draw one of `rows`, save its images, then add it to the journal.

        Returns:
            The result and the paths of its images, or the row's error.

        Raises:
            OSError: an image or the journal cannot be written, so that the batch cannot continue.
        """
        content = self._contents[row.number]
        more: dict[str, Any] = {"key": content.key, "extra": dict(content.extra)}
        drawn = False
        try:
            result = self._engine.run(self._reader.request(row), callback=on_step)
            drawn = True
            paths = [self.journal.folder / name for name in self._names(row, len(result.seeds))]
            sizes = [
                save_image(path, pixels, record, sidecar=self._options.sidecar, quality=self._options.quality)
                for path, pixels, record in zip(paths, result.images, result.records, strict=True)
            ]
        except Exception as error:  # an error of one row must not stop the others
            if drawn and isinstance(error, OSError):
                raise  # an error of the folder, and so of every row
            reason = f"{type(error).__name__}: {error}"
            reason = shown_text(reason, MAX_REASON)
            self._done.discard(row.number)
            self.journal.add(row.number, error=reason, line=row.line, **more)
            log.info("row %d failed: %s", row.number, type(error).__name__)  # the message may quote the prompt
            return reason
        request = result.records[0].request
        before = self.journal.lines.get(row.number, {}).get("pictures", [])
        self.journal.add(
            row.number,
            pictures=[path.name for path in paths],
            sizes=sizes,
            inputs={field: (request[field] or {}).get("sha256", "") for field in self._reader.inputs(row)},
            prompt=request["prompt"],
            seeds=list(result.seeds),
            timings=result.timings,
            **more,
        )
        for name in set(before) - {path.name for path in paths}:  # the row had more images, or other names
            old = self.journal.folder / Path(name).name
            old.unlink(missing_ok=True)
            sidecar_path(old).unlink(missing_ok=True)
        self._done.add(row.number)
        log.info("row %d done: %d images in %.2f s", row.number, len(paths), result.timings["total"])
        return result, paths

    def _header(self) -> dict[str, Any]:
        options = self._options
        engine = self._engine
        header: dict[str, Any] = {
            "template": options.template,
            "options": {name: _option_json(value) for name, value in options.defaults.items()},
            "seed": options.seed,
            "bundle": engine.bundle_id,
            "loras": [
                {name: value for name, value in lora.to_json().items() if name != "path"}
                for lora in engine.active_loras
            ],
            "backend": {"name": engine.backend, "options": engine.backend_options},
        }
        return header | {"name": options.name, "format": self._suffix[1:], "quality": options.quality}

    def _find_done(self, known: frozenset[int]) -> set[int]:
        """The numbers of the rows that are done; adds notes about rows that must be drawn again."""
        files = DoneRows(self.journal.folder)
        done: set[int] = set()
        broken, changed = [], []
        moved = []
        for row in self.rows:
            line = self.journal.lines.get(row.number)
            if row.number not in known or line is None or "error" in line:
                continue
            if not files.are_whole(line):
                broken.append(row.number)
            elif files.has_changed_inputs(line, self._reader.inputs(row)):
                changed.append(row.number)
            else:
                done.add(row.number)
                extra = dict(self._contents[row.number].extra)
                if extra != line["extra"]:
                    moved.append({**line, "extra": extra})
        if moved:
            self.journal.add_lines(moved)  # only other columns changed, such as a price: the image is still valid
        for numbers, why in ((broken, "images are gone or cut off"), (changed, "input images were changed")):
            if numbers:
                shown = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
                self.notes.append(f"{len(numbers)} rows are drawn again, because their {why}: {shown}")
        return done

    def _claim_names(self) -> None:
        """Record the file names of the batch in the journal. Raises RequestError if another file has one of them."""
        if not self._stems:
            return
        names = [name for row in self.rows if row.number in self._stems for name in self._names(row)]
        new = [name for name in names if name not in self.journal.claims]
        present = {path.name for path in self.journal.folder.iterdir()}
        taken = next((name for name in new if name in present), None)
        if taken is not None:
            raise RequestError(
                f"name: {self.journal.folder / taken} is there already, and not of this batch; choose another folder, "
                "or move it away"
            )
        if new:
            self.journal.add_lines([{"claims": new}])

    def _names(self, row: Row, count: int | None = None) -> list[str]:
        count = self._reader.count(row) if count is None else count
        stem = self._stems.get(row.number, f"{row.number:05d}")
        if count <= 1:
            return [f"{stem}{self._suffix}"]
        return [f"{stem}-{i:03d}{self._suffix}" for i in range(min(count, 1000))]


def _checkable_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that can be checked without a row, i.e. without its image."""
    return {name: value for name, value in defaults.items() if name not in BESIDE_IMAGE or defaults.get("image")}


def _option_json(value: Any) -> Any:
    """An option as JSON; a file is its path and its hash."""
    if isinstance(value, Path):
        return {"path": str(value), "sha256": hash_file(value).sha256}
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
