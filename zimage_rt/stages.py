"""Who is told how far a request or a load has come."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .backends.base import OnStep, ReadLatents

# (stage, done, total): called when a stage begins, with done 0, and at every part of it that is done.
OnStage = Callable[[str, int, int], object]


@dataclasses.dataclass(frozen=True)
class Stages:
    """Tells `on_stage`, where there is one."""

    on_stage: OnStage | None = None

    def tell(self, stage: str, done: int, total: int) -> None:
        """Say how far a stage has come. What `on_stage` raises ends the request."""
        if self.on_stage is not None:
            self.on_stage(stage, done, total)

    def with_steps(self, on_step: OnStep | None, images: int) -> OnStep | None:
        """`on_step` that also tells `denoise`, and behind the last step the beginning of `decode` where images follow.

        None where nobody wants to know.
        """
        if self.on_stage is None:
            return on_step

        def told(step: int, count: int, sigma: float, sigma_next: float, read: ReadLatents) -> bool:
            goes_on = on_step is None or on_step(step, count, sigma, sigma_next, read)
            self.tell("denoise", step + 1, count)
            if goes_on and step + 1 == count and images:
                self.tell("decode", 0, images)
            return goes_on

        return told


@contextmanager
def timed(timings: dict[str, float], stage: str, stages: Stages | None = None) -> Iterator[None]:
    """Add the seconds of a stage to `timings`, and tell its beginning and its end."""
    start = time.perf_counter()
    if stages is not None:
        stages.tell(stage, 0, 1)
    yield
    if stages is not None:
        stages.tell(stage, 1, 1)
    timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - start
