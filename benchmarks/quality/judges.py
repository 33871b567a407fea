"""Judges in processes of their own: a picture takes one of them a fifth of a second, and a GPU draws faster."""

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
_judge: list[Judge] = []  # this process's own


def _start(data: Path) -> None:
    _judge.append(Judge(Atlas.load(data)))


def _score(image: np.ndarray, scene: Mapping[str, Any]) -> Answers:
    return _judge[0].score(image, scene)


class Judges:
    """Takes pictures, and gives the answers in the order in which they came."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._waiting: list[AsyncResult[Answers]] = []

    def give(self, image: np.ndarray, scene: Mapping[str, Any]) -> None:
        """Have a picture judged, uint8 [height, width, 3]."""
        self._waiting.append(self._pool.apply_async(_score, (image, dict(scene))))

    def answers(self) -> list[Answers]:
        """Wait for all of them."""
        return [result.get() for result in self._waiting]


@contextmanager
def judges(data: Path, processes: int | None = None) -> Iterator[Judges]:
    """As many judges as there are cores, or so many; they end with the block."""
    count = processes or os.cpu_count() or 1
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    before = {name: os.environ.get(name) for name in single}
    os.environ.update(single)  # read as the processes start: each has a core
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
