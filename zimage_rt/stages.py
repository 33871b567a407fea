"""Progress of requests and loads: the stages that a caller's function is called with."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .backends.base import OnStep, ReadLatents

# (stage, done, total): called at a stage's beginning, with done 0, and after each part of it.
OnStage = Callable[[str, int, int], object]


@dataclasses.dataclass(frozen=True)
class Stages:
    """Reports progress to `on_stage`, if there is one."""

    on_stage: OnStage | None = None

    def tell(self, stage: str, done: int, total: int) -> None:
        """Report the progress of a stage. Exceptions of `on_stage` end the request."""
        if self.on_stage is not None:
            self.on_stage(stage, done, total)

    def with_steps(self, on_step: OnStep | None, images: int) -> OnStep | None:
        """`on_step` that also reports `denoise`, and after the last step the beginning of `decode` if `images` > 0.

        None if neither `on_step` nor `on_stage` is given.
        """
        if self.on_stage is None:
            return on_step

        def report(step: int, count: int, sigma: float, sigma_next: float, read: ReadLatents) -> bool:
            keep_running = on_step is None or on_step(step, count, sigma, sigma_next, read)
            self.tell("denoise", step + 1, count)
            if keep_running and step + 1 == count and images:
                self.tell("decode", 0, images)
            return keep_running

        return report


@contextmanager
def timed(timings: dict[str, float], stage: str, stages: Stages | None = None) -> Iterator[None]:
    """Add a stage's seconds to `timings`, and report its beginning and its end."""
    start = time.perf_counter()
    if stages is not None:
        stages.tell(stage, 0, 1)
    yield
    if stages is not None:
        stages.tell(stage, 1, 1)
    timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - start
