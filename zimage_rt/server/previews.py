"""Previews of the jobs of a worker: those that their share of the time allows, encoded beside the drawing."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ..request.types import StepInfo

log = logging.getLogger(__name__)

# Pixels of a preview's longer side: enough to see the image come, and a tenth of the bytes.
SIDE = 384
QUALITY = 80

# Sends a step of a job with its preview, a JPEG, or None.
SendStep = Callable[[StepInfo, "bytes | None"], None]


class Previews:
    """The previews of all jobs of a worker.

    Args:
        share: the most of a job's drawing time that its previews may take, 0 to 1; at 0 none is made, at 1 all are.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        # Seconds of one preview by its kind; None after the first, which also loads and captures what it needs.
        self.costs: dict[Hashable, float | None] = {}
        self.encoder = ThreadPoolExecutor(1, "zimage-preview")

    def of_job(self, every: int, kind: Hashable, send: SendStep) -> JobPreviews:
        """The previews of a job: one after `every` steps, none if 0.

        Args:
            every: steps.
            kind: jobs of one kind, such as a model and a size, have previews of one cost.
            send: called once per step, in the order of the steps.
        """
        return JobPreviews(self, every, kind, send)

    def stop(self) -> None:
        """End when all are encoded."""
        self.encoder.shutdown(wait=True)


class JobPreviews:
    """The previews of one job. Its methods are called by the thread that draws."""

    def __init__(self, previews: Previews, every: int, kind: Hashable, send: SendStep) -> None:
        self._previews, self._every, self._kind, self._send = previews, every, kind, send
        self._start, self._spent, self._steps = time.perf_counter(), 0.0, 0
        self._last: Future[None] | None = None

    def step(self, info: StepInfo) -> None:
        """Send a step, with a preview if one is due and there is time for it."""
        self._steps += 1
        if not self._every:
            self._send(info, None)
            return
        is_due = (info.step + 1) % self._every == 0 and info.step + 1 < info.num_steps
        pixels = self._decode(info) if is_due and self._has_time(info) else None
        self._last = self._previews.encoder.submit(self._encode, info, pixels)

    def flush(self) -> None:
        """Return when all steps are sent."""
        if self._last is not None:
            self._last.result()

    def _has_time(self, info: StepInfo) -> bool:
        share = self._previews.share
        if share in (0.0, 1.0):
            return bool(share)
        drawing = time.perf_counter() - self._start - self._spent
        whole = drawing / self._steps * max(self._steps, info.num_steps)
        cost = self._previews.costs.get(self._kind) or 0.0
        return self._spent + cost <= share * whole

    def _decode(self, info: StepInfo) -> np.ndarray:
        start = time.perf_counter()
        pixels = info.preview()[0]
        seconds = time.perf_counter() - start
        self._spent += seconds
        costs = self._previews.costs
        # The shortest: others waited for another job's work.
        costs[self._kind] = min(seconds, costs[self._kind] or seconds) if self._kind in costs else None
        return pixels

    def _encode(self, info: StepInfo, pixels: np.ndarray | None) -> None:
        try:
            self._send(info, None if pixels is None else encode_preview(pixels))
        except Exception:  # the image is worth more than its preview
            log.exception("a preview was not sent")


def encode_preview(pixels: np.ndarray) -> bytes:
    """uint8 `[height, width, 3]` as a small JPEG."""
    from PIL import Image

    step = -(-max(pixels.shape[:2]) // SIDE)
    encoded = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[::step, ::step])).save(encoded, "JPEG", quality=QUALITY)
    return encoded.getvalue()
