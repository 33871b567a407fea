"""Judges in parallel processes: judging an image takes a fifth of a second, more than a GPU takes to draw it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from typing import Any

import numpy as np
from zimage_rt.benchmarks.quality.judge import Atlas, Judge

Answers = dict[str, list[bool]]
_judge: list[Judge] = []  # the judge of this process


def _start(data: Path) -> None:
    _judge.append(Judge(Atlas.load(data)))


def _score(image: np.ndarray, scene: Mapping[str, Any]) -> Answers:
    return _judge[0].score(image, scene)


class Judges:
    """Judges images in a pool of processes; answers keep the order of the images."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._waiting: list[AsyncResult[Answers]] = []

    def give(self, image: np.ndarray, scene: Mapping[str, Any]) -> None:
        """Submit an image, uint8 [height, width, 3]."""
        self._waiting.append(self._pool.apply_async(_score, (image, dict(scene))))

    def answers(self) -> list[Answers]:
        """Wait for all images; return their answers."""
        return [result.get() for result in self._waiting]


@contextmanager
def judges(data: Path, processes: int | None = None) -> Iterator[Judges]:
    """Context manager for a pool of judges, by default one per core."""
    count = processes or os.cpu_count() or 1
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    before = {name: os.environ.get(name) for name in single}
    os.environ.update(single)  # read when the processes start: a core per process
    try:
        pool = multiprocessing.get_context("spawn").Pool(count, _start, (data,))
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    with pool:
        yield Judges(pool)
