"""A contact sheet of one prompt and seed at several step counts and guidance scales, and after each step."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from . import checks, limits
from .atomic_write import atomic_write
from .engine import Engine
from .errors import RequestError
from .image.contact_sheet import MIN_CELL, Section, SheetImage, draw_sheet
from .request.codec import make_request
from .request.resolve import resolve
from .request.types import GenerateRequest, StepInfo
from .sampling.samplers import sampler_table

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T", int, float)

KEY = "zimage_rt_explain"
# More images than this on one sheet cannot be compared by eye.
MAX_IMAGES = 100
# Steps that a strip shows of a longer run, including the first and the last.
MAX_STRIP = 12
# The fields that have an effect with guidance only, at their defaults.
NO_GUIDANCE: dict[str, Any] = {
    name: GenerateRequest.__dataclass_fields__[name].default
    for name in ("negative_prompt", "cfg_truncation", "cfg_normalization", "dynamic_cfg")
}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A contact sheet.

    Attributes:
        image: the sheet.
        data: the sheet's content as JSON: the request's fields, the bundle, and `cells` with `guidance_scale`,
            `num_inference_steps`, `evaluations` and `seconds`, without the time of previews.
    """

    image: Image
    data: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write the sheet atomically as PNG, with `data` in its text `zimage_rt_explain`.

        Raises:
            RequestError: the name does not end in .png.
            OSError: the folder cannot be made or written.
        """
        from PIL.PngImagePlugin import PngInfo

        path = checks.path(path, "output")
        if path.suffix.lower() != ".png":
            raise RequestError(f"output: expected a name that ends in .png, got {path.name}")
        text = PngInfo()
        text.add_text(KEY, json.dumps(self.data, ensure_ascii=False))
        encoded = io.BytesIO()
        self.image.save(encoded, "PNG", pnginfo=text)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, encoded.getvalue())
        return path


@dataclasses.dataclass(frozen=True)
class Grid:
    """The images of a sheet: one per guidance scale (down) and number of steps (across).

    Attributes:
        scales, counts: the guidance scales and the numbers of steps.
        requests: by guidance scale and number of steps.
        evaluations: the transformer's runs of each request; a guided evaluation is a batch of two and counts once.
    """

    scales: Sequence[float]
    counts: Sequence[int]
    requests: Mapping[tuple[float, int], GenerateRequest]
    evaluations: Mapping[tuple[float, int], int]

    @property
    def last(self) -> GenerateRequest:
        """The request with the most steps at the largest scale."""
        return self.requests[self.scales[-1], self.counts[-1]]


def explain(
    engine: Engine,
    prompt: str,
    *,
    steps: Sequence[int] | None = None,
    guidance_scales: Sequence[float] = (0.0, 1.0, 2.0, 4.0),
    cell: int = 160,
    font: str | Path | None = None,
    times: bool = True,
    on_image: Callable[[int, int], None] | None = None,
    **fields: Any,
) -> Explanation:
    """Generate a prompt at every step count and guidance scale, and put the images on a sheet.

    Rows are guidance scales and columns step counts; below, a strip for each guidance scale shows the latents after
    each step of the longest run. All images go through the tiny VAE.

    Args:
        engine: the engine that generates the images.
        prompt: the prompt.
        steps: values of `num_inference_steps`; 1, 2, 4 and the bundle's own if None.
        guidance_scales: values of `guidance_scale`.
        cell: the longer side of an image on the sheet, in pixels.
        font: a TrueType file for the labels; if None, a system font that has their characters.
        times: also write under each image the seconds that it took; if False, the sheet is reproducible.
        on_image: called after each image with the number of images done and in all.
        **fields: the other fields of `GenerateRequest`, the same for all images; `seed` is 0 unless given.

    Raises:
        RequestError: a field is invalid, or there are too many images.
    """
    if not isinstance(engine, Engine):
        raise RequestError(f"engine: expected an Engine, got {checks.shown(engine)}")
    if not isinstance(prompt, str):
        raise RequestError(f"prompt: expected a string, got {checks.shown(prompt)}")
    checks.function(on_image, "on_image")
    times = checks.flag(times, "times")
    font = None if font is None else checks.path(font, "font")
    if isinstance(cell, bool) or not isinstance(cell, int) or not MIN_CELL <= cell <= 1024:
        raise RequestError(f"cell: expected {MIN_CELL} to 1024 pixels, got {checks.shown(cell)}")
    grid = _grid(engine, steps, guidance_scales, {"seed": 0, **fields, "prompt": prompt, "vae": "tiny"})
    # A first run, so that the first image's time does not include loading the VAE.
    engine.run(dataclasses.replace(grid.last, num_inference_steps=1))
    rows, strips, cells = _draw_grid(engine, grid, times, on_image)
    data = _settings(engine, grid.last)
    columns = [f"{count} step{'s' * (count > 1)}" for count in grid.counts]
    sections = [
        Section("Steps across, guidance down", columns, rows, cell),
        Section(f"What the latents hold after {_shown(grid.counts[-1])}", None, strips, cell, shrink=True),
    ]
    titles = [
        data["prompt"],
        *([f"negative: {data['negative_prompt']}"] if data["negative_prompt"] else []),
        "seed {seed}, {width}x{height}, {sampler}, {schedule}, tiny VAE; "
        "{bundle_name} {precision}, bundle {bundle_id}, {backend}".format(**data),
    ]
    return Explanation(draw_sheet(titles, sections, font), {**data, "cells": cells})


def _grid(engine: Engine, steps: Any, guidance_scales: Any, fields: dict[str, Any]) -> Grid:
    """The checked requests. Raises RequestError."""
    own = engine.manifest.pipeline.num_inference_steps
    counts = _values(steps if steps is not None else (1, 2, 4, own), "steps", _steps)
    scales = _values(guidance_scales, "guidance_scales", _scale)
    if not counts or not scales or len(counts) * len(scales) > MAX_IMAGES:
        raise RequestError(
            f"steps and guidance_scales: expected 1 to {MAX_IMAGES} images, got {len(counts)} x {len(scales)}",
            field="steps",
        )
    base = make_request(**fields)
    requests = {
        (scale, count): dataclasses.replace(
            base,
            num_inference_steps=count,
            guidance_scale=scale,
            # Rows without guidance are intended: no warning that a negative prompt has no effect there.
            **(NO_GUIDANCE if scale == 0 and any(scales) else {}),
        )
        for scale in scales
        for count in counts
    }
    return Grid(scales, counts, requests, {key: _evaluations(engine, request) for key, request in requests.items()})


def _draw_grid(
    engine: Engine, grid: Grid, times: bool, on_image: Callable[[int, int], None] | None
) -> tuple[list[tuple[str, list[SheetImage]]], list[tuple[str, list[SheetImage]]], list[dict[str, Any]]]:
    """The rows of images, the strips of the longest runs, and the figures of every image."""
    rows: list[tuple[str, list[SheetImage]]] = []
    strips: list[tuple[str, list[SheetImage]]] = []
    cells: list[dict[str, Any]] = []
    for scale in grid.scales:
        row: list[SheetImage] = []
        for count in grid.counts:
            strip: list[SheetImage] | None = [] if count == grid.counts[-1] else None
            pixels, seconds = _draw(engine, grid.requests[scale, count], strip)
            made = grid.evaluations[scale, count]
            row.append(SheetImage(pixels, _counted(made) + (f", {seconds:.2f} s" if times else "")))
            cells.append(
                {"guidance_scale": scale, "num_inference_steps": count, "evaluations": made, "seconds": seconds}
            )
            if strip is not None:
                strips.append((f"guidance {scale:g}", strip))
            if on_image is not None:
                on_image(len(cells), len(grid.requests))
        rows.append((f"guidance {scale:g}" + (" (none)" if scale == 0 else ""), row))
    return rows, strips, cells


def _steps(value: Any) -> int:
    return checks.integer(value, "num_inference_steps", 1, limits.MAX_STEPS)


def _scale(value: Any) -> float:
    return checks.number(value, "guidance_scale", limits.MAX_GUIDANCE)


def _values(values: Any, name: str, check: Callable[[Any], T]) -> list[T]:
    """The checked values, sorted, without duplicates."""
    given = checks.items(values, name, f"1 to {MAX_IMAGES} numbers", MAX_IMAGES)
    return sorted({check(value) for value in given})


def _settings(engine: Engine, request: GenerateRequest) -> dict[str, Any]:
    """The settings that all images of a sheet have in common."""
    resolved = resolve(request, engine.manifest)
    return {
        "prompt": resolved.prompts[0],
        "negative_prompt": resolved.negative_prompts[0],
        "seed": resolved.seeds[0],
        "height": resolved.height,
        "width": resolved.width,
        "sampler": resolved.sampler,
        "schedule": request.schedule,
        "bundle_id": engine.bundle_id,
        "bundle_name": engine.manifest.name,
        "precision": engine.manifest.precision,
        "backend": engine.backend,
    }


def _shown(steps: int) -> str:
    return f"each step of {steps}" if steps <= MAX_STRIP else f"{MAX_STRIP} of {steps} steps"


def _counted(evaluations: int) -> str:
    return f"{evaluations} evaluation{'s' * (evaluations > 1)}"


def _evaluations(engine: Engine, request: GenerateRequest) -> int:
    """The transformer's runs of a request; a guided evaluation is a batch of two and counts once.

    Raises RequestError.
    """
    resolved = resolve(request, engine.manifest)
    made = len(sampler_table(resolved.sampler, resolved.sigmas, resolved.shift))
    if resolved.second_pass is not None:
        made += len(sampler_table(resolved.sampler, resolved.second_pass.sigmas, resolved.shift))
    return made


def _draw(engine: Engine, request: GenerateRequest, strip: list[SheetImage] | None) -> tuple[np.ndarray, float]:
    """The image, uint8 `[height, width, 3]`, and its seconds without previews, which are appended to `strip`."""
    spent = 0.0

    def on_step(info: StepInfo) -> None:
        nonlocal spent
        if strip is None or not _is_shown(info.step, info.num_steps):
            return
        start = time.perf_counter()
        preview = info.preview()[0]
        spent += time.perf_counter() - start
        strip.append(SheetImage(preview, f"{info.step + 1}: sigma {info.sigma_next:.2f}"))

    result = engine.run(request, callback=on_step)
    return result.images[0], result.timings["total"] - spent


def _is_shown(step: int, num_steps: int) -> bool:
    """Whether a strip shows a step: all of a short run, evenly spaced ones of a long run."""
    if num_steps <= MAX_STRIP:
        return True
    return step in np.linspace(0, num_steps - 1, MAX_STRIP).round().astype(int)
