"""Timers: CUDA events on a GPU, the wall clock on a CPU. Systems are interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

# Runs something a number of times and returns the milliseconds of each call.
Run = Callable[[int], list[float]]


def event_times(function: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Milliseconds of each call by CUDA events; calls are queued without synchronising between them."""
    if device == "cpu":
        return wall_times(function, repeats)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    return [marks[i].elapsed_time(marks[i + 1]) for i in range(repeats)]


def wall_times(function: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each call by the wall clock; `function` must be synchronous."""
    values = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        values.append(1e3 * (time.perf_counter() - start))
    return values


def timed(function: Callable[[], object], device: str) -> Run:
    """`event_times` of a function as a Run."""
    return lambda repeats: event_times(function, repeats, device)


def interleave(runs: Mapping[str, Run], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Interleaves runs, `repeats` calls per run and round, so that clocks and temperature are the same for all.

    A warm-up round is dropped. With several repeats, so is the first call of each burst, which the previous system's
    load may still affect.
    """
    values: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(1)
    for _ in range(rounds):
        for name, run in runs.items():
            burst = run(repeats + 1) if repeats > 1 else run(1)
            values[name] += burst[-repeats:]
    return values
