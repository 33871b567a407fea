"""How things are timed: CUDA events where there is a GPU, the wall clock where there is none; systems take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

# Runs something so many times and returns the milliseconds of each.
Run = Callable[[int], list[float]]


def event_times(function: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Milliseconds of each call on the device's own clock; calls are queued without waiting between them."""
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
    """Milliseconds of each call on the wall clock; `function` returns when its result is there."""
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
    """Run each in turn, `repeats` times a turn, so that clocks and heat are the same for all.

    A first turn is thrown away, and so is the first call of a longer turn: it may still belong to the run before it.
    """
    values: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(1)
    for _ in range(rounds):
        for name, run in runs.items():
            turn = run(repeats + 1) if repeats > 1 else run(1)
            values[name] += turn[-repeats:]
    return values
